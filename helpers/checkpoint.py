"""What is inside a safetensors checkpoint, and whether it is the one that was to be made.

A safetensors file begins with an 8-byte length and a JSON header that names every tensor, its
type, shape and place (https://github.com/huggingface/safetensors#format). Sizes, censuses and
predictions need headers only; no weight is loaded for them.
"""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

from helpers import WorkbookError

ITEM_BYTES = {"F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1, "BF16": 2, "F16": 2,
              "I16": 2, "F32": 4, "I32": 4, "F64": 8, "I64": 8}
FP8_SUFFIX = ".weight_scale"
# `model_free_ptq` sees names, not classes, so its ignore list has to spare the embedding too.
EMBEDDING = "re:.*embed_tokens$"
ROWS = 2048  # of a weight that verification holds in memory at once
ROLES = ("embedding", "attention", "mlp", "norm", "scale", "lm_head")  # from input to output


@dataclass(frozen=True)
class TensorInfo:
    """One tensor's header: `dtype` as safetensors names it, `nbytes` of data, its file's name."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: str = ""


@dataclass(frozen=True)
class Verification:
    """What `verify_fp8` found to be true of a checkpoint."""

    quantized: int  # modules stored as F8_E4M3 with a scale
    ignored: tuple[str, ...]  # Linear modules left in the base's type
    copied: int  # other tensors, of the base's type and shape
    predicted_bytes: int
    actual_bytes: int
    worst_step: float  # largest |rebuilt - base| in units of half an E4M3 step

    def __repr__(self) -> str:
        return (f"{self.quantized} modules in F8_E4M3, each with one scale per output channel\n"
                f"left alone: {', '.join(self.ignored)}; {self.copied} tensors copied\n"
                f"{self.actual_bytes:,} bytes, predicted {self.predicted_bytes:,}\n"
                f"largest weight error: {self.worst_step:.3f} of half a step of its grid")


def read_header(file: Path) -> list[TensorInfo]:
    """The tensors of one safetensors file; the file's length is held to what the header says.

    Raises `WorkbookError` when the file is truncated, too long, or no safetensors file.
    """
    size = file.stat().st_size
    try:
        with open(file, "rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            if length > min(size, 100_000_000):  # the format's own limit on a header
                raise ValueError("the header's length is out of range")
            header = json.loads(handle.read(length))
        entries = {n: e for n, e in header.items() if n != "__metadata__"}
        found = [TensorInfo(name, e["dtype"], tuple(e["shape"]),
                            e["data_offsets"][1] - e["data_offsets"][0], file.name)
                 for name, e in entries.items()]
        end = 8 + length + max((e["data_offsets"][1] for e in entries.values()), default=0)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WorkbookError(
            f"{file.name} is not a readable safetensors file ({error}).",
            "It was cut off at its beginning, damaged, or is another kind of file.",
            f"Delete {file} and fetch or make it again.") from None
    wrong = [t.name for t in found if t.nbytes != prod(t.shape) * ITEM_BYTES.get(t.dtype, -1)]
    if end != size or wrong:
        what = f"has {size:,} bytes, its header announces {end:,}" if end != size else (
            f"announces a size that does not fit the shape of {wrong[0]}")
        raise WorkbookError(f"{file.name} {what}.", "The file was truncated or damaged.",
                            f"Delete {file} and fetch or make it again.")
    return found


def data_offsets(file: Path) -> dict[str, int]:
    """Where each tensor's data begins in a safetensors file, in bytes from the file's start."""
    with open(file, "rb") as handle:
        (length,) = struct.unpack("<Q", handle.read(8))
        header = json.loads(handle.read(length))
    return {name: 8 + length + entry["data_offsets"][0]
            for name, entry in header.items() if name != "__metadata__"}


def census(path: Path) -> list[TensorInfo]:
    """Every tensor of the checkpoint directory `path`, in the order of its files.

    Raises `WorkbookError` when there are no safetensors, when the index is none or a shard of it
    is missing, or when the index and the shards disagree on the tensors.
    """
    index = path / "model.safetensors.index.json"
    files = sorted(path.glob("*.safetensors"))
    placed = None
    if index.is_file():
        try:
            placed = json.loads(index.read_text())["weight_map"]
            files = sorted({path / name for name in placed.values()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise WorkbookError(f"{index.name} of {path.name} is no index of shards ({error}).",
                                "Which file holds which tensor cannot be known.",
                                "Fetch or make the checkpoint again.") from None
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise WorkbookError(f"{path.name} lacks {', '.join(missing)}.",
                                "The index names these shards; the checkpoint is incomplete.",
                                "Fetch or make the checkpoint again.")
    if not files:
        raise WorkbookError(f"There are no safetensors in {path}.",
                            "It is not a checkpoint that this workbook can read.",
                            "Name a directory that holds config.json and *.safetensors.")
    tensors = [tensor for file in files for tensor in read_header(file)]
    if placed is not None and placed != {t.name: t.file for t in tensors}:
        odd = sorted(set(placed.items()) ^ {(t.name, t.file) for t in tensors})[0]
        raise WorkbookError(f"{path.name}: the index and the shards disagree on {odd[0]} "
                            f"({odd[1]}).", "Files of two checkpoints have been mixed.",
                            "Fetch or make the checkpoint again.")
    return tensors


def total_bytes(tensors: list[TensorInfo]) -> int:
    """Bytes of tensor data, headers not counted."""
    return sum(tensor.nbytes for tensor in tensors)


def by_dtype(tensors: list[TensorInfo]):
    """A DataFrame by safetensors type: tensors, parameters, bytes, share of the bytes in %."""
    return _grouped(tensors, lambda tensor: tensor.dtype, "dtype")


def by_role(tensors: list[TensorInfo]):
    """A DataFrame by what tensors are for, in the order of `ROLES`; columns as in `by_dtype`."""
    table = _grouped(tensors, role, "role")
    return table.loc[[each for each in ROLES if each in table.index]]


def role(tensor: TensorInfo) -> str:
    """What a tensor is for: one of `ROLES`."""
    name = tensor.name
    if name.endswith(FP8_SUFFIX):
        return "scale"
    for part, meaning in (("embed_tokens", "embedding"), ("self_attn", "attention"),
                          (".mlp.", "mlp"), ("lm_head", "lm_head")):
        if part in name:
            return meaning
    return "norm"


def _grouped(tensors, key, title):
    import pandas as pd

    rows = [{title: key(t), "tensors": 1, "parameters": prod(t.shape), "bytes": t.nbytes}
            for t in tensors]
    table = pd.DataFrame(rows).groupby(title, sort=False).sum()
    table["bytes, %"] = (100 * table["bytes"] / table["bytes"].sum()).round(2)
    return table


def read_tensor(path: Path, name: str):
    """One tensor of the checkpoint directory `path`, alone in memory.

    Raises `WorkbookError` when no tensor has this name.
    """
    from safetensors import safe_open

    for tensor in census(path):
        if tensor.name == name:
            with safe_open(path / tensor.file, "pt") as shard:
                return shard.get_tensor(name)
    raise WorkbookError(f"There is no tensor {name} in {path.name}.",
                        "Names are those of the checkpoint's header.",
                        "Look at checkpoint.census(path) for the names there are.")


def linears(tensors: list[TensorInfo]) -> list[str]:
    """The modules that FP8_DYNAMIC quantizes: Linear layers but lm_head, in the file's order."""
    return [t.name.removesuffix(".weight") for t in tensors
            if _is_linear(t) and role(t) != "lm_head"]


def _is_linear(tensor: TensorInfo) -> bool:
    return (len(tensor.shape) == 2 and tensor.name.endswith(".weight")
            and role(tensor) not in ("embedding", "scale"))


def predict_fp8(base: list[TensorInfo], ignore: tuple[str, ...] = ("lm_head",)) -> list[TensorInfo]:
    """The tensors that FP8_DYNAMIC makes of a 16-bit base checkpoint.

    A Linear weight [out, in] becomes F8_E4M3 of that shape, with a scale [out, 1] in the base's
    type; everything else is copied. Source: compressed-tensors, format `float-quantized`.
    """
    predicted = []
    for tensor in base:
        module = tensor.name.removesuffix(".weight")
        if not _is_linear(tensor) or module in ignore:
            predicted.append(tensor)
            continue
        out = tensor.shape[0]
        predicted.append(TensorInfo(tensor.name, "F8_E4M3", tensor.shape, prod(tensor.shape),
                                    tensor.file))
        predicted.append(TensorInfo(f"{module}{FP8_SUFFIX}", tensor.dtype, (out, 1),
                                    out * ITEM_BYTES[tensor.dtype], tensor.file))
    return predicted


def verify_fp8(base: Path, fp8: Path, ignore: tuple[str, ...] = ("lm_head",)) -> Verification:
    """Hold every tensor of an FP8 checkpoint to the prediction made from its base.

    Compared: names, types, shapes, total bytes, `quantization_config`; scales finite and positive;
    copied tensors equal; every weight rebuilt to within 17/16 of half a step of its E4M3 grid.
    Raises `WorkbookError` that lists each disagreement. `ROWS` rows at a time are in memory.
    """
    before, actual = census(base), census(fp8)
    predicted = predict_fp8(before, ignore)
    wrong = _disagreements(predicted, actual) + _config_disagreements(fp8, ignore)
    worst = 0.0
    if not wrong:
        quantized = {t.name for t in predicted if t.dtype == "F8_E4M3"}
        for tensor in before:
            if tensor.name in quantized:
                steps = _half_steps(base, fp8, tensor.name)
                worst = max(worst, steps)
                # LLM Compressor divides in bf16 and then rounds to E4M3. The first rounding moves a
                # value by up to 2^-9 of it, a sixteenth of half a step, before the second does.
                if steps > 1 + 2**-4:
                    wrong.append(f"{tensor.name} is off by {steps:.2f} half steps, or its scale is")
            elif not _equal(base, fp8, tensor.name):
                wrong.append(f"{tensor.name} is not the base's")
    if wrong:
        raise WorkbookError(
            f"{fp8.name} is not the FP8_DYNAMIC checkpoint of {base.name}: {'; '.join(wrong[:8])}"
            + (f"; and {len(wrong) - 8} more." if len(wrong) > 8 else "."),
            "It was made from another model or by another recipe, or it is damaged.",
            f"Delete the folder {fp8} and run notebook 02 again.")
    return Verification(
        quantized=sum(t.dtype == "F8_E4M3" for t in actual),
        ignored=tuple(m for m in ignore if any(t.name == f"{m}.weight" for t in actual)),
        copied=sum(t.dtype != "F8_E4M3" and not t.name.endswith(FP8_SUFFIX) for t in actual),
        predicted_bytes=total_bytes(predicted), actual_bytes=total_bytes(actual), worst_step=worst)


def _disagreements(predicted: list[TensorInfo], actual: list[TensorInfo]) -> list[str]:
    want = {t.name: (t.dtype, t.shape) for t in predicted}
    have = {t.name: (t.dtype, t.shape) for t in actual}
    wrong = [f"{name} is missing" for name in want if name not in have]
    wrong += [f"{name} is not expected" for name in have if name not in want]
    return wrong + [f"{name} is {have[name]}, expected {want[name]}"
                    for name in want if name in have and have[name] != want[name]]


def _config_disagreements(fp8: Path, ignore: tuple[str, ...]) -> list[str]:
    config = json.loads((fp8 / "config.json").read_text()).get("quantization_config")
    if config is None:
        return ["config.json has no quantization_config"]
    named = sorted(set(config["ignore"]) - {EMBEDDING})
    wrong = [] if named == sorted(ignore) else [f"config.json ignores {config['ignore']}"]
    if config.get("format") != "float-quantized":
        wrong.append(f"the format is {config.get('format')}, expected float-quantized")
    return wrong


def _half_steps(base: Path, fp8: Path, name: str) -> float:
    """The largest |rebuilt - base| of a weight, in halves of the E4M3 step at the base's value."""
    import torch

    scales = read_tensor(fp8, name.removesuffix(".weight") + FP8_SUFFIX).float()
    if not (torch.isfinite(scales).all() and (scales > 0).all()):
        return float("inf")
    worst = 0.0
    for weight, codes, scale in zip(_rows(base, name), _rows(fp8, name), scales.split(ROWS),
                                    strict=True):
        ratio = weight.float() / scale
        error = (codes.float() - ratio).abs()
        exponent = torch.frexp(ratio.abs().clamp_min(2.0**-6))[1] - 1
        steps = (error / torch.exp2(exponent - 4)).max().item()
        worst = max(worst, steps if steps == steps else float("inf"))  # NaN: a code or a weight is
    return worst


def _equal(base: Path, fp8: Path, name: str) -> bool:
    import torch

    return all(map(torch.equal, _rows(base, name), _rows(fp8, name)))


def _rows(path: Path, name: str) -> Iterator:
    """A tensor of the checkpoint directory `path`, `ROWS` of its rows at a time."""
    from safetensors import safe_open

    tensor = next(t for t in census(path) if t.name == name)
    for first in range(0, tensor.shape[0], ROWS):
        # Opened anew each time: an open file keeps all that was read of it in this process.
        with safe_open(path / tensor.file, "pt") as shard:
            yield shard.get_slice(name)[first:first + ROWS]
