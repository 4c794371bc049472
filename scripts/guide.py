"""The minutes of each notebook, for the instructor's guide: `python scripts/guide.py` writes them.

What the machine takes was measured by `make notebooks` and is kept in data/measured; reading and
tasks are estimates, computed here from words and from what each task says of itself.
"""

import json
import re
import sys
from collections import Counter
from pathlib import Path

from run_notebooks import REPO, SECONDS, NotebookStopped, notebooks, read, write

from helpers import check

GUIDE = REPO / "workshop" / "README.md"
MARKS = ("<!-- minutes -->\n", "<!-- /minutes -->")
# Non-fiction is read at 238 words a minute (Brysbaert, 2019, doi:10.1016/j.jml.2019.104047). Prose
# with terms that are new, and code, take longer: 150 is a guess, on the slow side.
WORDS_A_MINUTE = 150
FOLDED = re.compile(r"<details>.*?</details>", re.S)  # opened by few in the room


def words(path: Path) -> int:
    """Words of a notebook's prose and code, what is folded left out."""
    return sum(len(FOLDED.sub("", cell.source).split()) for cell in read(path).cells)


def reading_minutes(path: Path) -> int:
    return -(-words(path) // WORDS_A_MINUTE)


def tasks(number: str) -> tuple[int, str]:
    """Minutes of a notebook's tasks together, and how many there are by level, in words."""
    of_it = [task for task in check.TASKS.values() if task.notebook == number]
    levels = Counter(task.level for task in of_it)
    told = ", ".join(f"{levels[level]} {level}" for level in ("easy", "medium", "hard")
                     if levels[level])
    return sum(task.minutes for task in of_it), told or "none"


def table() -> str:
    """The guide's table as Markdown, with the machine that was measured above it."""
    kept = json.loads(SECONDS.read_text())
    lines = [f"Machine: {kept['machine']}, the bundled model ({kept['date']}). Reading and tasks: "
             f"estimates, at {WORDS_A_MINUTE} words a minute and by each task's own minutes.", "",
             "| notebook | machine, min | reading, min | tasks, min | together, min |",
             "|---|---:|---:|---|---:|"]
    sums = [0.0, 0, 0]
    for path in notebooks():
        title = read(path).cells[0].source.splitlines()[0].removeprefix("# ")
        machine, reading = kept["seconds"][path.stem] / 60, reading_minutes(path)
        minutes, told = tasks(path.stem[:2])
        sums = [a + b for a, b in zip(sums, (machine, reading, minutes), strict=True)]
        lines.append(f"| {title} | {machine:.1f} | {reading} | {minutes} ({told}) "
                     f"| {round(machine + reading + minutes)} |")
    lines.append(f"| **all** | **{sums[0]:.1f}** | **{sums[1]}** | **{sums[2]}** "
                 f"| **{round(sum(sums))}** |")
    return "\n".join(lines) + "\n"


def rewritten(guide: str) -> str:
    """The guide's text with the table of now between its marks."""
    head, rest = guide.split(MARKS[0])
    _, tail = rest.split(MARKS[1])
    return f"{head}{MARKS[0]}{table()}{MARKS[1]}{tail}"


if __name__ == "__main__":
    try:
        write(GUIDE, rewritten(GUIDE.read_text()))
    except NotebookStopped as error:
        sys.exit(f"\n{error}")
