"""The emulated accumulator beside one in integers, and inside the model beside plain arithmetic."""

import struct

import pytest
import torch

from helpers import ablation, accumulation, formats

FRACTION = 13  # bits kept below the largest exponent


@pytest.fixture(scope="module")
def tiny(tiny_base):
    model, tokenizer = ablation.load(tiny_base)
    return model, formats.texts(tokenizer, 2)


def fields(code: int) -> tuple[int, int]:
    """An E4M3 code as (signed integer significand, exponent): value = significand * 2^(e - 3)."""
    sign, exponent, mantissa = code >> 7, (code >> 3) & 15, code & 7
    significand = mantissa + 8 if exponent else mantissa
    return (-significand if sign else significand), max(exponent, 1) - 7


def shifted(value: int, places: int) -> int:
    """An integer moved by binary places, what falls off cut towards zero."""
    size = abs(value) << places if places >= 0 else abs(value) >> -places
    return -size if value < 0 else size


def step(codes, others, total: tuple[int, int]) -> tuple[int, int]:
    """32 products and a running sum, `significand * 2^exponent`, added as Hopper adds them.

    All are aligned to the largest exponent, where a product's is the sum of its factors', and cut
    FRACTION bits below it; the sum is cut to FRACTION bits below its own leading one. In integers
    alone, from the description in arXiv:2412.19437 (3.3.2) and arXiv:2512.07004.
    """
    terms = [total]  # (significand, exponent of its last bit)
    tops = [abs(total[0]).bit_length() - 1 + total[1]] if total[0] else []
    for code, other in zip(codes, others, strict=True):
        (a, ea), (b, eb) = fields(code), fields(other)
        if a * b:
            terms.append((a * b, ea + eb - 6))
            tops.append(ea + eb)
    if not tops:
        return 0, 0
    last = max(tops) - FRACTION
    value = sum(shifted(significand, exponent - last) for significand, exponent in terms)
    excess = max(0, abs(value).bit_length() - 1 - FRACTION)
    return shifted(value, -excess), last + excess


def summed(codes, others) -> float:
    total = (0, 0)
    for start in range(0, len(codes), 32):
        total = step(codes[start:start + 32], others[start:start + 32], total)
    return total[0] * 2.0**total[1]


def float32(value: float) -> float:
    """The nearest float32, by the C library."""
    return struct.unpack("f", struct.pack("f", value))[0]


def in_chunks(codes, others) -> float:
    """Slow accumulation: sums of 128 products, added in float32 to the nearest."""
    total = 0.0
    for start in range(0, len(codes), 128):
        total = float32(total + summed(codes[start:start + 128], others[start:start + 128]))
    return total


def operands(kind: str, length: int):
    """Ten rows and ten columns of E4M3 codes: normal, all codes alike, or of one sign."""
    random = torch.Generator().manual_seed(length)
    if kind == "every code":
        codes = torch.randint(0, 256, (20, length), generator=random).to(torch.uint8)
        codes[(codes & 127) == 127] = 0  # NaN
        return codes[:10].view(torch.float8_e4m3fn), codes[10:].view(torch.float8_e4m3fn)
    x = torch.randn(20, length, generator=random)
    return (accumulation.codes(part.abs() if kind == "one sign" else part)[0]
            for part in (x[:10], x[10:]))


@pytest.mark.parametrize("kind, length", [("normal", 5120), ("every code", 256),
                                          ("one sign", 1024)])
def test_hoppers_sums_are_those_of_an_accumulator_in_integers(kind, length):
    """300 dot products, each to the bit, fast and slow."""
    a, b = operands(kind, length)
    rows, columns = a.view(torch.uint8).tolist(), b.view(torch.uint8).tolist()
    for way, reference in (("fast", summed), ("slow", in_chunks)):
        found = accumulation.sums(a, b, way)
        assert found.dtype == torch.float32
        assert found.tolist() == [[reference(x, w) for w in columns] for x in rows]


def test_exact_sums_are_exact_and_this_cpus_are_float32():
    a, b = operands("normal", 5120)
    whole = [[sum(int(x * 512) * int(y * 512) for x, y in zip(row, column, strict=True)) / 2**18
              for column in b.double().tolist()] for row in a.double().tolist()]
    assert accumulation.sums(a, b, "exact").tolist() == whole
    error = accumulation.sums(a, b, "float32").double() - torch.tensor(whole, dtype=torch.float64)
    assert error.norm() / torch.tensor(whole).norm() < 1e-6


def test_the_errors_are_the_prototypes():
    table = accumulation.errors((256, 5120), rows=32, seeds=2)
    assert table.loc[256, "fast"] == pytest.approx(2.1e-4, rel=0.1)
    assert table.loc[5120, "fast"] == pytest.approx(1.6e-3, rel=0.1)
    assert table["slow"].tolist() == pytest.approx([1.2e-4, 1.2e-4], rel=0.1)
    assert table["quantization"].between(3.5e-2, 4e-2).all()
    assert (table["float32"] < 1e-6).all()
    again = accumulation.errors((256,), rows=32, seeds=2, repeat=20).loc[256]  # K of 5,120, too
    assert again["quantization"] == pytest.approx(table.loc[256, "quantization"], rel=1e-6)
    assert again["fast"] > 3 * table.loc[5120, "fast"]


def test_inside_the_model_exact_sums_are_w8a8(tiny):
    """Against the model with weights and inputs rounded, in float64 where its Linears multiply."""
    model, texts = tiny
    name = "model.layers.0.mlp.down_proj"
    seen = {}

    def keep(title):
        return lambda _m, args, out: seen.__setitem__(title, (args[0], out))

    for title, arm in (("emulated", accumulation.emulated(model, "exact")),
                       ("rounded", formats.quantized(model, formats.RECIPE))):
        with arm, torch.inference_mode():
            hook = model.get_submodule(name).register_forward_hook(keep(title))
            model(texts[0])
            hook.remove()
    weight = formats.stored(model.get_submodule(name).weight.detach(), formats.RECIPE)
    x, out = seen["emulated"]
    by_hand = ablation.rounded(x[0], "e4m3").double() @ weight.double().T
    assert torch.allclose(out[0].double(), by_hand, rtol=1e-5, atol=1e-6 * by_hand.abs().max())
    # and the other's inputs differ by no more than float32's sums have moved a rounding
    assert ablation.sqnr(out, seen["rounded"][1]) > 25


def test_a_longer_sum_is_the_same_value_with_more_of_the_sums_error(tiny):
    model, texts = tiny
    layer = model.model.layers[0].self_attn.qkv_proj
    x = torch.randn(1, 16, 256, generator=torch.Generator().manual_seed(0))
    before = dict(layer._forward_hooks)
    found = {}
    for way, repeat in (("exact", 1), ("exact", 5), ("fast", 1), ("fast", 5)):
        with accumulation.emulated(model, way, repeat), torch.inference_mode():
            found[way, repeat] = layer(x)
    assert dict(layer._forward_hooks) == before
    assert torch.equal(found["exact", 1], found["exact", 5])
    short, long = (ablation.sqnr(found["exact", 1], found["fast", n]) for n in (1, 5))
    assert 50 < long < short - 6
