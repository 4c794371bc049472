"""Measure what a tensor core's short sums cost the bundled model, and keep it.

The second half of `make measure-formats`, about ten minutes on two cores.
"""

import json
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata

from helpers import ablation, accumulation, formats, hardware, hub, models, workspace

TEXTS, LONG_TEXTS = 50, 10
LONG = 20  # times K: 256 becomes 5,120 and 768 becomes 15,360; Phi-4's are 5,120 and 17,920


def main() -> None:
    model, tokenizer = ablation.load(hub.obtain(models.tiny()))
    texts, machine = formats.texts(tokenizer, TEXTS), hardware.detect()
    kept = {
        "text": f"first {TEXTS} problems of data/tiny_gsm8k/test.jsonl with their answers; the "
                f"first {LONG_TEXTS} where K is Phi-4's",
        "command": "make measure-formats", "date": datetime.now(UTC).date().isoformat(),
        "hardware": f"{machine.cpu_model}, {machine.cores} cores, no GPU: an H100 emulated",
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "mmaemu")},
        "its own K": asdict(formats.measure(model, texts, accumulation.arms(model))),
        "repeated": asdict(formats.measure(
            model, texts[:LONG_TEXTS], accumulation.arms(model, ("exact", "fast"), LONG)))}
    workspace.write_json(accumulation.MEASURED, json.loads(
        json.dumps(kept), parse_float=lambda text: float(f"{float(text):.4g}")))


if __name__ == "__main__":
    main()
