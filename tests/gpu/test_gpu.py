"""What only a GPU can show: `make test-gpu`; elsewhere each is skipped with a reason."""

import pytest
import torch

from helpers import fp8, hardware, models, roofline, serving, workspace

PHI4 = roofline.load_config(workspace.data("phi4"))
SHAPES = {t.name.split(".")[-2]: t.shape for t in roofline.tensors(PHI4) if ".layers.0." in t.name
          and len(t.shape) == 2}


@pytest.fixture
def gpu():
    """The GPU that is used; skips where there is none with an FP8 path."""
    machine = hardware.detect()
    if hardware.serving_path(machine).device != "cuda":
        pytest.skip(f"no GPU with an FP8 path here: {hardware.serving_path(machine).why}")
    return hardware.best_gpu(machine)


@pytest.fixture
def tensor_cores(gpu):
    """A GPU that multiplies FP8; skips on one of an older capability."""
    if gpu.compute_capability < hardware.W8A8_CAPABILITY:
        pytest.skip(f"FP8 products need capability 8.9, and {gpu.name} has "
                    f"{hardware.capability(gpu)}")
    return gpu


@pytest.mark.parametrize("name", SHAPES)
def test_an_fp8_product_is_the_float64_one_of_the_same_codes(tensor_cores, name):
    """torch's FP8 product on tensor cores at Phi-4's shapes, per-token by per-channel scales."""
    if not torch.cuda.is_available():
        pytest.skip("this environment's torch has no CUDA")
    out, into = SHAPES[name]
    torch.manual_seed(0)
    codes, scale = fp8.quantize_per_channel(torch.randn(out, into).mul(0.02).bfloat16())
    x, x_scale = fp8.quantize_per_token(torch.randn(64, into))
    exact = (fp8.decode(x).double() * x_scale) @ (fp8.decode(codes).double() * scale.double()).T
    made = torch._scaled_mm(
        x.cuda().view(torch.float8_e4m3fn), codes.cuda().view(torch.float8_e4m3fn).t(),
        scale_a=x_scale.cuda(), scale_b=scale.float().cuda().t(), out_dtype=torch.bfloat16)
    # bf16 keeps eight bits: half a unit in the last place of the largest is 2^-9 of it.
    assert (made.cpu().double() - exact).abs().max() <= 2**-8 * exact.abs().max()


def test_the_server_takes_the_kernel_of_its_path_and_gives_the_memory_back(gpu, tiny_fp8):
    import pynvml

    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(gpu.index)
    before = pynvml.nvmlDeviceGetMemoryInfo(handle).used
    path = hardware.gpu_path(gpu)
    with serving.VllmServer(tiny_fp8, serving.default_flags(models.tiny(), path)) as server:
        assert ("Marlin" in server.kernel) == (path.key == "gpu-w8a16"), server.kernel
        assert pynvml.nvmlDeviceGetMemoryInfo(handle).used > before
    assert pynvml.nvmlDeviceGetMemoryInfo(handle).used <= before + 64 * 2**20
