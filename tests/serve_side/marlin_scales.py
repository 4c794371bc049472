"""Run by the serving environment: a layer's scales as vLLM prepares them for Marlin's kernel.

Standard input: {"scales": [...], "features": n} as JSON. Printed: the scales by type, as JSON.
"""

import json
import sys

import torch
from vllm.model_executor.layers.quantization.utils.marlin_utils import marlin_permute_scales
from vllm.model_executor.layers.quantization.utils.marlin_utils_fp8 import (
    fp8_fused_exponent_bias_into_scales,
)


def prepared(scales: list[float], features: int, dtype: torch.dtype) -> list[float]:
    """As `prepare_fp8_layer_for_marlin` does it: one scale for each channel."""
    row = torch.tensor([scales]).to(dtype)
    row = marlin_permute_scales(row, size_k=features, size_n=len(scales), group_size=-1)
    return fp8_fused_exponent_bias_into_scales(row).float().flatten().tolist()


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    print("ANSWER", json.dumps({name: prepared(asked["scales"], asked["features"], dtype) for
                                name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.half))}))
