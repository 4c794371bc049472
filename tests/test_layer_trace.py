"""What vLLM's kernel holds of a layer, against the checkpoint's own tensors."""

import pytest
import torch

from helpers import WorkbookError, checkpoint, hardware, models, serving
from helpers.serve_side import layer_trace

DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def received(tiny_fp8):
    mode = hardware.serving_mode(hardware.detect())
    flags = serving.default_flags(models.tiny(), mode)
    return layer_trace.received(tiny_fp8, DOWN, flags)


def stored(fp8):
    return (checkpoint.read_tensor(fp8, f"{DOWN}.{part}").float()
            for part in ("weight", "weight_scale"))


def test_the_kernel_holds_the_checkpoints_codes_and_scales(received, tiny_fp8, fp8_server):
    assert received.kernel == fp8_server.kernel
    codes, scale = stored(tiny_fp8)
    held = (received.product.T.float() / scale).to(torch.float8_e4m3fn).float()
    normal = codes.abs() >= 2**-6
    assert normal.double().mean() > 0.999
    assert torch.equal(held[normal], codes[normal])
    # vLLM's packed CPU operator reads exponent 0 as a normal one: by 2^-7 at most.
    assert (held - codes)[~normal].abs().max() <= 2**-7
    if "Marlin" not in received.kernel:  # which keeps them permuted
        assert torch.equal(received.scale, scale.flatten())


def test_it_is_this_layers_and_no_others(received, tiny_fp8):
    """The proof could fail: another layer's codes, or one code moved, do not agree."""
    codes, scale = stored(tiny_fp8)
    exact = (codes * scale).T
    assert torch.allclose(received.product.float(), exact, rtol=2**-8, atol=float(scale.max()) / 64)
    other = checkpoint.read_tensor(tiny_fp8, DOWN.replace("layers.0", "layers.1") + ".weight")
    assert not torch.allclose(received.product.float(), (other.float() * scale).T, rtol=2**-8,
                              atol=float(scale.max()) / 64)
    row, column = map(int, (codes.abs() > 1).nonzero()[0])
    codes[row, column] *= 1.125  # the next code
    assert not torch.allclose(received.product.float(), (codes * scale).T, rtol=2**-8,
                              atol=float(scale.max()) / 64)


@pytest.mark.parametrize("numerics", ["", "w8a8"])
def test_random_inputs_tell_the_arithmetics_apart(tiny_fp8, monkeypatch, numerics):
    """What notebook 05 calls the proof; told to compute W8A8, a CPU's kernel is found to do so."""
    mode = hardware.serving_mode(hardware.detect())
    if numerics and mode.device != "cpu":
        pytest.skip("PHI4_FP8_CPU_NUMERICS is for CPUs")
    monkeypatch.setenv("PHI4_FP8_CPU_NUMERICS", numerics)
    codes, scale = stored(tiny_fp8)
    x = torch.randn(16, codes.shape[1], generator=torch.Generator().manual_seed(0)).bfloat16()
    y = layer_trace.received(tiny_fp8, DOWN, serving.default_flags(models.tiny(), mode), x).product
    s_x = x.float().abs().amax(dim=1, keepdim=True) / 448
    codes_x = (x.float() / s_x).to(torch.float8_e4m3fn).float()
    products = {"w8a16": x.float() @ (codes * scale).T, "w8a8": s_x * codes_x @ (codes * scale).T}
    far = {name: float((y.float() - product).norm() / product.norm())
           for name, product in products.items()}
    expected = numerics or mode.title[:5].lower().strip()
    other = "w8a16" if expected == "w8a8" else "w8a8"
    assert far[expected] < 0.005 and far[other] > 0.015


def test_a_module_that_is_not_there_is_a_sentence(tiny_fp8):
    with pytest.raises(WorkbookError, match="no FP8 module model.layers.9.nothing"):
        layer_trace.received(tiny_fp8, "model.layers.9.nothing", [])
    with pytest.raises(WorkbookError, match="no FP8 module lm_head"):
        layer_trace.received(tiny_fp8, "lm_head", [])
