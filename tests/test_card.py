"""The card says what the ledger says, and "not measured" where it says nothing."""

import re

import yaml

from helpers import card, ledger, models


def rows(tmp_path, strict=0.9, speed=300.0, model=models.PHI4):
    file = tmp_path / f"{strict}-{speed}.jsonl"
    for arm in ("bf16", "fp8"):
        known = {"model": models.model_info(model), "mode": "gpu-w8a8", "kernel": "Cutlass",
                 "ledger": file}
        ledger.record("gsm8k", arm, {"task": "gsm8k", "limit": 100, "num_fewshot": 5},
                      {"strict-match": strict, "strict-match_stderr": 0.03,
                       "flexible-extract": strict, "flexible-extract_stderr": 0.03}, **known)
        ledger.record("throughput", arm, {"output_tokens": 500, "concurrency": 1, "rounds": 5},
                      {"output_tok_s": speed, "output_tok_s_min": speed - 1,
                       "output_tok_s_max": speed + 1}, **known)
    return ledger.read(file)


def test_a_figure_of_the_ledger_is_the_figure_on_the_card(tmp_path):
    before = str(card.model_card(models.PHI4, rows(tmp_path, strict=0.9)))
    after = str(card.model_card(models.PHI4, rows(tmp_path, strict=0.87)))
    assert "0.9000 ± 0.0300" in before and "0.8700 ± 0.0300" in after
    assert "0.9000" not in after
    assert "300.0 (299.0 to 301.0)" in before
    faster = str(card.model_card(models.PHI4, rows(tmp_path, speed=400.0)))
    assert "400.0 (399.0 to 401.0)" in faster and "300.0" not in faster


def test_an_empty_ledger_makes_a_card_without_a_figure():
    text = str(card.model_card(models.PHI4, []))
    for section in ("## Accuracy", "## Decoding speed"):
        part = text.split(section)[1].split("\n## ")[0]
        assert part.count(card.NOT_MEASURED) == 2
        assert not re.search(r"(?<![A-Za-z0-9])\d", part.replace("95 %", ""))
    assert "model-index" not in text


def test_the_card_serves_ampere_with_marlin_and_repeats_what_the_base_asks_of_deployers():
    text = str(card.model_card(models.PHI4, []))
    assert "--linear-backend marlin\n```" in text and "Humming" in text
    for asked in ("8 % of its training data", "retrieval", "Python", "AI system", "filter"):
        assert asked in text


def test_other_models_figures_stay_off_the_card(tmp_path):
    text = str(card.model_card(models.PHI4_MINI, rows(tmp_path)))
    assert "0.9000" not in text and card.NOT_MEASURED in text


def test_the_metadata_is_what_the_hub_reads(tmp_path):
    made = card.model_card(models.PHI4, rows(tmp_path))
    data = yaml.safe_load(str(made).split("---")[1])
    assert data["license"] == "mit" and data["library_name"] == "transformers"
    assert (data["base_model"], data["base_model_relation"]) == ("microsoft/phi-4", "quantized")
    (index,) = data["model-index"]
    scores = {m["name"]: m["value"] for r in index["results"] for m in r["metrics"]}
    assert scores == {"exact_match, strict-match": 0.9, "exact_match, flexible-extract": 0.9}
    from huggingface_hub import ModelCard
    assert len(ModelCard(str(made)).data.eval_results) == 2
