"""Quantization schemes beside one another: their bytes, and the arithmetic that vLLM has for them.

The bytes follow from LLM Compressor's own presets (`preset_name_to_scheme` of compressed-tensors),
which state bits, groups and scales. Nothing is written down here that a preset states.
"""

from collections.abc import Sequence
from math import ceil, prod
from typing import TYPE_CHECKING

from helpers import checkpoint, roofline, stats
from helpers.formats import Losses
from helpers.headers import ITEM_BYTES, TensorInfo

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme
    from pandas import DataFrame


# Titles to LLM Compressor's presets.
PRESETS = {"FP8_DYNAMIC": "FP8_DYNAMIC", "FP8 128x128 blocks": "FP8_BLOCK", "INT8 W8A8": "INT8",
           "W4A16": "W4A16", "NVFP4": "NVFP4", "MXFP4": "MXFP4"}
# The same, and W4A16's codes chosen by GPTQ: other numbers in the same bytes, for the same kernels.
GPTQ = "W4A16, GPTQ"
RECIPES = {**dict(list(PRESETS.items())[:4]), GPTQ: "W4A16", **dict(list(PRESETS.items())[4:])}
CALIBRATED = (GPTQ, "NVFP4")  # these need text: GPTQ for its codes, NVFP4 for its inputs' scale

# What vLLM 0.32.0 computes with each, by compute capability and on an x86 CPU. Read in its
# compressed_tensors.py (`_get_scheme_from_parts`), its schemes' `get_min_capability`, the order of
# kernels in kernels/linear/__init__.py (`_POSSIBLE_*_KERNELS`), and each kernel's `is_supported`:
# - FP8 blocks on Ada: CUTLASS takes them from 9.0 on, and Marlin, W8A16, stands before Triton;
# - INT8 on Blackwell: CUTLASS is chosen, and refuses at the first product ("Int8 not supported on
#   SM120. Use FP8 quantization instead": csrc/.../cutlass/c3x/scaled_mm_helper.hpp);
# - MXFP4 below 8.0: compressed_tensors_w4a4_mxfp4.py wants 8.0;
# - 4-bit floats on a CPU: no kernel is listed; W4A16 with AMX rounds activations to INT8 unless
#   VLLM_CPU_INT4_W4A8=0 (mixed_precision/cpu.py);
# - FP8 on a CPU: blocks want AMX (scaled_mm/cpu.py); scales per channel get the workbook's kernel.
MACHINES = {"Turing (7.5)": 75, "Ampere (8.0, 8.6)": 86, "Ada (8.9)": 89, "Hopper (9.0)": 90,
            "Blackwell (10.0, 12.0)": 100}
ARITHMETIC = {
    "FP8_DYNAMIC": ("W8A16", "W8A16", "W8A8", "W8A8", "W8A8", "W8A16 (plugin)"),
    "FP8 128x128 blocks": ("W8A16", "W8A16", "W8A16", "W8A8", "W8A8", "W8A16 (AMX only)"),
    "INT8 W8A8": ("W8A8", "W8A8", "W8A8", "W8A8", "none", "W8A8"),
    "W4A16": ("W4A16", "W4A16", "W4A16", "W4A16", "W4A16", "W4A16 (W4A8 with AMX)"),
    "NVFP4": ("W4A16", "W4A16", "W4A16", "W4A16", "W4A4", "none"),
    "MXFP4": ("none", "W4A16", "W4A16", "W4A16", "W4A4", "none"),
}


def preset(name: str) -> "QuantizationScheme":
    """LLM Compressor's preset of this name, for all Linears."""
    from compressed_tensors.quantization import preset_name_to_scheme

    return preset_name_to_scheme(name, ["Linear"])


def stated() -> "DataFrame":
    """What each preset of `PRESETS` says: bits and type, what shares a scale, activations."""
    import pandas as pd

    def line(scheme: "QuantizationScheme") -> dict:
        weights, inputs = scheme.weights, scheme.input_activations
        return {"bits": weights.num_bits, "type": weights.type, "one scale for": weights.strategy,
                "group": weights.group_size or weights.block_structure or "",
                "activations": "16 bits" if inputs is None else
                f"{inputs.num_bits} bits, {inputs.strategy}"}

    return pd.DataFrame({title: line(preset(name)) for title, name in PRESETS.items()}
                        ).T.rename_axis("scheme")


def predict(base: Sequence[TensorInfo], name: str) -> list[TensorInfo]:
    """The tensors that a preset makes of a 16-bit base checkpoint, lm_head left out.

    A Linear weight [out, in] becomes its codes and its scales, one for a channel, a group of a
    row or a block, in the preset's type or else the base's. Fewer than 8 bits are packed, which
    adds the weight's shape (integers) or a float32 scale for the whole tensor (NVFP4), and for
    4-bit activations one of theirs. Source: compressed-tensors, the preset and its compressors.
    """
    scheme, linears = preset(name), set(checkpoint.linears(base))
    predicted = []
    for tensor in base:
        module = tensor.name.removesuffix(".weight")
        if module not in linears:
            predicted.append(tensor)
            continue
        predicted += [TensorInfo(f"{module}.{part}", dtype, shape, prod(shape) * ITEM_BYTES[dtype],
                                 tensor.file)
                      for part, dtype, shape in _parts(scheme, tensor)]
    return predicted


def _parts(scheme: "QuantizationScheme", weight: TensorInfo) -> list[tuple[str, str, tuple]]:
    """Name, type and shape of what one Linear stores."""
    args, (out, width) = scheme.weights, weight.shape
    floats, packed = args.type == "float", args.num_bits < 8
    scales = {"tensor": (1,), "channel": (out, 1)}
    if args.group_size:
        scales["group"] = scales["tensor_group"] = (out, ceil(width / args.group_size))
    if args.block_structure:
        high, wide = args.block_structure
        scales["block"] = (ceil(out / high), ceil(width / wide))
    kept = str(args.scale_dtype).removeprefix("torch.")
    dtype = {"float8_e4m3fn": "F8_E4M3", "uint8": "U8", "None": weight.dtype}[kept]
    parts = [("weight_scale", dtype, scales[args.strategy])]
    if not packed:
        parts.append(("weight", "F8_E4M3" if floats else "I8", (out, width)))
    else:
        word = "U8" if floats else "I32"
        each = 8 * ITEM_BYTES[word] // args.num_bits
        parts.append(("weight_packed", word, (out, ceil(width / each))))
        if not floats:
            parts.append(("weight_shape", "I64", (2,)))
    if args.strategy == "tensor_group":
        parts.append(("weight_global_scale", "F32", (1,)))
        if scheme.input_activations is not None:
            parts.append(("input_global_scale", "F32", (1,)))
    return parts


def table(config: dict) -> "DataFrame":
    """By scheme, bf16 first: bits per weight, GB on disk, GB read per token, the gain's ceiling.

    Bits are those of the Linears that the scheme takes, scales included. The ceiling is bf16's
    bytes per token over the scheme's: the most that one stream can gain in decoding.
    """
    import pandas as pd

    base = roofline.tensors(config)
    taken = tuple(f"{module}." for module in checkpoint.linears(base))
    weights = sum(prod(tensor.shape) for tensor in base if tensor.name.startswith(taken))
    census = {"bf16": base} | {title: predict(base, name) for title, name in PRESETS.items()}
    read = {title: roofline.bytes_per_token(tensors) for title, tensors in census.items()}
    return pd.DataFrame({title: {
        "bits per weight": 8 * sum(t.nbytes for t in tensors if t.name.startswith(taken)) / weights,
        "GB on disk": checkpoint.total_bytes(tensors) / 1e9,
        "GB read per token": read[title] / 1e9,
        "most it can gain": read["bf16"] / read[title]}
        for title, tensors in census.items()}).T.rename_axis("scheme")


def arithmetic() -> "DataFrame":
    """What vLLM 0.32 computes with each scheme, by generation of GPU and on an x86 CPU."""
    import pandas as pd

    return pd.DataFrame(ARITHMETIC, index=[*MACHINES, "x86 CPU"]).T.rename_axis("scheme")


def beside(bytes_of: "DataFrame", losses: Losses) -> "DataFrame":
    """`table` for bf16 and each of `RECIPES`, with its "KL" in nats per token, and "low", "high".

    The interval is over texts, 95 % (`stats.paired_over_texts`); bf16's KL is 0.
    """
    found = [stats.Interval(0.0, 0.0, 0.0)] + [stats.paired_over_texts(
        losses.kl[recipe], [0.0] * len(losses.tokens), losses.tokens) for recipe in RECIPES]
    by_recipe = bytes_of.loc[["bf16", *(titled(recipe) for recipe in RECIPES)]]
    return by_recipe.set_axis(["bf16", *RECIPES]).rename_axis("scheme").assign(
        KL=[each.value for each in found], low=[each.low for each in found],
        high=[each.high for each in found])


def titled(recipe: str) -> str:
    """The scheme of `PRESETS` that a recipe of `RECIPES` makes: its bytes and its kernels."""
    return "W4A16" if recipe == GPTQ else recipe


def same(predicted: Sequence[TensorInfo], written: Sequence[TensorInfo]) -> bool:
    """Whether both hold the same tensors: names, types, shapes and bytes."""
    return _listed(predicted) == _listed(written)


def _listed(tensors: Sequence[TensorInfo]) -> list[tuple]:
    return sorted((tensor.name, tensor.dtype, tensor.shape, tensor.nbytes) for tensor in tensors)
