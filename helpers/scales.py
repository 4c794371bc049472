"""The scales of an FP8 checkpoint, and the error that comes with them, module by module.

One tensor or one slice of it is read at a time, so that a 14.7B checkpoint needs no more memory
than a small one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from helpers import WorkbookError, checkpoint
from helpers.checkpoint import Checkpoint
from helpers.fp8 import FLOAT16_READING, upcast

if TYPE_CHECKING:
    from pandas import DataFrame
    from torch import Tensor

SLICE = 2**19  # weights worked on at once: 2 MB in float32 stay in the processor's cache
TINY = 1e-12  # what the error of a channel of zeros, which is 0, is divided by
MAP_ROWS = 64  # a cell of the SQNR map is taken from so many output channels
RUN_ORDER = ("qkv_proj", "q_proj", "k_proj", "v_proj", "o_proj",
             "gate_up_proj", "gate_proj", "up_proj", "down_proj")  # of a decoder layer's modules


def modules(fp8: Checkpoint) -> list[tuple[int, str, str]]:
    """(layer, short name, full name) of every FP8 module of the checkpoint, in its order.

    Raises `WorkbookError` when the checkpoint is incomplete or holds no FP8 weight.
    """
    found = []
    for tensor in fp8.tensors:
        match = re.fullmatch(r"(.*\.layers\.(\d+)\..*?([^.]+))\.weight", tensor.name)
        if match and tensor.dtype == "F8_E4M3":
            found.append((int(match[2]), match[3], match[1]))
    if not found:
        raise WorkbookError(f"{fp8.name} holds no FP8 weight.",
                            "Its Linear layers are stored in another type.",
                            "Name a checkpoint that FP8_DYNAMIC made; notebook 02 makes one.")
    return found


def of(fp8: Checkpoint, module: str) -> Tensor:
    """The scales of a module's output channels: float32 [out].

    Raises `WorkbookError` when there is no such module, it is not FP8, it has one scale for the
    tensor, or a scale is not a positive number.
    """
    import torch

    weight, scale = (fp8.by_name.get(f"{module}.{part}") for part in ("weight", "weight_scale"))
    if weight is None:
        raise WorkbookError(f"There is no module {module} in {fp8.name}.",
                            "Names are those of the checkpoint's header.",
                            "scales.modules(fp8) lists the FP8 modules there are.")
    if weight.dtype != "F8_E4M3" or scale is None:
        raise WorkbookError(f"{module} of {fp8.name} is not FP8: its weight is {weight.dtype}"
                            f"{'' if scale else ' without a scale'}.",
                            "There are no scales to look at.",
                            "Choose a module that FP8_DYNAMIC quantized.")
    if scale.shape != (weight.shape[0], 1):
        raise WorkbookError(f"{module} has scales of shape {list(scale.shape)}, and "
                            f"{weight.shape[0]} output channels.",
                            "It was quantized per tensor or in groups, not per channel.",
                            "Choose a checkpoint that FP8_DYNAMIC made.")
    values = checkpoint.read_tensor(fp8, scale.name).float().flatten()
    bad = ~(torch.isfinite(values) & (values > 0))
    if bad.any():
        first = int(bad.nonzero()[0])
        raise WorkbookError(f"{int(bad.sum())} of {len(values)} scales of {module} are no positive "
                            f"number; the first is {values[first]:g}, of channel {first}.",
                            "Its weights cannot be rebuilt.", "Make the checkpoint again.")
    return values


def rows(model: Checkpoint, name: str, start: int, stop: int) -> Tensor:
    """Rows start to stop of a tensor, float32 [stop - start, in]; no other row is read."""
    with model.shard_of(name) as shard:
        return shard.get_slice(name)[start:stop].float()


def require_one_model(base: Checkpoint, fp8: Checkpoint, name: str) -> None:
    """Raise `WorkbookError` if a tensor has one shape in the base and another in the FP8 model."""
    shapes = [model.by_name[name].shape for model in (base, fp8) if name in model.by_name]
    if len(set(shapes)) > 1:
        raise WorkbookError(
            f"{name} is {list(shapes[0])} in {base.name} and {list(shapes[1])} in {fp8.name}.",
            "The two checkpoints are not of one model.",
            "Name the base that the FP8 checkpoint was made from.")


def channel_error(base: Checkpoint, fp8: Checkpoint, module: str,
                  channels: int | None = None) -> tuple[Tensor, Tensor]:
    """The sums of squares of signal and of error by output channel: two float32 [channels].

    The signal is the base's weight, the error is code times scale less it. `channels` limits it to
    the first so many; None takes all. Raises `WorkbookError` when the two checkpoints are not of
    one model, or an error is not a number.
    """
    import torch

    scale = of(fp8, module)[:channels]
    name = f"{module}.weight"
    require_one_model(base, fp8, name)
    signal, noise = torch.empty_like(scale), torch.empty_like(scale)
    with base.shard_of(name) as before, fp8.shard_of(name) as after:
        original, codes = before.get_slice(name), after.get_slice(name)
        step = max(1, SLICE // codes.get_shape()[1])
        for start in range(0, len(scale), step):
            part = slice(start, min(start + step, len(scale)))
            weight = original[part].float()
            error = torch.addcmul(weight, upcast(codes[part]), scale[part, None],
                                  value=-FLOAT16_READING)
            signal[part] = torch.linalg.vecdot(weight, weight)
            noise[part] = torch.linalg.vecdot(error, error)
    bad = ~torch.isfinite(noise)
    if bad.any():
        raise WorkbookError(
            f"The error of {int(bad.sum())} of {len(bad)} channels of {module} is not a number; "
            f"the first is channel {int(bad.nonzero()[0])}.",
            f"A weight of {base.name} or a code of {fp8.name} is NaN or infinite.",
            "Fetch the base again, and make the FP8 checkpoint from it.")
    return signal, noise


def relative_error(base: Checkpoint, fp8: Checkpoint, module: str) -> Tensor:
    """Norm of the error over norm of the weights, by output channel: float32 tensor [out]."""
    signal, noise = channel_error(base, fp8, module)
    return (noise / signal.clamp_min(TINY)).sqrt()


def spread_map(fp8: Checkpoint) -> DataFrame:
    """Largest over smallest channel scale: a DataFrame, index layer, columns module.

    Modules stand in the order in which a layer runs them.
    """
    def spread(module):
        values = of(fp8, module)
        return float(values.max() / values.min())

    return _map(fp8, spread)


def sqnr_map(base: Checkpoint, fp8: Checkpoint) -> DataFrame:
    """SQNR in dB of the first `MAP_ROWS` channels: a DataFrame, laid out as `spread_map`'s."""
    import torch

    def sqnr(module):
        signal, noise = channel_error(base, fp8, module, MAP_ROWS)
        return float(10 * torch.log10(signal.sum() / noise.sum()))

    return _map(fp8, sqnr)


def _map(fp8: Checkpoint, value: Callable[[str], float]) -> DataFrame:
    import pandas as pd

    table = {}
    for layer, short, module in modules(fp8):
        table.setdefault(short, {})[layer] = value(module)
    return pd.DataFrame(table)[in_run_order(table)].rename_axis(index="layer", columns="module")


def in_run_order(names: Iterable[str]) -> list[str]:
    """Short names of modules, each once, as a layer runs them; those of other models come after."""
    names = list(dict.fromkeys(names))
    order = [name for name in RUN_ORDER if name in names]
    return order + [name for name in names if name not in order]


def largest(scale: Tensor, count: int = 5) -> str:
    """The channels with the largest scales, named, largest first."""
    top = scale.topk(min(count, len(scale)))
    return ", ".join(f"{int(channel)} ({value:.3g})" for value, channel in zip(*top, strict=True))
