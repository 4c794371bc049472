"""What leads a reader somewhere leads to what is there.

Links and their anchors, numbers of notebooks in words, targets of make, tables of the README.
"""

import re
from functools import cache

import nbformat
import pytest
from conftest import REPO

from helpers import check, models, verdicts

NOTEBOOKS = REPO / "notebooks"
STEMS = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
NUMBERS = {stem[:2] for stem in STEMS}
PAGES = sorted([*NOTEBOOKS.glob("*.ipynb"), NOTEBOOKS / "glossary.md", REPO / "README.md",
                *(path for folder in ("data", "helpers", "training")
                  for path in (REPO / folder).rglob("*.md"))])
SOURCES = sorted([REPO / "Makefile", *REPO.glob("requirements/*.txt"), *(
    path for folder in ("helpers", "scripts", "tests", "training", "data")
    for path in (REPO / folder).rglob("*") if path.suffix in (".py", ".md"))])
# "notebook 05", "notebooks 01 to 04", "notebooks 02, 06 and 07", "Notebook a1".
NAMED = re.compile(r"\bnotebooks?\s+((?:[0-9a]\d)(?:(?:,| and| to| or)+\s+[0-9a]\d)*)\b", re.I)


@cache
def text(path) -> str:
    """A page's Markdown: the prose of a notebook, the whole of any other file."""
    if path.suffix != ".ipynb":
        return path.read_text()
    return "\n\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells
                       if cell.cell_type == "markdown")


def links(path) -> list[tuple[str, str, str]]:
    """(text, file, anchor) of every link that leads to a file of ours; "" is the page itself."""
    found = re.findall(r"\[([^\]]*)\]\(([^)#\s]*)(?:#([^)\s]*))?\)", text(path))
    return [link for link in found if "://" not in link[1]]


def anchors(path) -> set[str]:
    """The ids of a page's headings, in GitHub's form and in Jupyter's."""
    headings = re.findall(r"^#+ (.+)$", text(path), re.M)
    github = {re.sub(r"[^\w\- ]", "", each).strip().lower().replace(" ", "-") for each in headings}
    return github | {each.strip().replace(" ", "-") for each in headings}


def by_number(number: str):
    (stem,) = (stem for stem in STEMS if stem.startswith(number))
    return NOTEBOOKS / f"{stem}.ipynb"


def title(path) -> str:
    return re.search(r"^# (.+)$", text(path), re.M)[1]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(REPO)))
def test_every_link_leads_to_a_file_and_a_heading(path):
    for said, file, anchor in links(path):
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), f"[{said}]({file})"
        assert target.is_relative_to(REPO)
        assert not anchor or anchor in anchors(target), f"[{said}]({file}#{anchor})"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(REPO)))
def test_a_links_number_and_title_are_the_notebooks(path):
    for said, file, _ in links(path):
        if file.endswith(".ipynb"):
            stem = file.rpartition("/")[2].removesuffix(".ipynb")
            if number := re.search(r"(?<![\w.])[0-9a]\d(?![\w.])", said):
                assert stem.startswith(number[0]), f"[{said}]({file})"
            if " · " in said:
                assert title(NOTEBOOKS / f"{stem}.ipynb") in said, f"[{said}]({file})"


def test_titles_are_numbered_as_the_files_are():
    for stem in STEMS:
        begins = title(by_number(stem[:2])).split(" · ")[0]
        assert begins == (stem[:2] if stem[0] == "0" else "Appendix")


def test_each_notebook_leads_to_the_next_and_back():
    course = [stem for stem in STEMS if stem[0] == "0"]
    for stem, following in zip(course, course[1:], strict=False):
        opening = nbformat.read(NOTEBOOKS / f"{stem}.ipynb", as_version=4).cells[0].source
        assert re.search(rf"\[Next: [^\]]+ →\]\({following}\.ipynb\)", opening)
        back = nbformat.read(NOTEBOOKS / f"{following}.ipynb", as_version=4).cells[0].source
        assert re.search(rf"\[← [^\]]+\]\({stem}\.ipynb\)", back)
    assert any(file.startswith("a1_") for stem in course
               for _, file, _ in links(NOTEBOOKS / f"{stem}.ipynb"))


@pytest.mark.parametrize("path", [*PAGES, *SOURCES], ids=lambda path: str(path.relative_to(REPO)))
def test_a_notebook_named_by_number_or_file_is_there(path):
    whole = path.read_text()
    for said in NAMED.findall(whole):
        assert set(re.findall(r"[0-9a]\d", said)) <= NUMBERS, said
    for stem in re.findall(r"(?<![\w-])[0-9a]\d_[a-z0-9]+_\w+(?=\.ipynb|[\"'`])", whole):
        assert stem in STEMS, stem


@pytest.mark.parametrize("path", [*PAGES, *SOURCES], ids=lambda path: str(path.relative_to(REPO)))
def test_a_target_of_make_that_is_named_is_the_makefiles(path):
    targets = re.findall(r"^([a-z0-9-]+):", (REPO / "Makefile").read_text(), re.M)
    assert set(re.findall(r"`make ([a-z0-9-]+)", path.read_text())) <= set(targets)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(REPO)))
def test_what_is_quoted_of_the_readme_stands_there(path):
    for quoted in re.findall(r"README's \"([^\"]+)\"", text(path)):
        assert quoted in (REPO / "README.md").read_text(), quoted


def test_the_notebook_that_a_verdict_waits_for_records_its_figure():
    waiting = verdicts.of_this_machine(models.tiny(), [])["measured"]
    for number in {NAMED.findall(said)[0] for said in waiting}:
        assert re.search(r"\w\.record(_served)?\(", by_number(number).read_text()), number


def test_each_task_is_asked_by_the_notebook_that_it_names():
    asked = [(name, stem[:2]) for stem in STEMS for name in re.findall(
        r"check\.(\w+)\(answer\)", (NOTEBOOKS / f"{stem}.ipynb").read_text())]
    assert len(asked) >= len(STEMS) - 1
    assert [(name, check.TASKS[name].notebook) for name, _ in asked if name in check.TASKS] == [
        (name, number) for name, number in asked if name in check.TASKS]


def test_the_readme_lists_every_notebook_with_its_title_and_a_question():
    rows = re.findall(r"^\| \[([^\]]+)\]\(notebooks/(\w+)\.ipynb\) \| (.+) \|$",
                      (REPO / "README.md").read_text(), re.M)
    assert [stem for _, stem, _ in rows] == STEMS
    for said, stem, question in rows:
        assert said == title(NOTEBOOKS / f"{stem}.ipynb").replace(" · ", " ", stem[0] == "0")
        assert question.endswith("?")
        opening = nbformat.read(NOTEBOOKS / f"{stem}.ipynb", as_version=4).cells[0].source
        if asked := re.search(r"\*\*The question:?\*\*:? (.+?\?)", opening):
            assert question.lower() == asked[1].lower()
