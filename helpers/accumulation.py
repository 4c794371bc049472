"""What an FP8 tensor core sums: Hopper's short accumulator, emulated bit for bit on a CPU.

A product of two E4M3 numbers is exact; the sum is not. Hopper aligns 32 products and the running
sum to the largest exponent among them, cuts each at 13 bits below it, adds, and cuts the sum at 13
bits again: "about 14 bits" in DeepSeek-V3 (https://arxiv.org/abs/2412.19437, sections 3.3.2 and
3.5.2), measured by Khattak and Mikaitis (https://arxiv.org/abs/2512.07004). "Fast" accumulation
keeps one such sum over all of K; "slow" moves it to a float32 register after every 128 products.

vLLM 0.32 accumulates fast on Hopper: every kernel in
csrc/.../w8a8/cutlass/c3x/scaled_mm_sm90_fp8_dispatch.cuh is of a schedule whose name ends in
FP8FastAccum.

The sums are mmaemu's, which were recorded on an H100 PCIe with cuBLASLt; that vLLM's CUTLASS
kernels, which issue the same instruction in the same order, give the same bits was tried nowhere.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from helpers import ablation, formats, workspace

if TYPE_CHECKING:
    from pandas import DataFrame
    from torch import Tensor
    from transformers import PreTrainedModel

MEASURED = workspace.data("measured", "accumulation.json")
LENGTHS = (256, 1024, 5120, 17920)  # 256: the bundled model's; the last two are Phi-4's
WAYS = ("exact", "float32", "slow", "fast")


def sums(codes: Tensor, others: Tensor, way: str) -> Tensor:
    """codes [m, K] times others [n, K]^T, both float8_e4m3fn, as one of `WAYS`: [m, n].

    "exact": float64, which holds every such sum exactly up to K of 2^17; "float32": this CPU's
    own W8A8, torch._scaled_mm; "slow" and "fast": an H100's, float32. K a multiple of 16.
    """
    import torch

    if way == "exact":
        return codes.double() @ others.double().T
    if way == "float32":
        one = torch.tensor(1.0)
        return torch._scaled_mm(codes, others.T, one, one, out_dtype=torch.float32)
    import mmaemu

    return mmaemu.accumulate(codes, others, use_fast_accum=way == "fast", splitk=1)


def codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """float8_e4m3fn codes and float32 scales [rows, 1] of x [rows, K], a scale a row."""
    import torch

    x = x.float()
    scale = ablation.amax(x, "row").clamp_min(ablation.TINY) / ablation.LARGEST["e4m3"]
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale


def errors(lengths: tuple[int, ...] = LENGTHS, rows: int = 64, seeds: int = 3,
           repeat: int = 1) -> DataFrame:
    """Relative error of the sum alone, and of quantization, on normal random x and w [rows, K].

    A DataFrame, index K. "fast", "slow", "float32": the sum of the codes' products against the
    exact sum of the same codes. "quantization": the exact sum of the scaled codes against the
    product before rounding. Each is |error| / |exact| over all rows x rows outputs (Frobenius),
    the mean over seeds; "fast, seeds' max / min" is how far those lie apart. `repeat`: as
    in `emulated`, each row so many times as long.
    """
    import pandas as pd
    import torch

    table = {}
    for length in lengths:
        found = []
        for seed in range(seeds):
            random = torch.Generator().manual_seed(seed)
            x, w = (torch.randn(rows, length, generator=random) for _ in "xw")
            (x8, sx), (w8, sw) = codes(x.repeat(1, repeat)), codes(w.repeat(1, repeat))
            exact, whole = sums(x8, w8, "exact"), repeat * (x.double() @ w.double().T)
            found.append({way: _relative(sums(x8, w8, way), exact) for way in WAYS[1:]} | {
                "quantization": _relative(exact * sx * sw.T, whole)})
        each = pd.DataFrame(found)
        table[length] = dict(each.mean()) | {
            "fast, seeds' max / min": each["fast"].max() / each["fast"].min()}
    return pd.DataFrame(table).T.rename_axis("K")


def _relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@contextlib.contextmanager
def emulated(model: PreTrainedModel, way: str, repeat: int = 1) -> Iterator[None]:
    """Within the block, the Linears that FP8_DYNAMIC quantizes compute W8A8 with one of `WAYS`.

    Weights as the checkpoint stores them (E4M3 codes, bf16 scale a channel), inputs rounded per
    token; y = s_x * s_w * sum. `repeat`: every product stands so many times in a row of its own
    length, and the sum is divided by as much: the same value, summed over a K as long as Phi-4's.
    """
    import torch

    def hook_for(weight):
        scale = (ablation.amax(weight, "row").float() / ablation.LARGEST["e4m3"]).bfloat16()
        w8 = (weight.bfloat16() / scale).float().clamp(-448, 448).to(torch.float8_e4m3fn)
        w8 = w8.repeat(1, repeat)

        def hook(_module, args, _out):
            x8, sx = codes(args[0].flatten(0, -2))
            total = sums(x8.repeat(1, repeat), w8, way) / repeat
            return (total * sx * scale.float().T).to(args[0].dtype).view(
                *args[0].shape[:-1], len(w8))

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(
        hook_for(model.get_submodule(name).weight.detach())) for name in ablation.targets(model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def arms(model: PreTrainedModel, ways: tuple[str, ...] = ("exact", "slow", "fast"),
         repeat: int = 1) -> dict[str, Callable]:
    """W8A8 with several ways of summing, for `formats.measure`; `repeat` as in `emulated`."""
    titles = {"exact": "exact sums", "slow": "H100, slow", "fast": "H100, fast"}
    return {titles[way]: lambda way=way: emulated(model, way, repeat if way != "exact" else 1)
            for way in ways}


def measured(part: str) -> formats.Losses:
    """The kept figures of `arms` on the bundled model.

    `part`: "its own K", or "repeated", where `repeat` makes every sum 20 times as long.
    """
    return formats.Losses(**json.loads(MEASURED.read_text())[part])
