"""The acceptance of a machine with a GPU, `make accept-gpu`; nothing is downloaded.

Seven steps (`accept_steps`), in the order in which things would fail. Each says what it proves, and
then [OK] and what it found, [--] where it does not apply, or [FAIL] and the sentence that explains.
What is printed stays in report.txt, in a folder of its own under accept-gpu/ of the workspace; what
was measured beside it in ledger.jsonl, apart from the reader's own results.

Exit status: 0 when no step failed, 1 when one did, 2 where no GPU can serve FP8, 130 interrupted.
"""

import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from accept_steps import STEPS, Failed, Here, NotHere, Step
from run_notebooks import NotebookStopped

from helpers import WorkbookError, hardware, ledger, shared, workspace
from helpers.hardware import GB

NO_GPU = 2


def accept(here: Here, steps: Sequence[Step], say: Callable[[str], None]) -> int:
    """Run the steps in order; 0 when none failed, else 1. A failed `first` one ends it early."""
    failed = []
    for number, step in enumerate(steps, 1):
        say(f"[{number}/{len(steps)}] {step.name}: {step.proves}")
        began = time.monotonic()
        try:
            mark, found = "[OK]", step.run(here)
        except NotHere as why:
            mark, found = "[--]", str(why)
        except (Failed, WorkbookError, NotebookStopped) as why:
            mark, found = "[FAIL]", " ".join(str(why).split())
        except Exception as error:  # ours: the report is worth more than the rest of the run
            trace = traceback.extract_tb(error.__traceback__)[-1]
            mark, found = "[FAIL]", (f"{type(error).__name__}: {error} ({Path(trace.filename).name}"
                                     f", line {trace.lineno})")
        say(f"{mark:6} {step.name}, {time.monotonic() - began:.0f} s: {found}")
        if mark == "[FAIL]":
            failed.append(step.name)
            if step.first:
                say("What follows needs this first, and was not run.")
                break
    say(f"Not accepted: {', '.join(failed)}." if failed else "Accepted: no step failed.")
    return int(bool(failed))


def no_gpu(machine: hardware.Machine) -> str:
    """Why this machine has nothing to accept, in a sentence; "" where it has a GPU for FP8."""
    mode = hardware.serving_mode(machine)
    if mode.device == "cuda":
        return ""
    why = mode.why if machine.gpus else (machine.note or "no NVIDIA GPU was found")
    return (f"Nothing was run: this is for a machine with a GPU that serves FP8, and here {why}. "
            "`make test` checks a machine without one.")


def title(machine: hardware.Machine) -> list[str]:
    """What a reader of the report needs to know first: which machine this was."""
    gpus = [f"{gpu.name}, {gpu.memory_bytes / 2**20:.0f} MiB, capability "
            f"{hardware.capability(gpu)}, driver {gpu.driver}" for gpu in machine.gpus]
    return [f"make accept-gpu, {time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC", *gpus,
            f"{machine.cpu_model}, {machine.cores} cores, {machine.ram_bytes / GB:.0f} GB RAM, "
            f"{machine.os}, Python {machine.python}"]


def main() -> int:
    machine = hardware.detect()
    if why := no_gpu(machine):
        print(why)
        return NO_GPU
    place = workspace.root() / "accept-gpu" / time.strftime("%Y%m%d-%H%M%S")
    place.mkdir(parents=True)
    os.environ.update(PHI4_FP8_WORKSPACE=str(place), PHI4_FP8_PROFILE="tiny-phi4")
    os.environ.pop(shared.SERVERS, None)  # notebooks would take a room's servers for this machine's
    with (place / "report.txt").open("w") as report:
        def say(line: str) -> None:
            print(line, flush=True)
            print(line, file=report, flush=True)

        for line in title(machine):
            say(line)
        try:
            status = accept(Here(machine, hardware.serving_mode(machine), place), STEPS, say)
        except KeyboardInterrupt:
            say("Interrupted: what was found so far is above.")
            status = 130
        say(f"Send us this: {report.name}, and what was measured: {ledger.default()}.")
    return status


if __name__ == "__main__":
    sys.exit(main())
