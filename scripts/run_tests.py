"""Every notebook's student edition and every test under pytest, in a workspace of their own.

With the word `smollm2`: notebooks 01 to 05 on SmolLM2-135M-Instruct, and the tests of its making.
"""

import os
import shutil
import sys
import threading
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from editions import make_student
from nbmake.nb_result import NotebookError, NotebookResult
from nbmake.pytest_items import NotebookFailedException, NotebookItem
from notebook_outputs import code_cells
from run_notebooks import BUILD, REPO, notebooks

from helpers import hardware, shared
from helpers.serve_side import cpu_kernels

LIMIT = 600  # seconds for each notebook; on two cores the longest takes about a quarter of it


class NotebookRuns:
    """A pytest plugin: a time limit for each notebook, proof that its code ran, and a table."""

    def __init__(self, expected: list[str], limit: float = LIMIT):
        self.expected, self.limit = expected, limit
        self.seconds: dict[str, float] = {}
        self.passed: set[str] = set()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        if not isinstance(item, NotebookItem):
            return (yield)
        started = time.monotonic()
        timer = threading.Timer(self.limit, end_kernels)
        timer.start()
        try:
            result = yield
        except NotebookFailedException:
            raise
        except Exception as error:  # nbclient's, when the kernel has died
            if time.monotonic() - started >= self.limit:
                fail(item, f"{item.name} took more than {self.limit:.0f} s and was stopped.")
            fail(item, f"{item.name}: {error}")
        finally:
            timer.cancel()
            self.seconds[item.name] = time.monotonic() - started
        cells = code_cells(nbformat.read(item.path, as_version=4))
        if not cells or not all(cell.execution_count for cell in cells):
            fail(item, f"{item.name} ended without having run all its code.")
        self.passed.add(item.name)
        return result

    def pytest_sessionfinish(self, session):
        if set(self.expected) - self.passed:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def table(self) -> str:
        lines = []
        for name in self.expected:
            took = f"{self.seconds[name]:6.1f} s" if name in self.seconds else "did not run"
            state = "passed" if name in self.passed else "FAILED"
            lines.append(f"{name:<36}{took}  {state}")
        return "\n".join(lines)


def fail(item: NotebookItem, why: str) -> None:
    nb = nbformat.read(item.path, as_version=4)
    raise NotebookFailedException(NotebookResult(nb=nb, error=NotebookError(why, why, 0)))


def end_kernels() -> None:
    """Kill the notebook's kernel; nbclient then ends the run. Nothing else starts kernels then."""
    for child in psutil.Process().children(recursive=True):
        if "ipykernel_launcher" in " ".join(child.cmdline()):
            child.kill()


def run(sources: list[Path], tests: Path, workspace: Path) -> int:
    """The notebooks in copies of their own, then the tests; pytest's first exit code but 0."""
    os.environ["PHI4_FP8_WORKSPACE"] = str(workspace)
    copies = workspace.with_name(f"{workspace.name}-notebooks")
    make_student(sources, copies)  # without counts, which then prove that a cell was run
    runs = NotebookRuns([path.name for path in sources])
    # The notebooks first and alone: they measure, and tests read what they leave.
    noted = pytest.main([str(copies), "--nbmake", "--overwrite", f"--nbmake-timeout={LIMIT}"],
                        plugins=[runs])
    tested = pytest.main([str(tests), "-m", "not slow", "--durations=10", *at_once(),
                          "-W", "ignore::pytest.PytestAssertRewriteWarning"])  # nbmake's, loaded
    print(runs.table())
    return int(noted or tested)


def at_once() -> list[str]:
    """pytest's flags for several files of tests at a time; none where they would share a GPU.

    Most of their time is vLLM's start, which leaves a core idle even of two. Three at a time hold
    up to seven small servers, 2 GB each; where memory is shorter, two.
    """
    machine = hardware.detect()
    files = 3 if machine.ram_bytes >= 20 * hardware.GB else 2
    # In the order of tests/conftest.py: by itself xdist begins with the files of most tests, and
    # ends with one worker alone in a file of few, long ones.
    return [] if machine.gpus else ["-n", str(files), "--dist", "loadfile",
                                    "--no-loadscope-reorder"]


def main(words: list[str]) -> int:
    # A participant's servers and a reader's choice of numerics are no part of what is tested.
    for variable in (shared.SERVERS, shared.KEY_FILE, cpu_kernels.VARIABLE):
        os.environ.pop(variable, None)
    if words == ["smollm2"]:
        os.environ["PHI4_FP8_PROFILE"] = "smollm2"
        workspace = BUILD / "smollm2"
        for made in ("checkpoints", "ledger.jsonl"):  # the model stays: it is fetched once
            shutil.rmtree(workspace / made, ignore_errors=True)
        return run(notebooks()[1:6], REPO / "tests" / "smollm2", workspace)
    os.environ.setdefault("PHI4_FP8_PROFILE", "tiny-phi4")
    shutil.rmtree(BUILD / "test", ignore_errors=True)
    return run(notebooks(), REPO / "tests", BUILD / "test")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
