"""The deck: its notebook's form, and a page that fetches nothing. `make test-browser` shows it."""

import re

import nbformat
import slides
import test_notebooks
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

SOURCE = nbformat.read(slides.WORKSHOP / "slides.ipynb", as_version=4)
NAMES = re.compile(r"Phi-4|FP8|bf16|E4M3|INT8|W8A16|W8A8|W4A16|[Nn]otebook 0\d")


def kind(cell) -> str:
    return cell.metadata.get("slideshow", {}).get("slide_type", "")


def test_about_twenty_slides_with_a_title_each_and_notes_for_the_speaker():
    slides_of = [cell for cell in SOURCE.cells if kind(cell) == "slide"]
    assert 18 <= len(slides_of) <= 25
    assert all(re.match(r"##? \S", cell.source) for cell in slides_of)
    assert sum(kind(cell) == "notes" for cell in SOURCE.cells) == len(slides_of)


def test_no_figure_is_typed_by_hand():
    """A slide's words have no number but in names; the cells compute the figures."""
    for cell in SOURCE.cells:
        if cell.cell_type == "markdown":
            assert not re.search(r"\d", NAMES.sub("", cell.source)), cell.source
        else:
            assert not cell.outputs and cell.execution_count is None


def test_every_name_of_a_helper_is_there():
    test_notebooks.test_every_name_of_a_helper_is_there(SOURCE)


def test_the_page_has_all_that_it_needs():
    picture = new_output("display_data", data={"text/html": "<img alt='scales' src='data:,'>"})
    nb = new_notebook(cells=[
        new_markdown_cell("# One", metadata={"slideshow": {"slide_type": "slide"}}),
        new_code_cell("draw()", outputs=[picture]),
        new_markdown_cell("Say this.", metadata={"slideshow": {"slide_type": "notes"}}),
        new_markdown_cell("## Two", metadata={"slideshow": {"slide_type": "slide"}})])
    html = slides.deck(nb)
    page = BeautifulSoup(html, "html.parser")
    assert [title.get_text() for title in page.select("section section h1, section section h2")
            ] == ["One", "Two"]
    assert page.find("aside", class_="notes").get_text().strip() == "Say this."
    assert page.find("img")["alt"] == "scales" and "draw()" not in page.get_text()
    assert not page.find_all("link") and not page.find_all(["script", "iframe"], src=True)
    assert not re.search(r"@import|url\(\s*['\"]?(https?:)?//", html)
    assert "Reveal.initialize" in html and (slides.REVEAL / "reveal.css").read_text()[:200] in html
