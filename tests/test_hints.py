"""Hints come one at a time; what was tried is kept in the workspace, and no word of an answer."""

import io
import json
import re
import threading
from contextlib import redirect_stdout

import pytest
from test_check import Broken, said

from helpers import WorkbookError, check, course, workspace
from helpers.check import record


@pytest.fixture(autouse=True)
def _own_workspace(tmp_workspace):
    """Tries are counted in a workspace of the test's own."""


def hinted(name) -> str:
    with redirect_stdout(io.StringIO()) as out:
        check.hint(name)
    return out.getvalue()


def test_hints_come_one_at_a_time_and_are_counted():
    every = check.TASKS["encoded"].hints
    for number, text in enumerate(every, start=1):
        assert " ".join(hinted("encoded").split()) == f"Hint {number} of 3: {text}"
        assert record.read()["encoded"] == {"done": False, "tries": 0, "hints": number}
    assert re.findall(r"^Hint (\d) of 3: ", hinted("encoded"), re.M) == ["1", "2", "3"]
    assert record.read()["encoded"]["hints"] == 3


def test_a_hint_for_no_task_is_a_sentence():
    assert hinted("encode") == "There is no task 'encode'. Did you mean 'encoded'?\n"
    for name in ("", 3, None, Broken()):
        text = hinted(name)
        assert "There is no task" in text or "Name the task" in text


def test_a_misspelt_check_names_the_nearest():
    with pytest.raises(AttributeError, match="Did you mean 'quantizer'"):
        check.quantiser  # noqa: B018


def test_progress_shows_by_notebook_what_is_done_and_with_how_many_hints():
    said("same_work", {"d"})
    hinted("same_work")
    said("same_work", {"a"})
    said("same_work", {"b"})  # what was right once stays done
    table = check.progress()
    assert list(table.index) == [f"{number:02}" for number in range(10)]
    assert table.loc["09"].to_dict() == {
        "done": "1 of 4", "tasks done": "same_work", "tries": 3, "hints": 1,
        "still open": "verdict, card_faults, red_hats_advice"}
    assert table.loc["00", "done"] == "0 of 3"
    assert course.Course(None, None, None).progress().equals(table)


def test_no_line_is_so_long_that_jupyterlab_breaks_it_within_a_word(capsys):
    check.mcnemar(lambda first, second: 0.2931)
    check.hint("scheme_chosen")
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 100


def test_what_is_kept_is_three_counts_and_no_answer():
    said("same_work", {"d"})
    kept = json.loads((workspace.root() / record.FILE).read_text())
    assert kept == {"same_work": {"done": False, "tries": 1, "hints": 0}}


def test_a_damaged_record_is_set_aside_and_said():
    file = workspace.root() / record.FILE
    file.write_text('{"same_work": {"done": "yes"}}')
    with pytest.raises(WorkbookError, match=r"tasks\.json is damaged"):
        check.progress()
    assert "was damaged" in said("same_work", {"a"})
    assert record.read() == {"same_work": {"done": True, "tries": 1, "hints": 0}}
    assert file.with_name("tasks.json.damaged").exists()


def test_a_workspace_that_cannot_be_written_costs_the_record_alone(monkeypatch):
    monkeypatch.setenv("PHI4_FP8_WORKSPACE", "/proc/nowhere")
    text = said("same_work", {"a"})
    assert text.startswith("Right.") and "could not be kept" in text
    assert "Hint 1 of 3" in hinted("same_work")


def test_two_notebooks_that_check_at_once_lose_no_try():
    def tries():
        for _ in range(20):
            record.tried("sqnr", right=False)

    workers = [threading.Thread(target=tries) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert record.read()["sqnr"]["tries"] == 80
