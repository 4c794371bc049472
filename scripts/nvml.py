"""The NVIDIA driver and its GPUs before anything is installed: NVML, asked by ctypes.

Only the standard library. `helpers.hardware` asks the same of nvidia-ml-py once that is there, and
a test holds the two to each other.
"""

import ctypes
import os
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from helpers import hardware, visible_gpus  # noqa: E402  (they import nothing that is installed)


@dataclass(frozen=True)
class Driver:
    """What the driver says: its version, the newest CUDA it supports, the best visible GPU."""

    version: str
    cuda: tuple[int, int]
    capability: tuple[int, int]  # (0, 0) where CUDA_VISIBLE_DEVICES shows no GPU


def driver() -> Driver | None:
    """What the NVIDIA driver says; None where there is none, or it does not answer."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    if not _answers(nvml, "nvmlInit_v2"):
        return None
    try:
        version, cuda = ctypes.create_string_buffer(80), ctypes.c_int()
        if not (_answers(nvml, "nvmlSystemGetDriverVersion", version, 80)
                and _answers(nvml, "nvmlSystemGetCudaDriverVersion", ctypes.byref(cuda))):
            return None
        found = _devices(nvml)
    finally:
        nvml.nvmlShutdown()
    shown = visible_gpus.indices([uuid for uuid, _ in found],
                                 os.environ.get("CUDA_VISIBLE_DEVICES"))
    return Driver(version.value.decode(),
                  (cuda.value // 1000, cuda.value % 1000 // 10),  # 1000 major + 10 minor
                  max((found[index][1] for index in shown), default=(0, 0)))


def usable_gpu() -> bool:
    """Whether the driver shows a GPU that vLLM can use."""
    found = driver()
    return found is not None and found.capability >= hardware.W8A16_CAPABILITY


def _answers(nvml, function: str, *arguments) -> bool:
    """Whether NVML has the function, and answers it; what it says is in the arguments."""
    asked = getattr(nvml, function, None)
    return asked is not None and asked(*arguments) == 0


def _devices(nvml) -> list[tuple[str, tuple[int, int]]]:
    """Each GPU's UUID and compute capability; of a GPU in MIG slices, each slice's."""
    count, found = ctypes.c_uint(), []
    _answers(nvml, "nvmlDeviceGetCount_v2", ctypes.byref(count))
    for index in range(count.value):
        found += _described(nvml, index)
    return found


def _described(nvml, index: int) -> list[tuple[str, tuple[int, int]]]:
    """What `_devices` says of one GPU; nothing of one that NVML does not describe to the helpers.

    Such as one that has fallen off its bus, or one that shares the RAM.
    """
    device, major, minor, found = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int(), []
    if not (_answers(nvml, "nvmlDeviceGetHandleByIndex_v2", index, ctypes.byref(device))
            and _answers(nvml, "nvmlDeviceGetCudaComputeCapability", device, ctypes.byref(major),
                         ctypes.byref(minor))):
        return []
    for part in _mig_slices(nvml, device) or [device]:
        uuid, memory = ctypes.create_string_buffer(96), (ctypes.c_ulonglong * 3)()
        if not (_answers(nvml, "nvmlDeviceGetMemoryInfo", part, memory)
                and _answers(nvml, "nvmlDeviceGetUUID", part, uuid, 96)):
            return []
        found.append((uuid.value.decode(), (major.value, minor.value)))
    return found


def _mig_slices(nvml, device) -> list:
    mode, pending, places = ctypes.c_uint(), ctypes.c_uint(), ctypes.c_uint()
    if not (_answers(nvml, "nvmlDeviceGetMigMode", device, ctypes.byref(mode),
                     ctypes.byref(pending)) and mode.value):
        return []
    _answers(nvml, "nvmlDeviceGetMaxMigDeviceCount", device, ctypes.byref(places))
    handles = [(index, ctypes.c_void_p()) for index in range(places.value)]
    return [handle for index, handle in handles
            if _answers(nvml, "nvmlDeviceGetMigDeviceHandleByIndex", device, index,
                        ctypes.byref(handle))]
