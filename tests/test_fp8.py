"""E4M3 from the bits, against torch's cast and LLM Compressor's tensors."""

import torch

from helpers import checkpoint, fp8


def every_bf16() -> torch.Tensor:
    return torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)


def same_codes(mine, reference) -> bool:
    return torch.equal(mine, reference.view(torch.uint8))


def test_all_codes_decode_as_torch_decodes_them():
    codes = torch.arange(256, dtype=torch.uint8)
    reference = codes.view(torch.float8_e4m3fn).float()
    assert torch.equal(fp8.decode(codes).nan_to_num(1e9), reference.nan_to_num(1e9))
    assert int(fp8.decode(codes).isnan().sum()) == 2
    assert fp8.decode(codes)[~reference.isnan()].max() == fp8.MAX


def test_every_bf16_encodes_as_torch_after_the_clamp_of_llm_compressor():
    x = every_bf16()
    assert same_codes(fp8.encode(x), x.float().clamp(-448, 448).to(torch.float8_e4m3fn))


def test_this_torchs_own_cast_saturates_as_well():
    x = every_bf16()
    assert same_codes(fp8.encode(x), x.to(torch.float8_e4m3fn))
    assert fp8.decode(fp8.encode(torch.tensor([1e9, -torch.inf]))).tolist() == [448.0, -448.0]


def test_float32_between_two_codes_rounds_as_torch_does():
    grid = fp8.decode(torch.arange(127)).double()
    middle = (grid[1:] + grid[:-1]) / 2
    x = torch.cat([middle, middle * (1 + 1e-6), middle * (1 - 1e-6)]).float()
    assert same_codes(fp8.encode(torch.cat([x, -x])),
                      torch.cat([x, -x]).to(torch.float8_e4m3fn))


def test_codes_survive_a_round_trip():
    codes = torch.arange(256, dtype=torch.uint8)
    back = fp8.encode(fp8.decode(codes))
    assert torch.equal(back & 127, codes & 127)
    assert torch.equal(back[:127], codes[:127]) and torch.equal(back[128:255], codes[128:255])


def test_every_module_is_llm_compressors_bit_for_bit(tiny_base, tiny_fp8):
    modules = checkpoint.linears(checkpoint.census(tiny_base))
    assert len(modules) == 16
    for name in modules:
        codes, scale = fp8.quantize_per_channel(checkpoint.read_tensor(tiny_base, f"{name}.weight"))
        assert same_codes(codes, checkpoint.read_tensor(tiny_fp8, f"{name}.weight")), name
        assert torch.equal(scale, checkpoint.read_tensor(tiny_fp8, f"{name}.weight_scale")), name


def test_per_token_scales_are_those_of_compressed_tensors():
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    x = torch.randn(50, 256, generator=torch.Generator().manual_seed(0))
    x *= torch.logspace(-3, 3, 50)[:, None]
    codes, scale = fp8.quantize_per_token(x)
    args = QuantizationArgs(num_bits=8, type="float", strategy="token", dynamic=True)
    expected, _ = compute_dynamic_scales_and_zp(x[None], args, torch.nn.Module())
    assert torch.allclose(scale, expected.reshape(-1, 1), rtol=1e-6)
    assert ((fp8.decode(codes) * scale - x).abs() <= x.abs() / 17 + scale * 2**-10).all()
