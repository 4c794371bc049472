"""What `make rehearse-gpu` found and kept: the path of each GPU, as vLLM itself sees it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from helpers import arm_names, capacity, workspace

if TYPE_CHECKING:
    from pandas import DataFrame

KEPT = workspace.data("measured", "gpu-rehearsal.json")
NOT_SHOWN = [
    "anything that runs on the device: kernels, CUDA graphs, speed, answers",
    "what torch.compile makes of the model (only that its Triton compiles for the GPU is shown)",
    "that vLLM's compiled kernels hold code for the GPU",
    "what CUDA sees of the memory beside NVML's total, and what activations and graphs take",
    "NCCL between two GPUs",
]
MODES = {"gpu-w8a8": "W8A8", "gpu-w8a16": "W8A16", "none": "none"}


def kept() -> dict:
    """The kept rehearsal: "made", "versions", "made from", "rows" and "not shown"."""
    return json.loads(KEPT.read_text())


def table(rows: list[dict]) -> DataFrame:
    """A line for each machine: what it serves, in what, by which of vLLM's kernels."""
    import pandas as pd

    return pd.DataFrame([{
        "GPU": row["machine"], "mode": MODES.get(row["mode"], "CPU"),
        "serves": _serves(row), "kernel of FP8": ", ".join(_short(name) for name in row["kernel"]),
        "tokens of KV cache": _tokens(row), "verdict": row["verdict"],
    } for row in rows]).set_index("GPU")


def _serves(row: dict) -> str:
    """Profile and arms, 16 bits by their true name, and how many GPUs share the model."""
    if not row["arms"]:
        return ""
    names = {"bf16": arm_names.sixteen_bits(row["dtype"]), "fp8": "FP8"}
    on = f", on {row['gpus']} GPUs" if row["gpus"] > 1 else ""
    return f"{row['profile']} in {' and '.join(names[arm] for arm in row['arms'])}{on}"


def _tokens(row: dict) -> str:
    """In the order of the arms."""
    return " and ".join(f"{row['kv_tokens'][arm]:,}" for arm in row["arms"]
                        if arm in row["kv_tokens"])


def _short(kernel: str) -> str:
    return kernel.removesuffix("ScaledMMLinearKernel")


def as_markdown() -> str:
    """The README's table of the GPUs, from the kept rehearsal."""
    found = kept()
    versions = found["versions"]
    shown = table(found["rows"]).reset_index()
    return (f"Rehearsed on {found['made']} without a GPU by `make rehearse-gpu`, with vLLM "
            f"{versions['vllm']} and torch {versions['torch']}: each machine below was put in "
            "front of the project's code and of vLLM's own, which built the model, chose the "
            "kernel and divided the memory. Nothing ran on a device; the KV cache is what vLLM's "
            f"share leaves beside the weights and {capacity.REST / 1e9:.1f} GB for all else.\n\n"
            + shown.to_markdown(index=False))
