"""Measured beside published: the workbook's closing table, from the ledger and `data/published`.

`python -m helpers.report` prints it; with `--readme` it rewrites the README's results from
`data/measured`.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tabulate import tabulate

from helpers import WorkbookError, cpu_bench, hardware, ledger, ledger_row, models, stats, workspace

if TYPE_CHECKING:
    import pandas as pd

# What a row must share with the published one before the two may be called equal or different.
# A speed also needs the same GPU; an accuracy does not depend on how fast it was computed.
PHI4 = {"microsoft/phi-4", "NyxKrage/Microsoft_Phi-4"}
# Of a claim's work: its name, how its figure is read, and a length that no prompt of it reaches.
NOT_COMPARED = ("filter", "version", "benchmark", "max_model_len")
SCALE = {"percent right": 0.01}


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
            "mode": f"{row['mode']}, {row['kernel']}" if row else "",
            "verdict": _verdict(row, claim),
        })
    return pd.DataFrame(table)


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
        return "not measured here"
    _, low, high = _metric(row, claim)
    inside = low <= claim["value"] * SCALE.get(claim["unit"], 1) <= high
    return "agrees" if inside else "differs"


def readme_results() -> str:
    """The README's results as Markdown, from the ledgers committed under `data/measured`."""
    machines: dict[str, list[Path]] = {}
    for file in sorted(set(workspace.data("measured").glob("*.jsonl")) - {cpu_bench.RECORDED}):
        for last in ledger.read(file)[-1:]:
            vllm, compressor = (ledger_row.as_markdown(last["versions"].get(name, "unknown"))
                                for name in ("vllm", "llmcompressor"))
            title = (f"{ledger_row.as_markdown(ledger_row.device(last))} (vLLM {vllm}, "
                     f"llmcompressor {compressor})")
            machines.setdefault(title, []).append(file)
    return "\n\n".join(
        f"On {title}, from " + " and ".join(
            f"[`{file.name}`](data/measured/{file.name})" for file in files) + ":\n\n"
        + measured_beside_published(ledger.merge(files)).map(ledger_row.as_markdown).to_markdown(
            index=False)
        for title, files in machines.items())


def readme_bench() -> str:
    """The README's figures of FP8 on a CPU as Markdown, from what was recorded on one machine."""
    rows = ledger.read(cpu_bench.RECORDED)
    last, name = rows[-1], cpu_bench.RECORDED.name
    machine, day = last["hardware"], last["time"][:10]
    return (f"On {machine['cpu']}, {machine['cores']} cores ({day}, "
            f"vLLM {last['versions']['vllm']}), medians of {last['work']['rounds']} rounds from "
            f"[`{name}`](data/measured/{name}):\n\n"
            + cpu_bench.table(cpu_bench.records(rows)).to_markdown(index=False))


def write_readme() -> None:
    """Put `readme_results` and `readme_bench` between the README's markers."""
    readme = workspace.repo() / "README.md"
    text = readme.read_text()
    for name, block in (("results", readme_results()), ("bench", readme_bench())):
        head, rest = text.split(f"<!-- {name} -->\n")
        _, tail = rest.split(f"<!-- /{name} -->")
        text = f"{head}<!-- {name} -->\n{block}\n<!-- /{name} -->{tail}"
    readme.write_text(text)


def main(arguments: list[str]) -> int:
    """Print the table, or rewrite the README's with `--readme`."""
    try:
        if arguments == ["--readme"]:
            write_readme()
            return 0
        chosen = models.choose(hardware.detect()).name
        table = measured_beside_published(profile=chosen)
    except WorkbookError as error:
        print(error, file=sys.stderr)
        return 1
    print(tabulate(table, headers="keys", showindex=False, tablefmt="simple_grid",
                   maxcolwidths=[24, 9, 26, 22, 9]))
    print("agrees, differs: the same model, task, rows and hardware as published. not measured "
          "here:\nother work, which proves nothing about the published figure, either way.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
