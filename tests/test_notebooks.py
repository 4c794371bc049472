"""The committed notebooks: their form, and outputs that belong to their sources. Nothing is run."""

import ast
import re
from pathlib import Path

import nbformat
import pytest
from notebook_outputs import PROGRESS, STAMP, code_cells, sources_sha256

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
NAMES = ("00_start_here", "01_load_phi4", "02_quantize_to_fp8", "03_inspect_the_scales",
         "04_serve_with_vllm", "05_reproduce_gsm8k", "06_reproduce_throughput",
         "07_report_and_publish")
# A path into some machine: a folder that systems have at their root, and something in it.
MACHINE_PATH = re.compile(r"(?<![\w.~-])/(root|home|work|tmp|usr|opt|var|mnt|Users|etc)/\w")
LONGEST_CELL = 15  # lines of code


@pytest.fixture(params=sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def nb(request):
    return nbformat.read(request.param, as_version=4)


def lines(source: str) -> list[str]:
    return [line for line in source.splitlines() if line.strip()]


def texts(output) -> list[str]:
    """What an output says in words, images left out."""
    if output.output_type == "stream":
        return [output.text]
    return [text for mime, text in output.get("data", {}).items()
            if isinstance(text, str) and (mime.startswith("text/") or mime == "image/svg+xml")]


def test_the_eight_notebooks_are_there():
    assert sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")) == sorted(NAMES)


def test_a_title_then_three_lines_that_open_the_course(nb):
    first, second = nb.cells[:2]
    assert first.cell_type == "markdown" and first.source.startswith("# ")
    assert second.cell_type == "code" and len(lines(second.source)) <= 3


def test_every_code_cell_is_short_and_needs_no_set_up_of_its_own(nb):
    for cell in code_cells(nb):
        assert len(lines(cell.source)) <= LONGEST_CELL, cell.source
        assert "sys.path" not in cell.source and not re.search(r"^\s*[!%]", cell.source, re.M)
        assert not MACHINE_PATH.search(cell.source), cell.source
        ast.parse(cell.source)


def test_links_to_other_notebooks_lead_somewhere(nb):
    for cell in nb.cells:
        for name in re.findall(r"\]\((\w+)\.ipynb", cell.source):
            assert name in NAMES


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
