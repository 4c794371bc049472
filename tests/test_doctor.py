"""`make doctor`: it runs on a bare Python, agrees with the preflight, and names what is missing."""

import ast
import getpass
import os
import platform
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import doctor
import pytest
from conftest import REPO

from helpers import cpu, hardware, models, preflight

# as nvidia-smi prints them
H100 = "NVIDIA H100 80GB HBM3, 81559, 9.0, 580.82.07, GPU-a0"
A40 = "NVIDIA A40, 46068, 8.6, 580.82.07, GPU-b1"
T4 = "Tesla T4, 15360, 7.5, 580.82.07, GPU-c2"


def examined(tmp_path=None, smi: str = "", **variables) -> tuple[int, str]:
    """The exit status and output of the doctor, on a Python without any package."""
    path = os.environ["PATH"]
    if smi:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\nprintf '%s\\n' '{smi}'\n")
        program.chmod(0o755)
        path = f"{tmp_path}:{path}"
    done = subprocess.run([sys.executable, "-S", "-E", "-s", "scripts/doctor.py"], cwd=REPO,
                          capture_output=True, text=True, env={"PATH": path, **variables})
    assert done.stderr == "", done.stderr
    return done.returncode, done.stdout


def test_a_bare_python_says_the_same_as_the_preflight_of_the_whole_set_up(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # a GPU, where there is one, is left out of both
    started = time.monotonic()
    status, said = examined(CUDA_VISIBLE_DEVICES="")
    assert time.monotonic() - started < 30  # what it promises; it takes about one second
    machine = hardware.detect()
    mode = hardware.serving_mode(machine)
    assert status == 0 and "[FAIL]" not in said
    for part in (machine.cpu_model, f"{machine.cores} cores", f"{machine.ram_bytes / 1e9:.0f} GB",
                 mode.why, platform.python_version()):
        assert part in said, part
    line = said.splitlines()[-1]
    assert line.startswith("phi4-fp8: OK; ") and line.endswith(f"; tiny-phi4 {mode.key}")
    assert len(line) < 300


@pytest.mark.parametrize("asked, says, ends", [
    ("phi4", "[FAIL] model: PHI4_FP8_PROFILE=phi4: There is no profile 'phi4'", "no model phi4"),
    ("smollm2", "Will run: SmolLM2", "; smollm2 cpu-"),
    ("tiny-phi4", "Will run: the bundled model", "; tiny-phi4 cpu-")])
def test_the_model_that_is_asked_for_is_the_one_that_is_promised(asked, says, ends):
    status, said = examined(CUDA_VISIBLE_DEVICES="", PHI4_FP8_PROFILE=asked)
    assert says in said and ends in said.splitlines()[-1] and status == ("[FAIL]" in said)


def test_a_model_of_the_hub_needs_its_room_on_a_cpu_too(tmp_path):
    """Phi-4 fits a large enough RAM; then its download is looked at, else the RAM is named."""
    said = examined(CUDA_VISIBLE_DEVICES="", PHI4_FP8_PROFILE="phi-4", HF_HOME=str(tmp_path))[1]
    assert "disk for the model: 29.3 GB to fetch into" in said or (
        "[FAIL] model: PHI4_FP8_PROFILE=phi-4: Microsoft Phi-4 (14.7B) needs" in said)


def test_the_line_names_neither_the_reader_nor_the_machine():
    line = examined()[1].splitlines()[-1]
    words = re.split(r"[^\w.-]+", line)
    assert platform.node() not in words and getpass.getuser() not in words and "/" not in line


@pytest.mark.parametrize("smi, failing, says, ends", [
    (H100, set(), "Will run: Microsoft Phi-4 (14.7B); W8A8 on the GPU", "phi-4 gpu-w8a8"),
    (A40, set(), "Will run: Microsoft Phi-4 (14.7B); W8A16 on the GPU", "phi-4 gpu-w8a16"),
    ("NVIDIA L4, 23034, 8.9, 580.82.07, GPU-d3", set(), "FP8 alone: its bf16 weights do not fit",
     "phi-4 gpu-w8a8"),
    (T4, set(), "Phi-4-mini", "phi-4-mini gpu-w8a16"),
    ("GeForce GTX 1080, 8192, 6.1, 580.82.07, GPU-e4", {"GPU"}, "needs 7.5 or newer",
     "tiny-phi4 none"),
    (A40.replace("580.82.07", "550.54.15"), {"GPU"}, "needs driver 580 or newer",
     "phi-4 gpu-w8a16"),
    ("No devices were found", {"GPU"}, "nvidia-smi is there and names no GPU", "cpu-w8a16"),
], ids=["H100", "A40", "L4", "T4", "too old", "old driver", "no answer"])
def test_a_gpu_gets_the_model_and_mode_that_the_notebooks_would_choose(
        tmp_path, smi, failing, says, ends):
    _, said = examined(tmp_path, smi)
    failed = set(re.findall(r"^\[FAIL\] (\S+):", said, re.M))
    assert failed - {"disk"} == failing  # what tests the workbook need not have room for CUDA
    assert says in said.replace("Once that is mended, it will run", "Will run")
    if ends.startswith("cpu"):
        assert " tiny-phi4 cpu-" in said.splitlines()[-1]
    else:
        assert said.splitlines()[-1].endswith(ends)


def test_a_compiler_with_pythons_headers_is_found_for_a_gpu(tmp_path, a_compiler):
    assert "[OK]   C compiler: there, with Python's headers" in examined(tmp_path, H100)[1]


def test_a_gpu_without_a_compiler_or_pythons_headers_is_told_before_the_set_up(
        tmp_path):
    """Triton compiles at run time: the doctor tries it with the Python that would be used."""
    assert "C compiler" not in examined(CUDA_VISIBLE_DEVICES="")[1]
    said = examined(tmp_path, H100, CC="gcc -O2")[1]
    assert "[FAIL] C compiler: CC is 'gcc -O2'" in said and "no compiler or headers" in said


@pytest.mark.parametrize("command", ["false", "true", "no-such-python"])
def test_a_compiler_that_could_not_be_asked_for_is_not_well(command):
    said = doctor.compilation(command)
    assert not said.ok and said.detail == f"{command} gave no answer to whether there is one"


@pytest.mark.parametrize("setting, says, ends", [
    ("0", "Tesla T4, 15.0 GiB", "phi-4-mini gpu-w8a16"),
    ("1", "NVIDIA A40, 45.0 GiB", "phi-4 gpu-w8a16"),
    ("GPU-b", "NVIDIA A40, 45.0 GiB", "phi-4 gpu-w8a16"),
    ("0,1", "Tesla T4, 15.0 GiB, compute capability 7.5, driver 580.82.07; NVIDIA A40",
     "phi-4 gpu-w8a16"),
    ("2", "[OK]   GPU: none is used: CUDA_VISIBLE_DEVICES='2' hides", ""),
    ("", "[OK]   GPU: none is used: CUDA_VISIBLE_DEVICES='' hides", "")])
def test_only_a_gpu_that_cuda_sees_is_promised(tmp_path, setting, says, ends):
    _, said = examined(tmp_path, f"{T4}\n{A40}", CUDA_VISIBLE_DEVICES=setting)
    assert says in said
    if ends:
        assert said.splitlines()[-1].endswith(ends)
    else:
        assert " tiny-phi4 cpu-" in said.splitlines()[-1]
    assert ("Tesla T4" in said) == (setting in ("0", "0,1"))


def test_without_the_gpu_a_driver_that_does_not_answer_is_no_fault(tmp_path):
    said = examined(tmp_path, "No devices were found", CUDA_VISIBLE_DEVICES="")[1]
    assert "[OK]   GPU: none is used" in said


SLICED = f"""#!/bin/sh
if [ "$1" = -L ]; then
    echo 'GPU 0: NVIDIA A100-SXM4-80GB (UUID: GPU-f5)'
    echo '  MIG 3g.40gb     Device  0: (UUID: MIG-11)'
    echo '  MIG 2g.20gb     Device  1: (UUID: MIG-22)'
    echo 'GPU 1: Tesla T4 (UUID: GPU-c2)'
else
    echo 'NVIDIA A100-SXM4-80GB, 81920, 8.0, 580.82.07, GPU-f5'
    echo '{T4}'
fi
"""


@pytest.mark.parametrize("setting, names", [
    (None, ["NVIDIA A100-SXM4-80GB MIG 3g.40gb"]),
    ("MIG-22", ["NVIDIA A100-SXM4-80GB MIG 2g.20gb"]), ("GPU-c2", ["Tesla T4"]), ("GPU-f5", [])])
def test_of_a_gpu_in_slices_one_slice_is_promised(tmp_path, monkeypatch, setting, names):
    program = tmp_path / "nvidia-smi"
    program.write_text(SLICED)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if setting is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", setting)
    found = doctor.shown(doctor.gpus())
    assert [gpu.name for gpu in found] == names
    if setting == "MIG-22":
        assert found[0].memory_bytes == 20 * 10**9


def test_room_for_the_model_is_asked_where_its_files_go(tmp_path, monkeypatch):
    profile = models.PHI4
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("PHI4_FP8_WORKSPACE", str(tmp_path / "workspace"))
    free = SimpleNamespace(free=0)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: free)
    made = 0 if (REPO / ".venv-serve-gpu").is_dir() else doctor.DISK["gpu"]
    one_disk = tmp_path.stat().st_dev == REPO.stat().st_dev
    needed = profile.bf16_bytes + profile.fp8_bytes + (made if one_disk else 0)
    free.free = max(needed, made)
    assert doctor.model_disk(profile).ok
    free.free = needed - 1
    said = doctor.model_disk(profile)
    assert not said.ok and f"29.3 GB to fetch into {tmp_path}/cache/hub (HF_HOME)" in said.detail
    assert "PHI4_FP8_PROFILE=tiny-phi4" in said.detail and "PHI4_FP8_WORKSPACE" in said.detail
    (tmp_path / "cache/hub/models--microsoft--phi-4/snapshots" / profile.revision).mkdir(
        parents=True)
    assert doctor.model_disk(profile).ok  # what is there is not fetched again


@pytest.mark.parametrize("variables", [
    {}, {"HF_HOME": "/a"}, {"HF_HUB_CACHE": "/b", "HF_HOME": "/a"}, {"XDG_CACHE_HOME": "/c"},
    {"HF_HOME": "~/hf"}], ids=str)
def test_the_hubs_cache_is_where_its_client_puts_it(monkeypatch, variables):
    for name in ("HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    client = subprocess.check_output(
        [sys.executable, "-c",
         "from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"], text=True)
    assert str(doctor.hub_cache()) == client.strip()


@pytest.mark.parametrize("place", range(len(doctor.LIMITS)), ids=["cgroup v2", "cgroup v1"])
@pytest.mark.parametrize("said, least", [("3000000000", 3 * 10**9), ("max", None)])
def test_a_containers_limit_is_the_ram_it_has(monkeypatch, tmp_path, place, said, least):
    limits = [tmp_path / str(number) for number in range(len(doctor.LIMITS))]
    monkeypatch.setattr(doctor, "LIMITS", limits)
    whole = doctor.memory()
    limits[place].write_text(said + "\n")
    assert doctor.memory() == (least or whole) <= whole
    assert [str(each[0] / each[1]) for each in hardware.CGROUPS] == [
        "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"]


@pytest.mark.parametrize("kind, machine, release, libc, ok, says", [
    ("Darwin", "arm64", "24.0", ("", ""), False, "Darwin on arm64"),
    ("Windows", "AMD64", "11", ("", ""), False, "WSL 2"),
    ("Linux", "aarch64", "6.8", ("glibc", "2.39"), False, "Linux on aarch64"),
    ("Linux", "x86_64", "4.4.0-19041-Microsoft", ("glibc", "2.39"), False, "wsl --set-version"),
    ("Linux", "x86_64", "5.15.167.4-microsoft-standard-WSL2", ("glibc", "2.39"), True, "WSL 2"),
    ("Linux", "x86_64", "6.8", ("", ""), False, "not glibc"),
    ("Linux", "x86_64", "6.8", ("glibc", "2.28"), False, "need glibc 2.31"),
])
def test_a_system_that_the_wheels_are_not_for_is_told_what_to_do(
        monkeypatch, kind, machine, release, libc, ok, says):
    for name, value in (("system", kind), ("machine", machine), ("release", release),
                        ("libc_ver", libc)):
        monkeypatch.setattr(platform, name, lambda value=value: value)
    found = doctor.system()
    assert found.ok is ok and says in found.detail


def test_what_falls_short_is_said_with_the_remedy(monkeypatch):
    assert "3.11, 3.12 or 3.13" in doctor.python([]).detail
    assert "apt install python3.12-venv" in doctor.python([("p", "3.12.1", False)]).detail
    assert not doctor.ram(4 * 10**9).ok and doctor.ram(8 * 10**9).ok
    assert not doctor.disk(10**18).ok
    assert not doctor.processor("an old CPU", frozenset({"sse4_2"})).ok
    assert doctor.processor("an AVX2 CPU", frozenset({"avx2"})).ok


def test_a_library_that_vllm_loads_from_the_system_is_missed_before_a_server_stops(monkeypatch):
    assert cpu.missing_library() == "" and doctor.library().ok
    monkeypatch.setattr(cpu.ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError(name)))
    assert "apt install libnuma1" in doctor.library().detail
    assert doctor.library().short == "no libnuma"
    machine = hardware.detect()
    checks = {check.name: check for check in preflight.preflight()}
    if not machine.gpus:
        assert not checks["libnuma"].ok and "libnuma1" in checks["libnuma"].detail


def test_a_shim_without_a_python_behind_it_is_passed_over(tmp_path, monkeypatch):
    shim = tmp_path / "python3.13"
    shim.write_text("#!/bin/sh\necho 'not found' >&2\nexit 127\n")
    shim.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert [command for command, _, _ in doctor.pythons()] == [sys.executable]


@pytest.mark.parametrize("file", ["scripts/doctor.py", "helpers/__init__.py", "helpers/cpu.py",
                                  "helpers/visible_gpus.py"])
def test_it_can_be_read_by_an_old_python(file):
    tree = ast.parse((REPO / file).read_text(), feature_version=(3, 8))
    first = next(node for node in tree.body if isinstance(node, ast.ImportFrom))
    assert first.module == "__future__" and first.names[0].name == "annotations"
