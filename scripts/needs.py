"""What a machine must have before anything is downloaded; each lack is a sentence.

Only the standard library: this runs before anything is installed.
"""

import re
import shutil
from pathlib import Path

from nvml import Driver
from one_set_up import SetupError

from helpers import compiler, hardware

GB = 10**9


def require_platform(system: str, machine: str) -> None:
    if (system, machine) != ("Linux", "x86_64"):
        raise SetupError(
            f"This is {system} on {machine}, and vLLM's wheels are for Linux on x86-64. "
            "Use such a machine, a virtual machine, WSL 2, or a cloud instance.")


def require_disk(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise SetupError(
            f"The environments need about {needed / GB:.0f} GB of disk and {free / GB:.1f} GB are "
            f"free where this workbook lies ({folder}). Free some space, or move the workbook to a "
            "larger disk, and run the same command again.")


def require_compiler() -> None:
    """For a GPU: that Triton, which compiles at run time, finds a compiler and Python's headers."""
    if fault := compiler.fault():
        raise SetupError(f"{fault[0].upper()}{fault[1:]}. Then run the same command again.")


def torch_cuda(constraints: Path) -> tuple[int, int]:
    """The CUDA that the serving environment's torch is built for, by the toolkit it asks for."""
    pinned = re.search(r"^cuda-toolkit==(\d+)\.(\d+)", constraints.read_text(), re.MULTILINE)
    return int(pinned[1]), int(pinned[2])


def require_driver(driver: Driver, constraints: Path) -> None:
    """For a GPU: that its driver is new enough for what `constraints` would install."""
    fault = hardware.driver_too_old(driver.version, driver.cuda, torch_cuda(constraints))
    if fault:
        raise SetupError(f"{fault[0].upper()}{fault[1:]}. Nothing was downloaded.")
