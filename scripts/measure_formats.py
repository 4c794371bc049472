"""Measure what number formats cost the bundled model and SmolLM2-135M, and keep it.

The first half of `make measure-formats`, 35 minutes on two cores; SmolLM2 is fetched. Everything is
computed in float32 on the CPU. Another CPU sums in another order, which moves a figure by far less
than its interval is wide. Each arm is kept in the workspace as soon as it is measured, so that a
run that was stopped goes on where it was; the unrounded logits lie there too (2 GB for SmolLM2).
"""

import contextlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from helpers import (
    ablation,
    formats,
    hardware,
    hub,
    kv_cache,
    models,
    reach,
    scheme_trials,
    schemes,
    workspace,
)
from helpers.checkpoint import Checkpoint
from helpers.models import Profile

if TYPE_CHECKING:
    from llmcompressor.modifiers import Modifier
    from transformers import PreTrainedModel

TEXTS, CALIBRATION = 100, 32
NEEDS_BYTES = 3_000_000_000
FOLDER = "measure-formats"  # in the workspace
BLOCKS = "FP8 128x128 blocks"


def references(model, texts: list, place: Path) -> list[Path]:
    """Files of the unrounded model's logits, text by text; computed where they are not there.

    All of them before any arm: within an arm the model computes rounded.
    """
    import torch

    files = [place / f"{number}.pt" for number in range(len(texts))]
    for file, ids in zip(files, texts, strict=True):
        if not file.exists():
            torch.save(formats.seen(model, ids), file.with_suffix(".partial"))
            file.with_suffix(".partial").replace(file)
    return files


def once(file: Path, measure: Callable[[], list]) -> list:
    """What is measured, kept in a file, or read from it."""
    if not file.exists():
        workspace.write_json(file, measure())
        print(f"  {file.stem}", flush=True)
    return json.loads(file.read_text())


def of_scheme(base: Checkpoint, title: str, recipe: "Modifier") -> "PreTrainedModel":
    """The model that a scheme's checkpoint holds; the checkpoint is thrown away."""
    text = scheme_trials.calibration(base) if title in schemes.CALIBRATED else None
    with scheme_trials.scratch("measure-formats") as scratch:
        return scheme_trials.load(scheme_trials.make(base, recipe, scratch / "made", text))


def entry(profile: Profile) -> dict:
    """One model's entry of the file."""
    import torch

    place = workspace.root() / FOLDER / profile.name
    place.mkdir(parents=True, exist_ok=True)
    base = hub.obtain(profile)
    model, tokenizer = ablation.load(base)
    texts = formats.texts(tokenizer, TEXTS)
    calibration = formats.texts(tokenizer, CALIBRATION, "train")
    ways = kv_cache.ways(model, calibration)
    parts = {"formats": formats.format_arms(model),
             "activations": formats.activation_arms(model, calibration),
             "left alone": formats.left_alone_arms(model),
             "kv cache": kv_cache.arms(model, ways)}
    arms = {title: arm for part in parts.values() for title, arm in part.items()}
    true = references(model, texts, place)
    rows = {title: once(place / f"{title}.json", lambda arm=arm: formats.one_arm(
        model, texts, map(torch.load, true), arm)) for title, arm in arms.items()}
    parts["schemes"] = recipes = scheme_trials.recipes(base.config)
    for title, recipe in recipes.items():
        if title == BLOCKS and base.config["hidden_size"] % ablation.GROUP:
            rows[title] = rows["E4M3 128x128 blocks"]  # the same, where compressed-tensors refuses
            continue                                   # to round a last group that is not whole
        rows[title] = once(place / f"{title}.json", lambda title=title, recipe=recipe: (
            formats.one_arm(of_scheme(base, title, recipe), texts, map(torch.load, true),
                            contextlib.nullcontext)))
    return {"repo": profile.repo, "revision": profile.revision,
            "parts": {part: list(titles) for part, titles in parts.items()},
            "losses": asdict(formats.losses([ids.numel() for ids in texts], rows)),
            "modules": reach.modules(model, texts[0]).T.to_dict(),
            "kv cache, dB": kv_cache.error(model, texts[0], ways).T.to_dict()}


def main() -> None:
    machine = hardware.detect()
    workspace.require_disk(workspace.root(), NEEDS_BYTES, "the logits of 100 texts")
    kept = {
        "text": f"first {TEXTS} problems of data/tiny_gsm8k/test.jsonl with their answers; static "
                f"scales from the first {CALIBRATION} of train.jsonl; GPTQ and NVFP4 calibrated on "
                f"its first {scheme_trials.CALIBRATION}; W4A16 with groups of 128, or of 64 where "
                "128 does not divide the model's width",
        "command": "make measure-formats", "date": datetime.now(UTC).date().isoformat(),
        "hardware": f"{machine.cpu_model}, {machine.cores} cores, no GPU",
        "versions": {name: metadata.version(name) for name in (
            "torch", "transformers", "llmcompressor", "compressed-tensors", "gguf")},
        "models": {}}
    for profile in (models.tiny(), models.SMOLLM2):
        print(f"{profile.name} ...", flush=True)
        # four digits are more than the intervals can tell apart
        kept["models"][profile.name] = json.loads(
            json.dumps(entry(profile)), parse_float=lambda text: float(f"{float(text):.4g}"))
    workspace.write_json(formats.MEASURED, kept)
    shutil.rmtree(workspace.root() / FOLDER)


if __name__ == "__main__":
    main()
