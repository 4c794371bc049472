"""The book: pages, navigation and search of executed notebooks, with nothing to fetch."""

import json
import re
from pathlib import Path
from urllib.parse import unquote, urlparse

import book
import nbformat
import pytest
import run_notebooks
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

VIEW, STATE = book.VIEW, book.STATE
CONTROL = {
    "box": {"model_name": "VBoxModel", "state": {"children": ["IPY_MODEL_aa", "IPY_MODEL_bb",
                                                              "IPY_MODEL_cc"]}},
    "aa": {"model_name": "DropdownModel", "state": {"description": "a menu"}},
    "bb": {"model_name": "HTMLModel", "state": {"value": "scale = <b>2</b>"}},
    "cc": {"model_name": "OutputModel", "state": {"outputs": [
        {"output_type": "stream", "name": "stdout", "text": "1 < 2\n"},
        {"output_type": "display_data", "data": {"text/html": "<img alt='a picture of scales'>",
                                                 "text/plain": "<HTML>"}}]}},
}


def notebook(folder: Path, name: str, prose: str, *outputs, widgets=None) -> Path:
    nb = new_notebook(cells=[new_markdown_cell(prose),
                             new_code_cell("show()", outputs=list(outputs),
                                           execution_count=1)])
    if widgets:
        nb.metadata["widgets"] = {STATE: {"state": widgets, "version_major": 2}}
    folder.mkdir(exist_ok=True)
    nbformat.write(nb, folder / name)
    return folder / name


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The project's own notebooks in a book, with one more that has every kind of output."""
    folder = tmp_path_factory.mktemp("book")
    extra = notebook(
        folder / "ran", "a9_more.ipynb",
        "# More\n\n## Words\n\n[First](00_start_here.ipynb), [none](77_gone.ipynb), "
        "[terms](glossary.md), [its heart](../helpers/fp8.py)\n\n"
        "$$\\texttt{a\\_b} = \\tfrac{m}{8}$$\n\n<details><summary>Solution</summary>\n\n"
        "```python\nanswer = 1\n```\n\n</details>",
        new_output("stream", text="quasiperiodic words\n"),
        new_output("display_data", data={"text/markdown": "| a | b |\n|---|---|\n| $1$ | 2 |"}),
        new_output("display_data", data={VIEW: {"model_id": "box", "version_major": 2,
                                                "version_minor": 0}, "text/plain": "VBox()"}),
        widgets=CONTROL)
    warned = book.build([*run_notebooks.notebooks(), extra], folder / "site")
    assert warned == []
    return folder / "site"


def page(site: Path, name: str) -> BeautifulSoup:
    return BeautifulSoup((site / name).read_text(), "html.parser")


def test_every_notebook_is_a_page_with_its_title_in_the_navigation(site):
    titles = [re.search(r"^# (.+)$", nbformat.read(path, as_version=4).cells[0].source, re.M)[1]
              for path in run_notebooks.notebooks()]
    for name in ("index.html", "notebooks/05_serve_with_vllm.html"):
        found = [link.get_text() for link in page(site, name).select(".sidebar-tree a")]
        assert found == [*titles, "More", "Glossary"]


def test_every_address_within_the_book_is_there_and_nothing_else_is_loaded(site):
    for file in site.rglob("*.html"):
        for tag in BeautifulSoup(file.read_text(), "html.parser").find_all(True):
            loads = tag.get("src") or (tag.get("href") if tag.name == "link" else "") or ""
            address = urlparse(loads or (tag.get("href") if tag.name == "a" else "") or "")
            assert not loads or address.scheme in ("", "data"), f"{file.name} loads {loads}"
            if address.path and not address.scheme:
                assert (file.parent / unquote(address.path)).exists(), f"{file.name}: {address}"
    for style in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*['\"]?(https?:)?//", style.read_text()), style


def test_what_a_notebook_links_to(site):
    more = page(site, "notebooks/a9_more.html").find("article")
    links = {link.get_text(): link["href"] for link in more.find_all("a")}
    assert links["First"] == "00_start_here.html" and links["terms"] == "glossary.html"
    assert "def encode" in (site / "notebooks" / links["its heart"]).read_text()
    assert "none" not in links and "none" in more.get_text()  # a notebook that was not run


def test_formulas_tables_and_folded_solutions(site):
    more = page(site, "notebooks/a9_more.html").find("article")
    assert more.find("math").get_text() == "a_b=m8" and more.find("mfrac")
    assert [cell.get_text() for cell in more.find("table").find_all("td")] == ["$1$", "2"]
    assert more.find("details").find("pre").get_text() == "answer = 1\n"
    assert "quasiperiodic words" in more.get_text()


def test_a_control_shows_what_it_showed_first(site):
    more = page(site, "notebooks/a9_more.html").find("article")
    assert "In JupyterLab there are controls here" in more.get_text()
    assert more.find("b").get_text() == "2" and "1 < 2" in more.get_text()
    assert more.find("img")["alt"] == "a picture of scales"
    assert "VBox()" not in more.get_text() and not more.find("script")


def test_the_search_knows_every_page_and_is_a_script(site):
    """A page from a folder may load a script, not a JSON file."""
    text = (site / "searchindex.js").read_text()
    index = json.loads(text.removeprefix("Search.setIndex(").removesuffix(")"))
    assert {"More", "Glossary"} <= set(index["titles"])
    word = next(key for key in index["terms"] if key.startswith("quasiperiod"))
    assert index["docnames"][index["terms"][word]] == "notebooks/a9_more"
    assert [tag["src"] for tag in page(site, "search.html").find_all("script")
            if "searchindex" in tag.get("src", "")] == ["searchindex.js"]


def test_which_notebooks_are_in_it(tmp_path, monkeypatch):
    """Those that were run, of an older workbook none; where none was run, the project's own."""
    monkeypatch.setattr(run_notebooks, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setattr(book, "BUILD", tmp_path / "build")
    of_project = [notebook(tmp_path / "notebooks", name, "# A") for name in
                  ("00_a.ipynb", "01_b.ipynb")]
    assert book.executed() == of_project
    (tmp_path / "build").mkdir()
    ran = [notebook(tmp_path / "build" / "notebooks", name, "# A") for name in
           ("01_b.ipynb", "04_gone.ipynb")]
    assert book.executed() == ran[:1]
    nb = new_notebook(cells=[new_code_cell("1 / 0")])
    for outputs in ([new_output("error")], []):  # one that failed, one that was stopped
        nb.cells[0].outputs, nb.cells[0].execution_count = outputs, len(outputs) or None
        nbformat.write(nb, ran[0])
        assert book.executed() == of_project


def test_the_program_names_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_notebooks, "NOTEBOOKS", tmp_path)
    monkeypatch.setattr(book, "BUILD", tmp_path / "build")
    notebook(tmp_path, "00_a.ipynb", "# A")
    assert book.main() == 0
    said = capsys.readouterr()
    assert said.out == "The book, of 1 notebook(s): build/book/index.html\n" and not said.err
    assert [file.name for file in (tmp_path / "build").iterdir()] == ["book"]
