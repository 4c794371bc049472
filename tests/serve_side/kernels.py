"""Run by tests/test_cpu_kernels.py in the serving environment; prints what it measured as JSON.

Every figure comes from vLLM's own classes: the kernel is chosen by vLLM's own selection, given a
layer as vLLM's compressed-tensors scheme leaves it, and called as vLLM calls it.
"""

import contextlib
import json
import logging
import math
import os
import sys
from collections.abc import Sequence

import torch

PHI4 = {"qkv": (7680, 5120), "o": (5120, 5120), "gate_up": (35840, 5120), "down": (5120, 17920)}
BUNDLED = {"tiny qkv": (384, 256), "tiny o": (256, 256), "tiny gate_up": (1536, 256),
           "tiny down": (256, 768)}
ODD = {"N not of 32": (100, 256), "K not of 128": (64, 96), "K not of 32": (64, 100),
       "one of each": (1, 1), "odd both": (333, 77)}


def codes(rows: int, columns: int) -> torch.Tensor:
    """Every finite E4M3 code, equally likely."""
    random = torch.randint(0, 256, (rows, columns), dtype=torch.uint8)
    random[(random & 0x7F) == 0x7F] = 0
    return random.view(torch.float8_e4m3fn)


def selected(shape: tuple[int, int], dtype=torch.bfloat16, weight="channel"):
    """The kernel vLLM selects for FP8_DYNAMIC (or a per-tensor static) linear of this shape."""
    from vllm.model_executor.kernels.linear import init_fp8_linear_kernel
    from vllm.model_executor.layers.quantization.utils import quant_utils as keys

    activation, weight = {
        "channel": (keys.kFp8DynamicTokenSym, keys.kFp8StaticChannelSym),
        "tensor": (keys.kFp8StaticTensorSym, keys.kFp8StaticTensorSym),
    }[weight]
    return init_fp8_linear_kernel(activation_quant_key=activation, weight_quant_key=weight,
                                  input_dtype=dtype, out_dtype=dtype, weight_shape=shape)


def layer_of(weight: torch.Tensor, scale: torch.Tensor) -> torch.nn.Module:
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(weight.t(), requires_grad=False)
    layer.weight_scale = torch.nn.Parameter(scale.clone(), requires_grad=False)
    return layer


def relative_error(y, reference) -> float:
    return ((y.double() - reference).norm() / reference.norm()).item()


def in_float64(x, weight, scale, bias):
    """x times the dequantized weight, in float64."""
    return (x.double() @ (weight.double() * scale.double()).t()
            + (bias.double() if bias is not None else 0))


def per_token(x: torch.Tensor) -> torch.Tensor:
    """x as the W8A8 kernel sees it, dequantized: amax / 448 per row, round to nearest even."""
    scale = (x.float().abs().amax(-1, keepdim=True) / 448).clamp(min=1 / (448 * 512))
    return (x.float() * scale.reciprocal()).to(torch.float8_e4m3fn).double() * scale.double()


def errors(numerics: str, shape: tuple[int, int], rows: Sequence[int], with_bias=False,
           scale_dtype=torch.float32, pruned=False) -> list[dict]:
    """One layer's relative error against float64, on one thread and on two, and its bound.

    For each number of rows; the layer is made and packed once.
    """
    weight = codes(*shape)
    if pruned:  # nine of ten weights are zero, and activations have a mean
        weight.view(torch.uint8)[torch.rand(*shape) < 0.9] = 0
    scale = ((torch.rand(shape[0], 1) + 0.5) * 1e-3).to(scale_dtype)
    bias = torch.randn(shape[0]).bfloat16() if with_bias else None
    kernel = selected(shape)
    layer = layer_of(weight, scale)
    kernel.process_weights_after_loading(layer)
    some = slice(None)
    if shape[0] > 2048:  # of a large layer, compare outputs from all over it
        some = torch.randperm(shape[0])[:1024]
        weight, scale = weight[some], scale[some]
    found = []
    for count in rows:
        x = (torch.randn(count, shape[1]) + 10 * pruned).bfloat16()
        made = []
        for threads in (2, 1):
            torch.set_num_threads(threads)
            if threads == 2 or math.prod(shape) <= 2**25:  # the largest take seconds on one thread
                made.append(kernel.apply_weights(layer, x, bias)[:, some])
        torch.set_num_threads(2)
        seen = x if numerics == "w8a16" else per_token(x)
        reference = in_float64(seen, weight, scale, bias)
        found.append({
            "kernel": type(kernel).__name__, "outputs": reference.numel(),
            "dtype": str(made[0].dtype), "errors": [relative_error(y, reference) for y in made],
            "bound": bound(2 if numerics == "w8a16" else 1, shape[1], reference.numel())})
    return found


def bound(roundings: int, columns: int, outputs: int) -> float:
    """The relative error that a product may have, in any order of its sum.

    bf16 has 8 bits, so rounding to it is off by 2^-8 at most, and by 2^floor(log2 |y|) * 2^-7 /
    sqrt(12) in the root mean square: over normally distributed y, of whatever variance, 0.00166 of
    theirs. Independent errors add up by their squares. Of few outputs that is itself uncertain, by
    about 1 / sqrt(outputs): five times that are allowed, and 5 % for outputs that are not quite
    normal. W8A16 rounds twice: the product, then product times scale. The sum of `columns` products
    in float32 adds columns * 2^-24 at most, for products whose sum is not small beside them
    (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1).
    """
    typical = math.sqrt(roundings) * 0.00166 * (1.05 + 5 / math.sqrt(outputs))
    return min(roundings * 2**-8, typical) + columns * 2**-24


def accuracy(numerics: str) -> dict:
    measured = {
        **by_rows(numerics, PHI4, (1, 40)),
        **by_rows(numerics, {**BUNDLED, **ODD}, (1, 2, 5, 130, 700))}
    for name, shape, rows, options in (
            ("4096 rows", BUNDLED["tiny gate_up"], 4096, {}),
            ("4096 rows, odd", ODD["odd both"], 4096, {}),
            ("bias", (384, 256), 7, {"with_bias": True}),
            ("bias, odd", (33, 70), 7, {"with_bias": True}),
            ("pruned", (384, 256), 7, {"pruned": True}),
            ("bf16 scales", (384, 256), 7, {"scale_dtype": torch.bfloat16})):
        [measured[name]] = errors(numerics, shape, [rows], **options)
    return measured


def by_rows(numerics: str, shapes: dict, rows: Sequence[int]) -> dict:
    return {f"{name}, {count}": found for name, shape in shapes.items()
            for count, found in zip(rows, errors(numerics, shape, rows), strict=True)}


def shapes(numerics: str) -> dict:
    """A batch of sequences, no rows, float16, and weights that hold a NaN."""
    weight, scale = codes(384, 256), torch.full((384, 1), 1e-3)

    def run(x, dtype=torch.bfloat16):
        kernel, layer = selected((384, 256), dtype), layer_of(weight, scale)
        kernel.process_weights_after_loading(layer)
        return kernel.apply_weights(layer, x.to(dtype))

    x = torch.randn(2, 5, 256)
    rows = x.reshape(10, 256).bfloat16()
    exact = in_float64(rows if numerics == "w8a16" else per_token(rows), weight, scale, None)
    batch = run(x)
    half = run(x, torch.float16)
    bad = weight.clone().view(torch.uint8)
    bad[5, 7] = 0xFF
    kernel = selected((384, 256))
    refused = ""
    try:
        kernel.process_weights_after_loading(layer_of(bad.view(torch.float8_e4m3fn), scale))
    except ValueError as error:
        refused = str(error)
    return {"batch": list(batch.shape), "batch error": relative_error(batch.view(10, -1), exact),
            "bound": bound(2 if numerics == "w8a16" else 1, 256, exact.numel()),
            "no rows": list(run(torch.empty(0, 256)).shape),
            "float16": str(half.dtype), "NaN": refused,
            "float16 error": relative_error(half.view(10, -1), in_float64(
                x.reshape(10, 256).half(), weight, scale, None))}


@contextlib.contextmanager
def messages():
    """What the plugin logs: a list of (level, text)."""
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append((record.levelname, record.getMessage()))
    logger = logging.getLogger("vllm.phi4_fp8_cpu")
    logger.addHandler(handler)
    level, logger.level = logger.level, logging.INFO
    yield said
    logger.level = level
    logger.removeHandler(handler)


def registration() -> dict:
    """What `register` does to vLLM's list of kernels; the list is put back afterwards."""
    import vllm
    from vllm import platforms
    from vllm.model_executor.kernels import linear
    from vllm.platforms.interface import PlatformEnum, UnspecifiedPlatform

    from helpers.serve_side import cpu_kernels, cpu_products

    kernels = linear._POSSIBLE_FP8_KERNELS[PlatformEnum.CPU]
    stock = [kernel.__name__ for kernel in kernels]
    found = {"stock": stock, "stock choice": type(selected((384, 256))).__name__}

    def names():
        return [kernel.__name__ for kernel in kernels]

    asked = []
    has_amx, real = torch.cpu._is_amx_tile_supported, torch.cpu._init_amx
    torch.cpu._init_amx = lambda: asked.append(True) or real()
    # A platform that is no CPU: vLLM's own class for one it does not know.
    cpu, platforms.current_platform = platforms.current_platform, UnspecifiedPlatform()
    cpu_kernels.register()
    found["elsewhere"], found["elsewhere asked for AMX"] = names(), len(asked)
    platforms.current_platform = cpu

    found["moved"] = {}
    for name in ("FP8ScaledMMLinearKernel", "register_linear_kernel", "_POSSIBLE_FP8_KERNELS"):
        with messages() as said:  # a vLLM in which this has another name
            moved = getattr(linear, name)
            delattr(linear, name)
            cpu_kernels.register()
            setattr(linear, name, moved)
        found["moved"][name] = {"kernels": names(), "said": said}
    if cpu_products.has_packed_gemm():
        with messages() as said:  # one whose op packs weights in another order
            packing = cpu_products.pack
            cpu_products.pack = lambda weight: packing(weight.flip(0))
            cpu_kernels.register()
            cpu_products.pack = packing
        found["moved"]["other products"] = {"kernels": names(), "said": said}
    with messages() as said:  # one whose layers are described by other names
        fits = cpu_kernels.kernel_class("w8a8").can_implement(object())[0]
    found["moved"]["weight_quant_key"] = {"kernels": stock if not fits else [], "said": said}

    asked.clear()
    with messages() as said:
        cpu_kernels.register()
    found["default"], found["default said"] = names(), said
    found["AMX"] = bool(torch.cpu._is_amx_tile_supported())
    found["asked for AMX"] = len(asked)
    with messages() as said:  # an operating system that does not grant AMX
        torch.cpu._is_amx_tile_supported, torch.cpu._init_amx = lambda: True, lambda: False
        cpu_kernels.register()
        torch.cpu._is_amx_tile_supported, torch.cpu._init_amx = has_amx, real
    found["AMX refused said"] = said
    found["twice"] = names()
    found["per tensor"] = type(selected((384, 256), weight="tensor")).__name__

    with messages() as said:
        true_version, vllm.__version__ = vllm.__version__, "0.99.0"
        cpu_kernels.register()
        vllm.__version__ = true_version
    found["other version said"] = said
    kernels[:] = [kernel for kernel in kernels if kernel.__name__ in stock]
    torch.cpu._init_amx = real
    return found


def build() -> str:
    """The file of vLLM's C++ library that this process has loaded."""
    import vllm._custom_ops  # noqa: F401

    with open("/proc/self/maps") as maps:
        (name,) = {line.rpartition("/")[2].strip() for line in maps if "/vllm/_C" in line}
    return name


def main() -> dict:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.kernels import linear
    from vllm.platforms import PlatformEnum

    from helpers.serve_side import cpu_kernels, cpu_products

    torch.manual_seed(0)
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    finite = ~every.float().isnan()
    measured = {"upcast": (cpu_products.upcast(every) * 256).equal(
        torch.where(finite, every.float(), cpu_products.upcast(every) * 256)),
        "finite": int(finite.sum()), "op": cpu_products.has_packed_gemm(), "build": build()}
    with set_current_vllm_config(VllmConfig()):
        measured["registration"] = registration()
        for numerics in cpu_kernels.NUMERICS:
            os.environ[cpu_kernels.VARIABLE] = numerics
            cpu_kernels.register()
            measured[numerics] = {"accuracy": accuracy(numerics), "shapes": shapes(numerics)}
        os.environ[cpu_kernels.VARIABLE] = "w8a16"
        kernels = linear._POSSIBLE_FP8_KERNELS[PlatformEnum.CPU]
        kernels.sort(key=lambda kernel: "W8A16" not in kernel.__name__)
        cpu_products.has_packed_gemm = lambda: False  # as on a CPU without AVX512-BF16
        measured["unpacked"] = by_rows("w8a16", BUNDLED, (1, 5, 130))
    return measured


if __name__ == "__main__":
    result = main()
    with open(sys.argv[1], "w") as out:
        json.dump(result, out)
