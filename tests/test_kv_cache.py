"""Keys and values rounded in the cache: against a model changed by hand, and vLLM's own specs."""

import json

import pytest
import torch

from helpers import ablation, formats, kv_cache, workspace


@pytest.fixture(scope="module")
def tiny(tiny_base):
    model, tokenizer = ablation.load(tiny_base)
    return model, formats.texts(tokenizer, 2)


def test_phi4s_bytes():
    config = json.loads(workspace.data("phi4", "config.json").read_text())
    table = kv_cache.sizes(config)
    assert dict(table["total"]) == {"auto (bf16)": 204_800, "fp8": 102_400,
                                    "fp8_per_token_head": 102_400 + 2 * 40 * 10 * 4}
    assert table.loc["fp8", "of bf16"] == 0.5


def test_an_unchanged_cache_changes_nothing_and_is_taken_away(tiny):
    model, texts = tiny
    with torch.inference_mode():
        before = model(texts[0]).logits
        with kv_cache.replaced(model, lambda what, layer, tensor: tensor):
            assert torch.equal(model(texts[0]).logits, before)
        with kv_cache.replaced(model, lambda what, layer, tensor: tensor * 0):
            assert not torch.equal(model(texts[0]).logits, before)
        assert torch.equal(model(texts[0]).logits, before)


def test_what_is_rounded_are_keys_after_the_rotary_embedding_and_values(tiny):
    """Against transformers' own cache, and attention by hand from the rounded tensors."""
    model, texts = tiny
    with torch.inference_mode():
        plain = model(texts[0], use_cache=True).past_key_values
        found = kv_cache.observe(model, texts[0], lambda x: x)
        for layer in range(4):
            assert torch.equal(found["K", layer], plain.layers[layer].keys)
            assert torch.equal(found["V", layer], plain.layers[layer].values)
        kept = {}

        def change(what, layer, tensor):
            kept[what, layer] = kv_cache.rounding("e4m3", 1.0)(what, layer, tensor)
            return kept[what, layer]

        with kv_cache.replaced(model, change):
            cache = model(texts[0]).past_key_values
    assert torch.equal(cache.layers[0].keys, kept["K", 0])
    expected = found["K", 0].clamp(-448, 448).to(torch.float8_e4m3fn).float()
    assert torch.equal(kept["K", 0], expected) and not torch.equal(expected, found["K", 0])


def test_scales_are_one_a_layer_or_one_a_token_and_head(tiny):
    model, texts = tiny
    scales = kv_cache.calibrated(model, texts, "int8")
    peaks = [kv_cache.observe(model, ids, lambda x: x.abs().max()) for ids in texts]
    assert len(scales) == 8
    assert scales["V", 2] == max(peak["V", 2] for peak in peaks) / 127
    x = torch.randn(1, 3, 5, 64, generator=torch.Generator().manual_seed(0))
    one = kv_cache.rounding("int8")("K", 0, x)
    step = x.abs().amax(-1, keepdim=True) / 127
    assert ((one - x).abs() <= step * 0.5001).all()
    shared = kv_cache.rounding("int8", {("K", 0): x.abs().max() / 127})("K", 0, x)
    assert ((shared - x).abs() <= x.abs().max() / 127 * 0.5001).all()
    assert not torch.equal(one, shared)


def test_error_is_the_sqnr_of_all_layers(tiny):
    model, texts = tiny
    way = kv_cache.rounding("e4m3", 1.0)
    found = kv_cache.error(model, texts[0], {"way": way})
    kept = kv_cache.observe(model, texts[0], lambda x: x)
    signal = noise = 0.0
    for layer in range(4):
        x = kept["K", layer].double()
        signal += float((x**2).sum())
        noise += float(((x.float().to(torch.float8_e4m3fn).double() - x)**2).sum())
    assert found.loc["way", "K"] == pytest.approx(
        10 * torch.tensor(signal / noise).log10().item(), abs=1e-3)
