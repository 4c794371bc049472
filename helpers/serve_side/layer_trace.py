"""What vLLM's chosen kernel makes of one layer, in a server that is up.

A kernel may keep its weights packed in an order of its own, so they are not read but asked for:
the product with the identity matrix has the rebuilt weights for its rows, and the product with
other inputs shows the arithmetic. vLLM lets a class of ours extend its worker
(`--worker-extension-cls`) and, with its routes for development, calls a method of it by HTTP. Like
all routes they ask for the key. Files bring the question there and the answer back.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from helpers import WorkbookError, serving
from helpers.checkpoint import Checkpoint

FLAGS = ["--worker-extension-cls", "helpers.serve_side.layer_trace.Layers"]
ENVIRONMENT = {"VLLM_SERVER_DEV_MODE": "1"}

ASKED, ANSWER = "asked.safetensors", "answer.safetensors"
ROWS = 1024  # of the input multiplied at once


@dataclass(frozen=True)
class Received:
    """`kernel`: its class; `scale`: the scales as it holds them, float32, in its own order and
    times a power of two of its own; `product`: what it makes of the input, [rows, out], in the 16
    bits that the server computes in."""

    kernel: str
    scale: object
    product: object


def ask(server: serving.VllmServer, module: str, x=None) -> Received:
    """What the kernel in a running server holds for `module`, and makes of `x`.

    The server has been started with `FLAGS` and `ENVIRONMENT`. `x`: a bfloat16 tensor [rows, in],
    or the identity matrix where none is given. Where GPUs share the model, the module is one whose
    inputs they divide: o_proj or down_proj. Raises `WorkbookError` when the checkpoint has no
    such module, or vLLM knows it by another name.
    """
    from safetensors.torch import save_file

    _require(server.checkpoint, module)
    with tempfile.TemporaryDirectory() as folder:
        if x is not None:
            save_file({"x": x}, Path(folder) / ASKED)
        server.post("/collective_rpc", {"method": "ask_layer", "args": [module, folder]})
        return _answer(Path(folder))


def _answer(folder: Path) -> Received:
    """What the workers have left there: of GPUs that share a layer by its inputs, the sum."""
    from safetensors import safe_open

    parts = []
    for file in sorted(folder.glob(f"*{ANSWER}")):
        with safe_open(file, "pt") as part:
            parts.append(Received(part.metadata()["kernel"], part.get_tensor("scale"),
                                  part.get_tensor("product")))
    first = parts[0].product
    return Received(parts[0].kernel, parts[0].scale,
                    sum(part.product.float() for part in parts).to(first.dtype))


def received(fp8: Checkpoint, module: str, flags: list[str], x=None) -> Received:
    """As `ask`, of a server that is started for this one question, with `flags`."""
    _require(fp8, module)
    with serving.VllmServer(fp8, [*flags, *FLAGS], env=ENVIRONMENT) as server:
        return ask(server, module, x)


def _require(fp8: Checkpoint, module: str) -> None:
    if f"{module}.weight_scale" not in fp8.by_name:
        raise WorkbookError(f"{fp8.name} has no FP8 module {module}.",
                            "Names are those of the checkpoint's header.",
                            "scales.modules(path) lists the FP8 modules there are.")


class Layers:
    """What vLLM's worker gains, in the serving environment."""

    def ask_layer(self, module: str, folder: str) -> None:
        """Multiply the input in `folder` by one layer of vLLM's model; the answer goes there."""
        import torch
        from safetensors.torch import load_file, save_file

        layer = self.get_model().get_submodule(module)
        kernel = next(type(part).__name__ for part in vars(layer.scheme).values()
                      if type(part).__name__.endswith("Kernel"))
        asked = Path(folder) / ASKED
        x = (load_file(asked)["x"] if asked.exists()
             else torch.eye(layer.input_size))
        x = x.to(self.model_config.dtype)  # float16 on Turing, which has no bfloat16
        x = x.chunk(layer.input_size // layer.input_size_per_partition, dim=1)[layer.tp_rank]
        with torch.inference_mode():
            rows = [layer.scheme.apply_weights(layer, some.to(layer.weight.device)).cpu()
                    for some in x.split(ROWS)]
        save_file({"product": torch.cat(rows), "scale": layer.weight_scale.float().flatten().cpu()},
                  Path(folder) / f"{layer.tp_rank}-{ANSWER}", {"kernel": kernel})
