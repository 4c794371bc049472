"""Every exercise of every notebook: its solution is right, no answer stops the notebook."""

import re

import nbformat
import pytest
from conftest import REPO

from helpers import ablation, check


def exercises():
    """(notebook, name of the check, the folded solution's code)."""
    for path in sorted((REPO / "notebooks").glob("[0-9a]*.ipynb")):
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


NEAR_MISSES = [  # the check, an answer as it is usually wrong
    ("rtx_a6000_ceiling", 768 / 28.29), ("rtx_a6000_ceiling", 768 / 14.66 * 1.02),
    ("kv_cache_bytes", 10 * 128 * 40 * 2 * 16384),  # keys without values
    ("kv_cache_bytes", 2 * 40 * 128 * 40 * 2 * 16384),  # query heads
    ("bytes_saved_on_lm_head", 100352 * 5120), ("bytes_saved_on_lm_head", 100352 * 5120 - 100352),
    ("nearest_e4m3_to_0_3", 0.28125), ("nearest_e4m3_to_0_3", 0.3),
    ("stderr_of_93", (0.93 * 0.07 / 100) ** 0.5), ("stderr_of_93", (0.93 * 0.07) ** 0.5),
    ("h100_expected", 3350 / 14.66), ("h100_expected", 0.67 * 3350 / 28.29),
    ("bits_in_groups_of_256", 4 + 16 / 128), ("bits_in_groups_of_256", 4 + 8 / 256),
    ("rounded_per_token", lambda x: ablation.rounded(x, "e4m3", "tensor")),
    ("rounded_per_token", lambda x: ablation.rounded(x, "e5m2")),
    ("mode_of_capability", lambda c: "W8A8" if c >= (9, 0) else "W8A16" if c >= (7, 5) else None),
    ("mode_of_capability", lambda c: "W8A8" if c >= (8, 9) else "W8A16"),
]


@pytest.mark.parametrize("name, answer", NEAR_MISSES)
def test_a_usual_mistake_is_not_right(name, answer, capsys):
    getattr(check, name)(answer)
    assert capsys.readouterr().out.startswith("Not yet. ")


def test_every_notebook_has_an_exercise_and_every_check_is_used():
    used = [parameter.values[0] for parameter in exercises()]
    numbers = {path.stem[:2] for path in (REPO / "notebooks").glob("[0-9]*.ipynb")}
    assert {parameter.id[:2] for parameter in exercises()} == numbers
    public = {name for name, thing in vars(check).items()
              if callable(thing) and thing.__module__ == "helpers.check" and name[0] != "_"}
    assert set(used) == public
