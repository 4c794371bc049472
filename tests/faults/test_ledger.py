"""Faults of the ledger: rows of somebody else's, rows without figures, files that are closed."""

import json
import os
import re
import resource
import subprocess
import sys
import threading

import book
import nbformat
import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from small_disk import mounted

from helpers import (
    WorkbookError,
    card,
    course,
    ledger,
    ledger_row,
    models,
    report,
    verdicts,
    workspace,
)

REPO = workspace.repo()
MODEL = models.model_info(models.PHI4)
GSM8K = {"task": "gsm8k", "limit": 100, "num_fewshot": 5}
SCORES = {f"{name}{end}": value for name in ("strict-match", "flexible-extract")
          for end, value in (("", 0.9), ("_stderr", 0.03))}
SPEED = {"output_tok_s": 30.0, "output_tok_s_min": 29.0, "output_tok_s_max": 31.0}
RATE = {"output_tokens": 500, "concurrency": 1, "rounds": 5}
WORK, FIGURES = GSM8K | RATE, SCORES | SPEED
HOSTILE = [
    "<script>alert('evil')</script>", "<img src=x onerror=alert('evil')>",
    "[evil](javascript:alert(1))", "![evil](https://evil.example/pixel.png)",
    "a | b |\n|---|---|\n| evil | row |", "evil\n\n# evil heading\n\n<b>evil</b>",
    "`<b>evil</b>`", "``x`` <i>evil</i>", "https://evil.example/page", "www.evil.example",
    "<https://evil.example>", "$\\href{javascript:alert('evil')}{evil}$", "**evil**", "_evil_",
    "~~evil~~", "</td></tr></table><iframe src='https://evil.example'>",
    "\x1b]0;evil\x07\x1b[31mevil", "x\u202eevil", "&lt;b&gt;evil", "\\`<b>evil</b>",
]


def add(file, experiment="gsm8k", arm="fp8", work=GSM8K, metrics=SCORES, **other) -> dict:
    known = {"model": MODEL, "mode": "gpu-w8a8", "kernel": "K", "ledger": file} | other
    return ledger.record(experiment, arm, work, metrics, **known)


def rewritten(file, change) -> None:
    """The file's rows with `change` applied to each, as another program would write them."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows:
        change(row)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


@pytest.fixture
def file(tmp_path):
    return tmp_path / "ledger.jsonl"


# --- a row from someone else's ledger is data, never markup ---------------------------------------

def hostile_rows(file, text: str) -> list[dict]:
    """Rows of both experiments in which every text that is free says `text`."""
    if not file.exists():
        add(file)
        add(file, "throughput", work=RATE, metrics=SPEED)

    def change(row):
        row.update(mode=text, kernel=text, checkpoint=text, time=text, commit=text)
        row["hardware"].update(gpus=[text], cpu=text)
        row["versions"].update(vllm=text, llmcompressor=text)
        row["model"].update(repo=text, revision=text)
        row["work"] = {k: v for k, v in row["work"].items() if k in WORK} | {text: text}
        row["metrics"] = {k: v for k, v in row["metrics"].items() if k in FIGURES} | {text: 1.0}
        if row["experiment"] == "gsm8k":
            row["work"]["task"] = text

    rewritten(file, change)
    rows = ledger.read(file)
    assert len(rows) == 2
    return rows


def body_in_book(folder, texts: list[str]) -> BeautifulSoup:
    """The page of a notebook that shows such rows in every way that the workbook does."""
    folder.mkdir()
    outputs = []
    for text in texts:
        rows = hostile_rows(folder / "ledger.jsonl", text)
        table = report.measured_beside_published(rows)
        here = verdicts.of_this_machine(models.PHI4, rows)
        made = str(card.model_card(models.PHI4, rows)).partition("\n---\n")[2]
        outputs += [{"text/markdown": made},
                    {"text/markdown": table.map(ledger_row.as_markdown).to_markdown()},
                    {"text/html": table._repr_html_()},
                    {"text/markdown": here.map(ledger_row.as_markdown).to_markdown()},
                    {"text/html": here._repr_html_()},
                    {"text/html": ledger.table(rows)._repr_html_()}]
    cells = [new_markdown_cell("# Rows")] + [
        new_code_cell("show()", outputs=[new_output("display_data", data=data)])
        for data in outputs]
    nbformat.write(new_notebook(cells=cells), folder / "00_a.ipynb")
    book.build([folder / "00_a.ipynb"], folder / "book")
    page = (folder / "book" / "notebooks" / "00_a.html").read_text()
    return BeautifulSoup(page, "html.parser").body


@pytest.mark.fault("markup in a ledger's row, in the book of the notebooks")
def test_a_row_is_never_markup(tmp_path, monkeypatch, happened):
    """The page has the elements that it has for plain words, and no attribute says "evil"."""
    monkeypatch.setenv("PHI4_FP8_PROFILE", "tiny-phi4")
    course.open_course()  # as every notebook does; it sets how tables are shown
    hostile = body_in_book(tmp_path / "hostile", HOSTILE)
    plain = body_in_book(tmp_path / "plain", ["plain words"])

    def elements(body: BeautifulSoup) -> list[list[str]]:
        """Of every output, the names of its elements but those of code, how a text is shown."""
        return [[tag.name for tag in output.find_all(True) if tag.name not in ("code", "span")]
                for output in body.find_all(class_="cell_output")]

    assert elements(hostile) == elements(plain) * len(HOSTILE)
    assert hostile.get_text().count("evil") >= 10 * len(HOSTILE)
    assert not [tag for tag in hostile.find_all(True) if "evil" in str(tag.attrs)]
    for words in hostile.find_all(string=re.compile(r"\$")):  # no mathematics either
        table = words.find_parent("table")
        assert words.find_parent("code") or "tex2jax_ignore" in table.get("class", [])
    for sign in "\x1b\x07\u202e":
        assert sign not in hostile.get_text()
    happened(f"{len(HOSTILE)} texts are shown as they are: {ledger_row.as_markdown(HOSTILE[0])}")


@pytest.mark.fault("a ledger's row that would break the card's metadata")
@pytest.mark.parametrize("text", ["x\n---\nlicense: other", "a: b\nlicense: other", "'\"{}[]&*!"])
def test_a_row_in_the_cards_metadata(file, text, happened):
    made = card.model_card(models.PHI4, hostile_rows(file, text))
    assert made.data.license == "mit" and len(made.data.eval_results) == 2
    happened(made.data.eval_results[0].dataset_name)


# --- rows without figures, or of another form -----------------------------------------------------

@pytest.mark.fault("a ledger's row without its figures, in card and report")
@pytest.mark.parametrize(("score", "speed"), [
    ({}, {}), ({"strict-match": 0.9}, {"output_tok_s": 30.0}),
    ({}, SPEED | {"output_tok_s_max": float("nan")})], ids=["none", "some", "not a number"])
def test_a_row_without_figures(file, score, speed, happened):
    add(file, metrics=score)
    add(file, "throughput", work=RATE, metrics=speed)
    add(file, "quantize", work={}, metrics={})
    rows = ledger.read(file)
    text = str(card.model_card(models.PHI4, rows))
    assert text.count(card.NOT_MEASURED) == 5  # two arms of each table, and the size
    table = report.measured_beside_published(rows).set_index("published claim")
    speed = table.loc[[claim for claim in table.index if "per second" in claim], "measured"]
    assert set(speed) == {""}
    assert not ledger.table(rows).empty
    happened(f"the card says {card.NOT_MEASURED!r}")


@pytest.mark.fault("a ledger's row without its standard error")
def test_a_row_without_its_error(file, happened):
    add(file, metrics={"strict-match": 0.9, "flexible-extract": 0.9})
    assert "| 0.9000 | 0.826 to 0.945 |" in (text := str(card.model_card(
        models.PHI4, ledger.read(file))))
    happened(next(line for line in text.splitlines() if "| 0.9000 |" in line))


@pytest.mark.fault("a ledger's row with values of the wrong type")
@pytest.mark.parametrize(("field", "part", "value"), [
    ("metrics", "strict-match", "0.9"), ("metrics", "strict-match", 90), ("metrics", "x", [1]),
    ("metrics", "x", True), ("work", "limit", "100"), ("work", "limit", 0),
    ("work", "limit", 10**400), ("metrics", "bytes", 10**400),
    ("work", "num_fewshot", None), ("model", "profile", ["phi-4"]), ("hardware", "gpus", "A40"),
    ("versions", "vllm", 32)],
    ids=lambda value: str(value)[:14])
def test_a_row_of_wrong_types(file, field, part, value, happened):
    good = add(file)
    add(file)
    lines = file.read_text().splitlines()
    row = json.loads(lines[1])
    row[field][part] = value
    file.write_text(lines[0] + "\n" + json.dumps(row) + "\n")
    with pytest.warns(UserWarning, match=f"line 2 is skipped: {field}'s? ") as said:
        assert ledger.read(file) == [good]
    happened(said[0].message)


@pytest.mark.fault("a line of a thousand brackets in the ledger")
@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_a_line_of_nested_brackets(file, opening, happened):
    good = add(file)
    with open(file, "a") as handle:
        handle.write(opening * 100_000 + "\n")
    with pytest.warns(UserWarning, match="line 2 is skipped: nested too deep") as said:
        assert ledger.read(file) == [good]
    happened(said[0].message)


@pytest.mark.fault("a line separator inside a ledger's row")
def test_a_separator_within_a_row(file, happened):
    """U+2028 and its like end a line for Python's splitlines, and not for JSON lines."""
    add(file)
    rewritten(file, lambda row: row.update(kernel="a\u2028b\x85c"))
    assert [row["kernel"] for row in ledger.read(file)] == ["a b c"]
    happened("the row was read")


@pytest.mark.fault("a ledger of the workbook's first form")
def test_rows_of_schema_1(file, happened):
    new = add(file)

    def older(row):
        row["schema"] = 1
        row["path"] = row.pop("mode")

    rewritten(file, older)
    assert ledger.read(file) == [new]
    with open(file, "a") as handle:
        handle.write(json.dumps(new | {"schema": 3}) + "\n")
    with pytest.warns(UserWarning, match="schema 3, this workbook reads 1 to 2") as said:
        assert len(ledger.read(file)) == 1
    happened(said[0].message)


# --- a ledger that cannot be written or read ------------------------------------------------------

@pytest.mark.fault("the disk is full when a result is recorded")
def test_a_full_disk(tmp_path, happened):
    with mounted(tmp_path / "disk", "size=16k") as disk:
        file = disk / "ledger.jsonl"
        first = add(file)
        (disk / "other").write_bytes(b"")
        with pytest.raises(OSError), open(disk / "other", "wb", buffering=0) as other:
            while True:
                other.write(b"\0" * 4096)
        before = file.read_bytes()
        with pytest.raises(WorkbookError, match="No space left") as said:
            for _ in range(20):  # until the ledger's own page is full
                before = file.read_bytes()
                add(file)
        assert file.read_bytes() == before  # no half row
        os.unlink(disk / "other")
        last = add(file)
        assert [ledger.read(file)[0], ledger.read(file)[-1]] == [first, last]
    happened(said.value)


@pytest.mark.fault("a quota that ends in the middle of a ledger's row")
def test_a_quota(file, happened):
    """RLIMIT_FSIZE cuts a write short, as a quota does: the first part of the row arrives."""
    add(file)
    before = file.read_bytes()
    program = ("import resource, signal, sys; from pathlib import Path\n"
               "from helpers import WorkbookError, ledger\n"
               "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
               "place, most = Path(sys.argv[1]), int(sys.argv[2])\n"
               "resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))\n"
               "try: ledger.record('serve', 'fp8', {}, {}, model={'profile': '', 'repo': '',\n"
               "    'revision': ''}, mode='', kernel='', ledger=place)\n"
               "except WorkbookError as error: print(error)")
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    said = subprocess.run([sys.executable, "-c", program, file, str(len(before) + 50)], cwd=REPO,
                          capture_output=True, text=True)
    assert "could not be added" in said.stdout, said.stderr
    assert file.read_bytes() == before
    happened(said.stdout)


@pytest.mark.fault("a read-only workspace when a result is recorded")
def test_a_read_only_disk(tmp_path, happened):
    with mounted(tmp_path / "disk", "size=64k") as disk:
        row = add(disk / "ledger.jsonl")
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        with pytest.raises(WorkbookError, match="Read-only file system") as said:
            add(disk / "ledger.jsonl")
        assert ledger.read(disk / "ledger.jsonl") == [row]
    happened(said.value)


@pytest.mark.fault("a folder where the ledger should be")
def test_a_folder_called_ledger(file, happened):
    file.mkdir()
    with pytest.raises(WorkbookError, match="could not be added to .*Is a directory"):
        add(file)
    with pytest.raises(WorkbookError, match="cannot be read: Is a directory") as said:
        ledger.read(file)
    happened(said.value)


@pytest.mark.fault("a pipe where the ledger should be")
def test_a_pipe_called_ledger(file, happened):
    """Opening one waits for its other end; here somebody holds it, and a pipe has no end."""
    os.mkfifo(file)
    holder = threading.Thread(target=lambda: open(file, "rb").close(), daemon=True)
    holder.start()
    with pytest.raises(WorkbookError, match="could not be added") as said:
        add(file)
    happened(said.value)


# --- the published figures ------------------------------------------------------------------------

@pytest.mark.fault("published figures that are no JSON, or of another form")
@pytest.mark.parametrize("content", [b"", b"[{", b"[]", b'{"a": 1}', b'[{"claim": "x"}]', b"\xff",
                                     b"[" * 100_000])
def test_broken_published_figures(tmp_path, monkeypatch, content, happened):
    data = tmp_path / "data"
    (data / "published").mkdir(parents=True)
    form = REPO / "data" / "published.schema.json"
    (data / "published.schema.json").write_text(form.read_text())
    (data / "published" / "trelis.json").write_bytes(content)
    monkeypatch.setattr(workspace, "data", lambda *parts: data.joinpath(*parts))
    with pytest.raises(WorkbookError, match="trelis.json does not hold published figures") as said:
        report.measured_beside_published([])
    assert "git checkout -- data/published/trelis.json" in str(said.value)
    happened(said.value)


@pytest.mark.fault("a ledger that cannot be read, from the command line")
@pytest.mark.parametrize("module", ["helpers.ledger", "helpers.report"])
def test_the_command_line_says_a_sentence(tmp_path, module, happened):
    (tmp_path / "ledger.jsonl").mkdir()
    said = subprocess.run([sys.executable, "-m", module], cwd=REPO, capture_output=True, text=True,
                          env=os.environ | {"PHI4_FP8_WORKSPACE": str(tmp_path)})
    assert said.returncode == 1 and "cannot be read" in said.stderr
    happened(said.stderr)


@pytest.mark.fault("a ledger's name that is mistyped")
def test_a_mistyped_name(capsys, tmp_path, happened):
    assert ledger.main([str(tmp_path / "leger.jsonl")]) == 1
    said = capsys.readouterr().err
    assert "There is no file" in said
    happened(said)
