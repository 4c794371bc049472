"""What to expect before measuring: bytes per token, bandwidth, ceilings, and what fits on a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from helpers import WorkbookError, arm_names, capacity, checkpoint, hardware, workspace
from helpers.hardware import Gpu, Machine
from helpers.headers import TensorInfo

if TYPE_CHECKING:
    from pandas import DataFrame

SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "vocab_size", "max_position_embeddings")
GPU_FIELDS = {"name": str, "nvml_name": str, "compute_capability": list, "memory_mib": int,
              "bandwidth_gb_s": int | float, "memory_source": str, "source": str}


@dataclass(frozen=True)
class Bandwidth:
    """A memory's speed, and where the figure comes from."""

    bytes_per_s: float
    source: str


def load_config(directory: Path) -> dict:
    """A model directory's config.json, with what older and newer files leave out filled in.

    Transformers 5 writes RoPE's base into `rope_parameters`; here it is `rope_theta` as well. Where
    `num_key_value_heads` is absent, every head has a key and a value of its own.
    Raises `WorkbookError` for a config that is not of a decoder like Phi-3's or Llama's, or whose
    heads do not divide its width.
    """
    config = checkpoint.read_config(directory)
    missing = [key for key in SIZES if config.get(key) is None]
    if missing:
        raise WorkbookError(
            f"The config.json of {directory.name} has no {', '.join(missing)}.",
            f"It is of type {config.get('model_type')!r}, and the workbook counts the bytes of "
            "decoders whose sizes are called as Phi-3's and Llama's are.",
            "Choose a model of that form, as phi-4, phi-4-mini, smollm2 or tiny-phi4 are.")
    config.setdefault("rope_theta", (config.get("rope_parameters") or {}).get("rope_theta"))
    config.setdefault("tie_word_embeddings", False)
    heads = config["num_attention_heads"]
    kv_heads = config.setdefault("num_key_value_heads", heads)
    width_fits = "head_dim" in config or config["hidden_size"] % heads == 0
    if not width_fits or heads % kv_heads:
        raise WorkbookError(
            f"{directory.name} has {heads} query heads, {kv_heads} key-value heads and a width of "
            f"{config['hidden_size']}.",
            "The query heads have to divide the width, and the key-value heads the query heads: no "
            "such attention can be computed.",
            "Correct config.json, or fetch the model again.")
    return config


def head_dim(config: dict) -> int:
    """Dimensions of one attention head: config's own, or the width over the heads."""
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def tensors(config: dict) -> list[TensorInfo]:
    """Every tensor of a bf16 Phi3ForCausalLM of this config, without the weights.

    Names and shapes as Transformers' `Phi3ForCausalLM` has them: fused qkv_proj and gate_up_proj,
    two RMS norms a layer, no biases; no lm_head where it is tied to the embedding.
    """
    hidden, ffn, vocab = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head = head_dim(config)
    shapes = {"model.embed_tokens": (vocab, hidden)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.self_attn.qkv_proj": ((heads + 2 * kv_heads) * head, hidden),
            f"{layer}.self_attn.o_proj": (hidden, heads * head),
            f"{layer}.mlp.gate_up_proj": (2 * ffn, hidden),
            f"{layer}.mlp.down_proj": (hidden, ffn),
            f"{layer}.input_layernorm": (hidden,),
            f"{layer}.post_attention_layernorm": (hidden,),
        }
    shapes["model.norm"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head"] = (vocab, hidden)
    return [TensorInfo(f"{name}.weight", "BF16", shape, 2 * prod(shape))
            for name, shape in shapes.items()]


def bytes_per_token(census: Sequence[TensorInfo]) -> int:
    """Bytes of weights read to decode one token of one stream.

    The input embedding does not count, since one row of it is taken. Where no lm_head is stored,
    the embedding is the output head too; then all of it is read, and counts.
    """
    tied = not any(checkpoint.role(t) == "lm_head" for t in census)
    return sum(t.nbytes for t in census if tied or checkpoint.role(t) != "embedding")


def decode_bytes(config: dict, arm: str) -> int:
    """`bytes_per_token` of a config in "bf16" or "fp8"."""
    planned = tensors(config)
    return bytes_per_token(checkpoint.predict_fp8(planned) if arm == "fp8" else planned)


def kv_bytes_per_token(config: dict) -> int:
    """Bytes of 16-bit KV cache per token of context: K and V, by KV head, dimension and layer."""
    return 2 * 2 * config["num_key_value_heads"] * head_dim(config) * config["num_hidden_layers"]


def tensor_parallel_sizes(config: dict) -> list[int]:
    """The GPU counts that one layer of this config can be divided over, in vLLM 0.32.

    Query heads are dealt out evenly; KV heads too, or each is copied to the same number of GPUs;
    and so are the rows of the embedding and of lm_head, padded to a multiple of 64.
    Source: vLLM's `ModelConfig.verify_with_parallel_config`, `LlamaAttention` (Phi-4's class is
    built on it) and `VocabParallelEmbedding`; a test builds Phi-4 with each.
    """
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    vocabulary = -(-config["vocab_size"] // 64) * 64
    return [n for n in range(1, heads + 1) if heads % n == 0 and vocabulary % n == 0
            and (kv_heads % n == 0 or n % kv_heads == 0)]


@dataclass(frozen=True)
class Budget:
    """How a server's memory divides: bytes, tokens of context, sequences at once, tokens/s.

    `left` is what the weights and the rest (`capacity.room`) leave for the KV cache; it is
    negative where the weights alone are too large. `fits`: whether that holds one request of
    `capacity.MAX_MODEL_LEN` tokens; where it does not, `tokens` is 0. `ceiling` is the most that
    one stream can decode, tokens/s.
    """

    weights: int
    left: int
    tokens: int
    context: int
    concurrency: int
    ceiling: float

    @property
    def fits(self) -> bool:
        return self.tokens > 0


def budget(config: dict, arm: str, memory_bytes: int, bytes_per_s: float) -> Budget:
    """What serving a config in "bf16" or "fp8" takes of a GPU's memory, and what it leaves.

    Tokens are `left` over `kv_bytes_per_token`, as vLLM counts them; `context` is the longest
    sequence that fits, and `concurrency` counts the sequences of the model's full context that fit
    at once.
    """
    planned = tensors(config)
    weights = checkpoint.total_bytes(
        checkpoint.predict_fp8(planned) if arm == "fp8" else planned)
    longest = config["max_position_embeddings"]
    least = kv_bytes_per_token(config) * min(capacity.MAX_MODEL_LEN, longest)
    left = capacity.room(weights, memory_bytes)
    tokens = kv_tokens(config, left) if capacity.fits(weights, least, memory_bytes) else 0
    return Budget(weights, left, tokens, min(tokens, longest), tokens // longest,
                  bytes_per_s / decode_bytes(config, arm) if tokens else 0.0)


def kv_tokens(config: dict, nbytes: int) -> int:
    """Tokens of context that `nbytes` of 16-bit KV cache hold."""
    return nbytes // kv_bytes_per_token(config)


def gpus() -> list[dict]:
    """The GPUs of `data/gpus.json`, each with the source of its figures.

    Raises `WorkbookError` when the list is no JSON, or an entry lacks a field of `GPU_FIELDS`.
    """
    file = workspace.data("gpus.json")
    try:
        entries = json.loads(file.read_text())
    except ValueError as error:
        raise WorkbookError(
            f"data/gpus.json is not JSON ({error}).", "No GPU's memory and bandwidth are known.",
            "Correct it there, or get it back with `git checkout data/gpus.json`.") from None
    for entry in entries:
        wrong = [field for field, kind in GPU_FIELDS.items()
                 if not isinstance(entry.get(field), kind)]
        if wrong:
            raise WorkbookError(
                f"The entry {entry.get('name', '?')!r} of data/gpus.json has no usable "
                f"{', '.join(wrong)}.", "Every GPU of the list is looked at in the same way.",
                "Fill it in as the other entries have it.")
    return entries


def listed(gpu: dict) -> Gpu:
    """A GPU of `data/gpus.json` as if it were in this machine."""
    return Gpu(0, gpu["nvml_name"], memory_bytes(gpu), tuple(gpu["compute_capability"]), "")


def memory_bytes(gpu: dict) -> int:
    """Bytes of memory of a GPU of `data/gpus.json`, as NVML counts them."""
    return gpu["memory_mib"] * 2**20


def named(name: str) -> dict:
    """The GPU of `data/gpus.json` with this name there; raises `WorkbookError` for another."""
    known = {gpu["name"]: gpu for gpu in gpus()}
    if name not in known:
        raise WorkbookError(f"{name!r} is not in data/gpus.json.",
                            "Memory and bandwidth are read from that list.",
                            f"Choose one of {', '.join(known)}.")
    return known[name]


def budgets(config: dict, gpu: dict) -> dict[str, Budget]:
    """The `Budget` of "bf16" and of "fp8" on a GPU of `data/gpus.json`, by arm."""
    return {arm: budget(config, arm, memory_bytes(gpu), gpu["bandwidth_gb_s"] * 1e9)
            for arm in ("bf16", "fp8")}


def explain(config: dict, name: str) -> str:
    """One sentence for a GPU of `data/gpus.json`: its mode, and which of bf16 and FP8 it can serve.

    Raises `WorkbookError` for a GPU that is not in the list.
    """
    gpu = named(name)
    mode = hardware.gpu_mode(listed(gpu))
    if mode.key == "none":
        return f"{mode.why}."
    fitting = [arm for arm, found in budgets(config, gpu).items() if found.fits]
    sixteen = arm_names.sixteen_bits(mode.dtype)
    verdict = {0: f"Neither {sixteen} nor FP8 weights fit.",
               1: f"FP8 fits and {sixteen} does not: quantize on the CPU, serve FP8 alone.",
               2: "Both fit, so they can be compared on this GPU."}[len(fitting)]
    return f"{mode.title}. {verdict}"


def gpu_table(config: dict) -> DataFrame:
    """By GPU: serving mode, memory, bandwidth, one stream's ceilings, and what can be served.

    A DataFrame of values, slowest memory first. Ceilings are in tokens/s: bandwidth over bytes per
    token, an upper bound that no server reaches; memory is NVML's. "bf16 fits" and "FP8 fits" are
    True where the weights leave room for a KV cache (`Budget.fits`), "FP8 kernel" where vLLM has a
    kernel for this GPU.
    """
    import pandas as pd

    bf16, fp8 = decode_bytes(config, "bf16"), decode_bytes(config, "fp8")
    modes = {"gpu-w8a8": "W8A8", "gpu-w8a16": "W8A16", "none": "none"}
    rows = []
    for gpu in sorted(gpus(), key=lambda gpu: gpu["bandwidth_gb_s"]):
        speed, found = gpu["bandwidth_gb_s"] * 1e9, budgets(config, gpu)
        key = hardware.gpu_mode(listed(gpu)).key
        rows.append({
            "GPU": gpu["name"], "mode": modes[key], "FP8 kernel": key != "none",
            "memory, GiB": gpu["memory_mib"] / 1024, "bandwidth, GB/s": gpu["bandwidth_gb_s"],
            "bf16 ceiling": speed / bf16, "FP8 ceiling": speed / fp8,
            "bf16 fits": found["bf16"].fits, "FP8 fits": found["fp8"].fits})
    return pd.DataFrame(rows).set_index("GPU")


def read_bandwidth(machine: Machine) -> Bandwidth:
    """The memory bandwidth that bounds decoding on this machine.

    For a GPU it is the data sheet's, from `data/gpus.json`, or that of measured copies where the
    list lacks the GPU. For a CPU it is measured: the fastest of seven reads of 1 GiB by all cores.
    Raises `WorkbookError` when copies would have to be measured and torch cannot use the GPU.
    """
    if not machine.gpus:
        return Bandwidth(_measured_read(), "measured: all cores reading 1 GiB, best of 7")
    name = hardware.best_gpu(machine).name
    for gpu in gpus():
        if gpu["nvml_name"] == name:
            return Bandwidth(gpu["bandwidth_gb_s"] * 1e9, gpu["source"])
    if not _torch_has_cuda():
        raise WorkbookError(
            f"The bandwidth of {name} is not known: data/gpus.json does not list it.",
            "It cannot be measured either, because this environment's torch cannot use the GPU.",
            "Add the GPU to data/gpus.json with the figures of its data sheet; its nvml_name is "
            f"{name!r}.")
    return Bandwidth(measured_copy(), f"measured: copies on the {name}, median of 7")


def _torch_has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _measured_read() -> float:
    """Bytes/s of a sum over 1 GiB of float32, which reads each byte once, on all cores.

    As in STREAM, it is far larger than every cache, and the fastest of the runs counts: what
    slowed the others down was not the memory. A matrix-vector product reads at two thirds of this.
    """
    import torch

    matrix = torch.ones(2**28)
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        matrix.sum()
        seconds.append(time.perf_counter() - start)
    return matrix.nbytes / min(seconds[1:])


def measured_copy(device: str = "cuda") -> float:
    """Bytes/s, read and written, of 1 GiB copies in a device's memory, median of 7.

    In a process of its own: neither the copies nor the CUDA context that torch would make, some
    hundred MB, stay with this one; and it is shown the GPU that servers are shown. Raises
    `WorkbookError` where it cannot be measured.
    """
    machine = hardware.detect()
    ran = subprocess.run(
        [sys.executable, "-c", f"from helpers import roofline; print(roofline._copy({device!r}))"],
        cwd=workspace.repo(), capture_output=True, text=True,
        env=os.environ | hardware.cuda_variables(machine))
    if ran.returncode:
        from helpers import gpu_memory  # needs psutil, and the doctor reads this module without

        raise WorkbookError(
            "The speed of the GPU's memory could not be measured.",
            f"A copy of 1 GiB in it failed: {ran.stderr.strip().rpartition(chr(10))[2]}",
            f"{gpu_memory.in_the_way(machine.gpus)} Free 3 GB of it, and run this again.".strip())
    return float(ran.stdout)


def _copy(device: str) -> float:
    import torch

    source = torch.ones(2**28, device=device)
    copy = torch.empty_like(source)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    seconds = []
    for _ in range(8):
        wait()
        start = time.perf_counter()
        copy.copy_(source)
        wait()
        seconds.append(time.perf_counter() - start)
    return 2 * source.nbytes / sorted(seconds[1:])[3]
