"""E4M3 from the bits: decode, encode, and quantization per channel and per token.

Written with integer and ordinary float arithmetic only; the tests hold it to torch's own cast and
to LLM Compressor's tensors, bit for bit. The formats: Micikevicius et al. 2022,
https://arxiv.org/abs/2209.05433 (the variants that torch calls float8_e4m3fn and float8_e5m2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Float8:
    """An 8-bit float: its mantissa's bits, its exponent's bias, its largest number.

    `infinity`: the code of +infinity where the format has one; all codes above it are NaN.
    """

    mantissa_bits: int
    bias: int
    max: float
    infinity: int | None


E4M3 = Float8(3, 7, 448.0, None)  # S.1111.110 is 2^8 * (1 + 6/8); only S.1111.111 is NaN
E5M2 = Float8(2, 15, 57344.0, 0b11111_00)  # S.11110.11 is 2^15 * (1 + 3/4); as IEEE 754 does it
MAX = E4M3.max
SMALLEST_NORMAL = 2.0**-6  # below it E4M3's numbers are subnormal: evenly spaced, 2^-9 apart
_SIGN, _NAN = 128, 127
# An E4M3 code moved into a float16's bits has the exponent bias 15 instead of 7: it reads as its
# value times 2^-8.
FLOAT16_READING = 2.0**8


def decode(codes, format: Float8 = E4M3):
    """The numbers that 8-bit float codes stand for: uint8 tensor of any shape to float32."""
    import torch

    codes = codes.to(torch.int32)
    steps = 2**format.mantissa_bits
    sign = 1.0 - 2.0 * (codes >> 7)
    magnitude = codes & _NAN
    exponent, mantissa = magnitude // steps, (magnitude % steps).float()
    normal = torch.ldexp(1 + mantissa / steps, exponent - format.bias)
    subnormal = torch.ldexp(mantissa / steps, torch.tensor(1 - format.bias))
    value = sign * torch.where(exponent > 0, normal, subnormal)
    if format.infinity is not None:
        value = torch.where(magnitude == format.infinity, sign * torch.inf, value)
    return value.masked_fill(magnitude > (format.infinity or _NAN - 1), torch.nan)


def encode(x, format: Float8 = E4M3):
    """The nearest code of every number, ties to even, saturating at the format's largest number.

    Float tensor of any shape to uint8. LLM Compressor clamps before it casts, so larger numbers
    and infinities saturate. The bare cast of torch 2.13 saturates too in E4M3, and makes infinity
    of what rounds beyond the largest in E5M2. NaN stays NaN.
    """
    import torch

    x = x.float()
    least = 1 - format.bias  # the exponent of the smallest normal number, and of all subnormals
    magnitude = x.abs().clamp(max=format.max)
    # frexp gives x = f * 2^e with f in [0.5, 1): the exponent of 1.m * 2^(e-1). Below the smallest
    # normal number the step stays that of the smallest normal number.
    exponent = torch.frexp(magnitude)[1] - 1
    exponent = exponent.masked_fill(magnitude == 0, least).clamp(min=least)
    # torch rounds ties to even
    steps = torch.ldexp(magnitude, format.mantissa_bits - exponent).round()
    # A full mantissa carries into the exponent, as adding the two fields does.
    code = (exponent - least) * 2**format.mantissa_bits + steps
    code = code.masked_fill(x.isnan(), _NAN)
    return (code.to(torch.int32) | (torch.signbit(x).to(torch.int32) * _SIGN)).to(torch.uint8)


def quantize_per_channel(weight):
    """Codes and scales of a weight, as FP8_DYNAMIC stores them.

    weight [out, in], bf16: codes uint8 [out, in] and scales bf16 [out, 1]. The scale is
    amax / 448 of the output channel, rounded to the weight's own type; source: compressed-tensors,
    `calculate_qparams`, symmetric, strategy "channel".
    """
    amax = weight.abs().amax(dim=1, keepdim=True)
    scale = (amax.float() / MAX).to(weight.dtype)
    return encode(weight / scale), scale


def quantize_per_token(x):
    """Codes uint8 [tokens, in] and float32 scales [tokens, 1] of activations [tokens, in].

    What "dynamic" means: the scale is amax / 448 of each token, found when the token is there.
    """
    x = x.float()
    scale = x.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12) / MAX
    return encode(x / scale), scale


def fates(x, scale: float) -> dict:
    """What rounding x / scale to E4M3 does to each number of x, a float tensor of any shape.

    "rounded to": x after rounding and scaling back, float32; four masks of x's shape, of which one
    holds for every number: "clipped" (beyond 448 times the scale), "zero" (rounded to zero, or zero
    before), "subnormal" (rounded to less than 2^-6 times the scale), "rounded" (all others).
    """
    x = x.float()
    stored = decode(encode(x / scale))
    # amax / (amax / 448) can come out a rounding error above 448.
    clipped = x.abs().double() / scale > MAX * (1 + 1e-6)
    zero, small = stored == 0, stored.abs() < SMALLEST_NORMAL
    return {"rounded to": stored * scale, "clipped": clipped, "zero": zero,
            "subnormal": small & ~zero, "rounded": ~small & ~clipped}


def upcast(codes: torch.Tensor) -> torch.Tensor:
    """float8_e4m3fn codes as float32 values times 2^-8, exactly; 5 times as fast as `.to` (Zen 4).

    The seven bits below the sign are shifted to the top of a float16's exponent and mantissa,
    where they mean the same number with another bias, subnormals included. The two NaN codes
    become +-480 / 256.
    """
    import torch

    bits = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(7)
    return bits.bitwise_and_(0xBF80 - 0x10000).view(torch.float16).to(torch.float32)
