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


def test_a_module_that_is_not_there_is_a_sentence(tiny_fp8):
    with pytest.raises(WorkbookError, match="no FP8 module model.layers.9.nothing"):
        layer_trace.received(tiny_fp8, "model.layers.9.nothing", [])
    with pytest.raises(WorkbookError, match="no FP8 module lm_head"):
        layer_trace.received(tiny_fp8, "lm_head", [])
