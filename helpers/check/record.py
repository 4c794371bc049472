"""Which tasks were tried, done and hinted at: one file of the workspace, and no word of an answer.
"""

import contextlib
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

from helpers import WorkbookError, workspace

FILE = "tasks.json"
FIELDS = {"done": bool, "tries": int, "hints": int}
UNTRIED = {"done": False, "tries": 0, "hints": 0}


def read(folder: Path | None = None) -> dict[str, dict]:
    """By task: "done", "tries" and "hints"; of the workspace, or of another folder.

    Nothing where there is no such file. Raises `WorkbookError` where it is damaged.
    """
    file = (folder or workspace.root()) / FILE
    if not file.exists():
        return {}
    found = workspace.read_json(file)
    for name, entry in found.items():
        if not isinstance(entry, dict) or any(
                type(entry.get(key)) is not kind for key, kind in FIELDS.items()):
            raise workspace.damaged_json(file, f"its entry for {name!r} is none of a task")
    return found


def tried(name: str, right: bool) -> None:
    """Count a try; a task that was once right stays done."""
    def change(entry: dict) -> None:
        entry["done"] = entry["done"] or right
        entry["tries"] += 1

    _change(name, change)


def hinted(name: str, most: int) -> int:
    """Count a hint, up to `most`, and return its number; `most + 1` where all had been given.

    Where the workspace cannot be written, the first hint is given again.
    """
    number = 1

    def change(entry: dict) -> None:
        nonlocal number
        number = entry["hints"] + 1
        entry["hints"] = min(number, most)

    _change(name, change)
    return number


def _change(name: str, change: Callable[[dict], None]) -> None:
    """Change a task's entry, under a lock; a file that cannot be kept is said, and stops nothing.
    """
    try:
        with _locked(workspace.root()) as folder:
            entries = _readable(folder)
            entry = {**UNTRIED, **entries.get(name, {})}
            change(entry)
            workspace.write_json(folder / FILE, entries | {name: entry})
    except (WorkbookError, OSError) as error:
        what = error.what if isinstance(error, WorkbookError) else str(error)
        print(f"(Your progress could not be kept: {what})")


def _readable(folder: Path) -> dict[str, dict]:
    """`read`; a damaged file is set aside, and a new one begun."""
    try:
        return read(folder)
    except WorkbookError:
        aside = folder / f"{FILE}.damaged"
        os.replace(folder / FILE, aside)
        print(f"({FILE} was damaged. It is now {aside.name}, and your progress begins anew.)")
        return {}


@contextlib.contextmanager
def _locked(folder: Path):
    """Two notebooks may be worked in at once. The lock is a file beside, which is never replaced.
    """
    with open(folder / f".{FILE}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder
