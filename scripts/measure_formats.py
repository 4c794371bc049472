"""Measure what number formats cost the bundled model and SmolLM2-135M, and keep it.

The first half of `make measure-formats`, 15 minutes on two cores; SmolLM2 is fetched. Everything is
computed in float32 on the CPU. Another CPU sums in another order, which moves a figure by far less
than its interval is wide. Each arm is kept in the workspace as soon as it is measured, so that a
run that was stopped goes on where it was; the unrounded logits lie there too (2 GB for SmolLM2).
"""

import functools
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path

from helpers import ablation, formats, hardware, hub, kv_cache, models, reach, workspace

TEXTS, CALIBRATION = 100, 32
NEEDS_BYTES = 3_000_000_000
PROFILES = {profile.name: profile for profile in (models.tiny(), models.SMOLLM2)}


def folder(name: str) -> Path:
    return workspace.root() / "measure-formats" / name


@functools.cache
def load(name: str):
    """The model, its texts and those to set scales on; one thread computes with it."""
    import torch

    torch.set_num_threads(1)
    model, tokenizer = ablation.load(hub.obtain(PROFILES[name]))
    return model, formats.texts(tokenizer, TEXTS), formats.texts(tokenizer, CALIBRATION, "train")


@functools.cache
def parts(name: str) -> dict:
    """The arms of each part of the file."""
    model, _, calibration = load(name)
    return {"formats": formats.format_arms(model),
            "activations": formats.activation_arms(model, calibration),
            "left alone": formats.left_alone_arms(model),
            "kv cache": kv_cache.arms(model, kv_cache.ways(model, calibration))}


def reference(name: str) -> Iterator:
    """The unrounded model's logits, text by text, from disk; computed where they are not there."""
    import torch

    model, texts, _ = load(name)
    for number, ids in enumerate(texts):
        file = folder(name) / f"{number}.pt"
        if not file.exists():
            with file.with_suffix(".partial").open("wb") as partial:
                torch.save(formats.seen(model, ids), partial)
            file.with_suffix(".partial").replace(file)
        yield torch.load(file)


def measured(name: str, part: str, title: str) -> list:
    """One arm's figures of every text, from its file where an earlier run has left them."""
    file = folder(name) / f"{title.replace('/', '-')}.json"
    if not file.exists():
        model, texts, _ = load(name)
        workspace.write_json(file, formats.one_arm(
            model, texts, reference(name), parts(name)[part][title]))
        print(f"  {title}", flush=True)
    return json.loads(file.read_text())


def entry(name: str) -> dict:
    """One model's entry of the file."""
    folder(name).mkdir(parents=True, exist_ok=True)
    for _ in reference(name):  # before the two processes that read it
        pass
    model, texts, calibration = load(name)
    titles = {part: list(arms) for part, arms in parts(name).items()}
    owner = {title: part for part, names in titles.items() for title in names}
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        tasks = {title: pool.submit(measured, name, part, title) for title, part in owner.items()}
        rows = {title: task.result() for title, task in tasks.items()}
    profile = PROFILES[name]
    return {"repo": profile.repo, "revision": profile.revision, "parts": titles,
            "losses": asdict(formats.losses([ids.numel() for ids in texts], rows)),
            "modules": reach.modules(model, texts[0]).T.to_dict(),
            "kv cache, dB": kv_cache.error(
                model, texts[0], kv_cache.ways(model, calibration)).T.to_dict()}


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
    for name in PROFILES:
        print(f"{name} ...", flush=True)
        # four digits are more than the intervals can tell apart
        kept["models"][name] = json.loads(
            json.dumps(entry(name)), parse_float=lambda text: float(f"{float(text):.4g}"))
    workspace.write_json(formats.MEASURED, kept)
    shutil.rmtree(folder(""))


if __name__ == "__main__":
    main()
