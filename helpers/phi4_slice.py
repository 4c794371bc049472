"""A slice of Phi-4: whole layers of its shapes with random weights, to measure ratios of speed on.

What a layer computes and how many bytes that reads follows from its shapes, whatever its weights
are, and a claim of "1.88x" is a ratio. So it can be measured where Phi-4 does not fit. The slice
has n of Phi-4's 40 layers, and n fortieths of the rows of its output head, which every arm leaves
in 16 bits: the ceiling of the ratio is then Phi-4's own.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from helpers import (
    WorkbookError,
    arm_names,
    capacity,
    checkpoint,
    hardware,
    quantize,
    roofline,
    schemes,
    serving,
    workspace,
)
from helpers.checkpoint import Checkpoint
from helpers.hardware import Machine, ServingMode
from helpers.headers import TensorInfo

if TYPE_CHECKING:
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from torch import Tensor

LAYERS = {"cpu": 2, "cuda": 10}  # a bf16 copy of 1.5 GB, and of 7.3 GB
MAX_MODEL_LEN = 1024
KV_TOKENS = 2048  # of all requests together
# Bytes that a server takes beside its weights and its KV cache; what all else takes meanwhile, the
# notebook and the benchmark; and what making a quantized copy takes beside the bf16 weights and the
# codes. Measured on a CPU (PSS), and rounded up.
SERVER = {"cpu": 10**9, "cuda": 2 * 10**9}
BESIDE = {"cpu": 600_000_000, "cuda": 0}
MAKING = 10**9
CARDS = "FP8 W8A16"  # the arm that has the arithmetic of the model card's A40
SHARD = 200_000_000  # bytes: while vLLM loads a file, it is in memory twice
# The presets of LLM Compressor, by the name that a format has in the ledger.
PRESETS = {"fp8": "FP8_DYNAMIC", "int8": "INT8", "int4": "W4A16"}
# What every config.json of the slice has from the whole model's.
KEPT = ("model_type", "hidden_size", "intermediate_size", "num_attention_heads",
        "num_key_value_heads", "rms_norm_eps", "rope_theta", "tie_word_embeddings")


@dataclass(frozen=True)
class Arm:
    """What is measured: the weights' format, one of `ledger_row.ARMS`, and the products' bits.

    `flags`: of its server, beside those of all arms.
    """

    format: str
    numerics: str = ""
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Slice:
    """How large a slice is made, and how it is served: all arms' servers at once, or in turn."""

    config: dict
    together: bool
    why: str

    @property
    def layers(self) -> int:
        return self.config["num_hidden_layers"]

    @property
    def title(self) -> str:
        return title(self.layers)

    def tensors(self, format: str) -> list[TensorInfo]:
        """What its checkpoint holds in a format, one of `PRESETS` or "bf16"."""
        base = roofline.tensors(self.config)
        return base if format == "bf16" else schemes.predict(base, PRESETS[format])

    @property
    def kv_bytes(self) -> int:
        """The KV cache that each of its servers is given."""
        return KV_TOKENS * roofline.kv_bytes_per_token(self.config)

    def served_bytes(self, format: str, device: str) -> int:
        """Memory that a server of it in a format takes on "cpu" or "cuda"."""
        return checkpoint.total_bytes(self.tensors(format)) + self.kv_bytes + SERVER[device]

    def bytes_per_token(self, format: str) -> int:
        """Bytes of weights that one stream reads per token."""
        return roofline.bytes_per_token(self.tensors(format))


def title(layers: int) -> str:
    """The name of such a model in the ledger."""
    return f"{layers} layers of Phi-4, random weights"


def arms(mode: ServingMode) -> dict[str, Arm]:
    """What a machine measures, by the name it is shown under, bf16 first, or fp16 where it is that.

    INT8 is the 8-bit arithmetic of a CPU, as FP8 is that of a GPU from Ada on; Marlin gives the
    arithmetic of the model card's A40 on any GPU.
    """
    if mode.device == "cpu":
        return {"bf16": Arm("bf16"), CARDS: Arm("fp8", "w8a16"),
                "INT8 W8A8": Arm("int8", "w8a8")}
    own = {"FP8 W8A8": Arm("fp8", "w8a8")} if mode.key == "gpu-w8a8" else {}
    return {arm_names.sixteen_bits(mode.dtype): Arm("bf16"), **own,
            CARDS: Arm("fp8", "w8a16", tuple(serving.MARLIN))}


def choose(machine: Machine, mode: ServingMode, free: int | None = None) -> Slice:
    """The largest slice that memory holds, of up to `LAYERS`, and whether all servers fit at once.

    `free`: bytes of memory to serve in, by default what vLLM may take of the GPU that is used, or
    what is free of the RAM, in which the slice is made in any case. Fewer layers come before fewer
    servers at once, which costs a start for each turn. Raises `WorkbookError` where not even one
    layer fits.
    """
    ram = hardware.available_ram()
    if free is None:
        free = (capacity.usable(hardware.best_gpu(machine)) if mode.device == "cuda" else ram)
    for together in (True, False):
        for layers in range(LAYERS[mode.device], 0, -1):
            found = Slice(sliced(_phi4(), layers), together, "")
            served, making = memory(found, mode), _making(found)
            if served <= free and making <= (ram if mode.device == "cuda" else free):
                return replace(found, why=_why(found, served, free, mode))
    raise WorkbookError(
        f"One layer of Phi-4 takes {making / 1e9:.1f} GB to make and {served / 1e9:.1f} GB to "
        f"serve, and {free / 1e9:.1f} GB are free.",
        "No ratio can be measured at Phi-4's shapes here.",
        "Close what else uses memory, and run this again.")


def sliced(whole: dict, layers: int) -> dict:
    """The config of a slice: so many layers of a model, and as large a share of its vocabulary.

    The vocabulary is a multiple of 64, and no smaller than the tokenizer's, the bundled model's.
    """
    tokens = roofline.load_config(workspace.data("tiny_phi4"))["vocab_size"]
    rows = 64 * round(whole["vocab_size"] * layers / whole["num_hidden_layers"] / 64)
    return {**{name: whole[name] for name in KEPT}, "num_hidden_layers": layers,
            "vocab_size": max(rows, tokens), "max_position_embeddings": MAX_MODEL_LEN,
            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def largest(mode: ServingMode) -> Slice:
    """The slice of a machine with memory enough."""
    return Slice(sliced(_phi4(), LAYERS[mode.device]), True, "")


def disk(mode: ServingMode) -> int:
    """Bytes of disk that the largest slice takes while it is measured, in all formats."""
    part = largest(mode)
    return sum(checkpoint.total_bytes(part.tensors(format))
               for format in {arm.format for arm in arms(mode).values()})


def memory(part: Slice, mode: ServingMode) -> int:
    """Bytes that serving it takes, and what runs beside."""
    each = [part.served_bytes(arm.format, mode.device) for arm in arms(mode).values()]
    return (sum(each) if part.together else max(each)) + BESIDE[mode.device]


def _making(part: Slice) -> int:
    """Bytes of RAM that making it takes."""
    weights = checkpoint.total_bytes(part.tensors("bf16"))
    return int(weights * quantize.ONESHOT_MEMORY) + MAKING


def _phi4() -> dict:
    return roofline.load_config(workspace.data("phi4"))


def _why(found: Slice, needed: int, free: int, mode: ServingMode) -> str:
    count = len(arms(mode))
    servers = f"all {count} servers at once" if found.together else "one server at a time"
    said = (f"{found.layers} of Phi-4's {_phi4()['num_hidden_layers']} layers, "
            f"{checkpoint.total_bytes(found.tensors('bf16')) / 1e9:.1f} GB in bf16, {servers}: "
            f"{needed / 1e9:.1f} GB of the {free / 1e9:.1f} GB of memory that are free")
    if found.layers < LAYERS[mode.device] or not found.together:
        said += f" (more memory would take {LAYERS[mode.device]} layers, all servers at once)"
    return said


def caveat(machine: Machine, mode: ServingMode) -> str:
    """Why this machine's arithmetic keeps an arm from gaining what it could; "" where it does not.
    """
    if mode.device == "cuda":
        return ""
    said = []
    if mode.key == "cpu-unpacked":
        said.append("FP8 weights are unpacked to bf16 when they are loaded, because "
                    f"{mode.why.split(':')[0].removeprefix('no GPU, and ')}: expect a ratio of 1")
    if not machine.cpu_features & {"amx_int8", "avx512_vnni", "avx_vnni"}:
        said.append("this CPU has no instruction that multiplies 8-bit integers and sums them "
                    "(VNNI, AMX): INT8 reads fewer bytes, and computes no faster")
    return "; ".join(said)


@contextlib.contextmanager
def made(found: Slice, recipes: Mapping[str, "QuantizationModifier"]
         ) -> Iterator[dict[str, Checkpoint]]:
    """The slice in bf16 and, by LLM Compressor's `oneshot`, in the formats of `recipes`; by format.

    The checkpoints are in the workspace's scratch while the block runs, and gone after it, however
    it ends; those of a process that was killed are removed the next time. Raises `WorkbookError`
    for a disk that is too small, or refuses to be written.
    """
    target = workspace.folder("scratch") / "phi4-slice"
    scratch = target.parent / f".{target.name}.made-{os.getpid()}"
    needed = sum(checkpoint.total_bytes(found.tensors(each)) for each in ("bf16", *recipes))
    with workspace.writing(target, "The slice of Phi-4 that was begun has been removed."):
        workspace.clear(target)
        workspace.require_disk(target.parent, needed, "The slice of Phi-4")
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            base = random_checkpoint(found.config, scratch / f"{target.name}-bf16")
            yield {"bf16": base} | {
                format: quantized(base, recipe, scratch / f"{target.name}-{format}")
                for format, recipe in recipes.items()}
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def random_checkpoint(config: dict, place: Path) -> Checkpoint:
    """A bf16 checkpoint of this config in the new folder `place`, with the bundled tokenizer.

    Rows of the head beyond the tokenizer's tokens are 0, so that greedy decoding never takes a
    token that has no text.
    """
    from huggingface_hub import save_torch_state_dict

    tensors = roofline.tensors(config)
    with ThreadPoolExecutor() as pool:
        weights = dict(zip((tensor.name for tensor in tensors),
                           pool.map(_random, tensors, range(len(tensors))), strict=True))
    weights["lm_head.weight"][roofline.load_config(workspace.data("tiny_phi4"))["vocab_size"]:] = 0
    place.mkdir(parents=True)
    save_torch_state_dict(weights, place, max_shard_size=SHARD)
    (place / "config.json").write_text(json.dumps(
        {**config, "architectures": ["Phi3ForCausalLM"], "dtype": "bfloat16"}, indent=1))
    for file in workspace.data("tiny_phi4").glob("tokenizer*"):
        shutil.copyfile(file, place / file.name)
    workspace.write_manifest(place)
    return checkpoint.just_written(place)


def _random(tensor: TensorInfo, seed: int) -> "Tensor":
    """A tensor's weights in bf16: signs and magnitudes from 1/128 to 1/8 at random; norms are 1.

    From random bits, since a billion normal numbers take ten seconds.
    """
    import numpy as np
    import torch

    if len(tensor.shape) == 1:
        return torch.ones(tensor.shape, dtype=torch.bfloat16)
    count = prod(tensor.shape)
    bits = np.random.Generator(np.random.SFC64(seed)).integers(
        2**64, size=-(-count // 4), dtype=np.uint64)
    # Four bf16 in each: a sign, 8 bits of exponent, 7 of mantissa; the exponent is 120 to 123
    np.bitwise_and(bits, np.uint64(0x81FF81FF81FF81FF), out=bits)
    np.bitwise_or(bits, np.uint64(0x3C003C003C003C00), out=bits)
    return torch.from_numpy(bits.view(np.int16)[:count]).view(torch.bfloat16).view(tensor.shape)


def quantized(base: Checkpoint, recipe: "QuantizationModifier", place: Path) -> Checkpoint:
    """A checkpoint in the new folder `place` that `oneshot` makes of `base` by a recipe.

    Unlike `quantize.save`'s it is not for keeping: it appears bit by bit, and says not what it was
    made from.
    """
    import torch
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM

    with quantize.quiet():
        model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.bfloat16)
        oneshot(model=model, recipe=recipe)
        model.save_pretrained(place, save_compressed=True, max_shard_size=SHARD)
    del model
    quantize.forget()
    base.copy_beside(quantize.TOKENIZER_FILES, place)
    workspace.write_manifest(place)
    return checkpoint.just_written(place)
