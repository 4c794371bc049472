"""The tasks: `check.NAME(answer)`, `check.hint("NAME")`; what is done is kept in the workspace.

Each check works the right answer out of an independent source (torch's cast, compressed-tensors,
statsmodels, a safetensors header, the checkpoint that LLM Compressor wrote, data/gpus.json), knows
the usual mistakes and the sentence that undoes each, and never stops the notebook.
"""

import copy
import difflib
from typing import TYPE_CHECKING

from helpers.check import (
    record,
    tasks_00,
    tasks_01,
    tasks_02,
    tasks_03,
    tasks_04,
    tasks_05,
    tasks_06,
    tasks_07,
    tasks_08,
    tasks_09,
)
from helpers.check.task import NOT_TRIED, Task, say

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["NOT_TRIED", "TASKS", "Task", "hint", "material", "progress"]

_MODULES = (tasks_00, tasks_01, tasks_02, tasks_03, tasks_04, tasks_05, tasks_06, tasks_07,
            tasks_08, tasks_09)
TASKS = {task.name: task for module in _MODULES for task in module.TASKS}  # in the course's order


def __getattr__(name: str) -> Task:
    if name in TASKS:
        return TASKS[name]
    raise AttributeError(f"There is no task {name!r}.{_nearest(name)}")


def __dir__() -> list[str]:
    return sorted([*__all__, *TASKS])


def hint(name: str) -> None:
    """Print the next of a task's three hints, and count it; all of them, once all were given."""
    task = TASKS.get(name) if isinstance(name, str) else name if isinstance(name, Task) else None
    if task is None:
        print(f"There is no task {name!r}.{_nearest(name)}" if isinstance(name, str)
              else 'Name the task: check.hint("…").')
        return
    number = record.hinted(task.name, len(task.hints))
    for at, text in enumerate(task.hints, start=1):
        if at == number or number > len(task.hints):
            say(f"Hint {at} of {len(task.hints)}: {text}")


def material(name: str):
    """What a task is about, such as a broken config: a copy, to change at will."""
    return copy.deepcopy(TASKS[name].material())


def progress() -> "pd.DataFrame":
    """By notebook: how many tasks are done, which, which are open, and how many hints were taken.

    From the workspace, and kept nowhere else. Raises `WorkbookError` where the file is damaged.
    """
    import pandas as pd

    found = record.read()
    rows = []
    for notebook in dict.fromkeys(task.notebook for task in TASKS.values()):
        names = [task.name for task in TASKS.values() if task.notebook == notebook]
        entries = {name: found.get(name, record.UNTRIED) for name in names}
        rows.append({
            "notebook": notebook,
            "done": f"{sum(entry['done'] for entry in entries.values())} of {len(names)}",
            "tasks done": ", ".join(name for name in names if entries[name]["done"]),
            "still open": ", ".join(name for name in names if not entries[name]["done"]),
            "tries": sum(entry["tries"] for entry in entries.values()),
            "hints": sum(entry["hints"] for entry in entries.values())})
    return pd.DataFrame(rows).set_index("notebook")


def _nearest(name: str) -> str:
    near = difflib.get_close_matches(name, TASKS, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
