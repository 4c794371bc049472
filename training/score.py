"""Score data/tiny_phi4 on every test problem through vLLM and lm-eval: `python -m training.score`.

Writes data/tiny_phi4/evaluation.json and the model card.
"""

import json
import platform
from datetime import UTC, datetime
from statistics import mean

from helpers import evaluation, hardware, models, serving, workspace
from training.train_tiny_phi4 import TARGET
from training.write_card import write_card


def main() -> None:
    profile = models.tiny()
    machine = hardware.detect()
    flags = serving.default_flags(profile, hardware.serving_mode(machine))
    with serving.VllmServer(profile.checkpoint, flags) as server:
        scored = evaluation.run(server, profile, "bf16", limit=None, concurrency=16)
    filters = {}
    for name in ("strict-match", "flexible-extract"):
        right = evaluation.correct(scored, name)
        filters[name] = {"all": mean(right), "first_100": mean(right[:100])}
    record = {
        "task": scored.task,
        "rows": scored.n,
        "exact_match": filters,
        "config": scored.config,
        "cpu": machine.cpu_model,
        "python": platform.python_version(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "table": scored.table,
    }
    (TARGET / "evaluation.json").write_text(json.dumps(record, indent=1) + "\n")
    write_card(TARGET)
    workspace.write_manifest(TARGET)
    print(scored.table)


if __name__ == "__main__":
    main()
