"""Run by scripts/accept_steps.py in the serving environment: linear layers, by vLLM's kernels.

Arguments: whose layers, "phi4" or "bundled", then `--linear-backend`s. A layer as vLLM's
compressed-tensors schemes leave it goes to the kernel that vLLM selects for it; printed is, by
backend and layer, the kernel's name and its error against float64, as JSON.
"""

import json
import sys

import torch
from kernels import BUNDLED, PHI4, codes, in_float64, layer_of, per_token, relative_error
from vllm.config import KernelConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.kernels.linear import init_fp8_linear_kernel, init_wfp8_a16_linear_kernel
from vllm.model_executor.layers.quantization.utils import quant_utils as keys
from vllm.platforms import current_platform
from vllm.plugins import load_general_plugins


def dtype() -> torch.dtype:
    """The 16 bits that vLLM computes in: Turing has no bfloat16."""
    old = current_platform.is_cuda() and not current_platform.has_device_capability(80)
    return torch.half if old else torch.bfloat16


def selected(shape: tuple[int, int]):
    """As `CompressedTensorsW8A8Fp8` and, below capability 8.9, `CompressedTensorsW8A16Fp8` ask."""
    common = {"weight_quant_key": keys.kFp8StaticChannelSym, "weight_shape": shape,
              "input_dtype": dtype(), "out_dtype": dtype()}
    if current_platform.is_cuda() and not current_platform.has_device_capability(89):
        return init_wfp8_a16_linear_kernel(activation_quant_key=keys.kFp8DynamicTensorSym, **common)
    return init_fp8_linear_kernel(activation_quant_key=keys.kFp8DynamicTokenSym, **common)


def errors(shape: tuple[int, int], tokens: int, device: str) -> dict:
    """One layer on random weights, every code equally likely, and random inputs.

    Relative errors (norm of the difference over the norm): `w8a16` and `w8a8` are the kernel's,
    against float64 with 16-bit and with FP8 activations; `rounding` is what FP8 activations alone
    are off; `plain` is that of a 16-bit product with the dequantized weights.
    """
    weight = codes(*shape)
    scale = ((torch.rand(shape[0], 1) + 0.5) * 1e-3).bfloat16()  # as a checkpoint stores it
    x = torch.randn(tokens, shape[1]).to(dtype())
    layer = layer_of(weight.to(device), scale.float().to(device))
    layer.output_size_per_partition, layer.input_size_per_partition = shape
    layer.logical_widths, layer.orig_dtype = [shape[0]], dtype()
    layer.weight_block_size = layer.input_scale = None
    kernel = selected(shape)
    kernel.process_weights_after_loading(layer)
    y = kernel.apply_weights(layer, x.to(device)).cpu()
    some = torch.randperm(shape[0])[:1024]  # float64 on a CPU takes its time
    y, weight, scale = y[:, some], weight[some], scale[some]
    exact, rounded = (in_float64(seen, weight, scale, None) for seen in (x, per_token(x)))
    plain = (weight.float() * scale.float()).to(dtype())
    return {"kernel": type(kernel).__name__, "w8a16": relative_error(y, exact),
            "w8a8": relative_error(y, rounded), "rounding": relative_error(rounded, exact),
            "plain": relative_error(torch.nn.functional.linear(x, plain), exact)}


def main(whose: str, *backends: str) -> dict:
    load_general_plugins()  # as vLLM does: on a CPU the workbook's kernels are among them
    torch.manual_seed(0)
    measured, shapes = {}, {"phi4": PHI4, "bundled": BUNDLED}[whose]
    for backend in backends:
        config = VllmConfig(kernel_config=KernelConfig(linear_backend=backend))
        with set_current_vllm_config(config):
            measured[backend] = {
                f"{name}, {tokens}": errors(shape, tokens, current_platform.device_type)
                for name, shape in shapes.items() for tokens in (1, 64)}
    return measured


if __name__ == "__main__":
    print("ANSWER", json.dumps(main(*sys.argv[1:])))
