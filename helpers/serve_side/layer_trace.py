"""What vLLM's chosen kernel makes of one layer, once the checkpoint has been loaded for serving.

A kernel may keep its weights packed in an order of its own, so they are not read but asked for:
the product with the identity matrix has the rebuilt weights for its rows, and the product with
other inputs shows the arithmetic. The notebook's process starts the second half of this file in
`.venv-serve`; files bring the question there and the answer back.
"""

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from helpers import WorkbookError, server_log, serving, workspace
from helpers.checkpoint import Checkpoint

ASKED = "asked.safetensors"  # the input, beside the answer
ROWS = 1024  # of the input multiplied at once


@dataclass(frozen=True)
class Received:
    """`kernel`: its class; `scale`: the scales as it holds them, float32, in its own order;
    `product`: what it makes of the input, bfloat16 [rows, out]."""

    kernel: str
    scale: object
    product: object


def received(fp8: Checkpoint, module: str, flags: list[str], x=None) -> Received:
    """What the kernel that vLLM chooses for `module` holds after loading the checkpoint `fp8`.

    `flags`: as `serving.VllmServer` gets them; `x`: what it is to multiply, a bfloat16 tensor
    [rows, in], or the identity matrix where none is given. vLLM is started for this, with no
    server, and is gone afterwards. Raises `WorkbookError` when the checkpoint has no such module,
    or vLLM cannot load it, or knows the module by another name.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    if f"{module}.weight_scale" not in fp8.by_name:
        raise WorkbookError(f"{fp8.name} has no FP8 module {module}.",
                            "Names are those of the checkpoint's header.",
                            "scales.modules(path) lists the FP8 modules there are.")
    # In one process, so that the model can be reached; and the identity's rows make no graphs.
    env = serving.environment() | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "received.safetensors"
        if x is not None:
            save_file({"x": x}, Path(folder) / ASKED)
        ran = subprocess.run(
            [serving.serve_python(), "-m", "helpers.serve_side.layer_trace", file, module,
             "--model", fp8.path, "--enforce-eager", *flags],
            cwd=workspace.repo(), env=env, capture_output=True, text=True)
        if ran.returncode:
            meaning, remedy = server_log.explain(ran.stdout + ran.stderr, ran.returncode)
            raise WorkbookError(f"vLLM could not show {module} of {fp8.name}.", meaning,
                                remedy)
        with safe_open(file, "pt") as answer:
            return Received(answer.metadata()["kernel"], answer.get_tensor("scale"),
                            answer.get_tensor("product"))


# In the serving environment.


def _ask(model, module: str, file: str) -> None:
    """Multiply the input by one layer of vLLM's model; write what comes out to `file`."""
    import torch
    from safetensors.torch import load_file, save_file

    layer = model.get_submodule(module)
    kernel = next(type(part).__name__ for part in vars(layer.scheme).values()
                  if type(part).__name__.endswith("Kernel"))
    asked = Path(file).parent / ASKED
    if asked.exists():
        x = load_file(asked)["x"]
    else:
        x = torch.eye(layer.input_size_per_partition, dtype=torch.bfloat16)
    with torch.inference_mode():
        rows = [layer.scheme.apply_weights(layer, some.to(layer.weight.device)).cpu()
                for some in x.split(ROWS)]
    save_file({"product": torch.cat(rows), "scale": layer.weight_scale.float().flatten().cpu()},
              file, {"kernel": kernel})


def _main(file: str, module: str, *flags: str) -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.v1.engine.llm_engine import LLMEngine

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    engine = LLMEngine.from_engine_args(EngineArgs.from_cli_args(parser.parse_args(flags)))
    engine.apply_model(lambda model: _ask(model, module, file))


if __name__ == "__main__":
    _main(*sys.argv[1:])
