"""E4M3 and E5M2 from the bits: decode, encode, and quantize a weight per output channel.

How FP8 quantization of a weight works:

1. Take the largest magnitude of each output channel, its amax. One scale for a whole weight would
   have to serve the loudest channel, and the quiet ones would lose precision.
2. Scale = amax / 448, so that the channel's largest weight lands on E4M3's largest number and the
   whole grid is used. The scale is rounded to the weight's own type first, because that is the
   number that is stored and multiplied back.
3. Divide the channel by its scale and encode each quotient as the nearest of E4M3's 253 numbers.
   What rounds beyond 448 saturates: a NaN in its place would spoil the whole product.
4. The weight is read back as code times scale. Half a step of the grid is at most 1/17 of a number.
   LLM Compressor rounds the quotient to the weight's type first: with bf16 a weight is off by up to
   17/16 of half a step, 6.2 % of its size, until it is so small beside its amax that its code turns
   subnormal.

Integer and ordinary float arithmetic suffice; the tests hold both ways to torch's own cast, and
the codes and scales to LLM Compressor's, bit for bit. The formats: Micikevicius et al. 2022,
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

    `infinity` is the code of +infinity where the format has one; all larger codes are NaN.
    """

    mantissa_bits: int
    bias: int
    max: float
    infinity: int | None


E4M3 = Float8(3, 7, 448.0, None)  # S.1111.110 is 2^8 * (1 + 6/8); only S.1111.111 is NaN
E5M2 = Float8(2, 15, 57344.0, 0b11111_00)  # S.11110.11 is 2^15 * (1 + 3/4)
MAX = E4M3.max
SMALLEST_NORMAL = 2.0**-6  # below it E4M3's numbers are subnormal: evenly spaced, 2^-9 apart
_SIGN, _NAN = 128, 127
# `upcast` reads an E4M3 code, whose exponent has bias 7, as a float16, whose exponent has bias 15:
# it gets the value times 2^(7 - 15). This factor puts it right.
FLOAT16_READING = 2.0**8


def decode(codes: torch.Tensor, format: Float8 = E4M3) -> torch.Tensor:
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


def encode(x: torch.Tensor, format: Float8 = E4M3) -> torch.Tensor:
    """The nearest code of every number, ties to even, saturating at the format's largest number.

    Float tensor of any shape to uint8; NaN stays NaN. Larger numbers and infinities saturate, as in
    LLM Compressor, which clamps before it casts. The bare cast of torch 2.13 saturates too in E4M3;
    in E5M2 it makes an infinity of what rounds beyond the largest number.
    """
    import torch

    x = x.float()
    least = 1 - format.bias  # the exponent of the smallest normal number, and of all subnormals
    magnitude = x.abs().clamp(max=format.max)
    # frexp gives x = f * 2^e with f in [0.5, 1); as 1.m * 2^k, the form of the format, k is e - 1.
    # Subnormal numbers keep the step of the smallest normal number, so k stops at its exponent.
    exponent = torch.frexp(magnitude)[1] - 1
    exponent = exponent.masked_fill(magnitude == 0, least).clamp(min=least)
    # In units of the step at this exponent, the nearest code is the nearest whole number. torch
    # rounds a tie to the even one, as the hardware does.
    steps = torch.ldexp(magnitude, format.mantissa_bits - exponent).round()
    # `steps` counts the leading 1 too, unless the number is subnormal: added to the exponent's
    # field it makes the field one larger. A mantissa that was rounded up to 2 carries likewise.
    code = (exponent - least) * 2**format.mantissa_bits + steps
    code = code.masked_fill(x.isnan(), _NAN)
    return (code.to(torch.int32) | (torch.signbit(x).to(torch.int32) * _SIGN)).to(torch.uint8)


def quantize_per_channel(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of a weight, as FP8_DYNAMIC stores them.

    weight [out, in], bf16, to codes uint8 [out, in] and scales bf16 [out, 1]. A channel of zeros
    has the scale that is the type's epsilon. Source: compressed-tensors, `calculate_qparams`,
    symmetric, strategy "channel".
    """
    import torch

    amax = weight.abs().amax(dim=1, keepdim=True)
    scale = (amax.float() / MAX).to(weight.dtype)
    # Any scale would do for zeros, but 0 / 0 is NaN.
    scale = scale.masked_fill(scale == 0, torch.finfo(weight.dtype).eps)
    return encode(weight / scale), scale


def fates(x: torch.Tensor, scale: float) -> dict[str, torch.Tensor]:
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

    Any shape. The caller multiplies by `FLOAT16_READING`, or puts it into the scale. The two NaN
    codes become +-480 / 256.
    """
    import torch

    # A float16 has 1 + 5 + 10 bits, E4M3 has 1 + 4 + 3. Shifted up by 7, the code's exponent and
    # mantissa are the low four bits of the float16's exponent and the high three of its mantissa:
    # the same number with another bias, subnormals included. Widening int8 to int16 copied the
    # sign into every upper bit; the mask keeps bit 15, the sign, and clears bit 14, the exponent's
    # fifth.
    bits = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(7)
    return bits.bitwise_and_(0xBF80 - 0x10000).view(torch.float16).to(torch.float32)
