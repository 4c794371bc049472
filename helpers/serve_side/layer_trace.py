"""What vLLM's chosen kernel holds of one layer, once the checkpoint has been loaded for serving.

A kernel may keep its weights packed in an order of its own, so they are not read but asked for:
the product with the identity matrix has the rebuilt weights for its rows. The notebook's process
starts the second half of this file in `.venv-serve`; a file brings the answer back.
"""

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from helpers import WorkbookError, server_log, serving, workspace
from helpers.checkpoint import Checkpoint

ROWS = 1024  # of the identity matrix multiplied at once


@dataclass(frozen=True)
class Received:
    """`kernel`: its class; `scale`: the scales as it holds them, float32, in its own order;
    `product`: what it makes of the identity matrix, bfloat16 [in, out]."""

    kernel: str
    scale: object
    product: object


def received(fp8: Checkpoint, module: str, flags: list[str]) -> Received:
    """What the kernel that vLLM chooses for `module` holds after loading the checkpoint `fp8`.

    `flags`: as `serving.VllmServer` gets them. vLLM is started for this, with no server, and is
    gone afterwards. Raises `WorkbookError` when the checkpoint has no such module, or vLLM cannot
    load it, or knows the module by another name.
    """
    from safetensors import safe_open

    if f"{module}.weight_scale" not in fp8.by_name:
        raise WorkbookError(f"{fp8.name} has no FP8 module {module}.",
                            "Names are those of the checkpoint's header.",
                            "scales.modules(path) lists the FP8 modules there are.")
    # In one process, so that the model can be reached; and the identity's rows make no graphs.
    env = serving.environment() | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "received.safetensors"
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
    """Multiply the identity matrix by one layer of vLLM's model; write what comes out to `file`."""
    import torch
    from safetensors.torch import save_file

    layer = model.get_submodule(module)
    kernel = next(type(part).__name__ for part in vars(layer.scheme).values()
                  if type(part).__name__.endswith("Kernel"))
    size = layer.input_size_per_partition
    with torch.inference_mode():
        rows = []
        for start in range(0, size, ROWS):
            x = torch.zeros(min(ROWS, size - start), size, dtype=torch.bfloat16,
                            device=layer.weight.device)
            x[:, start:].fill_diagonal_(1)
            rows.append(layer.scheme.apply_weights(layer, x).cpu())
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
