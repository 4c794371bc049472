"""The closing tables: a published figure gets a verdict only where the work was the same."""

import pytest

from helpers import ledger, models, predictions, report, slice_speed

GSM8K = {"task": "gsm8k", "limit": 100, "num_fewshot": 5}


def row(tmp_path, experiment="gsm8k", model=models.PHI4, work=GSM8K, hardware=None, **metrics):
    written = ledger.record(
        experiment, "fp8", work, metrics, model=models.model_info(model), mode="gpu-w8a8",
        kernel="K", ledger=tmp_path / "ledger.jsonl")
    return written | {"hardware": hardware or written["hardware"]}


def verdicts(rows, experiment="gsm8k", source="gsm8k exact_match, strict-match, fp8"):
    table = report.measured_beside_published(rows).set_index("published claim")
    return table.loc[[claim for claim in table.index if claim.startswith(source)]].iloc[0]


def test_an_empty_ledger_measures_nothing(tmp_path):
    table = report.measured_beside_published([])
    assert set(table["verdict"]) == {"not measured here"}
    assert set(table["measured"]) == {""}
    claims = [c for c in ledger.published() if c["experiment"] in ("gsm8k", "throughput")]
    assert len(table) == len(claims) == 8


@pytest.mark.parametrize("value, verdict", [(0.93, "agrees"), (0.90, "agrees"), (0.80, "differs")])
def test_the_same_work_agrees_inside_wilsons_interval(tmp_path, value, verdict):
    rows = [row(tmp_path, **{"strict-match": value, "flexible-extract": value})]
    assert verdicts(rows)["verdict"] == verdict


def test_a_tiny_models_score_is_never_set_against_phi4s(tmp_path):
    tiny = row(tmp_path, model=models.tiny(), work=GSM8K | {"task": "tiny_gsm8k"},
               **{"strict-match": 0.93, "flexible-extract": 0.93})
    found = verdicts([tiny])
    assert found["verdict"] == "not measured here"
    assert found["measured"].startswith(
        "another experiment: tiny-phi4 on 100 rows of tiny_gsm8k, 0.93")


@pytest.mark.parametrize("change", [{"limit": 200}, {"num_fewshot": 0}, {"task": "gsm8k_cot"}])
def test_other_rows_shots_or_tasks_are_other_work(tmp_path, change):
    rows = [row(tmp_path, work=GSM8K | change, **{"strict-match": 0.93, "flexible-extract": 0.93})]
    assert verdicts(rows)["verdict"] == "not measured here"


@pytest.mark.parametrize("value, verdict", [(0.9067, "agrees"), (0.80, "differs")])
def test_red_hats_full_run_is_compared_in_spite_of_its_longer_context(tmp_path, value, verdict):
    rows = [row(tmp_path, work=GSM8K | {"limit": 1319},
                **{"strict-match": value, "flexible-extract": 0.0})]
    assert verdicts(rows, source="GSM8K accuracy, fp8, full test set")["verdict"] == verdict


def test_of_another_experiment_the_rows_of_the_claims_own_number_are_shown(tmp_path):
    rows = [row(tmp_path, model=models.tiny(), work={"task": "tiny_gsm8k", "limit": limit},
                **{"strict-match": value, "flexible-extract": value})
            for limit, value in ((1319, 0.88), (100, 0.89))]
    full = verdicts(rows, source="GSM8K accuracy, fp8, full test set")
    assert full["verdict"] == "not measured here" and ", 0.8802 (" in full["measured"]


@pytest.mark.parametrize("gpu, verdict", [("NVIDIA A40", "agrees"),
                                          ("NVIDIA H100 80GB HBM3", "not measured here")])
def test_a_speed_is_compared_on_the_same_gpu_only(tmp_path, gpu, verdict):
    rows = [row(tmp_path, "throughput", work={"output_tokens": 500, "concurrency": 1},
                hardware={"gpus": [gpu], "cpu": "", "cores": 8},
                output_tok_s=32, output_tok_s_min=31, output_tok_s_max=33)]
    assert verdicts(rows, source="Output tokens per second on an A40, fp8")["verdict"] == verdict


def test_what_was_not_measured_is_one_line_that_says_how_many_and_how():
    table = report.measured_beside_published([])
    assert report.compared(table).empty
    line = report.left_over(table)
    assert line.startswith("Not measured here: all 8 published figures (6 gsm8k scores, 2 speeds).")
    assert "notebooks 06 and 07 on a GPU" in line and "A40" in line and "\n" not in line


def test_what_was_measured_is_a_table_and_the_rest_the_line(tmp_path):
    rows = [row(tmp_path, **{"strict-match": 0.93, "flexible-extract": 0.8})]  # 100 rows, FP8
    table = report.measured_beside_published(rows)
    assert list(report.compared(table)["verdict"]) == ["differs", "agrees"]
    assert "6 of the 8 published figures (4 gsm8k scores, 2 speeds)" in report.left_over(table)
    table["verdict"] = "agrees"
    assert report.left_over(table) == ""


def test_the_end_of_a_run_shows_verdicts_and_the_line(tmp_workspace, monkeypatch, capsys):
    monkeypatch.setenv(models.VARIABLE, "tiny-phi4")
    ledger.record("quantize", "fp8", {}, {"bytes_after": 3_956_224}, mode="cpu-w8a16", kernel="",
                  model=models.model_info(models.tiny()))
    assert report.main() == 0
    printed = capsys.readouterr().out
    assert printed.count("3,956,224 bytes") == 2 and "as predicted" in printed
    assert "all 8 published figures" in printed
    assert max(len(line) for line in printed.splitlines()) <= 100


def test_predictions_stand_beside_what_was_measured(tmp_path, tmp_workspace):
    def said(rows):
        table = report.predicted_beside_measured("phi-4", rows).set_index("question")
        return [tuple(line) for line in table.itertuples(index=False)]

    assert said([]) == [("not predicted: notebook 06", "not measured yet: notebook 06")] + 3 * [
        ("not predicted: notebook 07", "not measured yet: notebook 07")]
    predictions.keep_number("flips", 4, 100)
    slice_speed.predict([1.5, 1, 0.75])
    one, _, prompt = slice_speed.WORK
    speeds = {"ratio": 1.9, "ratio_low": 1.8, "ratio_high": 2.0}
    rows = [row(tmp_path, lost=9, gained=9), row(tmp_path, lost=2, gained=1),
            row(tmp_path, work=GSM8K | {"limit": 1319}, lost=30, gained=20),
            row(tmp_path, model=models.tiny(), lost=7, gained=7),
            row(tmp_path, "slice", work=one.in_ledger() | {"numerics": "w8a16"}, **speeds),
            row(tmp_path, "slice", work=prompt.in_ledger() | {"numerics": "w8a8"}, **speeds)]
    assert said(rows) == [("4", "3"), ("1.5x", "1.90x (1.80 to 2.00)"),
                          ("1x", "not measured yet: notebook 07"),
                          ("0.75x", "not measured yet: notebook 07")]
