"""The committed notebooks: their form, and outputs that belong to their sources. Nothing is run."""

import ast
import importlib
import inspect
import re
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest
from nbconvert import HTMLExporter
from notebook_outputs import PROGRESS, STAMP, code_cells, sources_sha256

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
NAMES = ("00_start_here", "01_load_phi4", "02_quantize_to_fp8", "03_inspect_the_scales",
         "04_what_fp8_costs", "05_serve_with_vllm", "06_reproduce_gsm8k",
         "07_reproduce_throughput", "08_choose_a_scheme", "09_report_and_publish",
         "a1_fp8_on_a_cpu")
# A path into some machine: a folder that systems have at their root, and something in it.
MACHINE_PATH = re.compile(r"(?<![\w.~-])/(root|home|work|tmp|usr|opt|var|mnt|Users|etc)/\w")
PICTURE = re.compile(r"data:image/png;base64,[A-Za-z0-9+/=]+")
LONGEST_CELL = 15  # lines of code
MOST_WORDS = 900  # of prose in a notebook; code and what is folded are not counted


@pytest.fixture(params=sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def nb(request):
    return nbformat.read(request.param, as_version=4)


def lines(source: str) -> list[str]:
    return [line for line in source.splitlines() if line.strip()]


def texts(output) -> list[str]:
    """What an output says in words, images left out."""
    if output.output_type == "stream":
        return [output.text]
    return [PICTURE.sub("", text) for mime, text in output.get("data", {}).items()
            if isinstance(text, str) and (mime.startswith("text/") or mime == "image/svg+xml")]


def test_the_ten_notebooks_and_the_appendix_are_there():
    assert sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")) == sorted(NAMES)


def test_a_title_then_three_lines_that_open_the_course(nb):
    first, second = nb.cells[:2]
    assert first.cell_type == "markdown" and first.source.startswith("# ")
    assert second.cell_type == "code" and len(lines(second.source)) <= 3


def test_its_prose_is_short(nb):
    prose = " ".join(re.sub(r"```.*?```|<details>.*?</details>", "", cell.source, flags=re.S)
                     for cell in nb.cells if cell.cell_type == "markdown")
    assert len(prose.split()) <= MOST_WORDS


def test_every_code_cell_is_short_and_needs_no_set_up_of_its_own(nb):
    for cell in code_cells(nb):
        assert len(lines(cell.source)) <= LONGEST_CELL, cell.source
        assert "sys.path" not in cell.source and not re.search(r"^\s*[!%]", cell.source, re.M)
        assert not MACHINE_PATH.search(cell.source), cell.source
        ast.parse(cell.source)


def test_every_name_of_a_helper_is_there(nb):
    """A helper that lost a function must not be noticed by the reader of the seventh notebook."""
    source = "\n".join(line for cell in code_cells(nb) for line in cell.source.splitlines()
                       if not line.lstrip().startswith(("%", "!")))
    modules, tree = {}, ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "helpers":
            found = importlib.import_module(node.module)
            for name in node.names:
                if not hasattr(found, name.name):
                    importlib.import_module(f"{node.module}.{name.name}")
                modules[name.asname or name.name] = getattr(found, name.name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = modules.get(node.value.id)
            assert not inspect.ismodule(module) or hasattr(module, node.attr), ast.unparse(node)


def test_committed_with_the_outputs_of_one_clean_run(nb):
    cells = code_cells(nb)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert any(cell.outputs for cell in cells)
    for output in (output for cell in cells for output in cell.outputs):
        assert output.output_type != "error"
        assert output.get("name") != "stderr"
        for text in texts(output):
            assert not MACHINE_PATH.search(text), text
            assert not PROGRESS.search(text), text
            assert "\r" not in text and "\x1b" not in text, text


def test_the_outputs_come_from_these_sources(nb):
    """`make notebooks` stamps what it writes; a cell edited since then has outputs of another."""
    assert nb.metadata.get(STAMP, {}).get("sources_sha256") == sources_sha256(nb)


def pictures(html: str) -> list[str]:
    """The alt text of every <img> of a page, "" where there is none."""
    found = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tag == "img" and found.append(
        dict(attributes).get("alt") or "")
    parser.feed(html)
    return found


def test_every_picture_says_in_words_what_it_shows(nb):
    """In the outputs, and on the page that nbconvert makes of them, which adds a text of its own
    where it finds none."""
    html = [o.data["text/html"] for cell in code_cells(nb) for o in cell.outputs
            if "text/html" in o.get("data", {})]
    alts = [alt for text in html for alt in pictures(text)]
    assert all(len(alt) > 20 for alt in alts)
    for cell in code_cells(nb):
        for output in cell.outputs:  # JupyterLab and nbconvert show these without their alt text
            assert not any(mime.startswith("image/") for mime in output.get("data", {}))
        if "plots." in cell.source:
            assert sum(len(pictures(o.get("data", {}).get("text/html", "")))
                       for o in cell.outputs) == cell.source.count("plots."), cell.source
    exported = HTMLExporter().from_notebook_node(nb)[0]
    assert pictures(exported) == alts
