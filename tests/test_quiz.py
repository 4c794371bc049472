"""The quiz: each question has one right option, every wrong one its sentence, and nothing stops."""

import json
import re

import editions
import nbformat
import pytest

from helpers import WorkbookError, quiz, workspace

CELLS = nbformat.read(editions.QUIZ, as_version=4).cells
ALL = pytest.mark.parametrize("question", quiz.QUESTIONS, ids=lambda question: question.name)
STRANGE = [None, "", "e", "ab", 7, {"a", "b"}, [], object(), float("nan"), lambda: "a"]


@pytest.fixture(autouse=True)
def _own(tmp_workspace, monkeypatch):
    monkeypatch.setattr(quiz, "_now", "before")


def answers(question, answer, capsys) -> str:
    getattr(quiz, question.name)(answer)
    return capsys.readouterr().out


def test_ten_questions_of_which_no_two_share_a_name():
    assert len({question.name for question in quiz.QUESTIONS}) == 10


@ALL
def test_one_option_is_true_and_each_other_is_undone_by_a_sentence(question, capsys):
    quiz.begin("after")
    key = question.key()
    for letter, option in question.lettered().items():
        said = answers(question, letter, capsys)
        if letter == key.right:
            assert said == f"Right. (Notebook {question.notebook})\n"
        else:
            assert option.says.endswith(".") and len(option.says.split()) >= 4
            assert said == f"Not yet. {option.says} (Notebook {question.notebook})\n"
    assert answers(question, key.right.upper(), capsys).startswith("Right.")


@ALL
def test_before_the_course_nothing_is_told(question, capsys):
    quiz.begin("before")
    said = {answers(question, letter, capsys) for letter in "abcd"}
    assert said == {"Kept. You will hear of it after the course.\n"}
    assert answers(question, ..., capsys).startswith("Not tried yet")


@ALL
def test_a_strange_answer_stops_nothing(question, capsys):
    quiz.begin("after")
    for answer in STRANGE:
        assert answers(question, answer, capsys).startswith("Not yet. ")


def test_the_count_of_both_times(capsys):
    quiz.begin("before")
    for question in quiz.QUESTIONS[:4]:
        answers(question, question.key().right if question.name == "bytes" else "a", capsys)
    quiz.result()
    assert capsys.readouterr().out == "before the course: 4 of 10 answered, all kept\n"
    quiz.begin("after")
    for question in quiz.QUESTIONS:
        answers(question, question.key().right, capsys)
    quiz.result()
    right = sum(question.key().right == "a" for question in quiz.QUESTIONS[:4]) + 1
    assert capsys.readouterr().out == (
        f"before the course: 4 of 10 answered, {right} right\n"
        "after the course: 10 of 10 answered, 10 right\n")
    kept = json.loads((workspace.root() / quiz.FILE).read_text())
    assert set(kept) == {"before", "after"}
    assert all(type(each) is bool for time in kept.values() for each in time.values())


@pytest.mark.parametrize("content", ["[", "[]", '{"never": {}}', '{"after": {"bytes": "b"}}'])
def test_a_damaged_file_is_a_sentence(content):
    (workspace.root() / quiz.FILE).write_text(content)
    with pytest.raises(WorkbookError, match="quiz.json is damaged"):
        quiz.result()


def test_a_third_time_is_a_sentence():
    with pytest.raises(WorkbookError, match="'later' is no time of the quiz"):
        quiz.begin("later")


def test_the_notebook_asks_what_the_module_knows():
    asked = [cell.source for cell in CELLS if editions.is_tagged(cell, "task")]
    solved = [editions.FENCE.search(cell.source)[1] for cell in CELLS
              if editions.is_tagged(cell, "solution")]
    names = [re.search(r"quiz\.(\w+)\(answer\)", cell.source)[1] for cell in CELLS
             if editions.is_tagged(cell, "answer")]
    assert names == [question.name for question in quiz.QUESTIONS]
    for number, (question, text, code) in enumerate(
            zip(quiz.QUESTIONS, asked, solved, strict=True), start=1):
        options = "\n".join(f"- **{letter}**: {option.words}"
                            for letter, option in question.lettered().items())
        assert text == f"### Question {number}\n\n{question.asks}\n\n{options}"
        assert code == f'answer = "{question.key().right}"\n'
    assert not any(cell.get("outputs") for cell in CELLS)
