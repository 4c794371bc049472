"""The published figures: their form, their completeness, and what they say together."""

import datetime
import json
import math
import re
from pathlib import Path

import jsonschema
import pytest
from conftest import REPO

from helpers import ledger, report

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
    assert table.shape == (7, 8) and table.notna().all(axis=None)
    assert table.loc["SimpleQA", "phi-4 (14B)"] == "3.0"
    assert table.loc["MATH", "asks"] == "competition mathematics"
    starred = {(b, m) for b in table.index for m in table.columns if table.loc[b, m].endswith("*")}
    assert starred == {(b, "Llama-3.3 (70B instruct)") for b in ("MATH", "HumanEval")}


def test_both_arms_have_every_open_llm_score_and_the_averages_follow():
    table = ledger.open_llm_table()
    assert list(table.index) == ["MMLU", "ARC Challenge", "GSM8K", "HellaSwag", "Winogrande",
                                 "TruthfulQA", "Average"]
    for arm in ("bf16", "FP8"):
        scores = table[arm].drop("Average")
        assert abs(scores.mean() - table.loc["Average", arm]) < 0.006  # two decimals are published
    assert table["FP8 - bf16"].idxmin() == "Winogrande"
    assert table.loc["Winogrande", "FP8 - bf16"] == -0.71
    assert table["shots"].dropna().to_list() == [5, 25, 5, 10, 5, 0]


def test_the_card_of_the_base_is_told_topic_by_topic():
    table = ledger.card_table()
    for topic, word in (("Training data", "9.8 trillion"), ("Other languages", "8 %"),
                        ("Safety training", "DPO"), ("Red-teaming", "jailbreaks"),
                        ("Code", "Python"), ("Facts", "retrieval"),
                        ("Asked of deployers: disclosure", "AI system"),
                        ("Asked of deployers: filters", "classifiers")):
        assert word in table.loc[topic, "what it says"]
    assert set(table["source"]) == {"Phi-4 model card", "Phi-4 technical report, sections 6 to 8"}


def test_what_is_no_measurement_of_both_arms_stays_out_of_the_comparisons():
    compared = [row for row in ROWS if row["experiment"] in ("gsm8k", "throughput")]
    assert len(ledger.published_table()) == len(compared) == 8
    assert {row["arm"] for row in compared} == {"bf16", "fp8"}
    assert len(report.measured_beside_published([])) == 8


def test_lm_eval_has_the_tasks_that_the_readme_names():
    import lm_eval.tasks

    text = (PUBLISHED / "README.md").read_text()
    named = re.findall(r"^\| \w+ \| `(\w+)` \|", text, flags=re.M)
    assert len(named) == 6
    notebook = (REPO / "notebooks" / "09_report_and_publish.ipynb").read_text()
    assert all(f'\\"{name}\\"' in notebook for name in named)
    tasks = Path(lm_eval.tasks.__file__).parent
    folders = [str(tasks / name) for name in
               ("mmlu", "gpqa", "mgsm", "hendrycks_math", "humaneval", "drop")]
    known = lm_eval.tasks.TaskManager(include_path=folders, include_defaults=False).all_tasks
    assert set(named) <= set(known)
    assert not list(tasks.glob("*simple*qa*"))  # the README says that lm-eval has no SimpleQA
