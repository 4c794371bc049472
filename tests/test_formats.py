"""Formats on many texts: against LLM Compressor's own arithmetic, and by hand."""

import json

import measure_formats
import nbformat
import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from conftest import REPO
from safetensors.torch import load_file

from helpers import ablation, checkpoint, cost_plots, formats, models, plots, scheme_trials
from helpers.formats import FORMATS, Format, Losses


@pytest.fixture(scope="module")
def tiny(tiny_base):
    model, tokenizer = ablation.load(tiny_base)
    return model, formats.texts(tokenizer, 3), tokenizer


def test_the_recipes_weights_are_the_checkpoints_own(tiny, tiny_fp8):
    model, _, _ = tiny
    for name in ablation.targets(model):
        mine = formats.stored(model.get_submodule(name).weight.detach(), formats.RECIPE)
        codes = checkpoint.read_tensor(tiny_fp8, f"{name}.weight").float()
        assert torch.equal(mine, codes * checkpoint.read_tensor(
            tiny_fp8, f"{name}.weight_scale").float())


@pytest.mark.parametrize("form, strategy", [
    (FORMATS[0], "channel"), (FORMATS[2], "tensor"), (FORMATS[5], "channel"),
    (FORMATS[6], "tensor")], ids=lambda value: getattr(value, "name", value))
def test_stored_weights_are_compressed_tensors(tiny, form, strategy):
    """Its scale and its rounding of a bf16 weight; its products are bf16, so ours are cast."""
    weight = tiny[0].model.layers[1].mlp.down_proj.weight.detach().bfloat16()
    args = QuantizationArgs(num_bits=8, type="float" if form.grid == "e4m3" else "int",
                            strategy=strategy, symmetric=True)
    shared = weight.amin(), weight.amax()
    if strategy == "channel":
        shared = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    scale, zero = calculate_qparams(*shared, args)
    theirs = fake_quantize(weight, scale, zero, args)
    mine = formats.stored(weight, form)
    if form.grid == "int8":  # its INT8 has 256 levels for 2 amax, so 127.5 steps to amax
        assert ablation.sqnr(theirs.float(), mine) > 40
    else:
        assert torch.equal(mine.bfloat16(), theirs)


def test_activation_scales_are_the_formats_or_the_static_ones(tiny):
    model, texts, _ = tiny
    name = "model.layers.0.self_attn.qkv_proj"
    x = ablation.observe(model, texts[0], lambda x: x)[name]
    scales = formats.static_scales(model, texts)
    assert scales[name] == max(ablation.observe(model, ids, lambda x: x.abs().max())[name]
                               for ids in texts) / 448
    layer = model.get_submodule(name)
    weight = formats.stored(layer.weight.detach(), formats.RECIPE)
    for static, expected in ((None, ablation.rounded(x, "e4m3")),
                             (scales, ablation.rounded(x, "e4m3", scale=scales[name]))):
        with formats.quantized(model, formats.RECIPE, static=static), torch.inference_mode():
            assert torch.equal(layer(x), expected @ weight.T)


def test_losses_are_those_of_each_text_by_hand(tiny):
    model, texts, _ = tiny
    arms = formats.format_arms(model)
    losses = formats.measure(model, texts, {"E5M2": arms["E5M2 per channel"]})
    assert losses.tokens == [ids.numel() for ids in texts]
    same = []
    for ids, found in zip(texts, losses.kl["E5M2"], strict=True):
        with torch.inference_mode():
            true = model(ids).logits[0]
            with arms["E5M2 per channel"]():
                other = model(ids).logits[0]
        p, q = true.double().softmax(-1), other.double().softmax(-1)
        assert found == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-4)
        same += (true.argmax(-1) == other.argmax(-1)).tolist()
    assert losses.top1["E5M2"] == sum(same) / len(same)
    assert 10 < losses.sqnr["E5M2"] < 30


def test_one_question_has_one_figure(tiny, tiny_fp8):
    """W8A8 with the checkpoint's weights is the row "E4M3 per channel", to the bit."""
    model, texts, _ = tiny
    name = formats.RECIPE.name
    mine = formats.measure(model, texts, {name: formats.format_arms(model)[name]})
    held = load_file(tiny_fp8.path / "model.safetensors")
    stored = formats.measure(model, texts, {"W8A8": lambda: ablation.applied(
        model, ablation.targets(model),
        lambda name, _: held[f"{name}.weight"].float() * held[f"{name}.weight_scale"].float(),
        lambda _, x: ablation.rounded(x, "e4m3"))})
    assert mine.kl[name] == stored.kl["W8A8"] and min(stored.kl["W8A8"]) > 0


def test_a_table_says_what_cannot_be_told_apart():
    random = np.random.default_rng(0)
    base = random.lognormal(size=60)
    losses = Losses([100] * 60, {
        formats.RECIPE.name: list(base), "worse": list(base * 1.3),
        "better": list(base * 0.8), "other": list(base + random.normal(scale=0.5, size=60))},
        *({name: 1.0 for name in (formats.RECIPE.name, "worse", "better", "other")},) * 2)
    table = formats.table(losses)
    assert dict(table["told apart"]) == {formats.RECIPE.name: "-", "worse": "more",
                                         "better": "less", "other": "no"}
    assert table.loc["worse", "difference"] == pytest.approx(0.3 * base.mean())
    assert list(table["KL"]) == sorted(table["KL"])


def test_kept_figures_stand_beside_a_models_own_where_there_are_any(tmp_path, monkeypatch):
    kl = {formats.RECIPE.name: [0.1, 0.2], "other": [0.2, 0.4]}
    share = {title: 1.0 for title in kl}
    losses = Losses([10, 20], kl, share, share)
    monkeypatch.setattr(formats, "MEASURED", tmp_path / "formats.json")
    assert list(formats.beside("tiny-phi4", losses, "formats")) == ["tiny-phi4"]
    entry = {"losses": {"tokens": [10], "kl": {formats.RECIPE.name: [0.3], "other": [0.1]},
                        "top1": share, "sqnr": share}, "parts": {"formats": list(kl)}}
    formats.MEASURED.write_text(json.dumps({"models": {"smollm2": entry}}))
    assert list(formats.beside("smollm2", losses, "formats")) == ["smollm2"]
    found = formats.beside("tiny-phi4", losses, "formats")
    assert list(found) == ["tiny-phi4", "smollm2"]
    assert found["tiny-phi4"].loc["other", "KL"] == pytest.approx((0.2 * 10 + 0.4 * 20) / 30)
    assert found["smollm2"].loc[formats.RECIPE.name, "KL"] == 0.3
    drawn = []
    monkeypatch.setattr(plots, "show", lambda figure, alt: drawn.append(len(figure.axes)))
    for tables in (found, formats.beside("smollm2", losses, "formats")):
        cost_plots.differences(tables, formats.RECIPE.name)
    assert drawn == [2, 1]


@pytest.mark.parametrize("far, scale, says", [
    (0.1, "linear", "nats per token"), (5.0, "symlog", "(logarithmic beyond ±0.01)")])
def test_an_axis_that_is_not_linear_says_so(monkeypatch, far, scale, says):
    kl = {formats.RECIPE.name: [0.1, 0.1], "near": [0.12, 0.12], "other": [0.08, 0.08],
          "far": [0.1 + far, 0.1 + far]}
    share, drawn = {title: 1.0 for title in kl}, []
    monkeypatch.setattr(plots, "show", lambda figure, alt: drawn.append(figure.axes[0]))
    cost_plots.differences({"m": formats.table(Losses([1, 1], kl, share, share))},
                           formats.RECIPE.name)
    assert drawn[0].get_xscale() == scale and drawn[0].get_xlabel().endswith(says)


def test_tied_weights_are_put_back(tiny, tiny_base):
    """lm_head and the embedding are one Parameter; both are rounded, and both come back."""
    model, _ = ablation.load(tiny_base)
    model.lm_head.weight = model.model.embed_tokens.weight
    model.config.tie_word_embeddings = True
    before = model.lm_head.weight.detach().clone()
    assert len(formats.left_alone_arms(model)) == 2
    with formats.quantized(model, Format("E5M2", "e5m2"),
                           more=("lm_head", "model.embed_tokens")):
        assert not torch.equal(model.lm_head.weight, before)
    assert torch.equal(model.lm_head.weight, before)
    assert torch.equal(model.model.embed_tokens.weight, before)


def test_the_kept_figures_are_of_both_models_and_of_text_enough():
    for name, texts in (("tiny-phi4", 100), ("smollm2", 100)):
        losses = formats.measured(name, "formats")
        assert len(losses.tokens) == texts and sum(losses.tokens) >= 10_000
        assert list(losses.kl) == list(formats.format_arms(None))
        assert all(len(each) == texts for each in losses.kl.values())
        table = formats.table(losses)
        assert table.loc["INT8 per channel", "told apart"] in ("less", "more", "no")


def test_what_is_kept_is_measured_against_the_unrounded_model(tiny, tmp_workspace, monkeypatch):
    """From an empty workspace: no arm may be at work while the reference is computed."""
    monkeypatch.setattr(measure_formats, "TEXTS", 2)
    monkeypatch.setattr(measure_formats, "CALIBRATION", 1)
    every = scheme_trials.recipes  # one will do: all are made by tests/test_scheme_trials.py
    monkeypatch.setattr(scheme_trials, "recipes", lambda config: {
        "FP8_DYNAMIC": every(config)["FP8_DYNAMIC"]})
    model, texts, _ = tiny
    found = measure_formats.entry(models.tiny())["losses"]
    here = formats.measure(model, texts[:2], {formats.RECIPE.name: lambda: formats.quantized(
        model, formats.RECIPE)})
    assert found["kl"][formats.RECIPE.name] == pytest.approx(here.kl[formats.RECIPE.name], rel=1e-3)


@pytest.mark.parametrize("name", formats.kept())
def test_the_kept_arms_are_further_from_the_model_than_it_is_from_itself(name):
    kept = formats.measured(name, "activations")
    assert 0 < np.mean(kept.kl["W8A16"]) < np.mean(kept.kl[formats.RECIPE.name])


def test_the_kept_figures_of_the_bundled_model_are_made_again(tiny):
    model, _, tokenizer = tiny
    few = formats.texts(tokenizer, 4)
    kept = formats.measured("tiny-phi4", "formats")
    arm = {"INT8": formats.format_arms(model)["INT8 per channel"]}
    again = formats.measure(model, few, arm)
    assert again.tokens == kept.tokens[:4]
    assert np.mean(again.kl["INT8"]) == pytest.approx(
        np.mean(kept.kl["INT8 per channel"][:4]), rel=0.5)


def test_other_scales_round_otherwise_and_no_worse(tiny):
    """Every weight within E4M3's half step, as with the recipe's own scales, but for subnormals."""
    model, _, _ = tiny
    name = ablation.targets(model)[0]
    before = model.get_submodule(name).weight.detach().clone()
    seen = []
    for arm in (formats.quantized(model, formats.RECIPE), formats.moved(model, 1),
                formats.moved(model, 2)):
        with arm:
            seen.append(model.get_submodule(name).weight.detach().clone())
    assert torch.equal(model.get_submodule(name).weight, before)
    peak = before.abs().amax(1, keepdim=True)
    normal = before.abs() > peak * 2 * 2**-6 / 448
    for weight in seen:
        off = (weight / before - 1).abs()[normal & (before != 0)]
        assert off.max() < 0.0626 and 25 < ablation.sqnr(before, weight) < 40
    assert not any(torch.equal(seen[a], seen[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


def test_what_04_says_in_words_is_what_is_kept():
    nb = nbformat.read(REPO / "notebooks" / "04_what_fp8_costs.ipynb", as_version=4)
    prose = "\n".join(cell.source for cell in nb.cells if cell.cell_type == "markdown")
    kl = {}
    recipe = formats.RECIPE.name
    for name in ("tiny-phi4", "smollm2"):
        for part, against in (("formats", recipe), ("activations", recipe),
                              ("kv cache", "E4M3, scale 1")):
            kl |= {(name, arm): value for arm, value in formats.table(
                formats.measured(name, part), against)["KL"].items()}
    other = {name: [kl[name, f"E4M3, other scales {draw}"] for draw in (1, 2, 3)]
             for name in ("tiny-phi4", "smollm2")}
    assert (f"W8A8 cost the bundled model {kl['tiny-phi4', recipe]:.5f} nats, SmolLM2 "
            f"{kl['smollm2', recipe]:.3f}; scales as good, drawn at random, give "
            f"{min(other['tiny-phi4']):.5f} to {max(other['tiny-phi4']):.5f}, and "
            f"{min(other['smollm2']):.3f} to {max(other['smollm2']):.3f}.") in prose
    one_scale = [kl["smollm2", arm] / kl["smollm2", recipe] for arm in (
        "dynamic, one scale a text", "static, set on 32 texts", "static, set on 1 text")]
    assert "One scale for all tokens costs SmolLM2 a fifth more at least" in prose
    assert 1.2 <= min(one_scale) < 1.25
    luck = {name: max(each) for name, each in other.items()}
    assert ("A difference no larger than theirs may be luck: on the bundled model blocks and one "
            "scale for all, on SmolLM2 INT8 per channel and one scale for a weight.") in prose
    assert max(kl["tiny-phi4", arm] for arm in (
        "E4M3 128x128 blocks", "E4M3, weights per tensor", "E4M3 per tensor")) < luck["tiny-phi4"]
    assert max(kl["smollm2", arm] for arm in (
        "INT8 per channel", "E4M3, weights per tensor")) < luck["smollm2"]
    assert "one per token and head takes a third off SmolLM2's KL, INT8 half." in prose
    cache = [kl["smollm2", arm] / kl["smollm2", "E4M3, scale 1"] for arm in (
        "E4M3, per token and head", "INT8, calibrated")]
    assert cache == pytest.approx([2 / 3, 1 / 2], abs=0.03)
