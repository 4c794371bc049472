"""Tasks of notebook 03: E4M3 decoded and encoded, and a quantizer held to LLM Compressor's bits."""

import math
from collections.abc import Callable

from helpers.check.answers import Raised, all_same, each, how_many, near, number, results
from helpers.check.task import Key, Mistake, Task, Unusable, compared

NUMBERS = (0.3, 1.0, 17.0, 19.0, -21.0, 1000.0, -500.0, 448.0, 460.0, math.inf, 0.0, 0.02,
           2.0**-6, 0.001, 0.0029, 0.0009, -3.3, 100.0, 104.0, 0.1)


def _decode(code: int, bias: int = 7, subnormal: bool = True, signed: bool = True,
            finite: bool = True, nan: bool = True) -> float:
    exponent, mantissa = (code >> 3) & 15, code & 7
    sign = -1 if signed and code >> 7 else 1
    if not finite and exponent == 15:
        return math.nan if mantissa else sign * math.inf
    if nan and finite and code & 127 == 127:
        return math.nan
    if exponent == 0 and subnormal:
        return sign * 2.0 ** (1 - bias) * mantissa / 8
    return sign * 2.0 ** (exponent - bias) * (1 + mantissa / 8)


def _cast_decode(code: int) -> float:
    import torch

    return torch.tensor([code], dtype=torch.uint8).view(torch.float8_e4m3fn).float().item()


def _decode_key() -> Key:
    return Key(_cast_decode, (
        Mistake(lambda c: _decode(c, subnormal=False),
                "Codes with exponent 0 are subnormal: they have no leading 1, and their power of "
                "two is 2⁻⁶ as for exponent 1."),
        Mistake(lambda c: _decode(c, bias=8), "The bias is 7: an exponent field of 7 means 2⁰."),
        Mistake(lambda c: _decode(c, signed=False), "The highest bit is the sign: codes from 128 "
                                                    "on are negative."),
        Mistake(lambda c: _decode(c, finite=False),
                "E4M3 has no infinity. Exponent 15 holds ordinary numbers, up to 448; only "
                "mantissa 7 there is NaN."),
        Mistake(lambda c: _decode(c, nan=False), "S.1111.111 is NaN: there is no 480.")))


def _float(value) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise Unusable("For one number, one number is wanted.") from None


def _equal(given: float, other: float) -> bool:
    return given == other or math.isnan(given) and math.isnan(other)


def _encode(x: float, rounding: Callable[[float], float] = round, saturate: bool = True,
            least: float = -6, flush: bool = False) -> float:
    """Nearest number of E4M3's grid; `least` is the exponent of its smallest normal number."""
    size = abs(x)
    if size == 0 or flush and size < 2.0**-6:
        return 0.0
    if saturate:
        size = min(size, 448.0)
    elif size > 464:  # what rounds beyond 448
        return math.nan
    step = 2.0 ** (max(math.frexp(size)[1] - 1, least) - 3)
    value = rounding(size / step) * step
    return math.copysign(min(value, 448.0) if saturate else value, x)


def _cast_encode(x: float) -> float:
    import torch

    clamped = torch.tensor(x, dtype=torch.float64).clamp(-448, 448)
    return clamped.to(torch.float8_e4m3fn).double().item()


def _encode_key() -> Key:
    return Key(_cast_encode, (
        Mistake(lambda x: _encode(x, rounding=lambda steps: math.floor(steps + 0.5)),
                "Only ties are wrong: a number half-way between two goes to the even mantissa, not "
                "away from zero. Python's round() does so."),
        Mistake(lambda x: _encode(x, rounding=math.floor),
                "You cut off what does not fit. Round to the nearest instead."),
        Mistake(lambda x: _encode(x, saturate=False),
                "What is too large should saturate: it becomes 448, and no NaN."),
        Mistake(lambda x: _encode(x, flush=True),
                "Below 2⁻⁶ the grid goes on in steps of 2⁻⁹; you set those numbers to zero."),
        Mistake(lambda x: _encode(x, least=-math.inf),
                "Below 2⁻⁶ steps stop shrinking: they are 2⁻⁹ from there down to zero.")))


def _nearest_key() -> Key:
    return Key(_cast_encode(0.3), (
        Mistake(0.28125, "That is the neighbour below. 1.2 is nearer to 1.25 than to 1.125."),
        Mistake(0.25, "You dropped the mantissa: the power of two is right, and the eighths are "
                      "missing."),
        Mistake(0.3, "0.3 is not on the grid, which has eight numbers from 0.25 to 0.5."),
        Mistake(1.25, "The mantissa is right; multiply it by the power of two.")))


def _stored():
    """A weight, with the codes and scales that LLM Compressor wrote of it.

    Read from the chosen profile's checkpoints where both are there. Else they are made from the
    bundled model by compressed-tensors, which LLM Compressor calls for it.
    """
    from safetensors import safe_open

    from helpers import hardware, models, quantize, workspace

    profile = models.choose(hardware.detect())
    place = quantize.target(profile)
    if profile.checkpoint is not None and workspace.is_whole(place):
        base, name = profile.checkpoint, "model.layers.0.self_attn.o_proj"
        with base.shard_of(f"{name}.weight") as file:
            weight = file.get_tensor(f"{name}.weight")
        for shard in place.glob("*.safetensors"):
            with safe_open(shard, "pt") as file:
                if f"{name}.weight_scale" in file.keys():  # noqa: SIM118
                    return (weight, file.get_tensor(f"{name}.weight"),
                            file.get_tensor(f"{name}.weight_scale"))
    with models.tiny().checkpoint.shard_of("model.layers.0.self_attn.o_proj.weight") as file:
        return _made(file.get_tensor("model.layers.0.self_attn.o_proj.weight"))


def _made(weight):
    import torch
    from compressed_tensors.quantization import preset_name_to_scheme
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    arguments = preset_name_to_scheme("FP8_DYNAMIC", ["Linear"]).weights
    scale, zero = calculate_qparams(weight.amin(dim=1, keepdim=True),
                                    weight.amax(dim=1, keepdim=True), arguments)
    codes = quantize(weight, scale, zero, arguments, dtype=torch.float8_e4m3fn)
    return weight, codes, scale


def _pair(value):
    """Codes as int, and scales as float64 [out, 1]; a single scale stands for all."""
    import torch

    try:
        codes, scale = value
        codes, scale = torch.as_tensor(codes), torch.as_tensor(scale).detach()
    except (TypeError, ValueError, RuntimeError):
        raise Unusable("A pair is wanted: return codes, scale.") from None
    if codes.dtype not in (torch.float8_e4m3fn, torch.uint8):
        raise Unusable("The codes should be of type torch.float8_e4m3fn (or their bits, uint8), "
                       f"and are {str(codes.dtype).removeprefix('torch.')}: a cast is missing.")
    if codes.dim() != 2:
        raise Unusable(f"The codes have the weight's shape, and yours have {list(codes.shape)}.")
    if scale.numel() not in (1, codes.shape[0]):
        raise Unusable("One scale for each channel is wanted, [out, 1], and yours are "
                       f"{list(scale.shape)}.")
    return (codes.view(torch.uint8).int(),
            scale.double().reshape(-1, 1).expand(codes.shape[0], 1))


def _same_bits(given: list, other: list) -> bool:
    import torch

    return not isinstance(given[0], Raised) and all(
        a.shape == b.shape and torch.equal(a, b) for a, b in zip(given[0], other[0], strict=True))


def _how_near(given: list, right: list) -> str:
    if isinstance(given[0], Raised):
        return ""
    (codes, scales), (stored_codes, stored_scales) = given[0], right[0]
    if codes.shape != stored_codes.shape:
        return ""
    wrong = int((codes != stored_codes).sum())
    off = int((scales != stored_scales).sum())
    return (f"{len(scales) - off} of {len(scales):,} scales and {codes.numel() - wrong:,} of "
            f"{codes.numel():,} codes are LLM Compressor's.")


def _quantizer(weight, round_scale: bool = True, stored_rounded: bool = True,
               per_tensor: bool = False, exact_quotient: bool = False, largest: float = 448.0):
    import torch

    amax = weight.abs().amax() if per_tensor else weight.abs().amax(dim=1, keepdim=True)
    scale = amax.float() / largest
    divisor = scale.to(torch.bfloat16) if round_scale else scale
    wide = exact_quotient or not round_scale
    quotient = weight.float() / divisor.float() if wide else weight / divisor
    codes = quotient.clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes, divisor.to(torch.bfloat16) if stored_rounded else divisor


def _quantizer_key() -> Key:
    weight, codes, scale = _stored()
    return Key(
        lambda w: (codes, scale),
        (Mistake(lambda w: _quantizer(w, round_scale=False),
                 "You divided by the unrounded scale. What is stored and multiplied back is the "
                 "bf16 one, so round before you divide."),
         Mistake(lambda w: _quantizer(w, round_scale=False, stored_rounded=False),
                 "The scale is stored in the weight's type, bf16: round it, then divide by it."),
         Mistake(lambda w: _quantizer(w, per_tensor=True),
                 "One scale for the tensor: take the amax of each row, with keepdim=True."),
         Mistake(lambda w: _quantizer(w, largest=127.0),
                 "127 is INT8's largest number; E4M3's is 448.")),
        (Mistake(lambda w: _quantizer(w, exact_quotient=True),
                 "Your scales are LLM Compressor's, and your codes are a little nearer to the "
                 "weights: it divides in bf16, which moves some quotients to the other side of a "
                 "tie. weight / scale, both in bf16, gives its bits."),))


TASKS = (
    Task("decoded", "03", "easy", 5, "code", "a float's bits",
         ("Shift and mask: code >> 7 is the sign, (code >> 3) & 15 the exponent, code & 7 the "
          "mantissa.",
          "Two formulas: the one with 1 + m/8 for exponents above 0, the other for exponent 0.",
          "One special case: code & 127 == 127 is NaN, float('nan')."),
         _decode_key, compared(each(_float, results(lambda: [(code,) for code in range(256)])),
                               all_same(_equal), "Sign, exponent, mantissa, and two formulas.",
                               how_many(_equal, [str(code) for code in range(256)]),
                               "All 256 codes, as torch reads them.")),
    Task("nearest_e4m3_to_0_3", "03", "easy", 2, "value", "rounding by hand",
         ("0.3 = 1.2 × 2⁻². The exponent is settled; which mantissa?",
          "The mantissas are 1, 1.125, 1.25, 1.375 and so on.",
          "1.2 lies between 1.125 and 1.25. The nearer one, times 1/4."),
         _nearest_key, compared(number, near(1e-9), "0.3 = 1.2 × 2⁻²; which eighth is nearest to "
                                                    "1.2?",
                                right_says="The error is 4.2 %, a usual one.")),
    Task("encoded", "03", "hard", 8, "code", "ties, saturation, subnormals",
         ("Find the power of two: math.frexp(abs(x)) gives f and e with x = f × 2ᵉ, f from 0.5 to "
          "1, so x = 1.m × 2ᵉ⁻¹.",
          "A step is 2^(exponent − 3), and the exponent is never below −6. round(size / step) × "
          "step is the nearest number; Python's round takes ties to even.",
          "First of all min(abs(x), 448), which takes care of infinity too; zero apart; at the "
          "end the sign, with math.copysign."),
         _encode_key, compared(each(_float, results(lambda: [(x,) for x in NUMBERS])),
                               all_same(_equal), "Saturate, find the step, round to it, restore "
                                                 "the sign.",
                               how_many(_equal, [f"{x:g}" for x in NUMBERS]),
                               "As torch's clamp and cast.")),
    Task("quantizer", "03", "medium", 8, "code", "the whole scheme",
         ("Three lines: the rows' amax, the scale, the codes.",
          "amax = weight.abs().amax(dim=1, keepdim=True); the scale is amax / 448, computed in "
          "float32 and rounded to bf16.",
          "Divide the weight by that bf16 scale, clamp to ±448, cast to torch.float8_e4m3fn."),
         _quantizer_key, compared(each(_pair, results(lambda: [(_stored()[0],)])), _same_bits,
                                  "amax by row, / 448, to bf16; divide, clamp, cast.", _how_near,
                                  "Every code and every scale is LLM Compressor's.")),
)
