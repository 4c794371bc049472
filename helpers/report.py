"""The workbook's closing tables, from the ledger and `data/published`.

First what this machine shows of FP8 (`helpers.verdicts` has the rules), then measured beside
published. A published figure gets the verdict "agrees" or "differs" only where the work was the
same; those that were not measured share one line, which says how many they are and how to get them.
`python -m helpers.report` prints both.
"""

import sys
import textwrap
from typing import TYPE_CHECKING

from tabulate import tabulate

from helpers import (
    WorkbookError,
    hardware,
    ledger,
    ledger_row,
    models,
    predictions,
    slice_speed,
    stats,
    verdicts,
)

if TYPE_CHECKING:
    import pandas as pd

# What a row must share with the published one before the two may be called equal or different.
# A speed also needs the same GPU; an accuracy does not depend on how fast it was computed.
PHI4 = {"microsoft/phi-4", "NyxKrage/Microsoft_Phi-4"}
# Of a claim's work: its name, how its figure is read, and a length that no prompt of it reaches.
NOT_COMPARED = ("filter", "version", "benchmark", "max_model_len")
SCALE = {"percent right": 0.01}
NOT_HERE = "not measured here"


def measured_beside_published(rows: list[dict] | None = None,
                              profile: str | None = None) -> "pd.DataFrame":
    """Every published gsm8k and throughput row with this ledger's figure and one verdict.

    `rows`: ledger rows, the workspace's ledger by default; `profile`: only that profile's rows.
    A DataFrame with columns published claim, published, measured, mode, verdict. The verdict is
    "agrees" or "differs" (is the published value inside the measured 95 % interval, or for a speed
    inside the range of the rounds?) where the work was the same, and "not measured here" where it
    was not; then "measured" says what was done instead.
    """
    import pandas as pd

    rows = ledger.read() if rows is None else rows
    table = []
    for claim in ledger.published():
        if claim["experiment"] not in ("gsm8k", "throughput"):
            continue
        row = _latest(rows, claim, profile)
        table.append({
            "published claim": claim["claim"],
            "published": _figure(claim["value"], claim["unit"]),
            "measured": _measured(row, claim) if row else "",
            "mode": ", ".join(filter(None, (row["mode"], row["kernel"], row["work"].get("dtype"))))
            if row else "",
            "verdict": _verdict(row, claim),
        })
    return pd.DataFrame(table)


def compared(table: "pd.DataFrame") -> "pd.DataFrame":
    """The rows of `measured_beside_published` that have a verdict, the same work on both sides."""
    return table[table["verdict"] != NOT_HERE].reset_index(drop=True)


def predicted_beside_measured(profile: str, rows: list[dict] | None = None) -> "pd.DataFrame":
    """What the reader expected in notebooks 06 and 07, and what was then measured.

    `rows`: ledger rows, the workspace's ledger by default; newest first counts. A DataFrame of
    strings with columns question, predicted, measured; what is lacking names its notebook.
    """
    import pandas as pd

    rows = (ledger.read() if rows is None else rows)[::-1]
    flips = [row for row in rows if (row["experiment"], row["arm"]) == ("gsm8k", "fp8")
             and row["model"]["profile"] == profile
             and ledger_row.holds(row, (), ("lost", "gained")) and row["work"].get("limit") == 100]
    expected = predictions.number("flips")
    found = [("of 100 questions, those that one arm alone has right",
              f"{expected:g}" if expected is not None else "not predicted: notebook 06",
              f"{sum(flips[0]['metrics'][name] for name in ('lost', 'gained'))}" if flips
              else "not measured yet: notebook 06")]
    ratios = slice_speed.predicted()
    for work in slice_speed.WORK:
        asked = {name: value for name, value in work.in_ledger().items() if name != "rounds"}
        speeds = [row["metrics"] for row in rows
                  if (row["experiment"], row["arm"]) == ("slice", "fp8")
                  and row["work"].get("numerics") == "w8a16"
                  and ledger_row.holds(row, (), verdicts.RATIO)
                  and asked.items() <= row["work"].items()]
        found.append((
            f"FP8 in W8A16 over bf16 at Phi-4's shapes: {work.title}",
            f"{ratios[work.title]:g}x" if work.title in ratios else "not predicted: notebook 07",
            "{:.2f}x ({:.2f} to {:.2f})".format(*(speeds[0][name] for name in verdicts.RATIO))
            if speeds else "not measured yet: notebook 07"))
    return pd.DataFrame(found, columns=["question", "predicted", "measured"])


def left_over(table: "pd.DataFrame") -> str:
    """One sentence of the published figures that were not measured: how many, and how to get them.

    "" where all of `measured_beside_published` have a verdict.
    """
    left = table.loc[table["verdict"] == NOT_HERE, "published claim"]
    if left.empty:
        return ""
    speeds = int(left.str.contains("per second").sum())
    scores = len(left) - speeds
    many = "all" if len(left) == len(table) else f"{len(left)} of the"
    return (f"Not measured here: {many} {len(table)} published figures ({scores} gsm8k scores, "
            f"{speeds} speeds). They are of Phi-4 itself: run notebooks 06 and 07 on a GPU that "
            "holds it, with `whole = True` in 06 for all 1,319 questions, and on an A40 for "
            "the speeds.")


def _latest(rows: list[dict], claim: dict, profile: str | None) -> dict | None:
    fitting = [r for r in rows
               if (r["experiment"], r["arm"]) == (claim["experiment"], claim["arm"])
               and profile in (None, r["model"]["profile"]) and _can_be_set_beside(r, claim)]
    same = [r for r in fitting if _same_work(r, claim)]
    # Else the nearest: one stream, and the number of rows that the claim is of, where it was run.
    single = [r for r in fitting if r["work"].get("concurrency", 1) == 1]
    nearest = [r for r in single if r["work"].get("limit") == claim["work"].get("limit")]
    return (same or nearest or single or [None])[-1]


def _can_be_set_beside(row: dict, claim: dict) -> bool:
    """Whether the row has what the claim is a figure of."""
    if claim["experiment"] == "throughput":
        return ledger_row.holds(row, (), ("output_tok_s", "output_tok_s_min", "output_tok_s_max"))
    return ledger_row.holds(row, ("limit",), (claim["work"].get("filter", "strict-match"),))


def _same_work(row: dict, claim: dict) -> bool:
    if row["model"]["repo"] not in PHI4:
        return False
    if claim["experiment"] == "throughput":
        # The card does not say how many streams: one is what this workbook takes it to mean.
        work = {**claim["work"], "concurrency": 1}
        return claim["hardware"] in str(row["hardware"].get("gpus")) and all(
            row["work"].get(k) == v for k, v in work.items())
    asked = {k: v for k, v in claim["work"].items() if k not in NOT_COMPARED}
    return all(row["work"].get(k) == v for k, v in asked.items())


def _metric(row: dict, claim: dict) -> tuple[float, float, float]:
    """The row's figure, from and to: Wilson's 95 % interval, or the range of the rounds."""
    metrics = row["metrics"]
    if claim["experiment"] == "throughput":
        return tuple(metrics[f"output_tok_s{end}"] for end in ("", "_min", "_max"))
    value, n = metrics[claim["work"].get("filter", "strict-match")], row["work"]["limit"]
    interval = stats.wilson(round(value * n), n)
    return interval.value, interval.low, interval.high


def _figure(value: float, unit: str) -> str:
    return f"{value} tok/s" if unit == "tok/s" else f"{value * SCALE.get(unit, 1):.4f}"


def _measured(row: dict, claim: dict) -> str:
    value, low, high = _metric(row, claim)
    if claim["experiment"] == "throughput":
        figure = f"{value:.0f} tok/s ({low:.0f} to {high:.0f})"
    else:
        figure = f"{value:.4f} ({low:.4f} to {high:.4f})"
    if _same_work(row, claim):
        return figure
    work = row["work"]
    on = f" on {work['limit']:,} rows of {work['task']}" if "task" in work else ""
    return f"another experiment: {row['model']['profile']}{on}, {figure}"


def _verdict(row: dict | None, claim: dict) -> str:
    if row is None or not _same_work(row, claim):
        return NOT_HERE
    _, low, high = _metric(row, claim)
    inside = low <= claim["value"] * SCALE.get(claim["unit"], 1) <= high
    return "agrees" if inside else "differs"


def main() -> int:
    """Print both tables."""
    try:
        profile = models.choose(hardware.detect())
        here = verdicts.of_this_machine(profile)
        beside = measured_beside_published(profile=profile.name)
    except WorkbookError as error:
        print(error, file=sys.stderr)
        return 1
    print(textwrap.fill(f"FP8 on this machine, of {profile.title} (the last row: of a slice of "
                        "Phi-4):", 100))
    print(_grid(here, [23, 23, 25, 16]))
    print(textwrap.fill("Notebook 09 has the rule of each verdict. Where rounds are too spread to "
                        "say, run it again on an idle machine.", 100))
    if len(same := compared(beside)):
        print(_grid(same, [24, 9, 26, 22, 9]))
        print("agrees, differs: the same model, task, rows and hardware as published.")
    print(textwrap.fill(left_over(beside), 100))
    return 0


def _grid(table: "pd.DataFrame", widths: list[int]) -> str:
    """A table of texts for a terminal, each column wrapped at its width."""
    columns = zip(table.columns, widths, strict=True)
    wrapped = {name: [textwrap.fill(text, width) for text in table[name]]
               for name, width in columns}
    return tabulate(wrapped, headers="keys", tablefmt="simple_grid", disable_numparse=True)


if __name__ == "__main__":
    sys.exit(main())
