"""What this machine is, and which way of serving FP8 it gets."""

import contextlib
import os
import platform
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from helpers import cpu, visible_gpus

REPO = Path(__file__).resolve().parent.parent
GB = 10**9

# vLLM, docs/features/quantization: FP8 products on tensor cores from Ada (8.9) on; FP8 weights with
# 16-bit activations by Marlin kernels from Turing (7.5) on.
W8A8_CAPABILITY = (8, 9)
W8A16_CAPABILITY = (7, 5)
# Below it vLLM refuses bf16 (`vllm/platforms/cuda.py`, `check_if_supports_dtype`).
BF16_CAPABILITY = (8, 0)
# The oldest driver for each major CUDA, on which all its minor versions run. NVIDIA, CUDA
# Compatibility, https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html
OLDEST_DRIVER = {12: 525, 13: 580}
# Where a container's limit of memory is, in cgroup v2 and in v1: folder, limit, used, what of it is
# cache. Linux, Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst
CGROUPS = ((Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
           (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes",
            "total_inactive_file"))
NO_LIMIT = 2**60  # v1 says "none" by a number near 2^63

@dataclass(frozen=True)
class Gpu:
    index: int  # NVML's, in the order of the PCI bus
    name: str
    memory_bytes: int  # NVML's total
    compute_capability: tuple[int, int]
    driver: str
    cuda: tuple[int, int] | None = None  # the newest that the driver supports; None: not asked
    free_bytes: int | None = field(default=None, compare=False)  # when asked; None: not asked


@dataclass(frozen=True)
class Machine:
    gpus: tuple[Gpu, ...]  # those that CUDA_VISIBLE_DEVICES shows
    cpu_model: str
    cores: int  # those this process may run on
    cpu_features: frozenset[str]
    ram_bytes: int
    disk_free_bytes: int
    os: str
    python: str
    note: str  # why a GPU of this machine is not or cannot be used; "" where there is no reason


@dataclass(frozen=True)
class ServingMode:
    key: str  # "gpu-w8a8", "gpu-w8a16", "cpu-w8a16", "cpu-unpacked" or "none"
    device: str  # "cuda" or "cpu"
    title: str
    why: str
    dtype: str = "bfloat16"  # what 16-bit numbers are served in, as vLLM names it


def detect(disk_path: Path | None = None) -> Machine:
    """Look at the machine: GPUs by NVML, the rest from /proc and psutil; sizes in bytes.

    `disk_path` is where free disk is measured, the repository by default.
    """
    import psutil

    gpus, note = _gpus()
    model, features = cpu.read()
    note = "; ".join(filter(None, (note, driver_fault(gpus))))
    return Machine(
        gpus=gpus,
        cpu_model=model,
        cores=len(os.sched_getaffinity(0)),
        cpu_features=features,
        ram_bytes=min(psutil.virtual_memory().total, _container().get("limit", NO_LIMIT)),
        disk_free_bytes=shutil.disk_usage(disk_path or REPO).free,
        os=platform.platform(terse=True),
        python=platform.python_version(),
        note=note,
    )


def _gpus() -> tuple[tuple[Gpu, ...], str]:
    """The visible NVIDIA GPUs, and why others that are there are not among them."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        if _nvidia_on_pci_bus():
            return (), f"an NVIDIA GPU is in this machine, but its driver does not answer ({error})"
        return (), ""
    uuids, gpus, notes = [], [], []
    try:
        driver = pynvml.nvmlSystemGetDriverVersion()
        version = pynvml.nvmlSystemGetCudaDriverVersion()  # 1000 major + 10 minor
        for index in range(pynvml.nvmlDeviceGetCount()):
            try:
                found = _described(index, driver, (version // 1000, version % 1000 // 10))
            except pynvml.NVMLError as error:  # fallen off its bus, or it shares the RAM
                notes.append(f"GPU {index} is left out: NVML does not describe it ({error})")
            else:
                uuids += [uuid for uuid, _ in found]
                gpus += [gpu for _, gpu in found]
    except pynvml.NVMLError as error:
        return (), f"an NVIDIA GPU is in this machine, but NVML does not describe it ({error})"
    finally:
        pynvml.nvmlShutdown()
    setting = os.environ.get("CUDA_VISIBLE_DEVICES")
    indices = visible_gpus.indices(uuids, setting)
    seen, hidden = tuple(gpus[i] for i in indices), len(gpus) - len(indices)
    if hidden:
        notes.append(f"CUDA_VISIBLE_DEVICES={setting!r} hides {hidden} GPU(s)")
    # NVIDIA, Multi-Instance GPU User Guide, "CUDA Device Enumeration": a process gets one slice.
    slices = tuple(gpus[i] for i in indices if uuids[i].startswith("MIG-"))
    if slices and len(seen) > 1:
        seen = slices[:1]
        notes.append(f"of MIG slices CUDA uses one at a time, here the first: {seen[0].name}")
    if len(seen) > len(_equal(seen)):
        notes.append(f"the GPUs differ, and this plan is for the {_best(seen).name}, the only one "
                     "that vLLM is shown")
    return seen, "; ".join(notes)


def _described(index: int, driver: str, cuda: tuple[int, int]) -> list[tuple[str, Gpu]]:
    """What CUDA sees of NVML's GPU of this index, each with its UUID; raises NVML's errors.

    Of a GPU cut into MIG slices it is the slices, each with its part of the memory.
    """
    import pynvml

    device = pynvml.nvmlDeviceGetHandleByIndex(index)
    capability = tuple(pynvml.nvmlDeviceGetCudaComputeCapability(device))
    found = []
    for part in _mig_slices(device) or [device]:
        memory = pynvml.nvmlDeviceGetMemoryInfo(part)
        found.append((pynvml.nvmlDeviceGetUUID(part), Gpu(
            index, pynvml.nvmlDeviceGetName(part), memory.total, capability, driver, cuda,
            memory.free)))
    return found


def _mig_slices(device) -> list:
    """NVML's handles of the MIG slices that a GPU, itself such a handle, is cut into, if it is."""
    import pynvml

    try:
        if pynvml.nvmlDeviceGetMigMode(device)[0] != pynvml.NVML_DEVICE_MIG_ENABLE:
            return []
        slices = []
        for index in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(device)):
            with contextlib.suppress(pynvml.NVMLError_NotFound):  # a place without a slice
                slices.append(pynvml.nvmlDeviceGetMigDeviceHandleByIndex(device, index))
        return slices
    except pynvml.NVMLError:
        return []


def torch_cuda(environment: Path) -> tuple[int, int] | None:
    """The CUDA that an environment's torch is built for; None for a CPU build, or without torch.

    Read from torch's own version.py, so that its Python need not be started.
    """
    for file in environment.glob("lib/python3*/site-packages/torch/version.py"):
        built = re.search(r"^cuda\b.*= '(\d+)\.(\d+)", file.read_text(), re.MULTILINE)
        return (int(built[1]), int(built[2])) if built else None
    return None


def serving_folder(device: str) -> Path:
    """The folder of vLLM's environment for a device, "cuda" or "cpu": they lie side by side."""
    return REPO / (".venv-serve-gpu" if device == "cuda" else ".venv-serve")


def driver_fault(gpus: Sequence[Gpu]) -> str:
    """Why the driver cannot run the serving environment's torch, and what to do; "" if it can."""
    needed = torch_cuda(serving_folder("cuda"))
    if not gpus or not needed or not gpus[0].cuda:
        return ""
    return driver_too_old(gpus[0].driver, gpus[0].cuda, needed)


def driver_too_old(driver: str, supports: tuple[int, int], needed: tuple[int, int]) -> str:
    """Why a driver that supports one CUDA cannot run a torch built for another; "" if it can.

    It can where the major versions agree, or the driver's is newer.
    """
    if supports[0] >= needed[0]:
        return ""
    oldest = OLDEST_DRIVER.get(needed[0])
    return (f"the NVIDIA driver {driver} supports CUDA up to {dotted(supports)}, and "
            f"vLLM's torch needs CUDA {dotted(needed)}, so vLLM cannot use the GPU: install "
            + (f"driver {oldest} or newer" if oldest else "a driver for it")
            + ", or leave the GPU out with CUDA_VISIBLE_DEVICES= (empty) and `make setup`")


def dotted(version: tuple[int, int]) -> str:
    """A version of two numbers, such as "12.8"."""
    return "{}.{}".format(*version)


def energy_joules(count: int = 1) -> float | None:
    """The energy that the `count` GPUs of a server used since their driver was loaded, in joules.

    They are the first of the visible ones, or, where those differ, the best one alone. None where
    there is no GPU, or where NVML does not tell, for whatever reason: under WSL2 it has no counter.
    Source: `nvmlDeviceGetTotalEnergyConsumption` (millijoules, Volta and newer).
    """
    import pynvml

    indices = [gpu.index for gpu in _equal(_gpus()[0])[:count]]
    if not indices:
        return None
    try:
        pynvml.nvmlInit()
        return sum(pynvml.nvmlDeviceGetTotalEnergyConsumption(
            pynvml.nvmlDeviceGetHandleByIndex(index)) for index in indices) / 1000
    except pynvml.NVMLError:
        return None
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def _nvidia_on_pci_bus() -> bool:
    """Whether a display controller (class 03) of vendor 10de is on the PCI bus."""
    return any(
        (device / "vendor").read_text().strip() == "0x10de"
        and (device / "class").read_text().startswith("0x03")
        for device in Path("/sys/bus/pci/devices").glob("*")
    )


def _container() -> dict[str, int]:
    """A container's "limit" of memory, what is "used" of it and what of that is "cache", in bytes.

    Empty where no limit is set. "cache" is of files that were read, and can be dropped; the kernel
    counts it as used.
    """
    for folder, limit, used, cache in CGROUPS:
        if (folder / limit).is_file():
            text = (folder / limit).read_text().strip()
            if not text.isdecimal() or int(text) >= NO_LIMIT:
                return {}
            found = re.search(rf"^{cache} (\d+)$", (folder / "memory.stat").read_text(), re.M)
            return {"limit": int(text), "used": int((folder / used).read_text()),
                    "cache": int(found[1]) if found else 0}
    return {}


def available_ram() -> int:
    """Bytes of memory that are free without swapping, within a container's limit."""
    import psutil

    free, own = psutil.virtual_memory().available, _container()
    return int(min(free, own["limit"] - own["used"] + own["cache"])) if own else free


def best_gpu(machine: Machine) -> Gpu:
    """The GPU of newest compute capability, and among those the one with most memory."""
    return _best(machine.gpus)


def equal_gpus(machine: Machine) -> tuple[Gpu, ...]:
    """The GPUs that may share a model: all, where they are equal, else the best one alone."""
    return _equal(machine.gpus)


def _best(gpus: Sequence[Gpu]) -> Gpu:
    return max(gpus, key=lambda gpu: (gpu.compute_capability, gpu.memory_bytes))


def _equal(gpus: tuple[Gpu, ...]) -> tuple[Gpu, ...]:
    kinds = {(gpu.name, gpu.memory_bytes) for gpu in gpus}
    return gpus if len(kinds) < 2 else (_best(gpus),)


def cuda_variables(machine: Machine) -> dict[str, str]:
    """What shows CUDA the GPUs that the plan is for; empty where it sees just those by itself.

    Of GPUs that differ it is the best alone: vLLM would ask NVML about the first one on the bus,
    and CUDA compute on the fastest. A number in a reader's own CUDA_VISIBLE_DEVICES is NVML's here,
    in the order of the bus; CUDA by itself counts from the fastest.
    """
    order = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    if len(machine.gpus) > len(equal_gpus(machine)):
        return order | {"CUDA_VISIBLE_DEVICES": str(best_gpu(machine).index)}
    return order if machine.gpus and "CUDA_VISIBLE_DEVICES" in os.environ else {}


def serving_mode(machine: Machine) -> ServingMode:
    """How this machine serves FP8: by its best GPU if it has one, else by its CPU.

    Thresholds: vLLM's documentation of FP8 W8A8 and of Marlin's FP8 W8A16.
    """
    if machine.gpus:
        return gpu_mode(best_gpu(machine))
    lacks = cpu.lacking(machine.cpu_features)
    if not lacks:
        matrix = ", ".join(sorted(machine.cpu_features & cpu.BF16_FEATURES))
        return ServingMode(
            "cpu-w8a16", "cpu", "W8A16 on the CPU",
            "8-bit weights, unpacked to 16 bits by the workbook's plugin for vLLM, and activations "
            f"in 16 bits, because there is no GPU, and this CPU multiplies bf16 ({matrix})")
    return ServingMode(
        "cpu-unpacked", "cpu", "W8A16 on the CPU, unpacked on loading",
        f"no GPU, and {lacks}: the workbook's vLLM plugin unpacks "
        "the FP8 weights to bf16 when it loads them, so neither time nor memory is saved")


def capability(gpu: Gpu) -> str:
    """The compute capability as NVIDIA writes it, such as "8.9"."""
    return dotted(gpu.compute_capability)


def gpu_mode(gpu: Gpu) -> ServingMode:
    """How one GPU serves FP8, and in what 16-bit numbers, by its compute capability."""
    has = f"{gpu.name} has compute capability {capability(gpu)}"
    if gpu.compute_capability >= W8A8_CAPABILITY:
        return ServingMode("gpu-w8a8", "cuda", "W8A8 on the GPU",
                           f"{has} (8.9 or newer): 8-bit weights and activations on FP8 tensor "
                           "cores")
    if gpu.compute_capability >= W8A16_CAPABILITY:
        old = gpu.compute_capability < BF16_CAPABILITY
        return ServingMode("gpu-w8a16", "cuda", "W8A16 on the GPU",
                           f"{has} (7.5 to 8.8): 8-bit weights, unpacked to 16 bits by "
                           "Marlin kernels, and 16-bit activations"
                           + (", in fp16, because bf16 needs 8.0" if old else ""),
                           "float16" if old else "bfloat16")
    return ServingMode(
        "none", "cpu", "no FP8 on this GPU",
        f"{has}, and FP8 in vLLM needs 7.5 or newer. Set CUDA_VISIBLE_DEVICES= (empty) to leave "
        "it out: the bundled model then runs on the CPU. Or use a Turing GPU or a newer one")
