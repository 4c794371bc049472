"""The published figures: their form, their completeness, and what they say together."""

import datetime
import json
import math
import re
from pathlib import Path

import jsonschema
import pytest
from conftest import REPO

from helpers import ledger

PUBLISHED = REPO / "data" / "published"
FILES = sorted(PUBLISHED.glob("*.json"))
ROWS = [row for file in FILES for row in json.loads(file.read_text())]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_file_has_the_one_form(file):
    schema = json.loads((REPO / "data" / "published.schema.json").read_text())
    jsonschema.validate(json.loads(file.read_text()), schema,
                        format_checker=jsonschema.FormatChecker())


def test_the_form_refuses_a_row_without_a_source():
    schema = json.loads((REPO / "data" / "published.schema.json").read_text())
    row = {key: value for key, value in ROWS[0].items() if key != "source"}
    with pytest.raises(jsonschema.ValidationError, match="source"):
        jsonschema.validate([row], schema)


def test_ids_are_unique():
    assert len({row["id"] for row in ROWS}) == len(ROWS)


def test_sources_were_read_before_today():
    for row in ROWS:
        assert datetime.date.fromisoformat(row["source"]["retrieved"]) <= datetime.date.today()


def test_shares_are_in_their_unit():
    for row in ROWS:
        if row["unit"] == "fraction right":
            assert 0 <= row["value"] <= 1
        if row["unit"] == "percent right":
            assert 1 < row["value"] <= 100


def test_the_cards_stderr_follows_from_its_value_and_rows():
    rows = [row for row in ROWS if row["experiment"] == "gsm8k" and "stderr" in row]
    assert len(rows) == 4  # two arms, two filters
    for row in rows:
        p, n = row["value"], row["work"]["limit"]
        assert round(math.sqrt(p * (1 - p) / (n - 1)), 4) == row["stderr"]


def test_the_benchmark_table_is_whole():
    cells = {(row["work"]["benchmark"], row["model"]) for row in ROWS
             if row["experiment"] == "benchmark"}
    benchmarks, models = {b for b, _ in cells}, {m for _, m in cells}
    assert benchmarks == {"MMLU", "GPQA", "MGSM", "MATH", "HumanEval", "SimpleQA", "DROP"}
    assert len(models) == 7 and len(cells) == 49
    table = ledger.benchmark_table()
    assert table.shape == (7, 7) and table.notna().all(axis=None)
    assert table.loc["SimpleQA", "phi-4 (14B)"] == 3.0


def test_lm_eval_has_the_tasks_that_the_readme_names():
    import lm_eval.tasks

    text = (PUBLISHED / "README.md").read_text()
    named = re.findall(r"^\| \w+ \| `(\w+)` \|", text, flags=re.M)
    assert len(named) == 6
    notebook = (REPO / "notebooks" / "07_report_and_publish.ipynb").read_text()
    assert all(f'\\"{name}\\"' in notebook for name in named)
    tasks = Path(lm_eval.tasks.__file__).parent
    folders = [str(tasks / name) for name in
               ("mmlu", "gpqa", "mgsm", "hendrycks_math", "humaneval", "drop")]
    known = lm_eval.tasks.TaskManager(include_path=folders, include_defaults=False).all_tasks
    assert set(named) <= set(known)
    assert not list(tasks.glob("*simple*qa*"))  # the README says that lm-eval has no SimpleQA
