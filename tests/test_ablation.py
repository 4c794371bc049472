"""Rounding inside the model, against helpers.fp8, loops and compressed-tensors."""

import dataclasses
import json
import math

import nbformat
import pytest
import torch

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


def test_sqnr_of_an_error_of_a_tenth_is_20_db():
    x = torch.tensor([3.0, 4.0])
    assert ablation.sqnr(x, x + torch.tensor([0.3, 0.4])) == pytest.approx(20, abs=1e-4)
    assert math.isinf(ablation.sqnr(x, x))


def test_the_model_is_put_back_even_after_an_error(tiny):
    model, texts = tiny

    def logits():
        with torch.no_grad():
            return model(texts[0]).logits

    before = logits()
    with pytest.raises(KeyError), ablation.applied(
            model, ablation.targets(model), lambda _, weight: ablation.rounded(weight, "e4m3"),
            lambda _, x: ablation.rounded(x, "e4m3")):
        assert not torch.equal(logits(), before)
        raise KeyError
    assert torch.equal(logits(), before)


def test_what_is_observed_is_what_the_first_linear_is_given(tiny):
    model, texts = tiny
    found = ablation.observe(model, texts[0], lambda x: x)
    with torch.no_grad():
        expected = model.model.layers[0].input_layernorm(model.model.embed_tokens(texts[0]))[0]
    assert sorted(found) == sorted(ablation.targets(model))
    assert torch.equal(found["model.layers.0.self_attn.qkv_proj"], expected)


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
    assert scope["model"].config.num_hidden_layers == 4 and len(scope["texts"]) == 100
