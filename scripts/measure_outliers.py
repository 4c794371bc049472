"""Measure how far apart channels and tokens of the bundled model and of SmolLM2 lie, and keep it.

Run as `PYTHONPATH=. .venv/bin/python scripts/measure_outliers.py`; SmolLM2 is fetched.
"""

from importlib import metadata

from helpers import ablation, hub, models, outliers, quantize, workspace
from helpers.models import Profile


def measure(profile: Profile) -> dict:
    """One model's entry of the file: where it comes from, its FP8 checkpoint, its figures."""
    base = hub.obtain(profile)
    fp8 = quantize.fp8_checkpoint(profile, base)
    model, tokenizer = ablation.load(base)
    found = outliers.table(model, fp8, outliers.text(tokenizer))
    return {"repo": profile.repo, "revision": profile.revision,
            "checkpoint": fp8.fingerprint,
            "modules": {name: {column: float(f"{value:.4g}") for column, value in row.items()}
                        for name, row in found.T.to_dict().items()}}


def main() -> None:
    profiles = models.tiny(), models.SMOLLM2
    workspace.write_json(outliers.MEASURED, {
        "text": "first problem of data/tiny_gsm8k/test.jsonl, with its answer",
        "versions": {name: metadata.version(name) for name in (
            "torch", "transformers", "llmcompressor", "compressed-tensors", "gguf")},
        "models": {profile.name: measure(profile) for profile in profiles}})


if __name__ == "__main__":
    main()
