"""E4M3 from the bits: decode, encode, and quantization per channel and per token.

Written with integer and ordinary float arithmetic only; the tests hold it to torch's own cast and
to LLM Compressor's tensors, bit for bit. The format: Micikevicius et al. 2022,
https://arxiv.org/abs/2209.05433 (the variant that torch calls float8_e4m3fn).
"""

MAX = 448.0  # 2^8 * (1 + 6/8): S.1111.110, the largest number; S.1111.111 is NaN
BIAS = 7


def decode(codes):
    """The numbers that E4M3 codes stand for: uint8 tensor of any shape to float32."""
    import torch

    codes = codes.to(torch.int32)
    sign = 1.0 - 2.0 * (codes >> 7)
    exponent, mantissa = (codes >> 3) & 15, (codes & 7).float()
    normal = torch.ldexp(1 + mantissa / 8, exponent - BIAS)
    subnormal = torch.ldexp(mantissa / 8, torch.tensor(1 - BIAS))
    value = sign * torch.where(exponent > 0, normal, subnormal)
    return value.masked_fill((codes & 127) == 127, float("nan"))


def encode(x):
    """The nearest E4M3 code of every number, ties to even, saturating at 448: float to uint8.

    LLM Compressor clamps to ±448 before it casts, so larger numbers and infinities saturate;
    torch 2.13's bare cast saturates as well. NaN stays NaN.
    """
    import torch

    x = x.float()
    magnitude = x.abs().clamp(max=MAX)
    # frexp gives x = f * 2^e with f in [0.5, 1): the exponent of 1.m * 2^(e-1). Below 2^-6 the
    # step stays that of 2^-6.
    exponent = torch.frexp(magnitude)[1] - 1
    exponent = exponent.masked_fill(magnitude == 0, 1 - BIAS).clamp(min=1 - BIAS)
    steps = torch.ldexp(magnitude, 3 - exponent).round()  # torch rounds ties to even
    # A full mantissa (16 steps) carries into the exponent, as adding the two fields does.
    code = ((exponent + BIAS - 1) * 8 + steps).masked_fill(x.isnan(), 127)
    return (code.to(torch.int32) | (torch.signbit(x).to(torch.int32) << 7)).to(torch.uint8)


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
