"""`make doctor`: it runs on a bare Python, agrees with the preflight, and names what is missing."""

import ast
import getpass
import platform
import re
import subprocess
import sys
import time

import doctor
import pytest
from conftest import REPO

from helpers import cpu, hardware, preflight

H100 = "NVIDIA H100 80GB HBM3, 81559, 9.0, 580.82.07"  # as nvidia-smi prints them
A40 = "NVIDIA A40, 46068, 8.6, 580.82.07"


def examined(tmp_path=None, smi: str = "", **variables) -> tuple[int, str]:
    """The exit status and output of the doctor, on a Python without any package."""
    path = "/usr/bin:/bin"
    if smi:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\nprintf '%s\\n' '{smi}'\n")
        program.chmod(0o755)
        path = f"{tmp_path}:{path}"
    done = subprocess.run([sys.executable, "-S", "-E", "-s", "scripts/doctor.py"], cwd=REPO,
                          capture_output=True, text=True, env={"PATH": path, **variables})
    assert done.stderr == "", done.stderr
    return done.returncode, done.stdout


def test_a_bare_python_says_the_same_as_the_preflight_of_the_whole_set_up():
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


def test_the_line_names_neither_the_reader_nor_the_machine():
    line = examined()[1].splitlines()[-1]
    words = re.split(r"[^\w.-]+", line)
    assert platform.node() not in words and getpass.getuser() not in words and "/" not in line


@pytest.mark.parametrize("smi, failing, says, ends", [
    (H100, set(), "Will run: Microsoft Phi-4 (14.7B); W8A8 on the GPU", "phi-4 gpu-w8a8"),
    (A40, set(), "Will run: Microsoft Phi-4 (14.7B); W8A16 on the GPU", "phi-4 gpu-w8a16"),
    ("NVIDIA L4, 23034, 8.9, 580.82.07", set(), "FP8 alone: its bf16 weights do not fit",
     "phi-4 gpu-w8a8"),
    ("Tesla T4, 15360, 7.5, 580.82.07", set(), "Phi-4-mini", "phi-4-mini gpu-w8a16"),
    ("GeForce GTX 1080, 8192, 6.1, 580.82.07", {"GPU"}, "needs 7.5 or newer", "tiny-phi4 none"),
    ("NVIDIA A40, 46068, 8.6, 550.54.15", {"GPU"}, "needs driver 580 or newer", "phi-4 gpu-w8a16"),
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


@pytest.mark.parametrize("file", ["scripts/doctor.py", "helpers/__init__.py", "helpers/cpu.py"])
def test_it_can_be_read_by_an_old_python(file):
    tree = ast.parse((REPO / file).read_text(), feature_version=(3, 8))
    first = next(node for node in tree.body if isinstance(node, ast.ImportFrom))
    assert first.module == "__future__" and first.names[0].name == "annotations"
