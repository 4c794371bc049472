"""Whose the GPU's memory is: giving back what this process holds, and naming who holds the rest."""

import gc
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

from helpers.hardware import GB, Gpu

# What a process that uses a GPU has open: the driver's device, under WSL 2 the one that Windows has
# lent it. Others of the driver's files (nvidiactl) are open in whoever only asks what is there.
DEVICES = tuple(f"/dev/nvidia{number}" for number in range(64)) + ("/dev/dxg",)


@dataclass(frozen=True)
class Holder:
    """A process that holds memory of a GPU; `nbytes` is None where the driver does not say."""

    pid: int
    nbytes: int | None
    name: str


def free() -> str:
    """Give the GPU memory that no name holds any more back to the driver; says what is still held.

    torch keeps what it has freed for its own next use, where no other process can have it. A model
    is in cycles of references, so it is collected first.
    """
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return "This notebook holds no GPU memory."
    torch.cuda.empty_cache()
    held = sum(map(torch.cuda.memory_reserved, range(torch.cuda.device_count())))
    return f"This notebook's tensors hold {held / GB:.1f} GB of GPU memory."


def in_the_way(gpus: Iterable[Gpu]) -> str:
    """One sentence for each GPU on whose memory others sit, with their names; "" where nobody does.

    NVML may name nobody: in a container its numbers are the host's, and WSL 2 has no list. Then it
    is one sentence on who has any GPU of this machine open, as far as this user may see.
    """
    of_gpu = [(gpu, holders(gpu)) for gpu in gpus]
    said = [f"Memory of the {gpu.name} is held by {_listed(found)}."
            for gpu, found in of_gpu if found]
    if of_gpu and not said and (found := openers()):
        said = [f"A GPU of this machine is open in {_listed(found)}."]
    return " ".join(said)


def holders(gpu: Gpu) -> list[Holder]:
    """The processes of this machine that hold memory of a GPU by NVML's list, the largest first."""
    named = [Holder(pid, nbytes, _name(pid)) for pid, nbytes in _told(gpu.index).items()
             if _uses(pid, unseen=True)]
    return sorted(named, key=lambda holder: -(holder.nbytes or 0))


def openers() -> list[Holder]:
    """The processes that have the driver's device of a GPU open, without what they hold of it."""
    return [Holder(pid, None, _name(pid)) for pid in psutil.pids() if _uses(pid, unseen=False)]


def _listed(found: Iterable[Holder]) -> str:
    return ", ".join(f"{holder.name} (process {holder.pid}"
                     + (")" if holder.nbytes is None else f", {holder.nbytes / GB:.1f} GB)")
                     for holder in found)


def _told(index: int) -> dict[int, int | None]:
    """Bytes by process, as NVML has them; None where it does not know; empty where it fails."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return {}
    try:
        device = pynvml.nvmlDeviceGetHandleByIndex(index)
        return {process.pid: process.usedGpuMemory
                for ask in (pynvml.nvmlDeviceGetGraphicsRunningProcesses,
                            pynvml.nvmlDeviceGetComputeRunningProcesses)
                for process in ask(device)}
    except pynvml.NVMLError:
        return {}
    finally:
        pynvml.nvmlShutdown()


def _uses(pid: int, unseen: bool) -> bool:
    """Whether a process has a GPU open; `unseen` of another user's, whose files cannot be seen."""
    try:
        return any(os.readlink(file) in DEVICES for file in Path(f"/proc/{pid}/fd").iterdir())
    except PermissionError:
        return unseen
    except OSError:  # it is gone, or has just closed a file
        return False


def _name(pid: int) -> str:
    """What a reader calls a process: a notebook, a server that one started, a program."""
    if pid == os.getpid():
        return "this notebook or program itself"
    try:
        process = psutil.Process(pid)
        own = process.name()
        for each in (process, *process.parents()):
            if "ipykernel_launcher" in " ".join(each.cmdline()):
                notebook = f"the kernel of {_notebook(each)}"
                return notebook if each.pid == pid else f"{own}, started by {notebook}"
        return own
    except psutil.Error:
        return "a program of another user"


def _notebook(kernel: psutil.Process) -> str:
    """The notebook of a kernel; Jupyter's server names it to the kernels that it starts."""
    try:
        path = kernel.environ().get("JPY_SESSION_NAME", "")
    except psutil.Error:
        path = ""
    return Path(path).name or "a notebook"
