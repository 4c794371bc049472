"""How vLLM divides a GPU's memory: the one rule of what fits, and the share it is told to take.

vLLM 0.32 takes a share of the memory that CUDA sees (`--gpu-memory-utilization`), all of which has
to be free when it starts (`vllm/v1/worker/utils.py`, `request_memory`). Weights, activations and
CUDA graphs come off it, what is left is KV cache (`gpu_worker.py`, `determine_available_memory`),
and that has to hold one request of `--max-model-len` (`kv_cache_utils.py`,
`_check_enough_kv_cache_memory`). CUDA sees some hundred MB less than NVML counts.
"""

from collections.abc import Sequence

from helpers.hardware import Gpu

SHARE = 0.90  # of a GPU's memory, at most; what NVML counts
# Bytes that are neither weights nor KV cache, on each GPU: activations, CUDA graphs, and 0.90 of
# what CUDA sees less than NVML. An allowance of ours, as is `CONTEXT`.
REST = 1_500_000_000
# Bytes that vLLM's process has taken before it looks at what is free: CUDA's context, and NCCL's
# buffers where GPUs share a model.
CONTEXT = 800_000_000
MAX_MODEL_LEN = 4096  # tokens of prompt and answer together that the notebooks serve


def room(weights: int, memory: int, gpus: int = 1, share: float = SHARE) -> int:
    """Bytes of KV cache beside `weights` bytes, on so many GPUs of `memory` bytes (NVML's total).

    Weights and KV cache are divided among the GPUs. Negative where even the weights are too large.
    """
    return gpus * (int(share * memory) - REST) - weights


def fits(weights: int, kv_cache: int, memory: int, gpus: int = 1) -> bool:
    """Whether `weights` bytes leave room for a KV cache of `kv_cache` bytes; the rest as `room`."""
    return room(weights, memory, gpus) >= kv_cache


def usable(gpu: Gpu) -> int:
    """Bytes that servers may take of a GPU: `SHARE` of it, or what is free where that is less."""
    most = int(SHARE * gpu.memory_bytes)
    return most if gpu.free_bytes is None else min(most, gpu.free_bytes)


def share(needed: int, gpus: Sequence[Gpu]) -> float:
    """The share of each GPU's memory that vLLM is told to take, two decimals, rounded down.

    0.90, or on a GPU that others use, such as a desktop, what is free now beside `CONTEXT`. Never
    less than `needed` bytes of weights and KV cache take: where that is more than is free, vLLM
    stops at its start and says what is free.
    """
    least = max(-(-100 * (needed // len(gpus) + REST) // gpu.memory_bytes) for gpu in gpus)
    free = min((100 * (gpu.free_bytes - CONTEXT) // gpu.memory_bytes
                for gpu in gpus if gpu.free_bytes is not None), default=100)
    return min(max(least, free), round(100 * SHARE)) / 100
