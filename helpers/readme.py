"""What the README shows of results: two pictures and three tables, written from what is kept.

`python -m helpers.readme` puts them between the README's markers. The pictures are those of the
committed notebooks; the tables are made from the ledgers in `data/measured`.
"""

import base64
import html
import json
import re
from pathlib import Path

from helpers import cpu_bench, ledger, ledger_row, models, rehearsed, report, verdicts, workspace

RUN = workspace.data("measured", "cpu-tiny-phi4.jsonl")  # of the committed notebooks
# Where a picture goes, the notebook it is from, and how its description begins there.
PICTURES = (("speed.png", "07_reproduce_throughput", "Speed over bf16"),
            ("schemes.png", "08_choose_a_scheme", "KL on SmolLM2-135M over GB"))


def picture(notebook: str, begins: str) -> tuple[str, bytes]:
    """Description and PNG of the committed notebook's first picture whose description begins so."""
    place = workspace.repo() / "notebooks" / f"{notebook}.ipynb"
    for cell in json.loads(place.read_text())["cells"]:
        for output in cell.get("outputs", []):
            found = re.search(r'alt="([^"]*)"[^>]*base64,([A-Za-z0-9+/=]+)',
                              "".join(output.get("data", {}).get("text/html", "")))
            if found and html.unescape(found[1]).startswith(begins):
                return html.unescape(found[1]), base64.b64decode(found[2])
    raise LookupError(f"{notebook} holds no picture of {begins!r}")


def pictures() -> str:
    """The two pictures as Markdown, with the machine they were measured on."""
    row = next(row for row in ledger.read(RUN) if row["experiment"] == "slice")
    shown = [f"![{picture(notebook, begins)[0]}](data/measured/{name})"
             for name, notebook, begins in PICTURES]
    device = ledger_row.as_markdown(ledger_row.device(row))
    live = (f"One run of notebook 07, kept here, on {device}, with no GPU ({row['time'][:10]}): "
            f"{row['work']['layers']} of Phi-4's 40 layers at full size, in vLLM. FP8 in W8A16 is "
            "the arithmetic of an A40; INT8 in W8A8 plays the part of FP8 in W8A8 on a Hopper. The "
            "ranges are this run's; another hour's can lie outside.")
    loss = ("Notebook 08 sets beside it what each scheme loses, against the bytes it reads. "
            "(SmolLM2's weights come out of a 4-bit file.)")
    return "\n\n".join([live, shown[0], loss, shown[1]])


def results() -> str:
    """The results as Markdown, from the ledgers committed under `data/measured`."""
    machines: dict[str, list[Path]] = {}
    for file in sorted(set(workspace.data("measured").glob("*.jsonl")) - {cpu_bench.RECORDED}):
        for last in ledger.read(file)[-1:]:
            vllm, compressor = (ledger_row.as_markdown(last["versions"].get(name, "unknown"))
                                for name in ("vllm", "llmcompressor"))
            title = (f"{ledger_row.as_markdown(ledger_row.device(last))} (vLLM {vllm}, "
                     f"llmcompressor {compressor})")
            machines.setdefault(title, []).append(file)
    return "\n\n".join(
        f"Kept runs on {title}, from " + " and ".join(
            f"[`{file.name}`](data/measured/{file.name})" for file in files) + ":\n\n"
        + _as_markdown(ledger.merge(files)) for title, files in machines.items())


def _as_markdown(rows: list[dict]) -> str:
    """Both closing tables of one machine's rows: verdicts that they allow, by known profile."""
    names = {row["model"]["profile"] for row in rows}
    known = (models.PHI4, models.PHI4_MINI, models.SMOLLM2, models.tiny())
    tables = {}
    for each in known:
        if each.name in names:
            of_it = verdicts.of_this_machine(each, rows)
            tables[f"Of {each.title}:"] = of_it[of_it["verdict"] != verdicts.MISSING]
    beside = report.measured_beside_published(rows)
    if len(same := report.compared(beside)):
        tables["Of what was published:"] = same
    parts = [f"{title}\n\n{table.map(ledger_row.as_markdown).to_markdown(index=False)}"
             for title, table in tables.items()]
    return "\n\n".join([*parts, report.left_over(beside)]).strip()


def bench() -> str:
    """The figures of FP8 on CPUs as Markdown, from the runs that were recorded."""
    rows, name = ledger.read(cpu_bench.RECORDED), cpu_bench.RECORDED.name
    runs = {ledger_row.device(row): row["time"][:10] for row in rows}
    return ("On " + " and on ".join(f"{machine} ({day})" for machine, day in runs.items())
            + f", vLLM {rows[-1]['versions']['vllm']}, medians of {rows[-1]['work']['rounds']} "
            f"rounds from [`{name}`](data/measured/{name}):\n\n"
            + cpu_bench.table(cpu_bench.records(rows)).to_markdown(index=False))


def main() -> None:
    """Write the pictures' files, and all blocks between the README's markers."""
    for name, notebook, begins in PICTURES:
        workspace.data("measured", name).write_bytes(picture(notebook, begins)[1])
    readme = workspace.repo() / "README.md"
    text = readme.read_text()
    for name, block in (("pictures", pictures()), ("results", results()), ("bench", bench()),
                        ("gpus", rehearsed.as_markdown())):
        head, rest = text.split(f"<!-- {name} -->\n")
        _, tail = rest.split(f"<!-- /{name} -->")
        text = f"{head}<!-- {name} -->\n{block}\n<!-- /{name} -->{tail}"
    readme.write_text(text)


if __name__ == "__main__":
    main()
