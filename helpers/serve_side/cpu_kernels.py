r"""The vLLM plugin that makes FP8_DYNAMIC checkpoints usable on a CPU.

vLLM finds `register` through the entry point `vllm.general_plugins` and calls it in each of its
processes, and `platform`, which shortens its start, through `vllm.platform_plugins`. Where there is
a GPU both do nothing. On a CPU `register` does two things.

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

`cpu_products` beside this file has the arithmetic. `for_vllm.md` shows vLLM's maintainers each of
vLLM's faults that this plugin works around.
"""

from __future__ import annotations

import functools
import logging
import os

from helpers.fp8 import FLOAT16_READING, upcast
from helpers.serve_side import cpu_products as products

CHECKED_VLLM = "0.32.0"
VARIABLE = "PHI4_FP8_CPU_NUMERICS"
NUMERICS = ("w8a16", "w8a8")  # the default first
MOVED = ("The CPU FP8 kernel was written for vLLM %s and does not fit this one (%s: %s); vLLM's "
         "own, much slower kernel is used instead.")

AMX_REFUSED = ("The operating system does not grant this process AMX, which vLLM's attention uses "
               "on this CPU: it would end with SIGILL. Start it with --block-size 16, for which "
               "its attention takes AVX512.")


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
        if products.has_packed_gemm():
            _try_packed_gemm()
        kernel = kernel_class(wanted or NUMERICS[0])
        _register_kernel(kernel)
        _warn_of_other_version(logger)
    except (ImportError, AttributeError, KeyError, TypeError, RuntimeError) as moved:
        logger.warning(MOVED, CHECKED_VLLM, type(moved).__name__, moved)
        return
    logger.info("FP8 linear layers on this CPU: %s (%s).", kernel.__name__,
                VARIABLE if wanted else "the default")


def platform() -> str | None:
    """The entry point that names vLLM's platform: ours for its own CPU platform, else none."""
    from vllm.platforms import cpu_platform_plugin

    own = cpu_platform_plugin() == "vllm.platforms.cpu.CpuPlatform"
    return "helpers.serve_side.cpu_platform.ForkingCpuPlatform" if own else None


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


def _try_packed_gemm() -> None:
    """Raise RuntimeError where vLLM's W8A16 GEMM is called, or orders weights, in another way."""
    import torch

    weight = torch.arange(64 * 96).remainder(0x7F - 8).add(8).to(torch.uint8)  # normal numbers
    weight = weight.view(torch.float8_e4m3fn).view(64, 96)
    x = torch.eye(3, 96, dtype=torch.bfloat16)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so that OpenMP starts none, and the process may still be forked
    try:
        made = products.packed_product(x, products.pack(weight))
    finally:
        torch.set_num_threads(threads)
    if not made.float().equal(weight[:, :3].t().float()):
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


@functools.cache
def kernel_class(numerics: str) -> type:
    """vLLM's view of `cpu_products`: the linear kernel class for "w8a16" or "w8a8".

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
            self.packed = (numerics == "w8a16" and products.packs_exactly(weight)
                           and products.can_pack(*weight.shape, self.config.input_dtype))
            self.unpacked = None
            if self.packed:
                weight = products.pack(weight)
            elif numerics == "w8a16" and self.config.input_dtype == torch.bfloat16:
                self.unpacked = products.unpacked_product(weight)
                weight = weight.new_empty(0)
            scale = products.narrowed(layer.weight_scale.to(torch.float32).reshape(-1).contiguous(),
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
                product = (products.packed_product if self.packed
                           else products.upcast_product)(x, layer.weight)
            return products.scaled(product, layer.weight_scale, bias, x.dtype)

    class CpuFp8W8A8LinearKernel(PerChannelKernel):
        """FP8 weights, activations quantized to FP8 per token by vLLM's own QuantFP8."""

        def product(self, layer, x, bias):
            # Not the compiled one, which vLLM takes where a model is not eager: torch keeps what it
            # compiled for another CPU, and on AVX2 what was made for AVX512 found a wrong amax.
            codes, x_scale = self.quant_fp8.forward_native(x)
            product = products.upcast_product(upcast(codes), layer.weight).mul_(FLOAT16_READING)
            return products.scaled(product, layer.weight_scale * x_scale, bias, x.dtype)

    return {"w8a16": CpuFp8W8A16LinearKernel, "w8a8": CpuFp8W8A8LinearKernel}[numerics]
