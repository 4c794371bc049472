"""The mode each device gets, and `detect` against what the system itself says of this machine."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import environments
import pytest

from helpers import compiler, cpu, hardware, preflight, serving, visible_gpus
from helpers.hardware import Gpu, Machine

# Name, compute capability (NVIDIA's table of CUDA GPUs), memory in GB, the mode it gets.
DEVICES = [
    ("NVIDIA GeForce GTX 1080", (6, 1), 8, "none"),
    ("Tesla V100-SXM2-16GB", (7, 0), 16, "none"),
    ("Tesla T4", (7, 5), 16, "gpu-w8a16"),
    ("NVIDIA A100-SXM4-80GB", (8, 0), 80, "gpu-w8a16"),
    ("NVIDIA RTX 6000 Ada Generation", (8, 9), 48, "gpu-w8a8"),
    ("NVIDIA A10", (8, 6), 24, "gpu-w8a16"),
    ("NVIDIA A40", (8, 6), 48, "gpu-w8a16"),
    ("NVIDIA GeForce RTX 3090", (8, 6), 24, "gpu-w8a16"),
    ("NVIDIA L4", (8, 9), 24, "gpu-w8a8"),
    ("NVIDIA L40S", (8, 9), 48, "gpu-w8a8"),
    ("NVIDIA GeForce RTX 4090", (8, 9), 24, "gpu-w8a8"),
    ("NVIDIA H100 80GB HBM3", (9, 0), 80, "gpu-w8a8"),
    ("NVIDIA H200", (9, 0), 141, "gpu-w8a8"),
    ("NVIDIA B200", (10, 0), 192, "gpu-w8a8"),
    ("NVIDIA GeForce RTX 5090", (12, 0), 32, "gpu-w8a8"),
]


def gpu(name: str, capability: tuple[int, int], gigabytes: int, index: int = 0) -> Gpu:
    return Gpu(index, name, gigabytes * 10**9, capability, "580.95.05")


def machine(*gpus: Gpu, features: str = "", ram: int = 64, disk: int = 200) -> Machine:
    return Machine(gpus, "a processor", 8, frozenset(features.split()), ram * 10**9, disk * 10**9,
                   "Linux", "3.11.7", "")


@pytest.mark.parametrize(("name", "capability", "gigabytes", "key"), DEVICES)
def test_each_gpu_gets_its_path(name, capability, gigabytes, key):
    mode = hardware.serving_mode(machine(gpu(name, capability, gigabytes), features="amx_bf16"))
    assert mode.key == key
    assert mode.device == ("cpu" if key == "none" else "cuda")
    assert name in mode.why and "{}.{}".format(*capability) in mode.why


SKYLAKE = "avx2 avx512f avx512bw avx512dq avx512vl"
ZEN_4 = f"{SKYLAKE} avx512_vnni avx512_bf16"


@pytest.mark.parametrize(("features", "key", "says"), [
    (f"{ZEN_4} amx_bf16 amx_int8 amx_tile", "cpu-w8a16", "amx_bf16, avx512_bf16"),
    (ZEN_4, "cpu-w8a16", "multiplies bf16 (avx512_bf16)"),
    # as a hypervisor may show it: vLLM then loads a build without the packed product
    (f"{SKYLAKE} avx512_vnni amx_bf16 amx_tile", "cpu-unpacked", "lacks avx512_bf16:"),
    (f"{SKYLAKE} avx512_bf16", "cpu-unpacked", "lacks avx512_vnni:"),
    (f"{SKYLAKE} avx512_vnni", "cpu-unpacked", "lacks avx512_bf16:"),  # Ice Lake
    ("avx2", "cpu-unpacked", "lacks avx512_bf16, avx512_vnni, avx512bw"),
    ("", "cpu-unpacked", "lacks avx512_bf16"),
])
def test_without_a_gpu_the_cpu_decides(monkeypatch, features, key, says):
    for variable in cpu.ONEDNN_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    mode = hardware.serving_mode(machine(features=features))
    assert (mode.key, mode.device) == (key, "cpu")
    assert says in mode.why


def test_an_old_gpu_is_told_what_would_work():
    mode = hardware.serving_mode(machine(gpu("NVIDIA GeForce GTX 1080", (6, 1), 8)))
    assert "7.5" in mode.why and "CUDA_VISIBLE_DEVICES=" in mode.why


def test_the_best_of_several_gpus_decides():
    both = machine(gpu("GTX 1080", (6, 1), 8), gpu("L4", (8, 9), 24, 1))
    assert hardware.serving_mode(both).key == "gpu-w8a8"


@pytest.mark.parametrize(("setting", "seen"), [
    (None, [0, 1, 2]), ("", []), ("-1", []), ("1", [1]), ("2,0", [2, 0]), ("0,-1,1", [0]),
    ("7", []), ("GPU-bb", [1]), ("GPU-b", [1]), ("GPU-", []), ("GPU-aa,GPU-cc", [0, 2]),
    ("none", []), (" 1 , 2 ", [1, 2]),
])
def test_cuda_visible_devices_as_cuda_reads_it(setting, seen):
    assert visible_gpus.indices(["GPU-aa11", "GPU-bb22", "GPU-cc33"], setting) == seen


def test_gpus_as_nvml_tells_them(monkeypatch):
    """NVML itself answers only where there is a GPU, so its answers are given here."""
    import pynvml

    cards = [("NVIDIA H100 80GB HBM3", 85_520_809_984, (9, 0), "GPU-aa"),
             ("Tesla T4", 16_106_127_360, (7, 5), "GPU-bb")]
    answers = {
        "nvmlInit": lambda: None, "nvmlShutdown": lambda: None,
        "nvmlSystemGetDriverVersion": lambda: "580.95.05",
        "nvmlSystemGetCudaDriverVersion": lambda: 13010,
        "nvmlDeviceGetCount": lambda: len(cards),
        "nvmlDeviceGetHandleByIndex": lambda i: i,
        "nvmlDeviceGetName": lambda i: cards[i][0],
        "nvmlDeviceGetMemoryInfo": lambda i: SimpleNamespace(total=cards[i][1],
                                                             free=cards[i][1] - 3 * 10**9),
        "nvmlDeviceGetCudaComputeCapability": lambda i: list(cards[i][2]),
        "nvmlDeviceGetUUID": lambda i: cards[i][3],
        "nvmlDeviceGetMigMode": lambda i: [0, 0],
        "nvmlDeviceGetTotalEnergyConsumption": lambda i: [5_000, 7_500][i],
    }
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, name, answer)
    t4 = Gpu(1, "Tesla T4", 16_106_127_360, (7, 5), "580.95.05", (13, 1))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = hardware.detect()
    assert [g.name for g in found.gpus] == [cards[0][0], cards[1][0]]
    assert found.note == ("the GPUs differ, and this plan is for the NVIDIA H100 80GB HBM3, the "
                          "only one that vLLM is shown")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-bb")
    found = hardware.detect()
    assert found.gpus == (t4,) and "hides 1 GPU" in found.note
    assert found.gpus[0].free_bytes == 16_106_127_360 - 3 * 10**9
    assert hardware.energy_joules() == 7.5
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = hardware.detect()
    assert found.gpus == () and "hides 2 GPU" in found.note
    assert hardware.energy_joules() is None
    assert hardware.serving_mode(found).device == "cpu"


@pytest.mark.parametrize("cards, one, two", [
    (("T4", "A40"), 9, 9), (("A40", "T4"), 9, 9), (("A40", "A40"), 9, 18)])
def test_the_energy_is_of_the_gpus_that_serve(monkeypatch, cards, one, two):
    """The T4 has used 1 kJ, an A40 9 kJ: where they differ, the A40 alone serves."""
    import pynvml

    kinds = {"T4": ("Tesla T4", (7, 5), 16), "A40": ("NVIDIA A40", (8, 6), 48)}
    found = tuple(gpu(*kinds[name], index) for index, name in enumerate(cards))
    monkeypatch.setattr(hardware, "_gpus", lambda: (found, ""))
    for name, answer in {
            "nvmlInit": lambda: None, "nvmlShutdown": lambda: None,
            "nvmlDeviceGetHandleByIndex": lambda index: index,
            "nvmlDeviceGetTotalEnergyConsumption":
                lambda index: {"T4": 1_000_000, "A40": 9_000_000}[cards[index]]}.items():
        monkeypatch.setattr(pynvml, name, answer)
    assert (hardware.energy_joules(1), hardware.energy_joules(2)) == (one * 1000, two * 1000)


def test_a_gpu_in_mig_slices_is_its_slices(monkeypatch):
    """As NVML describes an A100 with two slices and a free place; its answers are given here."""
    import pynvml

    def slice_at(device, place):
        if place == 1:
            raise pynvml.NVMLError_NotFound(pynvml.NVML_ERROR_NOT_FOUND)
        return f"slice {place}"

    memory = SimpleNamespace(total=10_468_982_784, free=10_000_000_000)
    answers = {
        "nvmlInit": lambda: None, "nvmlShutdown": lambda: None,
        "nvmlSystemGetDriverVersion": lambda: "580.95.05", "nvmlDeviceGetCount": lambda: 1,
        "nvmlSystemGetCudaDriverVersion": lambda: 13010,
        "nvmlDeviceGetHandleByIndex": lambda i: "whole",
        "nvmlDeviceGetCudaComputeCapability": lambda i: [8, 0],
        "nvmlDeviceGetMigMode": lambda i: [1, 1],
        "nvmlDeviceGetMaxMigDeviceCount": lambda i: 3,
        "nvmlDeviceGetMigDeviceHandleByIndex": slice_at,
        "nvmlDeviceGetName": lambda i: f"NVIDIA A100-SXM4-40GB MIG 2g.10gb ({i})",
        "nvmlDeviceGetMemoryInfo": lambda i: memory, "nvmlDeviceGetUUID": lambda i: f"MIG-{i}",
    }
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, name, answer)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-slice 2")
    (found,) = hardware.detect().gpus
    assert found.name.endswith("(slice 2)") and found.memory_bytes == 10_468_982_784
    assert hardware.gpu_mode(found).key == "gpu-w8a16"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    found = hardware.detect()
    assert [g.name[-9:] for g in found.gpus] == ["(slice 0)"]
    assert "CUDA uses one at a time" in found.note


@pytest.mark.parametrize("error", ["NVMLError_NotSupported", "NVMLError_Unknown",
                                   "NVMLError_NoPermission", "NVMLError_FunctionNotFound"])
@pytest.mark.parametrize("asked", ["nvmlDeviceGetTotalEnergyConsumption",
                                   "nvmlDeviceGetHandleByIndex", "nvmlInit"])
def test_whatever_nvml_refuses_there_is_no_energy(monkeypatch, error, asked):
    """WSL2 has no counter, a container may lack the permission, an old driver the function."""
    import pynvml

    def refuse(*_):
        raise getattr(pynvml, error)()

    monkeypatch.setattr(hardware, "_gpus", lambda: ((gpu("NVIDIA L4", (8, 9), 24),), ""))
    for name in ("nvmlInit", "nvmlShutdown", "nvmlDeviceGetHandleByIndex",
                 "nvmlDeviceGetTotalEnergyConsumption"):
        monkeypatch.setattr(pynvml, name, refuse if name == asked else lambda *_: 1)
    assert hardware.energy_joules() is None


def test_a_gpu_that_nvml_does_not_describe_is_a_sentence(monkeypatch):
    """One that has fallen off its bus, or, as on a GB10, has no memory of its own."""
    import pynvml

    def refuse(*_):
        raise pynvml.NVMLError_NotSupported()

    for name in ("nvmlInit", "nvmlShutdown", "nvmlSystemGetDriverVersion",
                 "nvmlSystemGetCudaDriverVersion", "nvmlDeviceGetCount",
                 "nvmlDeviceGetHandleByIndex", "nvmlDeviceGetMigMode"):
        monkeypatch.setattr(pynvml, name, lambda *_: 1)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMigMode", refuse)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCudaComputeCapability", lambda _: [12, 1])
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", refuse)
    found = hardware.detect()
    assert found.gpus == () and "NVML does not describe it" in found.note
    assert hardware.serving_mode(found).device == "cpu"


def test_a_lost_gpu_takes_no_other_with_it(monkeypatch):
    """Its handle is refused; the ones beside it still describe themselves."""
    import pynvml

    def handle(index):
        if index == 0:
            raise pynvml.NVMLError_GpuIsLost()
        return index

    memory = SimpleNamespace(total=23_609_737_216, free=23_000_000_000)
    for name, answer in {
            "nvmlInit": lambda: None, "nvmlShutdown": lambda: None,
            "nvmlSystemGetDriverVersion": lambda: "580.95.05",
            "nvmlSystemGetCudaDriverVersion": lambda: 13000, "nvmlDeviceGetCount": lambda: 2,
            "nvmlDeviceGetHandleByIndex": handle, "nvmlDeviceGetMigMode": lambda _: [0, 0],
            "nvmlDeviceGetCudaComputeCapability": lambda _: [8, 9],
            "nvmlDeviceGetMemoryInfo": lambda _: memory, "nvmlDeviceGetName": lambda _: "NVIDIA L4",
            "nvmlDeviceGetUUID": lambda index: f"GPU-{index}"}.items():
        monkeypatch.setattr(pynvml, name, answer)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = hardware.detect()
    assert [(each.index, each.name) for each in found.gpus] == [(1, "NVIDIA L4")]
    assert "GPU 0 is left out: NVML does not describe it (GPU is lost)" in found.note


MEMORY_STAT = "cache 600\n{} 400\nactive_file 200\n"


@pytest.mark.parametrize("names, cache", [
    (("memory.max", "memory.current"), "inactive_file"),
    (("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_inactive_file")],
    ids=["cgroup v2", "cgroup v1"])
@pytest.mark.parametrize("limit, free", [
    (1000, 500), ("max", None), (9223372036854771712, None)])  # v1's "none", of 4 KiB pages
def test_a_containers_limit_bounds_the_ram(monkeypatch, tmp_path, names, cache, limit, free):
    """Of 1,000 bytes 900 are used, and 400 of those are files that can be dropped."""
    import psutil

    folder = tmp_path / ("memory" if cache.startswith("total") else "")
    folder.mkdir(exist_ok=True)
    for name, content in zip((*names, "memory.stat"), (limit, 900, MEMORY_STAT.format(cache)),
                             strict=True):
        (folder / name).write_text(f"{content}\n")
    monkeypatch.setattr(hardware, "CGROUPS", tuple(
        (tmp_path / place.relative_to("/sys/fs/cgroup"), *rest)
        for place, *rest in hardware.CGROUPS))
    monkeypatch.setattr(psutil, "virtual_memory",
                        lambda: SimpleNamespace(total=10**12, available=10**11))
    assert hardware.available_ram() == (10**11 if free is None else free)
    assert hardware.detect().ram_bytes == (10**12 if free is None else 1000)


def serving_environment(repo: Path, cuda: str) -> None:
    """A .venv-serve-gpu with nothing but torch's version.py, in torch's own words."""
    torch = repo / ".venv-serve-gpu" / "lib" / "python3.11" / "site-packages" / "torch"
    torch.mkdir(parents=True)
    (torch / "version.py").write_text(
        f"from typing import Optional\n__version__ = '2.13.0'\ncuda: Optional[str] = {cuda}\n"
        "git_version = 'cf30153c'\nhip: Optional[str] = None\n")


@pytest.mark.parametrize(("built", "supported", "words"), [
    ("'13.0'", (12, 4), ["550.54.15 supports CUDA up to 12.4", "needs CUDA 13.0",
                         "install driver 580 or newer", "CUDA_VISIBLE_DEVICES= (empty)"]),
    ("'12.8'", (11, 8), ["up to 11.8", "needs CUDA 12.8", "driver 525 or newer"]),
    ("'13.2'", (13, 0), []),  # a minor version behind: it runs
    ("'12.9'", (13, 0), []),
    ("None", (12, 4), []),  # the CPU build has no need of a driver
])
def test_a_driver_too_old_for_vllms_torch_is_a_sentence(
        monkeypatch, tmp_path, capsys, built, supported, words):
    serving_environment(tmp_path, built)
    monkeypatch.setattr(hardware, "REPO", tmp_path)
    card = dataclasses.replace(gpu("NVIDIA L4", (8, 9), 24), driver="550.54.15", cuda=supported)
    fault = hardware.driver_fault((card,))
    assert bool(fault) == bool(words) and all(word in fault for word in words), fault

    monkeypatch.setattr(hardware, "_gpus", lambda: ((card,), ""))
    assert hardware.detect().note == fault
    preflight.main()  # preflight
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.split()[1] == "GPU:")
    assert line.startswith("[FAIL]" if words else "[OK]") and fault in line
    assert "driver 550.54.15 (CUDA {}.{})".format(*supported) in line


def test_a_machine_without_a_gpu_has_no_driver_to_complain_of():
    assert hardware.driver_fault(()) == ""


def test_this_serving_environments_torch_is_read_as_it_reads_itself():
    said = subprocess.check_output(
        [serving.serve_python(), "-c", "from torch.version import cuda; print(cuda or '')"],
        text=True).strip()
    read = hardware.torch_cuda(serving.serve_python().parents[1])
    assert said == ("{}.{}".format(*read) if read else "")


def test_preflight_names_the_gpus_that_differ_and_the_hidden_ones(monkeypatch, capsys):
    two = dataclasses.replace(machine(gpu("NVIDIA L4", (8, 9), 24), gpu("Tesla T4", (7, 5), 16, 1)),
                              note="the GPUs differ, and this plan is for the NVIDIA L4")
    monkeypatch.setattr(hardware, "detect", lambda: two)
    preflight.main()
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.split()[1] == "GPU:")
    assert "NVIDIA L4" in line and "Tesla T4" in line and line.endswith(two.note)


@pytest.mark.parametrize("name, said", [
    ("AMD EPYC", "AMD EPYC (family 26, model 2)"), ("AMD EPYC 9354P", "AMD EPYC 9354P")])
def test_a_cpu_without_a_number_is_told_apart_by_its_generation(name, said, monkeypatch):
    text = f"cpu family\t: 26\nmodel\t\t: 2\nmodel name\t: {name}\nflags\t: avx2\n\nprocessor: 1"
    monkeypatch.setattr(cpu.Path, "read_text", lambda path: text)
    assert cpu.read() == (said, frozenset({"avx2"}))


def test_detect_agrees_with_the_system(tmp_path):
    found = hardware.detect(tmp_path)
    meminfo = Path("/proc/meminfo").read_text()
    assert found.ram_bytes <= int(re.search(r"MemTotal:\s+(\d+) kB", meminfo)[1]) * 1024
    assert found.cores == int(subprocess.check_output(["nproc"]))
    stat = os.statvfs(tmp_path)
    assert abs(found.disk_free_bytes - stat.f_bavail * stat.f_frsize) < 10**9
    assert found.python == ".".join(map(str, sys.version_info[:3]))
    cpuinfo = Path("/proc/cpuinfo").read_text()
    assert f": {found.cpu_model.partition(' (family')[0]}\n" in cpuinfo
    for feature in ("amx_bf16", "avx512_bf16", "avx2"):
        assert (feature in found.cpu_features) == bool(re.search(rf"\b{feature}\b", cpuinfo))
    if shutil.which("nvidia-smi"):
        listed = subprocess.check_output(["nvidia-smi", "-L"], text=True)
        assert [g.name for g in found.gpus] == re.findall(r"GPU \d+: (.+?) \(UUID", listed)
    else:
        assert found.gpus == ()


def test_set_up_and_preflight_see_the_same_gpu():
    """Set-up asks NVML by ctypes, before anything is installed; the helpers ask nvidia-ml-py."""
    mode = hardware.serving_mode(hardware.detect())
    assert environments.usable_gpu() == (mode.device == "cuda")


def test_preflight_of_this_machine():
    result = subprocess.run([sys.executable, "-m", "helpers.preflight"],
                            capture_output=True, text=True)
    lines = result.stdout.splitlines()
    assert result.returncode == 0, result.stdout + result.stderr
    assert all(line.startswith("[OK]   ") for line in lines)
    for wanted in ("Python: ", "disk: ", "RAM: ", "GPU: ", "torch 2.", "vllm", "mode: "):
        assert any(wanted in line for line in lines), wanted


def test_preflight_says_what_to_do(monkeypatch, capsys):
    poor = machine(gpu("NVIDIA GeForce GTX 1080", (6, 1), 8), ram=2, disk=1)
    monkeypatch.setattr(hardware, "detect", lambda: poor)
    monkeypatch.setattr(hardware, "REPO", hardware.REPO / "tests")  # no environment there
    assert preflight.main() == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[FAIL]")]
    assert [line.split()[1].rstrip(":") for line in failed] == ["disk", "RAM", "serving", "mode"]
    assert "free some space" in failed[0] and "make setup" in failed[2]
    assert "CUDA_VISIBLE_DEVICES=" in failed[3]


ON_GPU = hardware.serving_mode(machine(gpu("NVIDIA L4", (8, 9), 24)))


def test_a_gpu_mode_needs_a_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert "apt install build-essential" in preflight._compiler(ON_GPU).detail
    assert not preflight._compiler(ON_GPU).ok
    assert preflight._compiler(dataclasses.replace(ON_GPU, device="cpu")).ok


def test_a_gpu_mode_needs_pythons_headers(monkeypatch, tmp_path, a_compiler):
    assert preflight._compiler(ON_GPU).ok
    monkeypatch.setattr(compiler, "include_folder", lambda: str(tmp_path))
    assert "Python.h is not in" in preflight._compiler(ON_GPU).detail
