"""Quantization schemes beside one another: their bytes, and the arithmetic that vLLM has for them.

The bytes follow from LLM Compressor's own presets (`preset_name_to_scheme` of compressed-tensors),
which state bits, groups and scales. Nothing is written down here that a preset states.
"""

from collections.abc import Sequence
from math import ceil, prod
from typing import TYPE_CHECKING

from helpers import checkpoint, formats, roofline
from helpers.formats import Losses
from helpers.headers import ITEM_BYTES, TensorInfo

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme
    from pandas import DataFrame


# Titles to LLM Compressor's presets, and to the arm of `formats.FORMATS` that is the same numbers.
PRESETS = {"FP8_DYNAMIC": "FP8_DYNAMIC", "FP8 128x128 blocks": "FP8_BLOCK", "INT8 W8A8": "INT8",
           "W4A16": "W4A16", "NVFP4": "NVFP4", "MXFP4": "MXFP4"}
FORMATS = {"FP8_DYNAMIC": "E4M3 per channel", "FP8 128x128 blocks": "E4M3 128x128 blocks",
           "INT8 W8A8": "INT8 per channel"}

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
    """`table` with the "KL" of each scheme that was measured, nats per token; NaN elsewhere."""
    kl = formats.table(losses)["KL"]
    measured = {title: kl[arm] for title, arm in FORMATS.items()} | {"bf16": 0.0}
    return bytes_of.assign(KL=[measured.get(title, float("nan")) for title in bytes_of.index])
