"""Run by tests/gpu in the serving environment: Phi-4's linear layers, by vLLM's kernels.

A layer as vLLM's compressed-tensors schemes leave it goes to the kernel that vLLM selects for it,
with each of the `--linear-backend`s named on the command line; printed is, by backend and layer,
the kernel's name and its error against float64, as JSON.
"""

import json
import sys

import torch
from kernels import PHI4, codes, in_float64, layer_of, per_token, relative_error
from vllm.config import KernelConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.kernels.linear import init_fp8_linear_kernel, init_wfp8_a16_linear_kernel
from vllm.model_executor.layers.quantization.utils import quant_utils as keys
from vllm.platforms import current_platform


def selected(shape: tuple[int, int]):
    """As `CompressedTensorsW8A8Fp8` and, below capability 8.9, `CompressedTensorsW8A16Fp8` ask."""
    common = {"weight_quant_key": keys.kFp8StaticChannelSym, "weight_shape": shape,
              "input_dtype": torch.bfloat16, "out_dtype": torch.bfloat16}
    if current_platform.is_cuda() and not current_platform.has_device_capability(89):
        return init_wfp8_a16_linear_kernel(activation_quant_key=keys.kFp8DynamicTensorSym, **common)
    return init_fp8_linear_kernel(activation_quant_key=keys.kFp8DynamicTokenSym, **common)


def errors(shape: tuple[int, int], tokens: int, device: str) -> dict:
    """One layer on random weights, every code equally likely, and random inputs.

    Relative errors (norm of the difference over the norm): `w8a16` and `w8a8` are the kernel's,
    against float64 with 16-bit and with FP8 activations; `rounding` is what FP8 activations alone
    are off; `bf16` is that of a bf16 product with the dequantized weights.
    """
    weight = codes(*shape)
    scale = ((torch.rand(shape[0], 1) + 0.5) * 1e-3).bfloat16()  # as a checkpoint stores it
    x = torch.randn(tokens, shape[1]).bfloat16()
    layer = layer_of(weight.to(device), scale.float().to(device))
    layer.output_size_per_partition, layer.input_size_per_partition = shape
    layer.logical_widths, layer.orig_dtype = [shape[0]], torch.bfloat16
    layer.weight_block_size = layer.input_scale = None
    kernel = selected(shape)
    kernel.process_weights_after_loading(layer)
    y = kernel.apply_weights(layer, x.to(device)).cpu()
    some = torch.randperm(shape[0])[:1024]  # float64 on a CPU takes its time
    y, weight, scale = y[:, some], weight[some], scale[some]
    exact, rounded = (in_float64(seen, weight, scale, None) for seen in (x, per_token(x)))
    plain = (weight.float() * scale.float()).bfloat16()
    return {"kernel": type(kernel).__name__, "w8a16": relative_error(y, exact),
            "w8a8": relative_error(y, rounded), "rounding": relative_error(rounded, exact),
            "bf16": relative_error(torch.nn.functional.linear(x, plain), exact)}


def main(backends: list[str], shapes: dict = PHI4) -> dict:
    torch.manual_seed(0)
    measured = {}
    for backend in backends:
        config = VllmConfig(kernel_config=KernelConfig(linear_backend=backend))
        with set_current_vllm_config(config):
            measured[backend] = {
                f"{name}, {tokens}": errors(shape, tokens, current_platform.device_type)
                for name, shape in shapes.items() for tokens in (1, 64)}
    return measured


if __name__ == "__main__":
    print("ANSWER", json.dumps(main(sys.argv[1:])))
