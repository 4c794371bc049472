"""Schemes tried: what is read back is what was written, and the answers are the model's own."""

import contextlib

import pandas as pd
import pytest
import torch

from helpers import ablation, checkpoint, formats, scheme_trials, schemes, workspace
from helpers.scheme_trials import Trials


@pytest.fixture(scope="module")
def model(tiny_base):
    return ablation.load(tiny_base)


@pytest.fixture(scope="module")
def made(tiny_base, tmp_path_factory):
    """A checkpoint of every recipe, by title."""
    place, text = tmp_path_factory.mktemp("schemes"), scheme_trials.calibration(tiny_base)
    return {title: scheme_trials.make(tiny_base, recipe, place / title,
                                      text if title in schemes.CALIBRATED else None)
            for title, recipe in scheme_trials.recipes(tiny_base.config).items()}


@pytest.mark.parametrize("title", schemes.RECIPES)
def test_the_tensors_are_those_that_are_predicted(tiny_base, made, title):
    predicted = schemes.predict(tiny_base.tensors, schemes.RECIPES[title])
    assert schemes.same(predicted, made[title].tensors)
    assert not schemes.same(predicted[1:], made[title].tensors)
    assert checkpoint.total_bytes(predicted) == checkpoint.total_bytes(made[title].tensors)


def test_the_loaded_fp8_model_has_codes_times_scale_and_rounds_its_inputs(model, made):
    """Against the workbook's own emulation of the recipe, which computes both anew."""
    base, tokenizer = model
    loaded, ids = scheme_trials.load(made["FP8_DYNAMIC"]), formats.texts(tokenizer, 1)[0]
    for name in ablation.targets(base):
        codes, scale = (checkpoint.read_tensor(made["FP8_DYNAMIC"], f"{name}.{part}").float()
                        for part in ("weight", "weight_scale"))
        assert torch.equal(loaded.get_submodule(name).weight, codes * scale), name
    with formats.quantized(base, formats.RECIPE):
        emulated = formats.seen(base, ids)
    with formats.quantized(base, formats.RECIPE, activations=False):
        weights_alone = formats.seen(base, ids)
    found = formats.seen(loaded, ids)
    assert ablation.sqnr(emulated, found) > ablation.sqnr(weights_alone, found) + 6


def test_4_bit_integers_are_the_nearest_and_gptqs_are_not_but_lose_less(model, made):
    base, tokenizer = model
    texts = formats.texts(tokenizer, 10)
    reference = [formats.seen(base, ids) for ids in texts]
    rows, weights = {}, {}
    for title in ("W4A16", schemes.GPTQ):
        loaded = scheme_trials.load(made[title])
        rows[title] = formats.one_arm(loaded, texts, reference, contextlib.nullcontext)
        weights[title] = loaded.model.layers[0].mlp.down_proj.weight
    true = base.model.layers[0].mlp.down_proj.weight
    scale = checkpoint.read_tensor(made["W4A16"], "model.layers.0.mlp.down_proj.weight_scale")
    step = scale.float().repeat_interleave(128, 1)
    off = {title: ((weight - true).abs() / step).max() for title, weight in weights.items()}
    assert off["W4A16"] < 0.54 < 1 < off[schemes.GPTQ]  # the quotient is rounded to bf16, too
    losses = formats.losses([ids.numel() for ids in texts], rows)
    assert formats.table(losses, "W4A16").loc[schemes.GPTQ, "told apart"] == "less"


def test_the_answers_are_those_to_each_problem_alone(model):
    base, tokenizer = model
    prompts = [f"Question: {question}\nAnswer:" for question in (
        "Ann has 4 pens and buys 3 more. How many pens does she have?",
        "A farm has 6 fields. Each field has 9 cows. How many cows are there?")]
    together = scheme_trials.answers(base, tokenizer, prompts)
    assert together == [scheme_trials.answers(base, tokenizer, [each])[0] for each in prompts]
    assert all("#### " in text and "Question:" not in text for text in together)
    assert tokenizer.padding_side == "right"


@pytest.mark.parametrize("answer, number", [
    ("so 3\n#### 1,234.", "1234"), ("#### -5\n#### 6", "-5"), ("no number", None)])
def test_an_answer_is_read_as_strict_match_reads_it(answer, number):
    assert scheme_trials._number(answer) == number


def test_flips_count_both_ways():
    trials = Trials(pd.DataFrame(), None, {"bf16": [1, 1, 0, 0], "W4A16": [0, 1, 1, 1]})
    assert trials.flips().loc["W4A16"].tolist() == [3, 1, 2, 1]
    assert trials.flips().loc["bf16"].tolist() == [2, 0, 0, 1]


def test_nothing_is_left_of_a_trial_that_was_stopped():
    with pytest.raises(RuntimeError), scheme_trials.scratch("schemes") as place:
        (place / "file").write_text("half")
        raise RuntimeError
    assert not place.exists() and not list((workspace.root() / "scratch").glob(".schemes*"))


def test_groups_of_64_where_128_does_not_divide_the_width():
    for width, group in ((256, 128), (576, 64)):
        found = scheme_trials.recipes({"hidden_size": width})
        groups = {title: found[title].config_groups["group_0"].weights.group_size
                  for title in found}
        assert groups["W4A16"] == groups[schemes.GPTQ] == group
        assert groups["NVFP4"] == 16 and groups["MXFP4"] == 32
