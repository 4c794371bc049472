"""The arithmetic of an FP8 Linear on a CPU: tensors in, tensors out, no class of vLLM's."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from helpers.fp8 import FLOAT16_READING, upcast

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

# The rows and columns of the packed weight come in tiles of 32, and activations are bfloat16:
# vLLM's op aborts the process on anything else. 128 is its fixed block of K for the
# block scales, which are all one here.
_TILE = 32
_SCALE_BLOCK_K = 128

# oneDNN compiles a product for each number of rows. vLLM keeps so many of them for a bf16 layer,
# and so do we.
_ONEDNN_PRIMITIVES = 32

# Weights upcast at a time: 4 MB of float32, which stays in the cache between the upcast and the
# product. Measured on a Zen 4 with 32 MB of L3, 5120 x 5120, one row: 5.1 ms; 0.25 and 4 times as
# many weights: 9.8 and 18 ms.
_UPCAST_WEIGHTS = 2**20


@functools.cache
def has_packed_gemm() -> bool:
    """Whether vLLM's W8A16 GEMM is in the library that it has loaded, and this CPU can run it.

    vLLM ships three builds, for AVX2, AVX512 and AVX512-BF16; only the last has the op. More than
    four rows are multiplied by oneDNN, which can be kept from bf16 (`cpu.lacking`): the op
    then ends the process, so it cannot be asked by trying.
    """
    import torch
    import vllm._custom_ops  # noqa: F401  loads the build that fits this CPU

    from helpers import cpu

    return hasattr(torch.ops._C, "fp8_scaled_mm_cpu") and not cpu.lacking(cpu.read()[1])


def can_pack(rows: int, columns: int, dtype: torch.dtype) -> bool:
    """Whether vLLM's W8A16 GEMM is here and takes a [rows, columns] weight and such activations."""
    import torch

    return (has_packed_gemm() and dtype == torch.bfloat16 and rows % _TILE == 0
            and columns % _TILE == 0)


def packs_exactly(weight: torch.Tensor) -> bool:
    """Whether vLLM's W8A16 GEMM reads this [N, K] weight as it is, to bf16's own precision.

    The op of vLLM 0.32 takes subnormal codes for normal numbers: m * 2^-9, zero included, is read
    as 2^-7 + m * 2^-10. Of weights scaled to 448 about one in ten thousand is as small, and nothing
    shows; where a row's sum of errors may reach 2^-9 of its sum of magnitudes (a pruned layer's
    does), the weight must not be packed.
    """
    step = max(1, _UPCAST_WEIGHTS // weight.shape[1])
    for rows in weight.split(step):
        magnitude = upcast(rows).abs()
        wrong = (magnitude < 2.0**-6 / FLOAT16_READING).sum(1) * 2.0**-7
        if bool((wrong > magnitude.sum(1) * (FLOAT16_READING * 2.0**-9)).any()):
            return False
    return True


def pack(weight: torch.Tensor) -> torch.Tensor:
    """The [N, K] float8_e4m3fn weight in the order vLLM's W8A16 GEMM reads it; once, at loading."""
    import torch

    return torch.ops._C.convert_weight_packed(weight)


def packed_product(x: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """x [M, K] times packed codes [N, K], no scale: [M, N] in x's dtype, summed in float32.

    For every M, though it is slow for many. Its speed over that of oneDNN's bf16 product (above 1:
    faster), for 5120 x 17920 and two threads:

    | M                                            | 1   | 4   | 8    | 16   | 64   | 128  | 512  |
    |----------------------------------------------|-----|-----|------|------|------|------|------|
    | Zen 5, AVX512-BF16, medians of 7 in turn     | 1.6 | 2.0 | 0.44 | 0.27 | 0.20 | 0.18 | 0.18 |
    | Intel with AMX                               | 2.7 | 1.4 | 1.4  | 1.2  | 0.84 |      | 0.60 |
    | Zen 5, blocks of 256 rows unpacked by shifts | 0.2 | 0.3 | 0.40 | 0.36 | 0.59 | 0.66 | 0.79 |

    The last row is what was tried instead: sign, exponent and mantissa moved into bf16's places
    (the value times 2^-120), a block at a time, and oneDNN's product of that. It reaches 0.9
    nowhere, and needs the codes in the file's order beside the packed ones, together as many bytes
    as bf16's weights. torch's own cast of a block is slower still (0.39 at 512). So it was left:
    for arithmetic on a CPU there is INT8 W8A8.
    """
    import torch

    rows, columns = packed.shape[0], x.shape[1]
    ones = _ones(-(-columns // _SCALE_BLOCK_K))
    return torch.ops._C.fp8_scaled_mm_cpu(
        x, packed, ones, [rows, _SCALE_BLOCK_K], None, x.dtype, True)


@functools.cache
def _ones(blocks: int) -> torch.Tensor:
    import torch

    return torch.ones(1, blocks)


def unpacked_product(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function: x bfloat16 [M, K] times the [N, K] float8_e4m3fn codes, no scale, in bfloat16.

    Every code is exact in bf16. oneDNN keeps a copy in an order of its own; on a CPU without
    AVX512 it has no bf16 product and says so, and torch's is taken, as vLLM does for bf16 layers.
    """
    import torch
    from vllm import _custom_ops as ops

    codes = weight.to(torch.bfloat16)
    try:
        handler = ops.create_onednn_mm(codes.t(), _ONEDNN_PRIMITIVES)
    except RuntimeError:
        return lambda x: torch.nn.functional.linear(x, codes)
    return lambda x: ops.onednn_mm(handler, x, None)


def upcast_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [M, K], any float dtype, times [N, K] float8_e4m3fn codes: float32 [M, N], no scale.

    Both operands are exact in float32; for FP8-valued x, so is each product.
    """
    import torch

    x = x.to(torch.float32) * FLOAT16_READING
    out = torch.empty(x.shape[0], weight.shape[0])
    step = max(1, _UPCAST_WEIGHTS // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        torch.mm(x, upcast(weight[rows]).t(), out=out[:, rows])
    return out


def narrowed(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The float32 scales in `dtype` where that loses nothing, as of LLM Compressor's bf16 scales.

    torch multiplies two bf16 tensors in float32 and rounds once, as it does bf16 by float32, and
    faster: [512, 35840] takes 3.3 ms of one core and not 74 ms, 1 to 8 rows two thirds to a half
    (medians of 21 in turn, Zen 5).
    """
    narrow = scale.to(dtype)
    return narrow if bool((narrow == scale).all()) else scale


def scaled(product: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None,
           dtype: torch.dtype) -> torch.Tensor:
    """product * scale + bias, computed in float32 and rounded once to `dtype`.

    product [M, N]; scale float32 or `narrowed`, [N] or [M, N]; bias [N] or None.
    """
    import torch

    if bias is not None:
        return torch.addcmul(bias.to(torch.float32), product, scale).to(dtype)
    if product.dtype == dtype:
        return product.mul_(scale)  # in place: computed in float32, stored as `dtype`
    return torch.mul(product, scale).to(dtype)
