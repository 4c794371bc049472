"""E4M3 from the bits, against torch's cast and LLM Compressor's tensors."""

import pytest
import torch

from helpers import checkpoint, fp8


def every_bf16() -> torch.Tensor:
    return torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)


def same_codes(mine, reference) -> bool:
    return torch.equal(mine, reference.view(torch.uint8))


FORMATS = pytest.mark.parametrize("format, reference", [
    (fp8.E4M3, torch.float8_e4m3fn), (fp8.E5M2, torch.float8_e5m2)], ids=["e4m3", "e5m2"])


@FORMATS
def test_all_codes_decode_as_torch_decodes_them(format, reference):
    codes = torch.arange(256, dtype=torch.uint8)
    expected = codes.view(reference).float()
    mine = fp8.decode(codes, format)
    assert torch.equal(mine.isnan(), expected.isnan())
    assert torch.equal(mine[~mine.isnan()], expected[~mine.isnan()])
    assert torch.equal(torch.signbit(mine[[0, 128]]), torch.tensor([False, True]))
    assert mine[mine.isfinite()].max() == format.max == torch.finfo(reference).max


def test_e4m3_has_two_nans_and_no_infinity_and_e5m2_has_both():
    codes = torch.arange(256)
    fine, wide = fp8.decode(codes), fp8.decode(codes, fp8.E5M2)
    assert (int(fine.isnan().sum()), int(fine.isinf().sum())) == (2, 0)
    assert (int(wide.isnan().sum()), int(wide.isinf().sum())) == (6, 2)


@FORMATS
def test_every_bf16_encodes_as_torch_after_the_clamp_of_llm_compressor(format, reference):
    x = every_bf16()
    expected = x.float().clamp(-format.max, format.max).to(reference)
    assert same_codes(fp8.encode(x, format), expected)


def test_this_torchs_own_cast_saturates_in_e4m3_and_overflows_in_e5m2():
    x = every_bf16()
    assert same_codes(fp8.encode(x), x.to(torch.float8_e4m3fn))
    assert fp8.decode(fp8.encode(torch.tensor([1e9, -torch.inf]))).tolist() == [448.0, -448.0]
    differs = fp8.encode(x, fp8.E5M2) != x.to(torch.float8_e5m2).view(torch.uint8)
    assert differs.any() and (x[differs].abs() > fp8.E5M2.max).all()
    assert x[differs].to(torch.float8_e5m2).float().isinf().all()


def test_float32_between_two_codes_rounds_as_torch_does():
    grid = fp8.decode(torch.arange(127)).double()
    middle = (grid[1:] + grid[:-1]) / 2
    x = torch.cat([middle, middle * (1 + 1e-6), middle * (1 - 1e-6)]).float()
    assert same_codes(fp8.encode(torch.cat([x, -x])),
                      torch.cat([x, -x]).to(torch.float8_e4m3fn))


@FORMATS
def test_all_finite_codes_survive_a_round_trip(format, reference):
    codes = torch.arange(256, dtype=torch.uint8)
    finite = codes.view(reference).float().isfinite()
    assert torch.equal(fp8.encode(fp8.decode(codes, format), format)[finite], codes[finite])
    assert fp8.decode(fp8.encode(torch.tensor([torch.inf, -torch.inf]), format), format).tolist() \
        == [format.max, -format.max]


def test_the_scales_are_compressed_tensors_own_also_of_channels_of_zeros():
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams

    weight = every_bf16()[:32640].nan_to_num(posinf=0).reshape(-1, 64)  # from 0 to the largest
    weight = torch.cat([weight, -weight, torch.zeros(2, 64, dtype=torch.bfloat16)])
    args = QuantizationArgs(num_bits=8, type="float", strategy="channel")
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    expected, _ = calculate_qparams(low, high, args)
    codes, scale = fp8.quantize_per_channel(weight)
    assert torch.equal(scale, expected)
    assert (codes[-2:] == 0).all() and fp8.decode(codes).isfinite().all()


def test_every_module_is_llm_compressors_bit_for_bit(tiny_base, tiny_fp8):
    modules = checkpoint.linears(tiny_base.tensors)
    assert len(modules) == 16
    for name in modules:
        codes, scale = fp8.quantize_per_channel(checkpoint.read_tensor(tiny_base, f"{name}.weight"))
        assert same_codes(codes, checkpoint.read_tensor(tiny_fp8, f"{name}.weight")), name
        assert torch.equal(scale, checkpoint.read_tensor(tiny_fp8, f"{name}.weight_scale")), name
