"""Verdicts on this machine: what was expected of FP8, what was measured, and what that shows.

Each row is made from the newest fitting rows of one profile in the ledger, by a rule:

- **bytes**: the checkpoint's, against those that its base's tensors predict. "as predicted" where
  they are equal, else "differs".
- **scales**: codes and scales that notebook 03 made anew. "as predicted" where all modules are
  identical to the bit, else "differs".
- **kernel**: the one that vLLM's log names, against the one of the serving mode, and which
  arithmetic its output is nearer to, W8A16 or W8A8, against the mode's. "as predicted" where both
  are the mode's, else "differs".
- **accuracy**, once for each number of questions: "lower" or "higher" where McNemar's exact test of
  the questions lost and gained gives p < 0.05. If not, "within the noise" where no more of them
  changed than notebook 06 saw change when bf16 ran again in another batch size; else "not told
  apart".
- **speed** of one stream, FP8 over bf16 of the same round: "faster" where the range of the
  ratio lies above 1, "slower" where it lies below; else "too spread to say" where the rounds
  spread too widely (`stats.spreads`), and "not told apart" where they do not.
- **the model card's ratio at Phi-4's shapes**: FP8 W8A16 over bf16 on a slice of Phi-4, one stream.
  The card gives 32 and 17 tokens/s, whole numbers, so its ratio lies between 31.5 / 17.5 and
  32.5 / 16.5. "consistent with 1.88x" where the measured range meets that range, "not
  consistent: lower" or "higher" where it does not; "too spread to say" where it meets the
  range only because the rounds spread so widely (`stats.spreads`) that it would meet nearly any.

"not measured yet" stands where the ledger has no such row, with the notebook that makes it.
"""

from typing import TYPE_CHECKING

from helpers import ledger, ledger_row, stats
from helpers.models import Profile

if TYPE_CHECKING:
    import pandas as pd

PREDICTED, DIFFERS, APART = "as predicted", "differs", "not told apart"
NOISE, MISSING, SPREAD = "within the noise", "not measured yet", "too spread to say"
ALPHA = 0.05
# What vLLM 0.32 names in its log for this checkpoint, and what that computes, by serving mode.
KERNELS = {"gpu-w8a8": ("CutlassFP8ScaledMMLinearKernel", "W8A8"),
           "gpu-w8a16": ("MarlinFP8ScaledMMLinearKernel", "W8A16"),
           "cpu-w8a16": ("CpuFp8W8A16LinearKernel", "W8A16"),
           "cpu-unpacked": ("CpuFp8W8A16LinearKernel", "W8A16")}
# Notebook 05's relative distances of the kernel's output from either arithmetic.
DISTANCES = {"from_w8a16": "W8A16", "from_w8a8": "W8A8"}
RATIO = ("ratio", "ratio_low", "ratio_high")


def of_this_machine(profile: Profile, rows: list[dict] | None = None) -> "pd.DataFrame":
    """One row for each question that this machine can answer of a profile.

    `rows`: ledger rows, the workspace's ledger by default. A DataFrame of strings with columns
    what, expected, measured, verdict; the module's docstring has the rules.
    """
    import pandas as pd

    rows = ledger.read() if rows is None else rows
    of_profile = [row for row in rows if row["model"]["profile"] == profile.name]
    found = [_bytes(of_profile, profile), _scales(of_profile), _kernel(of_profile),
             *_accuracy(of_profile), _speed(of_profile), _slice(rows)]
    return pd.DataFrame(found, columns=["what", "expected", "measured", "verdict"])


def _newest(rows: list[dict], experiment: str, arm: str = "fp8", work: tuple = (),
            metrics: tuple = ()) -> dict | None:
    return next((row for row in reversed(rows)
                 if (row["experiment"], row["arm"]) == (experiment, arm)
                 and ledger_row.holds(row, work, metrics)), None)


def _bytes(rows: list[dict], profile: Profile) -> tuple[str, ...]:
    what, expected = "size of the FP8 checkpoint", f"{profile.fp8_bytes:,} bytes"
    row = _newest(rows, "quantize", metrics=("bytes_after",))
    if row is None:
        return what, expected, "notebook 02 measures it", MISSING
    made = row["metrics"]["bytes_after"]
    return what, expected, f"{made:,} bytes", PREDICTED if made == profile.fp8_bytes else DIFFERS


def _scales(rows: list[dict]) -> tuple[str, ...]:
    what = "codes and scales made again, to the bit"
    row = _newest(rows, "scales", metrics=("identical", "modules"))
    if row is None:
        return what, "all modules", "notebook 03 measures it", MISSING
    same, every = row["metrics"]["identical"], row["metrics"]["modules"]
    return (what, f"{every} modules", f"{same} modules",
            PREDICTED if same == every > 0 else DIFFERS)


def _kernel(rows: list[dict]) -> tuple[str, ...]:
    what = "kernel of the quantized layers, and its arithmetic"
    served = [row for row in rows if row["arm"] == "fp8" and row["kernel"]]
    proved = [row for row in served if row["experiment"] == "serve"
              and ledger_row.holds(row, (), DISTANCES)]
    if not served:
        return what, "the serving mode's", "notebook 05 measures it", MISSING
    row = (proved or served)[-1]
    kernel, arithmetic = KERNELS.get(row["mode"], ("none", "none"))
    as_said = row["kernel"] == kernel
    measured = row["kernel"]
    if proved:
        far = {name: row["metrics"][key] for key, name in DISTANCES.items()}
        measured += "; output " + ", ".join(f"{100 * far[name]:.1f} % from {name}" for name in far)
        as_said = as_said and min(far, key=far.get) == arithmetic
    return what, f"{arithmetic} by {kernel}", measured, PREDICTED if as_said else DIFFERS


def _accuracy(rows: list[dict]) -> list[tuple[str, ...]]:
    """A row for each task and number of questions, the fewest first."""
    scored = {(row["work"]["limit"], str(row["work"]["task"])): row for row in rows
              if (row["experiment"], row["arm"]) == ("gsm8k", "fp8")
              and ledger_row.holds(row, ("task", "limit"), ("lost", "gained"))}
    if not scored:
        return [("right answers, FP8 beside bf16", "no fewer", "notebook 06 measures it", MISSING)]
    return [_paired(rows, row) for _, row in sorted(scored.items())]


def _paired(rows: list[dict], row: dict) -> tuple[str, ...]:
    lost, gained = (int(row["metrics"][name]) for name in ("lost", "gained"))
    noise = _noise(rows, row["work"])
    if lost + gained > row["work"]["limit"] or min(lost, gained) < 0:
        verdict = MISSING  # such a row counts nothing that can be
    elif stats.mcnemar(lost, gained) < ALPHA:
        verdict = "lower" if lost > gained else "higher"
    else:
        verdict = NOISE if noise is not None and lost + gained <= noise else APART
    beside = "" if noise is None else f"; bf16 again: {noise} changed"
    return (f"right answers of {row['work']['limit']:,}, FP8 beside bf16", "no fewer",
            f"{lost} lost, {gained} gained{beside}", verdict)


def _noise(rows: list[dict], work: dict) -> int | None:
    """How many answers changed at most when bf16 did the same work again; None if unknown."""
    same = [row["metrics"]["flips"] for row in rows
            if (row["experiment"], row["arm"]) == ("noise-floor", "bf16")
            and ledger_row.holds(row, ("task", "limit"), ("flips",))
            and all(row["work"][key] == work[key] for key in ("task", "limit"))]
    return int(max(same)) if same else None


def _speed(rows: list[dict]) -> tuple[str, ...]:
    what, expected = "tokens/s of one stream, FP8 over bf16", "no slower"
    single = [row for row in rows if row["work"].get("concurrency") == 1]
    row = _newest(single, "throughput", work=("output_tokens",), metrics=RATIO)
    if row is None:
        return what, expected, "notebook 07 measures it", MISSING
    ratio = stats.Interval(*(row["metrics"][name] for name in RATIO))
    verdict = ("faster" if ratio.low > 1 else "slower" if ratio.high < 1 else
               SPREAD if stats.spreads(ratio) else APART)
    return what, expected, f"{ratio.value:.2f}x ({ratio.low:.2f} to {ratio.high:.2f})", verdict


def published_ratio() -> stats.Interval:
    """The card's tokens/s on an A40, FP8 over bf16, and the range that its whole numbers leave."""
    speed = {row["arm"]: row["value"] for row in ledger.published()
             if row["experiment"] == "throughput"}
    bf16, fp8 = speed["bf16"], speed["fp8"]
    return stats.Interval(fp8 / bf16, (fp8 - 0.5) / (bf16 + 0.5), (fp8 + 0.5) / (bf16 - 0.5))


def consistent(measured: stats.Interval) -> str:
    """The verdict on a measured ratio of Phi-4's shapes, by the rule of this module's docstring."""
    claimed = published_ratio()
    if measured.high < claimed.low:
        return "not consistent: lower"
    if measured.low > claimed.high:
        return "not consistent: higher"
    return SPREAD if stats.spreads(measured) else f"consistent with {claimed.value:.2f}x"


def _slice(rows: list[dict]) -> tuple[str, ...]:
    claimed = published_ratio()
    what = "the shapes of Phi-4, other hardware: one stream, FP8 over bf16"
    expected = f"{claimed.value:.2f}x ({claimed.low:.2f} to {claimed.high:.2f})"
    row = _newest([row for row in rows if row["work"].get("numerics") == "w8a16"
                   and row["work"].get("concurrency") == 1
                   and row["work"].get("output_tokens", 1) > 1], "slice", metrics=RATIO)
    if row is None:
        return what, expected, "notebook 07 measures it", MISSING
    ratio = stats.Interval(*(row["metrics"][name] for name in RATIO))
    if not 0 < ratio.low <= ratio.value <= ratio.high:
        return what, expected, "no ratio that can be", MISSING
    return what, expected, f"{ratio.value:.2f}x ({ratio.low:.2f} to {ratio.high:.2f})", consistent(
        ratio)
