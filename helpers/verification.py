"""Whether an FP8 checkpoint is the one that its base and the recipe make, tensor by tensor."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from helpers import WorkbookError
from helpers.checkpoint import (
    EMBEDDING,
    FP8_SUFFIX,
    Checkpoint,
    predict_fp8,
    read_tensor,
    total_bytes,
)
from helpers.headers import TensorInfo

ROWS = 2048  # of a weight that are held in memory at once


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


def verify_fp8(base: Checkpoint, fp8: Checkpoint,
               ignore: tuple[str, ...] = ("lm_head",)) -> Verification:
    """Hold every tensor of an FP8 checkpoint to the prediction made from its base.

    Compared: names, types, shapes, total bytes, `quantization_config`; scales finite and positive;
    copied tensors equal; every weight rebuilt to within 17/16 of half a step of its E4M3 grid.
    Raises `WorkbookError` that lists each disagreement, or names the base's tensor that is not
    finite. `ROWS` rows at a time are in memory.
    """
    actual = fp8.tensors
    predicted = predict_fp8(base.tensors, ignore)
    wrong = _disagreements(predicted, actual) + _config_disagreements(fp8, ignore)
    worst = 0.0
    if not wrong:
        quantized = {t.name for t in predicted if t.dtype == "F8_E4M3"}
        for tensor in base.tensors:
            if tensor.name in quantized:
                steps = _half_steps(base, fp8, tensor.name)
                worst = max(worst, steps)
                # LLM Compressor divides in bf16 and then rounds to E4M3. The first rounding moves a
                # value by up to 2^-9 of it, a sixteenth of half a step, before the second does.
                if steps > 1 + 2**-4:
                    _require_finite(base, tensor.name)
                    wrong.append(f"{tensor.name} is off by {steps:.2f} half steps, or its scale is")
            elif not _equal(base, fp8, tensor.name):
                _require_finite(base, tensor.name)
                wrong.append(f"{tensor.name} is not the base's")
    if wrong:
        raise WorkbookError(
            f"{fp8.name} is not the FP8_DYNAMIC checkpoint of {base.name}: {'; '.join(wrong[:8])}"
            + (f"; and {len(wrong) - 8} more." if len(wrong) > 8 else "."),
            "It was made from another model or by another recipe, or it is damaged.",
            f"Delete the folder {fp8.path} and run notebook 02 again.")
    return Verification(
        quantized=sum(t.dtype == "F8_E4M3" for t in actual),
        ignored=tuple(m for m in ignore if any(t.name == f"{m}.weight" for t in actual)),
        copied=sum(t.dtype != "F8_E4M3" and not t.name.endswith(FP8_SUFFIX) for t in actual),
        predicted_bytes=total_bytes(predicted), actual_bytes=total_bytes(actual), worst_step=worst)


def require_finite(base: Checkpoint) -> None:
    """Raise `WorkbookError` if a weight of a base is NaN or infinite: no scale fits such a row."""
    for tensor in base.tensors:
        _require_finite(base, tensor.name)


def _require_finite(base: Checkpoint, name: str) -> None:
    import torch

    for rows in _rows(base, name):
        if rows.is_floating_point() and not torch.isfinite(rows).all():
            raise not_finite(base, name)


def not_finite(base: Checkpoint, name: str) -> WorkbookError:
    """The error of a base that no FP8 checkpoint can be made from."""
    return WorkbookError(
        f"{name} of the base, {base.name}, holds NaN or infinity.",
        "The fault is in the weights that are to be quantized: no scale fits them, and no FP8 "
        "checkpoint made from them can be right.",
        f"Fetch the base again, or train it anew: {base.path}.")


def _disagreements(predicted: Sequence[TensorInfo], actual: Sequence[TensorInfo]) -> list[str]:
    want = {t.name: (t.dtype, t.shape) for t in predicted}
    have = {t.name: (t.dtype, t.shape) for t in actual}
    wrong = [f"{name} is missing" for name in want if name not in have]
    wrong += [f"{name} is not expected" for name in have if name not in want]
    return wrong + [f"{name} is {have[name]}, expected {want[name]}"
                    for name in want if name in have and have[name] != want[name]]


def _config_disagreements(fp8: Checkpoint, ignore: tuple[str, ...]) -> list[str]:
    config = fp8.config.get("quantization_config")
    if config is None:
        return ["config.json has no quantization_config"]
    ignored = config.get("ignore")
    named = sorted(set(map(str, ignored if isinstance(ignored, list) else ())) - {EMBEDDING})
    wrong = [] if named == sorted(ignore) else [f"config.json ignores {ignored}"]
    if config.get("format") != "float-quantized":
        wrong.append(f"the format is {config.get('format')}, expected float-quantized")
    return wrong


def _half_steps(base: Checkpoint, fp8: Checkpoint, name: str) -> float:
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


def _equal(base: Checkpoint, fp8: Checkpoint, name: str) -> bool:
    import torch

    return all(map(torch.equal, _rows(base, name), _rows(fp8, name)))


def _rows(model: Checkpoint, name: str) -> Iterator:
    """A tensor, `ROWS` of its rows at a time."""
    for first in range(0, model.by_name[name].shape[0], ROWS):
        # Opened anew each time: an open file keeps all that was read of it in this process.
        with model.shard_of(name) as shard:
            yield shard.get_slice(name)[first:first + ROWS]
