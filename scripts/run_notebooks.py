"""Execute the notebooks in order: `run [05]` into build/, `refresh` back into notebooks/.

00 to 09, then the appendix a1; `run a1` executes that alone.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbformat import NotebookNode
from notebook_outputs import clean, code_cells

from helpers import hardware

REPO = Path(__file__).resolve().parent.parent
NOTEBOOKS = REPO / "notebooks"
BUILD = REPO / "build"
NAMED = "[0-9a][0-9]_*.ipynb"  # 00 to 09, then the appendix: in the order of their names
MEASURED = REPO / "data" / "measured" / "cpu-tiny-phi4.jsonl"
SECONDS = REPO / "data" / "measured" / "notebook-seconds.json"


class NotebookStopped(Exception):
    """Which notebook stopped, in which cell, with what error: one paragraph."""


def notebooks(only: str = "") -> list[Path]:
    """The notebooks in order, or the ones whose name begins with `only`."""
    found = sorted(NOTEBOOKS.glob(NAMED))
    chosen = [path for path in found if path.name.startswith(only)]
    if not chosen:
        names = ", ".join(path.name[:2] for path in found) or "none at all"
        raise NotebookStopped(f"No notebook's name begins with {only!r}. There are: {names}.")
    return chosen


def execute(source: Path, target: Path, label: str) -> NotebookNode:
    """Execute one notebook in a fresh kernel and write it, as far as it got, to `target`.

    Its working directory is the notebooks' own. Raises `NotebookStopped` when a cell fails.
    """
    nb = read(source)
    cells, tty, started = code_cells(nb), sys.stdout.isatty(), time.monotonic()
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None

    begun = 0

    def begin(cell: NotebookNode, cell_index: int) -> None:
        nonlocal begun
        begun = cells.index(cell) if cell in cells else begun
        if tty and cell in cells:
            at = f"cell {cells.index(cell) + 1} of {len(cells)}"
            print(f"\r{label}  {at}, {time.monotonic() - started:.0f} s\033[K", end="", flush=True)

    print(label, end="" if tty else "\n", flush=True)
    client = NotebookClient(nb, timeout=None, kernel_name="python3", record_timing=False,
                            resources={"metadata": {"path": str(source.parent)}},
                            extra_arguments=["--log-level=CRITICAL"],  # the kernel's own log
                            on_cell_start=begin)
    state = "failed"
    try:
        client.execute()
        state = "done"
    except (CellExecutionError, DeadKernelError) as error:
        raise NotebookStopped(paragraph(source.name, nb, begun, error, target)) from None
    except AssertionError:  # how nbclient ends after SIGINT or SIGTERM, its kernel shut down
        state = "interrupted"
        raise KeyboardInterrupt from None
    finally:
        write(target, nbformat.writes(nb))
        line = f"{label}  {state} in {time.monotonic() - started:.0f} s"
        print(f"\r{line}\033[K" if tty else line, flush=True)
    return nb


def write(target: Path, text: str) -> None:
    """Write a file, all of it or none. Raises `NotebookStopped` where the disk does not take it."""
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text if text.endswith("\n") else text + "\n", encoding="utf-8")
        partial.replace(target)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise NotebookStopped(
            f"{shown(target)} could not be written: {error.strerror}. What was measured so far is "
            "in the ledger. Free some space, or make the folder one that you may write to, and run "
            "the same command again.") from None


def read(path: Path) -> NotebookNode:
    """A notebook. Raises `NotebookStopped` for a file that is none."""
    try:
        return nbformat.read(path, as_version=4)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise NotebookStopped(
            f"{shown(path)} cannot be read as a notebook ({type(error).__name__}: "
            f"{str(error)[:100]}). Restore it (git checkout -- {shown(path)}), or delete it where "
            "it is in build/, and run the same command again.") from None


def paragraph(name: str, nb: NotebookNode, begun: int, error: Exception, target: Path) -> str:
    """What happened in which cell of which notebook, without a traceback."""
    cells = code_cells(nb)
    if isinstance(error, CellExecutionError):
        what = f"{error.ename}: {error.evalue}"
    else:
        what = ("The process that runs its cells died. Most often the system has ended it for "
                "want of memory: close other programs, or choose a smaller model with "
                "PHI4_FP8_PROFILE.")
    first = cells[begun].source.strip().splitlines()[0]
    return (f"{name} stopped at code cell {begun + 1} of {len(cells)}, which begins `{first}`.\n"
            f"{what}\nThe notebook as far as it got: {shown(target)}")


def shown(path: Path) -> str:
    return str(path.relative_to(REPO)) if path.is_relative_to(REPO) else str(path)


def run(only: str = "") -> int:
    """Execute into build/notebooks/, print the closing tables, make the book and name it."""
    chosen, started = notebooks(only), time.monotonic()
    for i, path in enumerate(chosen, start=1):
        execute(path, BUILD / "notebooks" / path.name, f"[{i}/{len(chosen)}] {path.name}")
    print(f"\n{len(chosen)} notebook(s) in {time.monotonic() - started:.0f} s. Executed: "
          "build/notebooks/\n", flush=True)
    closing = ([sys.executable, "-m", "helpers.report"], [sys.executable, REPO / "scripts/book.py"])
    return max(subprocess.run(command, cwd=REPO).returncode for command in closing)


def refresh() -> int:
    """Execute all on the bundled model in a workspace of their own, clean them, write them back.

    Their ledger becomes `data/measured/cpu-tiny-phi4.jsonl`, how long each took stands beside it,
    and the README's pictures and tables and the guide's follow them.
    """
    workspace = BUILD / "refresh-workspace"
    shutil.rmtree(workspace, ignore_errors=True)
    os.environ.update(PHI4_FP8_WORKSPACE=str(workspace), PHI4_FP8_PROFILE="tiny-phi4")
    home = os.path.expanduser("~")  # "~" itself where there is no HOME
    places = {workspace: "workspace", REPO: ""} | ({Path(home): "~"} if home != "~" else {})
    chosen, fresh, seconds = notebooks(), {}, {}
    for i, path in enumerate(chosen, start=1):
        target, started = BUILD / "refreshed" / path.name, time.monotonic()
        fresh[path] = execute(path, target, f"[{i}/{len(chosen)}] {path.name}")
        seconds[path.stem] = round(time.monotonic() - started)
    for path, nb in fresh.items():  # only when all have run
        clean(nb, places)
        write(path, nbformat.writes(nb))
    MEASURED.parent.mkdir(exist_ok=True)
    shutil.copy(workspace / "ledger.jsonl", MEASURED)
    machine = hardware.detect()
    write(SECONDS, json.dumps({
        "machine": f"{machine.cpu_model}, {machine.cores} cores",
        "date": time.strftime("%Y-%m-%d", time.gmtime()), "seconds": seconds}, indent=1))
    follow = ([sys.executable, "-m", "helpers.readme"],
              [sys.executable, REPO / "scripts" / "guide.py"])
    return max(subprocess.run(command, cwd=REPO).returncode for command in follow)


def main(arguments: list[str]) -> int:
    if len(arguments) > 2:
        print(f"ONLY takes one notebook's number, and not {' '.join(arguments[1:])!r}: "
              "make run ONLY=05, for instance.", file=sys.stderr)
        return 1
    try:
        return {"run": run, "refresh": refresh}[arguments[0]](*arguments[1:])
    except NotebookStopped as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"\nThe run stopped: {error}.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted. What was made so far is kept; the same command goes on from it.",
              file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
