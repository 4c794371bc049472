"""LLM Compressor's FP8_DYNAMIC recipe, its run, and the checkpoint it leaves."""

import contextlib
import io
import os
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from helpers import (
    WorkbookError,
    checkpoint,
    gpu_memory,
    hardware,
    identity,
    models,
    streaming,
    verification,
    workspace,
)
from helpers.checkpoint import Checkpoint
from helpers.hardware import Machine, serving_mode
from helpers.identity import Origin
from helpers.models import Profile

if TYPE_CHECKING:
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import PreTrainedModel

# Beside the weights and config, which save_pretrained writes.
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "chat_template*", "merges.txt",
                   "vocab.json", "LICENSE*")

# FP8_DYNAMIC as `recipe_in` reads it from a config.json.
RECIPE = {
    "format": "float-quantized", "targets": ["Linear"], "ignore": ["lm_head"],
    "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True,
                "dynamic": False},
    "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True,
                          "dynamic": True}}

# The bf16 weights, and what saving them needs besides: the codes are written beside the weights.
ONESHOT_MEMORY = 1.6

# Both libraries read this when they are first imported. Their logs would bury the notebook's own
# words; what went wrong still arrives as an exception.
os.environ.setdefault("LLM_COMPRESSOR_LOG_DISABLED", "true")
os.environ.setdefault("COMPRESSED_TENSORS_LOG_DISABLED", "true")


@dataclass(frozen=True)
class Route:
    """Whether the shards are streamed, the RAM that takes in bytes, and the sentence that says why.
    """

    streams: bool
    ram: int
    why: str


def recipe() -> "QuantizationModifier":
    """LLM Compressor's recipe: every Linear but the output head, FP8_DYNAMIC."""
    from llmcompressor.modifiers.quantization import QuantizationModifier

    return QuantizationModifier(targets="Linear", scheme="FP8_DYNAMIC", ignore=["lm_head"])


def target(profile: Profile) -> Path:
    """Where the profile's FP8 checkpoint belongs."""
    return workspace.root() / "checkpoints" / f"{profile.name}-fp8-dynamic"


def fp8_checkpoint(profile: Profile, base: Checkpoint) -> Checkpoint:
    """The profile's finished FP8 checkpoint, made from `base` if it is not there.

    One that is unfinished or damaged, or was made from another base, by another recipe or by other
    versions of the libraries, is said to be so, and made again.
    """
    place = target(profile)
    if place.exists():
        try:
            found = checkpoint.finished(place)
            other = _differences(found.made_from, origin(base, RECIPE))
            if not other:
                return found
            print(f"{place.name} was made {other}. It is made again.")
        except WorkbookError as damage:
            print(f"{damage.what} It is made again.")
    print(f"Quantizing {profile.title} ({profile.bf16_bytes / 1e9:.2g} GB) to FP8 ...")
    way = route(base)
    print(way.why)
    made = stream(base, place) if way.streams else save(quantized(base), base, place)
    forget()
    try:
        verification.verify_fp8(base, made)
    except WorkbookError:
        shutil.rmtree(made.path)  # or it would be taken for a good one the next time
        raise
    return made


def origin(base: Checkpoint, recipe: dict) -> Origin:
    """What a checkpoint made here and now of `base` by a recipe is made from."""
    return Origin(base.fingerprint, recipe, streaming.versions())


def _differences(found: Origin | None, wanted: Origin) -> str:
    """From what else a checkpoint was made than it would be now; empty where from the same."""
    if found is None:
        return "from a base that it does not name"
    said = [words for words, a, b in (
        ("from another base", found.base, wanted.base),
        ("by another recipe", found.recipe, wanted.recipe)) if a != b]
    if found.versions != wanted.versions:
        other = [f"{name} {version}" for name, version in found.versions.items()
                 if wanted.versions.get(name) != version]
        said.append(f"by {', '.join(other) or 'other libraries'}")
    return " and ".join(said)


def recipe_in(config: dict) -> dict:
    """The recipe that a quantized checkpoint's config.json tells of, in the form of `RECIPE`."""
    def inside(value, name: str) -> dict:
        found = value.get(name)
        return found if isinstance(found, dict) else {}

    said = inside(config, "quantization_config")
    groups, ignored = inside(said, "config_groups"), said.get("ignore")
    group = inside(groups, next(iter(groups), ""))
    return {"format": said.get("format"), "targets": group.get("targets"),
            "ignore": sorted(set(ignored) - {checkpoint.EMBEDDING})
            if isinstance(ignored, list) else ignored,
            **{part: {key: inside(group, part).get(key) for key in RECIPE[part]}
               for part in ("weights", "input_activations")}}


def route(base: Checkpoint) -> Route:
    """Whether `oneshot` can hold the model of `base`, or its shards have to be streamed."""
    return route_for(models.directory_profile(base), hardware.detect())


def route_for(profile: Profile, machine: Machine) -> Route:
    """`route` of a profile's model on a machine, before the model is there.

    What counts is the RAM that is free now, and whether the GPU, where one is used, could serve the
    model as it is: where it cannot, nothing needs the whole of it in memory.
    """
    weights = profile.bf16_bytes
    if not models.fits(weights, profile, machine) and serving_mode(machine).device == "cuda":
        return Route(True, streaming.memory(), f"{weights / 1e9:.3g} GB of weights are more than "
                     f"can be served on {models.most_gpus(profile, machine)} GPU(s) of "
                     f"{models.memory(machine) / 1e9:.3g} GB, so they are not loaded: the model's "
                     "shards are streamed on the CPU.")
    needed, available = int(weights * ONESHOT_MEMORY), hardware.available_ram()
    numbers = f"{needed / 1e9:.3g} GB for oneshot, {available / 1e9:.3g} GB of RAM free"
    if needed > available:
        return Route(True, streaming.memory(),
                     f"{numbers}: the model does not fit, so its shards are streamed.")
    return Route(False, needed,
                 f"{numbers}: the model fits, so it is loaded whole.")


def stream(base: Checkpoint, place: Path) -> Checkpoint:
    """Quantize `base` into `place` without loading the model; see `helpers.streaming`."""
    with quiet():
        return streaming.stream(base, place, TOKENIZER_FILES, origin(base, RECIPE))


def quantized(base: Checkpoint) -> "PreTrainedModel":
    """The model of `base`, loaded in bf16, its scales set by `oneshot`; saving makes the codes."""
    import torch
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM

    with quiet():
        model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.bfloat16)
        oneshot(model=model, recipe=recipe())
    return model


def save(model: "PreTrainedModel", base: Checkpoint, place: Path) -> Checkpoint:
    """Write a model that `oneshot` has quantized, with the tokenizer of `base`, to `place`.

    The directory appears whole, with its manifest and what it was made from, or not at all
    (`workspace.building`).
    """
    verification.require_finite(base)
    written = checkpoint.total_bytes(checkpoint.predict_fp8(base.tensors))
    with workspace.building(place, needs_bytes=written) as partial:
        with quiet():
            model.save_pretrained(partial, save_compressed=True)
        for file in partial.glob("*.safetensors"):  # safetensors lets nobody but the owner read
            file.chmod(0o644)  # them, and a container serves as another user
        base.copy_beside(TOKENIZER_FILES, partial)
        base.require_unchanged()
        used = recipe_in(checkpoint.read_config(partial))
        workspace.write_json(partial / identity.MADE_FROM, asdict(origin(base, used)))
    return checkpoint.just_written(place)


def forget() -> None:
    """Give back the memory of models that no name holds, RAM and the GPU's, after `oneshot`.

    LLM Compressor's session keeps the last model, and where there is a GPU it computes there.
    """
    from llmcompressor.core import reset_session

    reset_session()
    gpu_memory.free()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep LLM Compressor's warnings and bars off the page; errors still come through."""
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
