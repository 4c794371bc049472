"""What vLLM's kernel holds of a layer, against the checkpoint's own tensors."""

import contextlib
import io
import json
import subprocess
from types import SimpleNamespace

import pytest
import torch
from conftest import REPO
from on_a_gpu import server_flags
from safetensors.torch import save_file

from helpers import WorkbookError, checkpoint, client, hardware, serving
from helpers.serve_side import layer_trace

DOWN = "model.layers.0.mlp.down_proj"


def start(fp8, **env):
    return serving.VllmServer(fp8, [*server_flags(), *layer_trace.FLAGS],
                              env={**layer_trace.ENVIRONMENT, **env})


@pytest.fixture(scope="module")
def server(tiny_fp8):
    with start(tiny_fp8) as server:
        yield server


@pytest.fixture(scope="module")
def received(server):
    return layer_trace.ask(server, DOWN)


def stored(fp8):
    return (checkpoint.read_tensor(fp8, f"{DOWN}.{part}").float()
            for part in ("weight", "weight_scale"))


def test_the_kernel_holds_the_checkpoints_codes_and_scales(received, tiny_fp8, server):
    assert received.kernel == server.kernel
    codes, scale = stored(tiny_fp8)
    held = (received.product.T.float() / scale).to(torch.float8_e4m3fn).float()
    normal = codes.abs() >= 2**-6
    assert normal.double().mean() > 0.999
    assert torch.equal(held[normal], codes[normal])
    # vLLM's packed CPU operator reads exponent 0 as a normal one: by 2^-7 at most.
    assert (held - codes)[~normal].abs().max() <= 2**-7
    if "Marlin" not in received.kernel:  # which keeps them permuted, times a power of two
        assert torch.equal(received.scale, scale.flatten())


def said_of(scales, file) -> str:
    """What the appendix's cell prints of scales in a kernel and in the file."""
    nb = json.loads((REPO / "notebooks" / "a1_fp8_on_a_cpu.ipynb").read_text())
    (cell,) = (cell for cell in nb["cells"] if cell["id"] == "a1-scales")
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec("".join(cell["source"]), {"torch": torch, "scale": file,
                                       "received": SimpleNamespace(scale=scales)})
    return " ".join(said.getvalue().split())


def test_the_scales_of_every_kernel_are_the_files(received, tiny_fp8):
    """The server's, and Marlin's, as vLLM's own code prepares them: on a CPU too."""
    codes, file = stored(tiny_fp8)
    if "Marlin" not in received.kernel:
        assert said_of(received.scale, file) == (
            "scales: 256 of 256 are the file's to the bit, times 2^0, in the file's order")
    asked = {"scales": file.flatten().tolist(), "features": codes.shape[1]}
    ran = subprocess.run(
        [serving.serve_python(), REPO / "tests" / "serve_side" / "marlin_scales.py"],
        input=json.dumps(asked), capture_output=True, text=True)
    (answer,) = (line for line in ran.stdout.splitlines() if line.startswith("ANSWER "))
    for dtype, power in (("bf16", 120), ("fp16", 8)):
        marlins = torch.tensor(json.loads(answer.removeprefix("ANSWER "))[dtype])
        assert said_of(marlins, file) == (f"scales: 256 of 256 are the file's to the bit, times "
                                          f"2^{power}, in its own order")
    marlins[3] *= 1.01  # one scale that is another's
    assert "256 of 256" not in said_of(marlins, file)


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


def far_from(server, fp8) -> dict[str, float]:
    """How far the kernel's product of random inputs is from each arithmetic's."""
    codes, scale = stored(fp8)
    x = torch.randn(16, codes.shape[1], generator=torch.Generator().manual_seed(0)).bfloat16()
    y = layer_trace.ask(server, DOWN, x).product
    s_x = x.float().abs().amax(dim=1, keepdim=True) / 448
    codes_x = (x.float() / s_x).to(torch.float8_e4m3fn).float()
    products = {"w8a16": x.float() @ (codes * scale).T, "w8a8": s_x * codes_x @ (codes * scale).T}
    return {name: float((y.float() - product).norm() / product.norm())
            for name, product in products.items()}


def test_random_inputs_show_the_modes_arithmetic(server, tiny_fp8):
    """What notebook 05 calls the proof."""
    far = far_from(server, tiny_fp8)
    mode = hardware.serving_mode(hardware.detect())
    expected = mode.title[:5].lower().strip()
    other = "w8a16" if expected == "w8a8" else "w8a8"
    assert far[expected] < 0.005 and far[other] > 0.015


def test_a_kernel_that_is_told_to_compute_w8a8_is_found_to_do_so(tiny_fp8):
    if hardware.serving_mode(hardware.detect()).device != "cpu":
        pytest.skip("PHI4_FP8_CPU_NUMERICS is for CPUs")
    with start(tiny_fp8, PHI4_FP8_CPU_NUMERICS="w8a8") as server:
        far = far_from(server, tiny_fp8)
    assert far["w8a8"] < 0.005 and far["w8a16"] > 0.015


def test_only_with_the_key(server):
    for route in ("/collective_rpc", "/server_info", "/sleep"):
        assert client.session().post(server.url + route).status_code == 401


def test_a_module_that_is_not_there_is_a_sentence(tiny_fp8):
    with pytest.raises(WorkbookError, match="no FP8 module model.layers.9.nothing"):
        layer_trace.received(tiny_fp8, "model.layers.9.nothing", [])
    with pytest.raises(WorkbookError, match="no FP8 module lm_head"):
        layer_trace.received(tiny_fp8, "lm_head", [])


class Shared:
    """A worker of two GPUs that share down_proj: vLLM's names, and a product in W8A8 or W8A16."""

    def __init__(self, rank: int, codes, scale, w8a8: bool):
        class SomeKernel:
            pass

        def apply_weights(layer, x):
            s_x = x.float().abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / 448
            x = s_x * (x.float() / s_x).to(torch.float8_e4m3fn).float() if w8a8 else x.float()
            return (x @ layer.weight.T * layer.weight_scale.T).bfloat16()

        part = codes.chunk(2, dim=1)[rank]
        scheme = SimpleNamespace(kernel=SomeKernel(), apply_weights=apply_weights)
        self.layer = SimpleNamespace(
            scheme=scheme, weight=part, weight_scale=scale, tp_rank=rank,
            input_size=codes.shape[1], input_size_per_partition=part.shape[1])
        self.model_config = SimpleNamespace(dtype=torch.bfloat16)

    def get_model(self):
        return SimpleNamespace(get_submodule=lambda module: self.layer)


@pytest.mark.parametrize("w8a8", [True, False])
def test_two_gpus_that_share_the_layer_answer_as_one(w8a8, tiny_fp8, tmp_path):
    """Notebook 05's inputs, whose halves have one amax, and its distances; and the identity."""
    codes, scale = stored(tiny_fp8)
    nb = json.loads((REPO / "notebooks" / "05_serve_with_vllm.ipynb").read_text())
    (cell,) = (cell for cell in nb["cells"] if cell["id"] == "05-proof")
    names = {"fp8": tiny_fp8}
    exec("".join(cell["source"]), names)
    save_file({"x": names["x"]}, tmp_path / layer_trace.ASKED)
    for rank in (1, 0):
        layer_trace.Layers.ask_layer(Shared(rank, codes, scale, w8a8), DOWN, tmp_path)
    y = layer_trace._answer(tmp_path).product.float()
    far = {name: float((y - product).norm() / product.norm())
           for name, product in names["products"].items()}
    right, wrong = ("W8A8", "W8A16") if w8a8 else ("W8A16", "W8A8")
    assert far[right] < 0.005 < 0.02 < far[wrong], far
    (tmp_path / layer_trace.ASKED).unlink()
    for rank in (0, 1):
        layer_trace.Layers.ask_layer(Shared(rank, codes, scale, w8a8), DOWN, tmp_path)
    held = layer_trace._answer(tmp_path).product.T.float()
    assert torch.allclose(held, codes * scale, rtol=2**-7, atol=0)
