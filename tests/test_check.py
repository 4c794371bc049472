"""Every exercise of every notebook: its solution is right, no answer stops the notebook."""

import re

import nbformat
import pytest
from conftest import REPO

from helpers import check


def exercises():
    """(notebook, name of the check, the folded solution's code)."""
    for path in sorted((REPO / "notebooks").glob("[0-9]*.ipynb")):
        cells = nbformat.read(path, as_version=4).cells
        for cell, following in zip(cells, cells[1:], strict=False):
            asked = re.search(r"check\.(\w+)\(answer\)", cell.source)
            if cell.cell_type == "code" and asked:
                solution = re.search(r"<details>.*```python\n(.*?)```.*</details>",
                                     following.source, re.S)
                yield pytest.param(asked[1], cell.source, solution[1] if solution else None,
                                   id=f"{path.stem[:2]}-{asked[1]}")


@pytest.mark.parametrize("name, cell, solution", exercises())
def test_the_solution_is_right_and_the_untouched_cell_says_not_tried(name, cell, solution, capsys):
    scope = {}
    exec(solution, scope)
    getattr(check, name)(scope["answer"])
    assert capsys.readouterr().out == "Right.\n"
    exec(cell, {})
    assert capsys.readouterr().out.strip() == check.NOT_TRIED


@pytest.mark.parametrize("name, cell, solution", exercises())
@pytest.mark.parametrize("wrong", [-1, "no", None, object(), [], lambda *_: "W4A4"])
def test_a_wrong_answer_gets_a_hint_and_stops_nothing(name, cell, solution, wrong, capsys):
    getattr(check, name)(wrong)
    assert capsys.readouterr().out.startswith("Not yet")


def test_every_notebook_has_an_exercise_and_every_check_is_used():
    used = [parameter.values[0] for parameter in exercises()]
    assert len({parameter.id[:2] for parameter in exercises()}) == 8
    public = {name for name, thing in vars(check).items()
              if callable(thing) and thing.__module__ == "helpers.check" and name[0] != "_"}
    assert set(used) == public
