"""FP8 on a CPU beside everything else that could run the same model: its arms, and its records.

`make bench-cpu` (`scripts/bench_cpu.py`) measures them; the README and notebook 07 show what it
recorded on one machine.
"""

from dataclasses import dataclass

from helpers import ledger, ledger_row, phi4_slice, workspace
from helpers.throughput import Work

RECORDED = workspace.data("measured") / "bench-cpu.jsonl"
PHI4 = phi4_slice.title(phi4_slice.LAYERS["cpu"])  # the name of that model in the ledger
_FORMATS = {"bf16": "bf16", "fp8": "FP8", "int8": "INT8", "int4": "INT4", "q8_0": "Q8_0"}
_NUMERICS = {"": "", "w8a16": ", W8A16", "w8a8": ", W8A8", "w4a16": ", W4A16", "stock": ", stock"}


@dataclass(frozen=True)
class Arm:
    """What computes, with which weights.

    `engine`: "vLLM", "Transformers" or "llama.cpp". `format`: that of the weights, one of
    `ledger_row.ARMS`. `numerics`: of quantized weights in vLLM, the products' bits; FP8's are those
    of the workbook's two kernels, or "stock" for vLLM's own.
    """

    engine: str
    format: str
    numerics: str = ""

    @property
    def title(self) -> str:
        return f"{self.engine} {_FORMATS[self.format]}{_NUMERICS[self.numerics]}"

    def in_ledger(self) -> dict[str, str]:
        """The part of a ledger row's `work` that tells the arms of one format apart."""
        return {"engine": self.engine, "numerics": self.numerics}


BF16 = Arm("vLLM", "bf16")
STOCK = Arm("vLLM", "fp8", "stock")
INT8, INT4 = Arm("vLLM", "int8", "w8a8"), Arm("vLLM", "int4", "w4a16")
TRANSFORMERS = Arm("Transformers", "bf16")
LLAMA_CPP = Arm("llama.cpp", "q8_0")
# In the order in which they are shown.
ARMS = (BF16, Arm("vLLM", "fp8", "w8a16"), Arm("vLLM", "fp8", "w8a8"), STOCK, INT8, INT4,
        TRANSFORMERS, LLAMA_CPP)


@dataclass(frozen=True)
class Record:
    """One row of the ledger, read: `metrics` are tokens/s and its ratio to `BF16`'s.

    `cpu`: the CPU it was measured on, and its cores.
    """

    cpu: str
    model: str
    arm: Arm
    work: Work
    metrics: dict[str, float]


def records(rows: list[dict] | None = None, model: str | None = None) -> list[Record]:
    """The bench's rows, of one model if named; `rows`: the committed ones by default."""
    found = [Record(ledger_row.device(row), row["model"]["profile"],
                    Arm(row["work"]["engine"], row["arm"], row["work"]["numerics"]),
                    Work.from_ledger(row["work"]), row["metrics"])
             for row in (ledger.read(RECORDED) if rows is None else rows)]
    return [record for record in found if model in (None, record.model)]


def table(found: list[Record]):
    """Records by CPU, model and arm: a DataFrame with a column for each work.

    Median tokens per second, and in brackets over `BF16`'s of the same round: median and range.
    """
    import pandas as pd

    lines: dict[tuple[str, str, Arm], dict[str, str]] = {}
    for record in found:
        cells = lines.setdefault(
            (record.cpu, record.model, record.arm),
            {"CPU": record.cpu, "model": record.model, "tokens/s": record.arm.title})
        tok_s, ratio, low, high = (
            record.metrics[name] for name in ("tok_s", "ratio", "ratio_min", "ratio_max"))
        speed = f"{tok_s:,.{0 if tok_s >= 100 else 1}f}"
        cells[record.work.title] = speed if record.arm == BF16 else (
            f"{speed} ({ratio:.2f}x, {low:.2f} to {high:.2f})")
    return pd.DataFrame(lines.values()).fillna("")
