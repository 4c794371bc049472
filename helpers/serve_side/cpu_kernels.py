r"""The vLLM plugin that makes FP8_DYNAMIC checkpoints usable on a CPU.

vLLM finds `register` through the entry point `vllm.general_plugins` and calls it in each of its
processes. Where there is a GPU it does nothing. On a CPU it does two things.

It asks the operating system for AMX. vLLM 0.32's attention kernel uses AMX tiles without asking,
and dies with SIGILL ("Worker proc died unexpectedly (exit code: -4)") when nothing before it did.

It registers an FP8 linear kernel. For a checkpoint with one scale per output channel and dynamic
per-token activations, vLLM 0.32 has a kernel for CPUs with AMX-FP8
(`CPUFP8W8A8ScaledMMLinearKernel`; Diamond Rapids). Any other CPU gets
`ChannelWiseTorchFP8ScaledMMLinearKernel`, which ends in oneDNN's reference loop: correct, and on
the bundled model 5 times (AMD Zen 4) to 500 times (Intel with AMX) slower than bf16. Ours comes in
two numerics, chosen by the environment variable PHI4_FP8_CPU_NUMERICS:

w8a16   FP8 weights, 16-bit activations: what Marlin does on an Ampere GPU. The default. Where
        vLLM's own W8A16 GEMM is built in and runs (AVX512-BF16, with or without AMX), half the
        bytes of bf16 are read per token. On other CPUs, and for a layer that the GEMM does not
        take, the weights are unpacked to bf16 once, when they are loaded: the speed of bf16, and
        its memory.
w8a8    FP8 weights, activations quantized to FP8 per token, exact products, float32 sums. For
        comparing answers; slower. A GPU multiplies the same codes and scales; the sums of Hopper's
        FP8 tensor cores keep about 14 bits (DeepSeek-V3, arXiv 2412.19437, section 3.3.2), and
        vLLM's CUTLASS kernels leave them there (`...FP8FastAccum` schedules).

Nothing of vLLM is patched: the kernel goes through `register_linear_kernel` and vLLM's kernel
classes. Only its place in vLLM's list is changed, in `_register_kernel`.

For vLLM's maintainers
----------------------
The faults that this plugin is around, each as it can be seen without it (VLLM_PLUGINS='').

SIGILL on a CPU with AMX. `cpu_attn` uses AMX tiles, which Linux grants a process only after
`arch_prctl(ARCH_REQ_XCOMP_PERM)`; oneDNN asks for it, but may not have run when a short prompt
reaches the attention first:

    VLLM_PLUGINS='' python -m vllm.entrypoints.openai.api_server --model MODEL --dtype bfloat16 \
        --enforce-eager --served-model-name m
    curl localhost:8000/v1/completions -H 'Content-Type: application/json' \
        -d '{"model": "m", "prompt": [5, 6], "max_tokens": 3}'

The worker ends with "Worker proc died unexpectedly (exit code: -4)". `torch.cpu._init_amx()` at the
worker's start cures it.

Per-channel FP8 falls back to a reference loop. Without AMX-FP8 the only kernel for dynamic
per-token activations and per-channel weights ends in `torch._scaled_mm`, for which oneDNN then has
no other implementation than `ref`; ONEDNN_VERBOSE=1 names it:

    import torch
    a, b = torch.randn(1, 5120), torch.randn(5120, 5120)
    a8, b8, one = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn), torch.ones(())
    torch._scaled_mm(a8, b8.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

`python -m helpers.serve_side.layer_times 5120 5120` times it beside the others.
`torch.ops._C.fp8_scaled_mm_cpu`, which vLLM already builds, does the work at the speed of the
memory: with `convert_weight_packed`, unit block scales, and the channel's scale multiplied
afterwards.

That op ends the process, and gives no reason in vLLM's own log, where oneDNN is kept from bf16:
more than four rows go to torch's `brgemm`, which throws inside an OpenMP region. This prints
"terminate called after throwing an instance of 'c10::Error'"; `_has_packed_gemm` decides so that it
is never called there:

    ONEDNN_MAX_CPU_ISA=AVX2 python -c "
    import torch, vllm._custom_ops
    packed = torch.ops._C.convert_weight_packed(torch.zeros(32, 128).to(torch.float8_e4m3fn))
    torch.ops._C.fp8_scaled_mm_cpu(torch.ones(5, 128).bfloat16(), packed, torch.ones(1, 1),
                                   [32, 128], None, torch.bfloat16, True)"

That op reads subnormal codes, zero among them, as normal numbers (`packs_exactly`). This prints
tensor([[1., ...]]), where it should print zeros:

    import torch, vllm._custom_ops
    zeros = torch.zeros(32, 128).to(torch.float8_e4m3fn)
    print(torch.ops._C.fp8_scaled_mm_cpu(
        torch.ones(1, 128).bfloat16(), torch.ops._C.convert_weight_packed(zeros),
        torch.ones(1, 1), [32, 128], None, torch.bfloat16, True))
"""

from __future__ import annotations

import functools
import logging
import os
from typing import TYPE_CHECKING

from helpers.fp8 import FLOAT16_READING, upcast

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

CHECKED_VLLM = "0.32.0"
VARIABLE = "PHI4_FP8_CPU_NUMERICS"
NUMERICS = ("w8a16", "w8a8")  # the default first
MOVED = ("The CPU FP8 kernel was written for vLLM %s and does not fit this one (%s: %s); vLLM's "
         "own, much slower kernel is used instead.")

AMX_REFUSED = ("The operating system does not grant this process AMX, which vLLM's attention uses "
               "on this CPU: it would end with SIGILL. Start it with --block-size 16, for which "
               "its attention takes AVX512.")

# The rows and columns of the packed weight come in tiles of 32, and activations are bfloat16:
# vLLM's op aborts the process on anything else. 128 is its fixed block of K for the
# block scales, which are all one here.
_TILE = 32
_SCALE_BLOCK_K = 128

# Of as many numbers of rows vLLM keeps oneDNN's compiled product; its own number for bf16 layers.
_ONEDNN_PRIMITIVES = 32

# Weights upcast at a time: 4 MB of float32, which stays in the cache between the upcast and the
# product. Measured on a Zen 4 with 32 MB of L3, 5120 x 5120, one row: 5.1 ms; 0.25 and 4 times as
# many weights: 9.8 and 18 ms.
_UPCAST_WEIGHTS = 2**20


def register() -> None:
    """The entry point: called by vLLM in every one of its processes.

    Raises `WorkbookError` when PHI4_FP8_CPU_NUMERICS names no numerics. Anything of vLLM that is
    not where it was in the version this was checked against is one warning, and vLLM's own
    behaviour.
    """
    logger = _logger()
    wanted = requested_numerics()
    try:
        from vllm.platforms import current_platform

        if not current_platform.is_cpu():
            return
        _permit_amx(logger)
        if _has_packed_gemm():
            _try_packed_gemm()
        kernel = kernel_class(wanted or NUMERICS[0])
        _register_kernel(kernel)
        _warn_of_other_version(logger)
    except (ImportError, AttributeError, KeyError, TypeError, RuntimeError) as moved:
        logger.warning(MOVED, CHECKED_VLLM, type(moved).__name__, moved)
        return
    logger.info("FP8 linear layers on this CPU: %s (%s).", kernel.__name__,
                VARIABLE if wanted else "the default")


def _logger() -> logging.Logger:
    return logging.getLogger("vllm.phi4_fp8_cpu")  # below "vllm", whose handlers vLLM sets up


def requested_numerics(environ: dict | None = None) -> str | None:
    """What PHI4_FP8_CPU_NUMERICS asks for; None when it is not set."""
    from helpers import WorkbookError

    value = (os.environ if environ is None else environ).get(VARIABLE, "").strip()
    if value and value not in NUMERICS:
        raise WorkbookError(
            f"{VARIABLE}={value} names no numerics.",
            "It decides how FP8 linear layers are computed on a CPU.",
            f"Set it to {' or '.join(NUMERICS)}, or leave it out.",
        )
    return value or None


def _permit_amx(logger: logging.Logger) -> None:
    """Ask Linux for the AMX tile registers, which a process may not touch before it has asked."""
    import torch

    if torch.cpu._is_amx_tile_supported() and not torch.cpu._init_amx():
        logger.warning(AMX_REFUSED)


@functools.cache
def _has_packed_gemm() -> bool:
    """Whether vLLM's W8A16 GEMM is in the library that it has loaded, and this CPU can run it.

    vLLM ships three builds, for AVX2, AVX512 and AVX512-BF16; only the last has the op. More than
    four rows are multiplied by oneDNN, which can be kept from bf16 (`cpu.lacking`): the op
    then ends the process, so it cannot be asked by trying.
    """
    import torch
    import vllm._custom_ops  # noqa: F401  loads the build that fits this CPU

    from helpers import cpu

    return hasattr(torch.ops._C, "fp8_scaled_mm_cpu") and not cpu.lacking(cpu.read()[1])


def _try_packed_gemm() -> None:
    """Raise RuntimeError where vLLM's W8A16 GEMM is called, or orders weights, in another way."""
    import torch

    weight = torch.arange(64 * 96).remainder(0x7F - 8).add(8).to(torch.uint8)  # normal numbers
    weight = weight.view(torch.float8_e4m3fn).view(64, 96)
    x = torch.eye(3, 96, dtype=torch.bfloat16)
    if not packed_product(x, pack(weight)).float().equal(weight[:, :3].t().float()):
        raise RuntimeError("fp8_scaled_mm_cpu gives other products")


def _register_kernel(kernel: type) -> None:
    """Put `kernel` before vLLM's own FP8 kernels for the CPU.

    `register_linear_kernel` appends, and vLLM takes the first kernel of its list that can do a
    layer: appended, ours would never be reached. Checked against vLLM 0.32.0.
    """
    from vllm.model_executor.kernels import linear
    from vllm.platforms import PlatformEnum

    kernels = linear._POSSIBLE_FP8_KERNELS[PlatformEnum.CPU]
    if kernel not in kernels:
        linear.register_linear_kernel(kernel, PlatformEnum.CPU, "fp8")
        kernels.insert(0, kernels.pop(kernels.index(kernel)))


def _warn_of_other_version(logger) -> None:
    import vllm

    if vllm.__version__.split("+")[0] != CHECKED_VLLM:
        logger.warning("The CPU FP8 kernel was checked against vLLM %s; this is %s. If FP8 answers "
                       "look wrong, set VLLM_PLUGINS='' and compare.",
                       CHECKED_VLLM, vllm.__version__)


# The arithmetic: tensors in, tensors out, no vLLM class.


def can_pack(rows: int, columns: int, dtype: torch.dtype) -> bool:
    """Whether vLLM's W8A16 GEMM is here and takes a [rows, columns] weight and such activations."""
    import torch

    return (_has_packed_gemm() and dtype == torch.bfloat16 and rows % _TILE == 0
            and columns % _TILE == 0)


def packs_exactly(weight: torch.Tensor) -> bool:
    """Whether vLLM's W8A16 GEMM reads this [N, K] weight as it is, to bf16's own precision.

    The op of vLLM 0.32 takes subnormal codes for normal numbers: m * 2^-9, zero included, is read
    as 2^-7 + m * 2^-10. Of weights scaled to 448 about one in ten thousand is as small, and nothing
    shows; where a row's sum of errors may reach 2^-9 of its sum of magnitudes (a pruned layer's
    does), the weight must not be packed.
    """
    step = max(1, _UPCAST_WEIGHTS // weight.shape[1])
    for rows in weight.split(step):
        magnitude = upcast(rows).abs()
        wrong = (magnitude < 2.0**-6 / FLOAT16_READING).sum(1) * 2.0**-7
        if bool((wrong > magnitude.sum(1) * (FLOAT16_READING * 2.0**-9)).any()):
            return False
    return True


def pack(weight: torch.Tensor) -> torch.Tensor:
    """The [N, K] float8_e4m3fn weight in the order vLLM's W8A16 GEMM reads it; once, at loading."""
    import torch

    return torch.ops._C.convert_weight_packed(weight)


def packed_product(x: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """x [M, K] times packed codes [N, K], no scale: [M, N] in x's dtype, summed in float32.

    For every M. Unpacking to bf16, whole or by block, and multiplying then was slower up to
    M = 2048, where it comes within 4 to 10 % (Zen 4, 2 cores, 1536 x 256 to 5120 x 5120): torch
    unpacks a code in several passes, the op in registers. Against oneDNN's bf16 product this one
    is 2 to 2.7 times as fast at M = 1 and 5120 x 5120, 0.75 to 0.95 times at M = 8 to 16, where
    unpacking is all there is to wait for, and 0.9 to 1.0 times from M = 64 on. On Intel with AMX,
    2 cores, 5120 x 17920: 2.7 times at M = 1, 1.4 at 4 and 8, 1.2 at 16, 0.84 at 64, 0.60 at 512.
    """
    import torch

    rows, columns = packed.shape[0], x.shape[1]
    ones = _ones(-(-columns // _SCALE_BLOCK_K))
    return torch.ops._C.fp8_scaled_mm_cpu(
        x, packed, ones, [rows, _SCALE_BLOCK_K], None, x.dtype, True)


@functools.cache
def _ones(blocks: int) -> torch.Tensor:
    import torch

    return torch.ones(1, blocks)


def unpacked_product(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function: x bfloat16 [M, K] times the [N, K] float8_e4m3fn codes, no scale, in bfloat16.

    Every code is exact in bf16. oneDNN keeps a copy in an order of its own; on a CPU without
    AVX512 it has no bf16 product and says so, and torch's is taken, as vLLM does for bf16 layers.
    """
    import torch
    from vllm import _custom_ops as ops

    codes = weight.to(torch.bfloat16)
    try:
        handler = ops.create_onednn_mm(codes.t(), _ONEDNN_PRIMITIVES)
    except RuntimeError:
        return lambda x: torch.nn.functional.linear(x, codes)
    return lambda x: ops.onednn_mm(handler, x, None)


def upcast_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [M, K], any float dtype, times [N, K] float8_e4m3fn codes: float32 [M, N], no scale.

    Both operands are exact in float32; for FP8-valued x, so is each product.
    """
    import torch

    x = x.to(torch.float32) * FLOAT16_READING
    out = torch.empty(x.shape[0], weight.shape[0])
    step = max(1, _UPCAST_WEIGHTS // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        torch.mm(x, upcast(weight[rows]).t(), out=out[:, rows])
    return out


def narrowed(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The float32 scales in `dtype` where that loses nothing, as of LLM Compressor's bf16 scales.

    torch multiplies two bf16 tensors in float32 and rounds once, as it does bf16 by float32, and
    faster: [512, 35840] takes 3.3 ms of one core and not 74 ms, 1 to 8 rows two thirds to a half
    (medians of 21 in turn, Zen 5).
    """
    narrow = scale.to(dtype)
    return narrow if bool((narrow == scale).all()) else scale


def scaled(product: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None,
           dtype: torch.dtype) -> torch.Tensor:
    """product * scale + bias, computed in float32 and rounded once to `dtype`.

    product [M, N]; scale float32 or `narrowed`, [N] or [M, N]; bias [N] or None.
    """
    import torch

    if bias is not None:
        return torch.addcmul(bias.to(torch.float32), product, scale).to(dtype)
    if product.dtype == dtype:
        return product.mul_(scale)  # in place: computed in float32, stored as `dtype`
    return torch.mul(product, scale).to(dtype)


@functools.cache
def kernel_class(numerics: str) -> type:
    """vLLM's view of the arithmetic above: the linear kernel class for "w8a16" or "w8a8".

    Made on demand because its base class is vLLM's.
    """
    import torch
    from vllm.model_executor.kernels.linear import FP8ScaledMMLinearKernel
    from vllm.platforms import current_platform

    class PerChannelKernel(FP8ScaledMMLinearKernel):
        @classmethod
        def is_supported(cls, compute_capability=None):
            return (True, None) if current_platform.is_cpu() else (False, "requires a CPU.")

        @classmethod
        def can_implement(cls, c):
            try:
                return cls._fits(c)
            except AttributeError as moved:
                _logger().warning(MOVED, CHECKED_VLLM, type(moved).__name__, moved)
                return False, f"vLLM describes a layer in another way ({moved})."

        @classmethod
        def _fits(cls, c):
            if c.weight_quant_key.dtype != torch.float8_e4m3fn:
                return False, "requires float8_e4m3fn weights."
            if not c.weight_quant_key.scale.group_shape.is_per_channel():
                return False, "requires one weight scale per output channel."
            activation = c.activation_quant_key.scale
            if activation.static or not activation.group_shape.is_per_token():
                return False, "requires dynamic per-token activation scales."
            return True, None

        def process_weights_after_loading(self, layer):
            # vLLM hands the weight over as a [K, N] view of the checkpoint's [N, K].
            weight = layer.weight.t().contiguous()
            if bool(((weight.view(torch.uint8) & 0x7F) == 0x7F).any()):
                raise ValueError("An FP8 weight of this checkpoint is NaN: quantize it again.")
            self.packed = (numerics == "w8a16" and packs_exactly(weight)
                           and can_pack(*weight.shape, self.config.input_dtype))
            self.unpacked = None
            if self.packed:
                weight = pack(weight)
            elif numerics == "w8a16" and self.config.input_dtype == torch.bfloat16:
                self.unpacked = unpacked_product(weight)
                weight = weight.new_empty(0)
            scale = narrowed(layer.weight_scale.to(torch.float32).reshape(-1).contiguous(),
                             self.config.input_dtype)
            layer.weight = torch.nn.Parameter(weight, requires_grad=False)
            layer.weight_scale = torch.nn.Parameter(scale, requires_grad=False)

        def apply_weights(self, layer, x, bias=None):
            *batch, _ = x.shape
            rows = layer.weight_scale.numel()
            if x.numel() == 0:  # which vLLM's op answers with SIGFPE
                return x.new_empty(*batch, rows)
            return self.product(layer, x.reshape(-1, x.shape[-1]), bias).view(*batch, rows)

        def apply_scaled_mm(self, **_):
            raise NotImplementedError("apply_weights does it all")

    class CpuFp8W8A16LinearKernel(PerChannelKernel):
        """FP8 weights, 16-bit activations."""

        def product(self, layer, x, bias):
            if self.unpacked is not None:
                product = self.unpacked(x)
            else:
                product = (packed_product if self.packed else upcast_product)(x, layer.weight)
            return scaled(product, layer.weight_scale, bias, x.dtype)

    class CpuFp8W8A8LinearKernel(PerChannelKernel):
        """FP8 weights, activations quantized to FP8 per token by vLLM's own QuantFP8."""

        def product(self, layer, x, bias):
            # Not the compiled one, which vLLM takes where a model is not eager: torch keeps what it
            # compiled for another CPU, and on AVX2 what was made for AVX512 found a wrong amax.
            codes, x_scale = self.quant_fp8.forward_native(x)
            product = upcast_product(upcast(codes), layer.weight).mul_(FLOAT16_READING)
            return scaled(product, layer.weight_scale * x_scale, bias, x.dtype)

    return {"w8a16": CpuFp8W8A16LinearKernel, "w8a8": CpuFp8W8A8LinearKernel}[numerics]
