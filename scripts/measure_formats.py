"""Measure what number formats cost the bundled model and SmolLM2-135M, and keep it.

`make measure-formats`, 20 minutes on two cores; SmolLM2 is fetched. Everything is computed in
float32 on the CPU. Another CPU sums in another order, which moves a figure by far less than its
interval is wide.
"""

import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from multiprocessing import get_context

from helpers import ablation, formats, hardware, hub, kv_cache, models, reach, workspace
from helpers.models import Profile

TEXTS, CALIBRATION = 100, 32
PARTS = {
    "formats": lambda model, calibration: formats.format_arms(model),
    "activations": formats.activation_arms,
    "left alone": lambda model, calibration: formats.left_alone_arms(model),
    "kv cache": lambda model, calibration: kv_cache.arms(model, kv_cache.ways(model, calibration)),
}
SHIFTS = ("formats", "left alone"), ("activations", "kv cache")  # about equally long


def load(profile: Profile):
    """The model, its texts and those to set scales on, for one thread."""
    import torch

    torch.set_num_threads(1)
    model, tokenizer = ablation.load(hub.obtain(profile))
    return (model, formats.texts(tokenizer, TEXTS),
            formats.texts(tokenizer, CALIBRATION, "train"))


def losses(profile: Profile, parts: tuple[str, ...]) -> tuple[dict, dict]:
    """The figures of some parts, and the titles of each part's arms; in a process of its own."""
    model, texts, calibration = load(profile)
    arms = {part: PARTS[part](model, calibration) for part in parts}
    together = {title: arm for part in arms.values() for title, arm in part.items()}
    return (asdict(formats.measure(model, texts, together)),
            {part: list(titles) for part, titles in arms.items()})


def entry(profile: Profile, pool: ProcessPoolExecutor) -> dict:
    """One model's entry of the file."""
    started = [pool.submit(losses, profile, parts) for parts in SHIFTS]
    model, texts, calibration = load(profile)
    found = {"repo": profile.repo, "revision": profile.revision,
             "modules": reach.modules(model, texts[0]).T.to_dict(),
             "kv cache, dB": kv_cache.error(
                 model, texts[0], kv_cache.ways(model, calibration)).T.to_dict()}
    (first, titles), (second, others) = (future.result() for future in started)
    return found | {"parts": titles | others, "losses": {"tokens": first["tokens"]} | {
        column: first[column] | second[column] for column in ("kl", "top1", "sqnr")}}


def main() -> None:
    machine = hardware.detect()
    kept = {
        "text": f"first {TEXTS} problems of data/tiny_gsm8k/test.jsonl with their answers; static "
                f"scales from the first {CALIBRATION} of train.jsonl",
        "command": "make measure-formats", "date": datetime.now(UTC).date().isoformat(),
        "hardware": f"{machine.cpu_model}, {machine.cores} cores, no GPU",
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "gguf")},
        "models": {}}
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        for profile in (models.tiny(), models.SMOLLM2):
            print(f"{profile.name} ...", flush=True)
            # four digits are more than the intervals can tell apart
            kept["models"][profile.name] = json.loads(
                json.dumps(entry(profile, pool)),
                parse_float=lambda text: float(f"{float(text):.4g}"))
            workspace.write_json(formats.MEASURED, kept)


if __name__ == "__main__":
    main()
