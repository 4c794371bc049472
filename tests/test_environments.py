"""Which environments a machine gets, and what it must have: with a GPU, and with it hidden."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import environments
import needs
import nvml
import nvml_library
import pytest
from conftest import REPO
from nvml_library import L4, OLD, SLICED
from one_set_up import SetupError
from rehearsal import stand_in

from helpers import compiler, hardware

ASK = """
import json, environments, nvml
from helpers import hardware, serving_env
environments.fingerprint = lambda env, repo=None: "made of this"
gpu = environments.usable_gpu()
found = nvml.driver()
print(json.dumps({
    "usable": gpu, "device": hardware.serving_mode(hardware.detect()).device,
    "driver": found and [found.version, found.cuda],
    "gpus": [[gpu.driver, gpu.cuda] for gpu in hardware.detect().gpus],
    "serving": serving_env.folder().name,
    "missing": [env.folder.name for env in environments.environments(gpu)
                if not environments.is_whole(env)]}))
"""


def ask(environ: dict) -> dict:
    """What the set-up and the helpers make of a machine, each in its way, in one process."""
    done = subprocess.run([sys.executable, "-c", ASK], cwd=REPO, capture_output=True, text=True,
                          env=environ | {"PYTHONPATH": f"{REPO}:{REPO / 'scripts'}"})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(("gpus", "shown", "usable"), [
    ((L4,), None, True), ((OLD,), None, False), ((OLD, L4), None, True), ((OLD, L4), "0", False),
    ((OLD, L4), "1", True), ((L4,), "", False), ((L4,), "-1", False), ((L4,), "none", False),
    ((OLD, L4), "GPU-1", True), ((OLD, L4), "GPU-0", False), ((L4,), "GPU", True),
    ((L4,), "GPU-9", False), ((SLICED,), "MIG-0-0", True), ((SLICED,), "GPU-0", False),
])
def test_set_up_and_helpers_see_the_same_gpu(tmp_path, gpus, shown, usable):
    environ = nvml_library.compiled(tmp_path, gpus)
    found = ask(environ if shown is None else environ | {"CUDA_VISIBLE_DEVICES": shown})
    assert found["usable"] is usable
    assert found["device"] == ("cuda" if usable else "cpu")
    assert found["serving"] == (".venv-serve-gpu" if usable else ".venv-serve")
    for each in found["gpus"]:
        assert each == found["driver"] == ["580.95.05", [13, 0]]


LOST = """
#define nvmlDeviceGetHandleByIndex_v2 handle_of_any
#define nvmlDeviceGetMemoryInfo memory_of_any
#include "{source}"
#undef nvmlDeviceGetHandleByIndex_v2
#undef nvmlDeviceGetMemoryInfo
int nvmlDeviceGetHandleByIndex_v2(unsigned index, Handle *to) {{
    return {lost} && index == 0 ? 15 : handle_of_any(index, to); /* NVML_ERROR_GPU_IS_LOST */
}}
int nvmlDeviceGetMemoryInfo(Handle d, unsigned long long *to) {{
    return !{lost} && d->index == 0 ? NOT_SUPPORTED : memory_of_any(d, to);
}}
"""


@pytest.mark.parametrize("lost", [1, 0], ids=["lost", "shares the RAM"])
@pytest.mark.parametrize(("gpus", "usable"), [((L4, L4), True), ((L4, OLD), False), ((L4,), False)])
def test_set_up_and_helpers_leave_out_the_same_gpu(tmp_path, gpus, usable, lost):
    """The first one, which NVML counts and does not describe; those beside it stay."""
    environ = nvml_library.compiled(tmp_path, gpus)
    source = tmp_path / "lost.c"
    source.write_text(LOST.format(source=stand_in.HERE / "nvml.c", lost=lost))
    library = Path(environ["LD_LIBRARY_PATH"]) / "libnvidia-ml.so.1"
    subprocess.run([compiler.found(), "-shared", "-fPIC", "-o", library, source], check=True)
    found = ask(environ)
    assert found["usable"] is usable and len(found["gpus"]) == len(gpus) - 1
    assert found["device"] == ("cuda" if usable else "cpu")
    assert found["serving"] == (".venv-serve-gpu" if usable else ".venv-serve")


def test_without_a_driver_nothing_is_said_of_one(monkeypatch):
    monkeypatch.setattr(nvml.ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError(name)))
    assert nvml.driver() is None and not nvml.usable_gpu()


def made(env: environments.Environment, cuda: str) -> None:
    """An environment of nothing but what tells whether it is whole; `cuda`: its torch's."""
    torch = env.folder / "lib" / "python3.11" / "site-packages" / "torch"
    torch.mkdir(parents=True, exist_ok=True)
    (torch / "version.py").write_text(
        f"from typing import Optional\ncuda: Optional[str] = {cuda}\n")
    env.python.parent.mkdir(exist_ok=True)
    env.python.unlink(missing_ok=True)
    env.python.symlink_to(sys.executable)
    env.stamp.write_text(environments.fingerprint(env))


def whole(gpu: bool, repo: Path) -> dict[str, bool]:
    return {env.folder.name: environments.is_whole(env)
            for env in environments.environments(gpu, repo)}


@pytest.fixture
def place(tmp_path) -> Path:
    """A folder for environments, with the lists they are made from."""
    (tmp_path / "requirements").symlink_to(REPO / "requirements")
    (tmp_path / "requirements.txt").symlink_to(REPO / "requirements.txt")
    return tmp_path


def test_a_gpu_that_has_come_makes_the_cpu_build_of_the_notebooks_torch_anew(place):
    for env in environments.environments(False, place):
        made(env, "None")
    assert whole(False, place) == {".venv": True, ".venv-serve": True}
    assert whole(True, place) == {".venv": False, ".venv-serve-gpu": False}


def test_a_gpu_that_is_hidden_for_a_command_leaves_its_environments_whole(place):
    for env in environments.environments(True, place):
        made(env, "'13.0'")
    assert whole(True, place) == {".venv": True, ".venv-serve-gpu": True}
    assert whole(False, place) == {".venv": True, ".venv-serve": False}
    made(environments.environments(False, place)[1], "None")
    assert whole(False, place) == {".venv": True, ".venv-serve": True}
    assert whole(True, place) == {".venv": True, ".venv-serve-gpu": True}


def test_an_environment_that_got_no_cuda_torch_is_not_finished(place, monkeypatch):
    env = environments.environments(True, place)[0]
    made(env, "None")
    env.stamp.unlink()
    monkeypatch.setattr(environments, "run_uv", lambda *command: None)
    with pytest.raises(SetupError, match="built without CUDA"):
        environments.install(env, Path("uv"), {}, [])
    assert not env.stamp.exists()


# --- what they take on disk -----------------------------------------------------------------------

@pytest.mark.parametrize("gpu", [False, True], ids=["CPU", "GPU"])
@pytest.mark.parametrize("index", [0, 1], ids=["notebooks", "serving"])
def test_the_figures_of_the_disk_are_measured(gpu, index):
    """The environments that are here: their files by blocks of 4 KiB, each counted once."""
    env = environments.environments(gpu)[index]
    if not environments.is_whole(env) or (hardware.torch_cuda(env.folder) is not None) != env.cuda:
        pytest.skip(f"there is no such {env.folder.name} on this machine")
    files = {(each.st_dev, each.st_ino): each.st_size for each in
             map(os.lstat, (file for file in env.folder.rglob("*")))}
    measured = sum(-(-size // 4096) * 4096 for size in files.values())
    assert 0.85 * env.nbytes <= measured <= 1.05 * env.nbytes, measured


def test_doctor_asks_for_what_the_readme_asks_for():
    """What the set-up asks for and the bundled model's files: no disk is refused needlessly."""
    import doctor
    import test_readme

    for name in ("cpu", "gpu"):
        needed = test_readme.needed(gpu=name == "gpu")
        assert doctor.DISK[name] == int(test_readme.gigabytes(needed)) * needs.GB


# --- what must be there before anything is downloaded ---------------------------------------------

SERVE = REPO / "requirements" / "constraints" / "serve.txt"


def set_up(environ: dict, **variables) -> str:
    """What a set-up that stops says; everything it would install from is closed."""
    folder = environ["LD_LIBRARY_PATH"]
    for name in ("Makefile", "scripts", "helpers", "requirements", "requirements.txt",
                 "pyproject.toml"):
        if not (Path(folder) / name).exists():
            os.symlink(REPO / name, Path(folder) / name)
    code = ("import sys; from pathlib import Path; import environments; "
            f"environments.REPO = Path({folder!r}); "
            "environments.environments.__defaults__ = environments.is_whole.__defaults__ = "
            "environments.fingerprint.__defaults__ = (environments.REPO,); "
            "environments.require_disk = lambda *_: None; "  # the test's own may be small
            "environments.bootstrap_uv = lambda: sys.exit('something would be downloaded'); "
            "sys.exit(environments.main())")
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True,
                          env=environ | {"PYTHONPATH": str(REPO / "scripts")} | variables)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    return done.stderr


def test_too_old_a_driver_is_said_before_anything_is_downloaded(tmp_path, a_compiler):
    said = set_up(nvml_library.compiled(tmp_path, driver=("550.54.15", 12040)))
    for words in ("Set-up stopped: The NVIDIA driver 550.54.15 supports CUDA up to 12.4",
                  "needs CUDA 13.0", "install driver 580 or newer", "Nothing was downloaded"):
        assert words in said, said
    assert "would be downloaded" in set_up(nvml_library.compiled(tmp_path))


def test_the_cuda_that_is_needed_is_the_one_that_vllms_torch_is_built_for():
    assert needs.torch_cuda(SERVE) == (13, 0)
    assert re.search(r"^nvidia-cudnn-cu13==", SERVE.read_text(), re.M)
    built = hardware.torch_cuda(hardware.serving_folder("cuda"))
    if built is not None:  # on a machine with a GPU
        assert needs.torch_cuda(SERVE) == built


def test_doctor_asks_for_the_same_driver():
    import doctor

    assert hardware.OLDEST_DRIVER[needs.torch_cuda(SERVE)[0]] == doctor.DRIVER


def test_without_pythons_headers_a_gpus_set_up_stops(tmp_path):
    """The header's folder is named by Python itself; another one is named here to it."""
    environ = nvml_library.compiled(tmp_path)
    (tmp_path / "sitecustomize.py").write_text(
        "import sysconfig\nsysconfig.get_path = lambda *of: '/nonexistent/include'\n")
    said = set_up(environ, PYTHONPATH=f"{REPO / 'scripts'}:{tmp_path}")
    package = "python{}.{}-dev".format(*sys.version_info[:2])
    assert "Python.h is not in /nonexistent/include" in said and f"apt install {package}" in said


def test_a_gpus_set_up_looks_for_the_compilers_that_triton_takes(
        tmp_path, monkeypatch, a_compiler):
    """Triton: what CC names, else gcc, else clang; never cc."""
    real = compiler.found()
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "cc").symlink_to(real)
    with pytest.raises(SetupError, match="no C compiler.* apt install build-essential"):
        needs.require_compiler()
    for name in ("clang", "gcc"):  # the second is preferred
        (tmp_path / name).symlink_to(real)
        assert compiler.found() == str(tmp_path / name)
    monkeypatch.setenv("CC", str(real))
    assert compiler.found() == str(real)
    monkeypatch.setenv("CC", f"{real} -O2")
    with pytest.raises(SetupError, match="CC is '.* -O2', which is no program.*: unset CC"):
        needs.require_compiler()


def test_a_compiler_without_the_c_librarys_headers_is_told_so(
        tmp_path, monkeypatch, a_compiler):
    (tmp_path / "Python.h").write_text("#include <no_such_header.h>\n")
    monkeypatch.setattr(compiler, "include_folder", lambda: str(tmp_path))
    said = compiler.fault()
    assert "no_such_header.h" in said and "apt install build-essential" in said


def test_a_compiler_that_speaks_another_language_is_asked_in_english(tmp_path, monkeypatch):
    """gcc translates "error:" as well, by the reader's locale."""
    speaking = tmp_path / "gcc"
    speaking.write_text("#!/bin/sh\nword=Fehler\n[ \"$LC_ALL\" = C ] && word=error\n"
                        "echo \"<stdin>:1:10: $word: Python.h: no such file\" >&2\nexit 1\n")
    speaking.chmod(0o755)
    monkeypatch.setenv("CC", str(speaking))
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    assert "Python's header Python.h is not in" in compiler.fault()
