"""The guide: its minutes, agendas that add up, sentences that the workbook says, every picture."""

import ast
import re

import guide
import pytest
import run_notebooks
from conftest import REPO

from helpers import check

TEXT = guide.GUIDE.read_text()
SECTIONS = dict(re.findall(r"^### ([^\n]+)\n\n(.*?)(?=^##|\Z)", TEXT, re.M | re.S))
AGENDAS = {"90 minutes": 90, "Half a day": 210, "A day": 435}
HOLE = "…"


def titles() -> dict[str, str]:
    """The notebooks' titles by stem."""
    return {path.stem: guide.read(path).cells[0].source.splitlines()[0].removeprefix("# ")
            for path in run_notebooks.notebooks()}


def said() -> str:
    """Every text of the sources, what is filled in as `HOLE`, one a line."""
    found = []
    for folder in ("helpers", "scripts"):
        for path in (REPO / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    found.append("".join(part.value if isinstance(part, ast.Constant) else HOLE
                                         for part in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return "\n".join(" ".join(text.split()) for text in found)


def test_the_minutes_are_those_of_the_notebooks_and_tasks():
    assert guide.rewritten(TEXT) == TEXT, "run scripts/guide.py"
    for number, title in ((stem[:2], title) for stem, title in titles().items()):
        row = next(line for line in TEXT.splitlines() if line.startswith(f"| {title} |"))
        minutes = sum(task.minutes for task in check.TASKS.values() if task.notebook == number)
        assert f"| {minutes} (" in row


def test_reading_is_counted_in_words_and_what_is_folded_is_left_out(tmp_path):
    import nbformat
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

    folded = "<details><summary>Solution</summary>\n\nmany words\n\n</details>"
    nbformat.write(new_notebook(cells=[new_markdown_cell(f"one two {folded} three"),
                                       new_code_cell("x = 1")]), tmp_path / "00_a.ipynb")
    assert guide.words(tmp_path / "00_a.ipynb") == 6
    nbformat.write(new_notebook(cells=[new_markdown_cell("word " * 301)]), tmp_path / "00_a.ipynb")
    assert guide.reading_minutes(tmp_path / "00_a.ipynb") == 3  # and no less than it takes


@pytest.mark.parametrize("name", AGENDAS)
def test_an_agenda_adds_up(name):
    rows = re.findall(r"^\| (\d+):(\d\d) \| (\d+) \| (.+) \|$", SECTIONS[name], re.M)
    at = 0
    for hours, minutes, lasts, _ in rows:
        assert 60 * int(hours) + int(minutes) == at
        at += int(lasts)
    assert at == AGENDAS[name]
    for task in re.findall(r"`(\w+)`", SECTIONS[name]):
        assert task in check.TASKS


def test_the_day_has_time_for_every_notebook():
    given = {number: int(lasts) for lasts, number in re.findall(
        r"^\| [\d:]+ \| (\d+) \| Notebook (\d\d) \|$", SECTIONS["A day"], re.M)}
    needed = dict(re.findall(r"^\| (\d\d) · .*\| (\d+) \|$", TEXT, re.M))
    assert len(given) == 10
    for number, minutes in given.items():
        assert minutes >= int(needed[number]), f"notebook {number} takes {needed[number]}"


def test_each_notebook_has_its_section_with_all_its_parts():
    parts = [f"**{part}**" for part in ("Its point", "When late", "Asked", "Goes wrong",
                                        "Pictures")]
    for title in titles().values():
        assert [SECTIONS[title].count(part) for part in parts] == [1] * 5, title
        assert re.search(r"^> ", SECTIONS[title], re.M), title


@pytest.mark.parametrize("sentence", re.findall(r"^> (.+)$", TEXT, re.M))
def test_the_workbook_says_what_the_guide_quotes(sentence):
    assert len(sentence.replace(HOLE, "").split()) >= 3
    assert sentence in said(), f"no source says: {sentence}"


def test_there_is_a_word_on_every_picture_and_none_on_another():
    for path in run_notebooks.notebooks():
        section = SECTIONS[titles()[path.stem]]
        code = "\n".join(cell.source for cell in guide.read(path).cells
                         if cell.cell_type == "code")
        shown = set(re.findall(r"plots\.(\w+)\(", code)) | set(
            re.findall(r"widgets\.(\w+)\(", code)) - {"budget_table"}
        pictures = section.partition("**Pictures**")[2]
        assert set(re.findall(r"`(\w+)`", pictures)) == shown, path.name


def test_every_command_of_the_guide_is_a_target():
    makefile = (REPO / "Makefile").read_text()
    for target in set(re.findall(r"`make ([a-z-]+)", TEXT)):
        assert re.search(rf"^{target}:", makefile, re.M), target
