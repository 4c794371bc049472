"""What a row of the ledger is: its form, its older form, and how its texts are shown.

A row may come from somebody else. So each is held to its form when it is read, its texts lose
their control characters, and what shows them shows data: `as_markdown`, and pandas' own escaping.
"""

import math
import re
from collections.abc import Sequence

from helpers import arm_names

SCHEMA = 2  # 1 had "path" for "mode"; such rows are read as well
EXPERIMENTS = ("quantize", "scales", "serve", "gsm8k", "noise-floor", "throughput",
               "slice", "bench-cpu")
ARMS = ("bf16", "fp8", "int8", "int4", "q8_0")
FIELDS = {"schema": int, "id": str, "time": str, "experiment": str, "arm": str, "model": dict,
          "mode": str, "kernel": str, "checkpoint": str, "work": dict, "metrics": dict,
          "hardware": dict, "versions": dict, "commit": str}
# Inside a field, where it is there.
PARTS = {"model": {"profile": str, "repo": str, "revision": str},
         "work": {"task": str, "limit": int, "num_fewshot": int, "input_tokens": int,
                  "output_tokens": int, "concurrency": int, "rounds": int, "engine": str,
                  "numerics": str, "layers": int, "shared": str, "dtype": str},
         "hardware": {"gpus": list, "cpu": str, "cores": int},
         "versions": {"vllm": str, "llmcompressor": str}}
# Words without markup: "_" within a word only, no address, no mention, no dash that opens a rule.
HARMLESS = re.compile(r"(?!.*(://|www\.|@\S|--))[A-Za-z0-9 .,:;()/+@%=-]+"
                      r"(_[A-Za-z0-9][A-Za-z0-9 .,:;()/+@%=-]*)*")
LARGEST = 10**18  # of a count; a larger one overflows where it is computed with
SHARES = ("strict-match", "flexible-extract")  # metrics between 0 and 1


def validate(row: object) -> str:
    """What is wrong with a row, in words; "" when it is of the ledger's form."""
    if not isinstance(row, dict):
        return "not an object"
    for field, kind in FIELDS.items():
        if not _is(row.get(field), kind):
            return f"{field} is not {kind.__name__}"
    if row["schema"] != SCHEMA:
        return f"schema {row['schema']}, this workbook reads 1 to {SCHEMA}"
    if row["experiment"] not in EXPERIMENTS or row["arm"] not in ARMS:
        return f"unknown experiment or arm: {row['experiment']}, {row['arm']}"
    if not PARTS["model"].keys() <= row["model"].keys():
        return "model lacks profile, repo or revision"
    for field, parts in PARTS.items():
        for part, kind in parts.items():
            if part in row[field] and not _is(row[field][part], kind):
                return f"{field}'s {part} is not {kind.__name__}"
    for field in ("work", "metrics"):
        for name, value in row[field].items():
            if isinstance(value, int) and abs(value) > LARGEST:
                return f"{field}'s {name} is a number that nothing has"
    for name, value in row["metrics"].items():
        if not (_is(value, int) or isinstance(value, float)):
            return f"metrics' {name} is not a number"
        if name in SHARES and not 0 <= value <= 1:
            return f"metrics' {name} is not between 0 and 1"
    if row["work"].get("limit", 1) < 1:
        return "work's limit is less than 1"
    return ""


def _is(value: object, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def holds(row: dict, work: Sequence[str], metrics: Sequence[str]) -> bool:
    """Whether a row has these fields of its work, and these figures, all of them finite."""
    return all(name in row["work"] for name in work) and all(
        math.isfinite(row["metrics"].get(name, math.nan)) for name in metrics)


def converted(row: object) -> object:
    """A row of schema 1 as schema 2 has it; anything else as it is."""
    if not isinstance(row, dict) or row.get("schema") != 1:
        return row
    return {{"path": "mode"}.get(field, field): SCHEMA if field == "schema" else value
            for field, value in row.items()}


def plain(value: object) -> object:
    """The same with every control character a space: they drive terminals and break tables."""
    if isinstance(value, str):
        return "".join(sign if sign.isprintable() else " " for sign in value)
    if isinstance(value, list):
        return [plain(each) for each in value]
    if isinstance(value, dict):
        return {plain(key): plain(each) for key, each in value.items()}
    return value


def device(row: dict) -> str:
    """What a row was measured on: its GPUs, or its CPU."""
    machine = row["hardware"]
    return ", ".join(map(str, machine.get("gpus", []))) or (
        f"{machine.get('cpu', 'unknown')}, {machine.get('cores', 'unknown')} cores")


def dtype(served: str) -> dict[str, str]:
    """What a row's work says of the 16-bit type that vLLM served in: nothing where it is bf16."""
    return {} if served == "bfloat16" else {"dtype": served}


def arm_title(row: dict) -> str:
    """A row's arm; "fp16" where the model that is not quantized was served in that."""
    arm = row["arm"]
    return arm_names.sixteen_bits(row["work"].get("dtype", "")) if arm == "bf16" else arm


def as_markdown(text: str) -> str:
    """A row's text for a Markdown page, also inside a table: it is shown and never acts.

    Plain words stay as they are; what could be markup, a link, mathematics or an address becomes
    code, in which nothing of these is active.
    """
    if not text or re.fullmatch(HARMLESS, text):
        return text
    shown = "".join(sign if sign.isprintable() else " " for sign in text)
    return "`" + shown.replace("`", "'").replace("|", "\N{BROKEN BAR}") + "`"
