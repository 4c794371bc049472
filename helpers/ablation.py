"""Rounding inside a real model: values to a format's grid, weights and inputs exchanged for others.

A value is rounded to the format's grid and scaled back, and everything is computed in the model's
own type (float32 gives the cleanest figures), so the only error is the format's. After each
measurement the model is put back as it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from helpers import fp8
from helpers.checkpoint import Checkpoint

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GROUP = 128  # of block scales: DeepSeek-V3, https://arxiv.org/abs/2412.19437, section 3.3
TINY = 1e-12  # the least amax, so that a row of zeros is not divided by zero


@dataclass(frozen=True)
class Format:
    """A grid ("e4m3", "e5m2", "int8"), and what shares a scale in weights and in activations.

    Scopes: "row" (an output channel, a token), "tensor", "block" (128x128), "group" (128 of a row).
    """

    name: str
    grid: str
    weights: str = "row"
    activations: str = "row"


LARGEST = {"e4m3": fp8.E4M3.max, "e5m2": fp8.E5M2.max, "int8": 127.0}


def amax(x: Tensor, scope: str) -> Tensor:
    """The largest magnitude of each scope of x [rows, columns], repeated to a shape that fits x."""
    import torch

    size = x.abs()
    if scope == "tensor":
        return size.max()
    if scope == "row":
        return size.amax(dim=1, keepdim=True)
    rows, columns = x.shape
    high = GROUP if scope == "block" else 1
    padded = torch.nn.functional.pad(size, (0, -columns % GROUP, 0, -rows % high))
    blocks = padded.unfold(0, high, high).unfold(1, GROUP, GROUP).amax(dim=(2, 3))
    return blocks.repeat_interleave(high, 0).repeat_interleave(GROUP, 1)[:rows, :columns]


def rounded(x: Tensor, grid: str, scope: str = "row",
            scale: Tensor | float | None = None) -> Tensor:
    """x [rows, columns] rounded to a grid and scaled back; same shape and type.

    The scale is amax / largest of each scope, in float32. With a static `scale` instead, values
    beyond the grid saturate.
    """
    import torch

    values, largest = x.float(), LARGEST[grid]
    if scale is None:
        scale = amax(values, scope).clamp_min(TINY) / largest
    values = (values / scale).clamp(-largest, largest)
    if grid == "int8":
        values = values.round()
    else:  # torch's cast, which is faster than helpers.fp8's; a test holds it to the same bits
        values = values.to(
            torch.float8_e4m3fn if grid == "e4m3" else torch.float8_e5m2).float()
    return (values * scale).to(x.dtype)


def sqnr(original: Tensor, changed: Tensor) -> float:
    """Signal over quantization noise in dB: 10 log10(sum x^2 / sum (x - q)^2); inf when equal."""
    import torch

    original, changed = original.double(), changed.double()
    return float(10 * torch.log10(original.square().sum() / (original - changed).square().sum()))


def load(source: Checkpoint) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A checkpoint's model in float32 on the CPU, for inference, and its tokenizer."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(source.path)


def targets(model: PreTrainedModel) -> list[str]:
    """The names of the Linear layers that FP8_DYNAMIC quantizes: all but lm_head."""
    import torch

    return [name for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and name != "lm_head"]


def encoded(tokenizer: PreTrainedTokenizerBase, rows: list[dict]) -> list[Tensor]:
    """Problems with their answers, as the task writes them: ids int64 [1, tokens] for each row."""
    return [tokenizer(f"Question: {row['question']}\nAnswer: {row['answer']}",
                      return_tensors="pt").input_ids for row in rows]


@contextlib.contextmanager
def threads(model: PreTrainedModel) -> Iterator[None]:
    """Compute with a small model on one thread, because a second one is woken too late to help.

    On two cores shared with other work, 100 answers of the bundled model took 2.9 s of processor
    time on one thread and 21 s on two, most of it spent waiting. A model is small below 64 MiB.
    """
    import torch

    before = torch.get_num_threads()
    if sum(tensor.nbytes for tensor in model.parameters()) < 64 * 2**20:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def applied(model: PreTrainedModel, modules: list[str], weight: Callable | None = None,
            activation: Callable | None = None) -> Iterator[None]:
    """Within the block, the named modules compute with other weights or other inputs.

    `weight(name, tensor)` and `activation(name, tensor)` return the tensor to take instead; weights
    are [out, in], activations [tokens, in].
    """
    import torch

    kept, hooks = {}, []

    def hook_for(name: str):
        def hook(module, args):
            return (activation(name, args[0].flatten(0, -2)).view(args[0].shape), *args[1:])
        return hook

    try:
        for name in modules:
            module = model.get_submodule(name)
            if weight is not None:
                kept[name] = module.weight.data
                module.weight.data = weight(name, kept[name]).to(kept[name].dtype)
            if activation is not None and isinstance(module, torch.nn.Linear):
                hooks.append(module.register_forward_pre_hook(hook_for(name)))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for name, tensor in reversed(kept.items()):  # tied weights share one Parameter
            model.get_submodule(name).weight.data = tensor


def observe(model: PreTrainedModel, ids: Tensor, keep: Callable[[Tensor], object]) -> dict:
    """`keep(x)` of the input x [tokens, in] of every quantized Linear, by the module's name.

    `ids`: int64 [1, tokens].
    """
    import torch

    found = {}

    def look(name, x):
        found[name] = keep(x.detach())
        return x

    with applied(model, targets(model), activation=look), torch.no_grad():
        model(ids)
    return found
