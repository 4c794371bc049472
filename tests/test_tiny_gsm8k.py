"""The bundled problems: what they promise, held against the files themselves."""

import json
import re
from functools import cache
from itertools import islice
from pathlib import Path

import pytest

from training import make_problems, templates
from training.problems import HE, ITEMS, SHE, TEMPLATES, stream
from training.train_tiny_phi4 import Run, step_problems

FOLDER = Path(__file__).resolve().parent.parent / "data" / "tiny_gsm8k"
MODEL = FOLDER.parent / "tiny_phi4"
ANNOTATED = re.compile(r"(\d+)([-+*/])(\d+)=\$?<<(\d+)([-+*/])(\d+)=(\d+)>>(\d+)")


def rows(split: str) -> list[dict]:
    return [json.loads(line) for line in (FOLDER / f"{split}.jsonl").read_text().splitlines()]


@cache
def problems() -> list[dict]:
    return rows("train") + rows("test")


def test_regenerating_gives_the_same_bytes():
    for name, split in make_problems.splits().items():
        assert make_problems.as_jsonl(split) == (FOLDER / f"{name}.jsonl").read_text()


def test_as_many_rows_as_promised_and_none_twice():
    assert len(rows("test")) == 1319
    assert len(rows("train")) >= 2000
    questions = [row["question"] for row in problems()]
    assert len(set(questions)) == len(questions)


def test_thirty_templates_over_eight_patterns_all_in_the_test_split():
    test = make_problems.splits()["test"]
    assert len({p.template for p in test}) == len(TEMPLATES) >= 30
    assert len({p.pattern for p in test}) >= 8


def test_every_computation_is_right_and_leads_to_the_answer():
    for row in problems():
        *lines, last = row["answer"].split("\n")
        assert 2 <= len(lines) <= 5, row
        for line in lines:
            a, op, b, *again, result, shown = ANNOTATED.search(line).groups()
            assert again == [a, op, b] and shown == result, line
            exact = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b),
                     "/": int(a) / int(b)}[op]  # fmt: skip
            assert exact == int(result) >= 1, line
            assert len(ANNOTATED.findall(line)) == 1, line
        assert last == f"#### {result}"


def test_every_number_of_a_step_was_given_or_computed_before():
    """No step takes a number from nowhere (60 minutes an hour, 2 and 1 are common knowledge)."""
    for row in problems():
        known = set(re.findall(r"\d+", row["question"])) | {"60", "2"}
        for match in ANNOTATED.finditer(row["answer"]):
            assert {match[1], match[3]} <= known, (row, match[0])
            known.add(match[8])


PLURALS = {word + "s": word for words in ITEMS.values() for word in words}
PLURALS |= {noun.many: noun.one for noun in vars(templates).values()
            if isinstance(noun, templates.Noun)}  # fmt: skip


def test_nouns_agree_with_their_numbers():
    for row in problems():
        text = re.sub(r"\S*<<.*?>>", "", f"{row['question']} {row['answer']}")
        for number, word in re.findall(r"(?<![\d$])(\d+) (\w+)", text):
            assert not (number == "1" and word in PLURALS), row
            assert not (number != "1" and word in PLURALS.values()), row


def test_pronouns_agree_with_the_person():
    """A template uses a pronoun for the first person it names alone."""
    for row in problems():
        text = f"{row['question']} {row['answer']}"
        first = next(w for w in re.findall(r"[A-Z]\w+", row["question"]) if w in SHE + HE)
        wrong = {"he", "his", "him"} if first in SHE else {"she", "her", "hers"}
        assert not wrong & set(re.findall(r"[a-z]+", text.lower())), row


# doubled or misplaced spaces and stops, a/an, a template's leftovers
WRONG = r"  |\ba ([aeiou]|hour)|\ban (?!hour)[^aeiou]|[{}]|\.\.| [.,?]"


def test_sentences_are_written_properly():
    for row in problems():
        assert re.fullmatch(r"[A-Z0-9].*\?", row["question"]), row
        assert row["question"].count("?") == 1
        text = f"{row['question']} {row['answer']}"
        assert not re.search(WRONG, text), row
        assert all(line.endswith(".") for line in row["answer"].split("\n")[:-1]), row


def test_the_model_was_trained_on_no_test_question():
    """The run that made the bundled model, its problems drawn again."""
    run = Run(**json.loads((MODEL / "training_log.json").read_text())["run"])
    held_out = {row["question"] for row in rows("test")}
    assert not held_out & {row["question"] for row in rows("train")}
    sample = islice(stream(f"{run.seed} tokenizer", held_out), 20_000)
    assert not held_out & {p.question for p in sample}
    drawn = 0
    for step in range(run.steps):
        for _, sequence in step_problems(run, step, frozenset(held_out)):
            drawn += len(sequence)
            assert held_out.isdisjoint(p.question for p in sequence)
    assert drawn * 50 > run.tokens


def test_the_stream_rejects_what_is_forbidden():
    first = list(islice(stream("a seed"), 50))
    forbidden = {p.question for p in first[::2]}
    assert list(islice(stream("a seed", forbidden), 25)) == first[1::2]


def lm_eval_task(definition: Path, **changed):
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    manager = lm_eval.tasks.TaskManager(include_path=str(FOLDER), include_defaults=False)
    config = load_yaml(definition, resolve_func=True) | changed
    return next(iter(manager.load([config])["tasks"].values()))


@pytest.fixture(scope="module")
def ours():
    return lm_eval_task(FOLDER / "tiny_gsm8k.yaml")


@pytest.fixture(scope="module")
def theirs(ours):
    """lm-eval's own gsm8k, its dataset alone replaced by the bundled problems."""
    import lm_eval.tasks

    definition = Path(lm_eval.tasks.__file__).parent / "gsm8k" / "gsm8k.yaml"
    return lm_eval_task(definition, custom_dataset=ours.config.custom_dataset)


def test_the_task_differs_from_gsm8k_in_name_and_dataset_alone(ours, theirs):
    mine, gsm8k = ours.config.to_dict(), theirs.config.to_dict()
    different = {key for key in mine | gsm8k if mine.get(key) != gsm8k.get(key)}
    assert different == {"task", "dataset_path", "dataset_name"}


def test_the_two_tasks_ask_the_same_of_a_model(ours, theirs):
    for task in (ours, theirs):
        task.set_fewshot_seed(1234)
        task.build_all_requests(limit=3, rank=0, world_size=1)
    for mine, gsm8k in zip(ours.instances, theirs.instances, strict=True):
        assert mine.args == gsm8k.args
        assert mine.args[0].count("Question: ") == 6


def test_shots_come_from_train_and_questions_from_test(ours):
    assert [doc["question"] for doc in ours.test_docs()] == [r["question"] for r in rows("test")]
    assert [d["question"] for d in ours.fewshot_docs()] == [r["question"] for r in rows("train")]


def test_the_task_loads_by_name_from_anywhere(tmp_path, monkeypatch):
    import lm_eval.tasks

    monkeypatch.chdir(tmp_path)
    manager = lm_eval.tasks.TaskManager(include_path=str(FOLDER), include_defaults=False)
    task = manager.load(["tiny_gsm8k"])["tasks"]["tiny_gsm8k"]
    assert len(task.test_docs()) == 1319
