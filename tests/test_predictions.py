"""What the reader expected is kept, and a damaged file costs nothing but what it held."""

import pytest

from helpers import predictions


def test_what_is_kept_is_there_again_and_the_last_one_counts(tmp_workspace):
    assert predictions.kept() == {}
    predictions.keep("ratios", [1.5, 1, 1])
    predictions.keep("lost", 3)
    predictions.keep("ratios", [1.9, 1.2, 0.8])
    assert predictions.kept() == {"ratios": [1.9, 1.2, 0.8], "lost": 3}


def test_a_damaged_file_is_none(tmp_workspace):
    predictions.keep("lost", 3)
    (tmp_workspace / predictions.FILE).write_text('{"lost": ')
    assert predictions.kept() == {}
    predictions.keep("lost", 4)
    assert predictions.kept() == {"lost": 4}


@pytest.mark.parametrize("answer, said", [
    (..., "Not predicted yet"), (3, "Kept: 3."), ("4", "Kept: 4."), (0, "Kept: 0."),
    (101, "Not kept"), (-1, "Not kept"), (float("nan"), "Not kept"), ([3], "Not kept"),
    (None, "Not kept"), (object(), "Not kept")])
def test_a_number_is_kept_or_it_is_said_why_not(tmp_workspace, capsys, answer, said):
    predictions.keep_number("flips", answer, 100)
    assert capsys.readouterr().out.startswith(said)
    assert predictions.number("flips") == (
        float(answer) if said.startswith("Kept") else None)


def test_a_workspace_that_cannot_be_written_stops_no_notebook(monkeypatch, capsys):
    monkeypatch.setenv("PHI4_FP8_WORKSPACE", "/proc/nowhere")
    predictions.keep_number("flips", 3, 100)
    assert capsys.readouterr().out.startswith("Not kept: ")
