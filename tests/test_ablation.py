"""Formats inside the model, against helpers.fp8, loops, scipy and a model changed by hand."""

import dataclasses
import json
import math

import nbformat
import pytest
import torch
from scipy.stats import entropy

from helpers import ablation, course, fp8, models, workspace


@pytest.fixture(scope="module")
def tiny(tiny_base):
    model, tokenizer = ablation.load(tiny_base)
    with open(tiny_base.path.parent / "tiny_gsm8k" / "test.jsonl") as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(3), strict=False)]
    return model, ablation.encoded(tokenizer, rows)


def matrix(rows=200, columns=300):
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    return x * torch.logspace(-3, 3, rows)[:, None]


@pytest.mark.parametrize("grid, format", [("e4m3", fp8.E4M3), ("e5m2", fp8.E5M2)])
def test_float_grids_are_those_of_fp8(grid, format):
    x = matrix()
    scale = x.abs().amax(1, keepdim=True) / format.max
    expected = fp8.decode(fp8.encode(x / scale, format), format) * scale
    assert torch.equal(ablation.rounded(x, grid), expected)


def test_dynamic_activations_are_compressed_tensors_own():
    """A token's scale as compressed-tensors finds it at run time, and its rounding with it."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    x = matrix()
    args = QuantizationArgs(num_bits=8, type="float", strategy="token", dynamic=True)
    scale, zero = compute_dynamic_scales_and_zp(x[None], args, torch.nn.Module())
    expected = fake_quantize(x[None], scale, zero, args)[0]
    assert torch.allclose(ablation.rounded(x, "e4m3"), expected, rtol=1e-6, atol=0)


def test_int8_is_off_by_at_most_half_a_step():
    x = matrix()
    step = x.abs().amax(1, keepdim=True) / 127
    error = (ablation.rounded(x, "int8") - x).abs()
    assert (error <= step * 0.5001).all() and (error > step * 0.45).any()


@pytest.mark.parametrize("scope, high", [("block", 128), ("group", 1)])
def test_block_scales_are_the_loops_also_where_blocks_are_cut(scope, high):
    x = matrix()
    found = ablation.amax(x, scope)
    assert found.shape == x.shape
    for top in range(0, 200, high):
        for left in range(0, 300, 128):
            part = x[top:top + high, left:left + 128]
            assert (found[top:top + high, left:left + 128] == part.abs().max()).all()


def test_a_static_scale_saturates_what_is_larger():
    x = torch.tensor([[1.0, 10.0, -10.0]])
    assert ablation.rounded(x, "e4m3", scale=torch.tensor(1 / 448)).tolist() == [[1.0, 1.0, -1.0]]


@pytest.mark.parametrize("grid, largest", [("int8", 127), ("e5m2", 57344)])
def test_beyond_a_static_scale_every_grid_ends_at_its_largest_value(grid, largest):
    """torch's own cast saturates in E4M3 alone."""
    x = torch.tensor([[1.0, 10.0, -torch.inf]])
    found = ablation.rounded(x, grid, scale=torch.tensor(1 / largest))
    assert found.tolist() == [[1.0, 1.0, -1.0]]


def test_a_row_of_zeros_stays_zero():
    assert torch.equal(ablation.rounded(torch.zeros(2, 128), "e4m3"), torch.zeros(2, 128))


def test_sqnr_and_kl_against_numpy_and_scipy():
    x = torch.tensor([3.0, 4.0])
    assert ablation.sqnr(x, x + torch.tensor([0.3, 0.4])) == pytest.approx(20, abs=1e-4)
    assert math.isinf(ablation.sqnr(x, x))
    p, q = torch.randn(5, 7), torch.randn(5, 7)
    expected = entropy(p.softmax(-1).numpy(), q.softmax(-1).numpy(), axis=1)
    assert ablation.kl(p, q).tolist() == pytest.approx(expected, rel=1e-4)


def test_the_model_is_put_back_even_after_an_error(tiny):
    model, texts = tiny
    before = ablation.outputs(model, texts)[1]
    with pytest.raises(KeyError), ablation.quantized(model, ablation.FORMATS[0], True, True):
        assert not torch.equal(ablation.outputs(model, texts)[1], before)
        raise KeyError
    assert torch.equal(ablation.outputs(model, texts)[1], before)


def test_w8a16_is_a_model_whose_weights_were_changed_by_hand(tiny, tiny_base, tiny_fp8):
    from safetensors.torch import load_file

    model, texts = tiny
    stored = load_file(tiny_fp8.path / "model.safetensors")
    other, _ = ablation.load(tiny_base)
    state = {name.removesuffix("_scale"): stored[name.removesuffix("_scale")].float()
             * stored[name].float() for name in stored if name.endswith("weight_scale")}
    assert len(state) == len(ablation.targets(model)) == 16
    other.load_state_dict(state, strict=False)
    with ablation.w8(model, tiny_fp8, activations=False):
        found = ablation.outputs(model, texts)[1]
    expected = ablation.outputs(other, texts)[1]
    # The same products in float32, whose sums may be taken in another order.
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ablation.outputs(model, texts)[1], expected, rtol=1e-4, atol=1e-4)


def test_layers_are_transformers_hidden_states(tiny):
    model, texts = tiny
    layers, logits = ablation.outputs(model, texts[:1])
    with torch.no_grad():
        reference = model(texts[0], output_hidden_states=True)
    assert torch.equal(logits, reference.logits[0])
    for mine, theirs in zip(layers[:-1], reference.hidden_states[1:-1], strict=True):
        assert torch.equal(mine, theirs[0])
    # transformers' last hidden state comes after the final norm
    assert torch.allclose(model.model.norm(layers[-1]), reference.hidden_states[-1][0])


def test_what_is_observed_is_what_the_first_linear_is_given(tiny):
    model, texts = tiny
    found = ablation.observe(model, texts[0], lambda x: x)
    with torch.no_grad():
        expected = model.model.layers[0].input_layernorm(model.model.embed_tokens(texts[0]))[0]
    assert sorted(found) == sorted(ablation.targets(model))
    assert torch.equal(found["model.layers.0.self_attn.qkv_proj"], expected)


def test_rounding_more_costs_more_and_nothing_costs_nothing(tiny):
    model, texts = tiny
    reference = ablation.outputs(model, texts)
    same = ablation.compare(reference, model, texts)
    assert same["KL"] == 0 and same["top-1"] == 1
    assert all(math.isinf(same[f"layer {i}, dB"]) for i in range(4))
    table = ablation.run(model, texts, ablation.FORMATS[:1] + ablation.FORMATS[3:4])
    kl = table.set_index(["format", "rounded"])["KL"]
    assert (kl > 0).all()
    assert kl["E5M2 per channel", "both"] > kl["E4M3 per channel", "both"]
    alone = ablation.left_alone(model, texts)
    assert alone.loc["Linears only", "KL"] == kl["E4M3 per channel", "both"]
    assert len(set(alone["KL"])) == 4


def test_problems_are_solved_as_transformers_answers_them_one_by_one(tiny_base):
    """Batched and padded against each alone; and a model that is rounded to nothing solves none.

    In float64, where no order of a sum decides which of two words is the likelier.
    """
    model, tokenizer = ablation.load(tiny_base)
    model = model.double()
    with open(tiny_base.path.parent / "tiny_gsm8k" / "test.jsonl") as lines:
        rows = [json.loads(line) for line in lines][:12]
    alone = [ablation.solved(model, tokenizer, [row], batch=1)[0] for row in rows]
    assert ablation.solved(model, tokenizer, rows, batch=5) == alone and sum(alone) > 6
    wrong = [row | {"answer": "#### 123456"} for row in rows]
    assert not any(ablation.solved(model, tokenizer, wrong))
    before = torch.get_num_threads()
    table = ablation.accuracy(model, tokenizer, rows, ablation.FORMATS[3:4])
    assert torch.get_num_threads() == before
    assert list(table.index) == ["unrounded", "E5M2 per channel"]
    first, second = table["right"]
    assert first == sum(alone) and second == first - table["lost"].iloc[1] + table["gained"].iloc[1]
    assert (table["low"] < table["accuracy"]).all() and (table["high"] > table["accuracy"]).all()
    with ablation.applied(model, ablation.targets(model), weight=lambda _, w: w * 0):
        assert not any(ablation.solved(model, tokenizer, rows))


@pytest.mark.parametrize("nbytes, expected", [(7_000_000, "own"), (29_319_014_400, "tiny-phi4")])
def test_notebook_04_takes_the_bundled_model_for_one_too_large_for_float32(nbytes, expected):
    """The cell itself, with a course whose model is small and one whose model is Phi-4's size."""
    nb = nbformat.read(workspace.repo() / "notebooks" / "04_what_fp8_costs.ipynb", 4)
    cell = next(cell.source for cell in nb.cells if "small = phi4.profile" in cell.source)
    tiny = models.tiny()
    profile = dataclasses.replace(tiny, name="own", bf16_bytes=nbytes)
    scope = {"course": course, "phi4": course.Course(None, None, profile)}
    exec(cell, scope)
    assert scope["subject"].profile.name == expected
    assert scope["model"].config.num_hidden_layers == 4 and len(scope["texts"]) == 8
