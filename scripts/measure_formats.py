"""Measure what number formats cost the bundled model and SmolLM2-135M, and keep it.

The first half of `make measure-formats`, 15 minutes on two cores; SmolLM2 is fetched. Everything is
computed in float32 on the CPU. Another CPU sums in another order, which moves a figure by far less
than its interval is wide. Each arm is kept in the workspace as soon as it is measured, so that a
run that was stopped goes on where it was; the unrounded logits lie there too (2 GB for SmolLM2).
"""

import json
import shutil
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from helpers import ablation, formats, hardware, hub, kv_cache, models, reach, workspace
from helpers.models import Profile

TEXTS, CALIBRATION = 100, 32
NEEDS_BYTES = 3_000_000_000
FOLDER = "measure-formats"  # in the workspace


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


def entry(profile: Profile) -> dict:
    """One model's entry of the file."""
    import torch

    place = workspace.root() / FOLDER / profile.name
    place.mkdir(parents=True, exist_ok=True)
    model, tokenizer = ablation.load(hub.obtain(profile))
    texts = formats.texts(tokenizer, TEXTS)
    calibration = formats.texts(tokenizer, CALIBRATION, "train")
    ways = kv_cache.ways(model, calibration)
    parts = {"formats": formats.format_arms(model),
             "activations": formats.activation_arms(model, calibration),
             "left alone": formats.left_alone_arms(model),
             "kv cache": kv_cache.arms(model, ways)}
    arms = {title: arm for part in parts.values() for title, arm in part.items()}
    true, rows = references(model, texts, place), {}
    for title, arm in arms.items():
        file = place / f"{title}.json"
        if not file.exists():
            workspace.write_json(file, formats.one_arm(model, texts, map(torch.load, true), arm))
            print(f"  {title}", flush=True)
        rows[title] = json.loads(file.read_text())
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
                f"scales from the first {CALIBRATION} of train.jsonl",
        "command": "make measure-formats", "date": datetime.now(UTC).date().isoformat(),
        "hardware": f"{machine.cpu_model}, {machine.cores} cores, no GPU",
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "gguf")},
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
