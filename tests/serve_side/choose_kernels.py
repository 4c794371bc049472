"""Run by the serving environment: compute capabilities. Which kernel vLLM would take on such GPUs.

vLLM's own code chooses, for each of LLM Compressor's presets, a scheme and then a kernel; only the
platform is made up, and what compiled code would answer: that CUTLASS has FP8 from 8.9 on, FP8
blocks from 9.0 and FP4 from 10.0 (vLLM 0.32.0, csrc/.../w8a8/cutlass/scaled_mm_entry.cu and
csrc/.../fp4/nvfp4_scaled_mm_entry.cu). FlashInfer is taken to be there for MXFP4, as it is in
vLLM's environment for GPUs. Printed: JSON, the kernel by capability ("0": a CPU) and preset; ""
where vLLM refuses.
"""

import json
import sys
from types import SimpleNamespace

import torch
import vllm.platforms
from vllm.platforms.interface import DeviceCapability, Platform, PlatformEnum


class MadeUp(Platform):
    # A CPU's while vLLM is imported, for a GPU's attention is compiled code.
    _enum, device_name, device_type, capability = PlatformEnum.CPU, "cuda", "cuda", 0

    @classmethod
    def get_device_capability(cls, device_id=0):
        return DeviceCapability(*divmod(cls.capability, 10)) if cls.capability else None

    @classmethod
    def support_deep_gemm(cls):
        return cls.capability >= 90


vllm.platforms._current_platform = MadeUp()  # before anything of vLLM asks which it is

from compressed_tensors.quantization import preset_name_to_scheme  # noqa: E402
from vllm import _custom_ops as ops  # noqa: E402

for name, least in {"cutlass_scaled_mm_supports_fp8": 89,
                    "cutlass_scaled_mm_supports_fp4": 100}.items():
    setattr(ops, name, lambda capability, least=least: capability >= least)

from vllm.config import VllmConfig, set_current_vllm_config  # noqa: E402
from vllm.distributed import parallel_state  # noqa: E402
from vllm.model_executor.kernels.linear.mxfp4 import flashinfer as mxfp4  # noqa: E402
from vllm.model_executor.kernels.linear.scaled_mm import cutlass  # noqa: E402
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (  # noqa: E402, E501
    CompressedTensorsConfig,
)

PRESETS = {"FP8_DYNAMIC": "float-quantized", "FP8_BLOCK": "float-quantized",
           "INT8": "int-quantized", "W4A16": "pack-quantized", "NVFP4": "nvfp4-pack-quantized",
           "MXFP4": "mxfp4-pack-quantized"}


def chosen(preset: str, form: str) -> str:
    """The kernel's class for one of Phi-4's Linears, o_proj: 5120 by 5120."""
    scheme = preset_name_to_scheme(preset, ["Linear"])
    config = CompressedTensorsConfig({}, [], form, {}, [])
    found = config._get_scheme_from_parts(scheme.weights, scheme.input_activations, None, form)
    config._check_scheme_supported(found.get_min_capability())
    layer = torch.nn.Module()
    with torch.device("meta"):
        found.create_weights(
            layer=layer, input_size=5120, output_size=5120, input_size_per_partition=5120,
            output_partition_sizes=[5120], output_size_per_partition=5120,
            params_dtype=torch.bfloat16, weight_loader=lambda *_: None)
    kernels = [value for value in vars(found).values() if "Kernel" in type(value).__name__]
    return type(kernels[0]).__name__


config = VllmConfig()
config.model_config = SimpleNamespace(dtype=torch.bfloat16,
                                      hf_text_config=SimpleNamespace(model_type="phi3"))
parallel_state._TP = SimpleNamespace(world_size=1, rank_in_group=0)
mxfp4.has_flashinfer_cutedsl = lambda: True
answers = {}
for capability in [*map(int, sys.argv[1:]), 0]:
    MadeUp.capability = capability
    MadeUp._enum = PlatformEnum.CUDA if capability else PlatformEnum.CPU
    cutlass.CUTLASS_BLOCK_FP8_SUPPORTED = capability >= 90
    answers[capability] = {}
    for preset, form in PRESETS.items():
        try:
            with set_current_vllm_config(config):
                answers[capability][preset] = chosen(preset, form)
        except (ValueError, RuntimeError) as refused:
            print(capability, preset, refused, file=sys.stderr)
            answers[capability][preset] = ""
print(json.dumps(answers))
