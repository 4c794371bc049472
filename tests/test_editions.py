"""The editions: what a student is given, and a solution for every task that its check accepts."""

import re

import editions
import nbformat
import pytest
import run_notebooks
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

CHECK = "check.ceiling(answer)\n# check.hint(\"ceiling\")"
SOLUTION = ("<details><summary>Solution</summary>\n\n```python\n{}\n```\n\nWhy.\n\n```python\n"
            "answer = 'another'\n```\n</details>")


def task(stub: str, solution: str) -> list:
    return [new_markdown_cell("## Task · easy, 3 min · trains", metadata={"tags": ["task"]}),
            new_code_cell(f"from check import check\n\n{stub}\n{CHECK}", execution_count=3,
                          outputs=[new_output("stream", text="Not tried yet.")],
                          metadata={"tags": ["answer"]}),
            new_markdown_cell(SOLUTION.format(solution), metadata={"tags": ["solution"]})]


def notebook(folder, *cells, name="00_a.ipynb"):
    folder.mkdir(exist_ok=True)
    nb = new_notebook(cells=[new_markdown_cell("# A"), *cells])
    nbformat.write(nb, folder / name)
    return folder / name


def test_a_student_gets_no_output_no_solution_and_an_empty_answer(tmp_path):
    path = notebook(tmp_path, *task("answer = ...", "answer = 42"))
    nb = editions.student(path)
    assert [cell.cell_type for cell in nb.cells] == ["markdown", "markdown", "code"]
    assert nb.cells[2].source == f"from check import check\n\nanswer = ...\n{CHECK}"
    assert nb.cells[2].outputs == [] and nb.cells[2].execution_count is None
    assert "answer = 42" not in nbformat.writes(nb)


@pytest.mark.parametrize(("stub", "solution"), [
    ("answer = ...", "import math\n\nanswer = math.inf  # \\1 and \\n stay as they are"),
    ("def answer(scale, codes):\n    ...", "def answer(scale, codes):\n    return scale * codes"),
], ids=["value", "function"])
def test_the_solution_takes_the_place_of_the_stub(tmp_path, stub, solution):
    nb = editions.solved(notebook(tmp_path, *task(stub, solution)))
    assert nb.cells[2].source == f"from check import check\n\n{solution}\n{CHECK}"
    assert nb.cells[3].source.startswith("<details>") and nb.cells[2].outputs == []


@pytest.mark.parametrize("cells", [
    task("answer = 3", "answer = 42"), task("answer = ...", "answer = 42")[:2],
    [*task("answer = ...", "answer = 42")[:2], new_markdown_cell("```python\nanswer = 1\n```")],
    task("answer = ...\nanswer = ...", "answer = 42")],
    ids=["no stub", "nothing after it", "no tag", "two stubs"])
def test_a_task_that_is_not_whole_is_named(tmp_path, cells):
    with pytest.raises(run_notebooks.NotebookStopped, match="00_a.ipynb has a task that is not"):
        editions.solved(notebook(tmp_path, *cells))


def test_links_lead_where_they_led(tmp_path, monkeypatch):
    monkeypatch.setattr(editions, "STUDENT", tmp_path / "build" / "student")
    cell = new_markdown_cell("[b](01_b.ipynb#end) [g](glossary.md) [h](../helpers/fp8.py#L3) "
                             "[w](https://example.org/x) [here](#top)")
    nb = editions.student(notebook(tmp_path / "notebooks", cell))
    assert nb.cells[1].source == ("[b](01_b.ipynb#end) [g](glossary.md) "
                                  "[h](../../helpers/fp8.py#L3) [w](https://example.org/x) "
                                  "[here](#top)")
    quiz = notebook(tmp_path / "workshop", new_markdown_cell("[b](../notebooks/01_b.ipynb)"))
    assert editions.student(quiz).cells[1].source == "[b](01_b.ipynb)"


@pytest.fixture
def course(tmp_path, monkeypatch):
    """One notebook whose check is in the notebook itself, executed for real."""
    for module, name, place in ((run_notebooks, "NOTEBOOKS", "notebooks"),
                                (editions, "STUDENT", "student"),
                                (editions, "SOLUTIONS", "solutions"),
                                (editions, "WORKSPACE", "workspace"),
                                (editions, "QUIZ", "quiz.ipynb")):
        monkeypatch.setattr(module, name, tmp_path / place)
    for name in ("PHI4_FP8_WORKSPACE", "PHI4_FP8_PROFILE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)

    def made(solution: str) -> None:
        check = new_code_cell(
            "import os\nfrom types import SimpleNamespace\nprint(os.environ['PHI4_FP8_WORKSPACE'])"
            "\nsays = lambda answer: print('Right.' if answer == 6 else 'Not yet: six.')\n"
            "check = SimpleNamespace(ceiling=says)")
        cells = task("answer = ...", solution)
        cells[1].source = cells[1].source.removeprefix("from check import check\n\n")
        notebook(tmp_path / "notebooks", check, *cells)

    return made


def test_both_editions_of_a_course(course, tmp_path, capsys):
    course("answer = 2 * 3")
    assert editions.main([]) == 0
    said = capsys.readouterr().out
    assert "The student edition, 1 notebooks: build/student/\n" in said
    assert "The solutions edition, 1 tasks solved and right: build/solutions/\n" in said
    given, done = (nbformat.read(tmp_path / edition / "00_a.ipynb", as_version=4)
                   for edition in ("student", "solutions"))
    assert "2 * 3" not in nbformat.writes(given)
    assert [c.execution_count for c in done.cells if c.cell_type == "code"] == [1, 2]
    assert done.cells[1].outputs[0].text == "workspace\n"  # its own, and no machine's path
    assert done.cells[3].outputs[0].text == "Right.\n"
    assert all((tmp_path / edition / "glossary.md").exists() for edition in ("student",
                                                                             "solutions"))


def test_a_solution_that_its_check_does_not_accept_stops_it(course, capsys):
    course("answer = 7")
    assert editions.main([]) == 1
    assert "00_a.ipynb: a check says of its own solution:\nNot yet: six." in capsys.readouterr().err


# --- the course's own -----------------------------------------------------------------------------

TAGGED = [path for path in editions.sources() if any(
    editions.is_tagged(cell, "answer") for cell in nbformat.read(path, as_version=4).cells)]
OWN = [(path, i) for path in editions.sources()
       for i, cell in enumerate(editions.solved(path).cells) if editions.is_tagged(cell, "answer")]


def test_every_notebook_has_three_tasks_or_more():
    for path in editions.sources():
        assert path.stem[0] == "a" or sum(each == path for each, _ in OWN) >= 3, path.name


@pytest.mark.parametrize("path", TAGGED, ids=lambda path: path.stem)
def test_no_solution_is_left_in_the_student_edition(path):
    nb = editions.student(path)
    text = "\n".join(cell.source for cell in nb.cells)
    assert "<summary>Solution" not in text
    for cell in nb.cells:
        if editions.is_tagged(cell, "answer"):
            assert len(editions.STUB.findall(cell.source)) == 1
        elif cell.cell_type == "code":
            assert not re.search(r"check\.\w+\(answer\)", cell.source), cell.source
    assert sum(editions.is_tagged(cell, "task") for cell in nb.cells) == sum(
        editions.is_tagged(cell, "answer") for cell in nb.cells)


@pytest.mark.parametrize(("path", "i"), OWN, ids=[f"{path.stem[:2]}-{i}" for path, i in OWN])
def test_the_check_accepts_the_solution_in_its_cell(path, i, tmp_workspace, capsys):
    """As `make editions` runs it, but the cell alone: an answer cell needs no other."""
    exec(editions.solved(path).cells[i].source, {})
    assert editions.convinced(said := capsys.readouterr().out), said
