"""`make lock`: pins of three Pythons in one file, and what uv is asked for each."""

import os
import re
import subprocess
import sys
import zipfile

import environments
import lock
import pytest


def test_a_pin_that_not_every_python_has_gets_a_marker():
    resolved = {"3.11": ["a==1", "b==2"], "3.12": ["a==1", "b==3"], "3.13": ["b==3", "a==1"]}
    assert lock.merge(resolved) == [
        "a==1", "b==2 ; python_version == '3.11'",
        "b==3 ; python_version == '3.12' or python_version == '3.13'"]


def test_the_pins_of_one_python_are_found_again():
    resolved = {"3.11": ["a==1", "b==2"], "3.12": ["a==1", "b==3"], "3.13": ["a==1"]}
    held = "\n".join([lock.HEADER.format("requirements.txt").strip(), *lock.merge(resolved)])
    for python, pins in resolved.items():
        found = [line for line in lock.for_python(held, python).splitlines() if line[0] != "#"]
        assert found == pins


@pytest.mark.parametrize(("name", "torchs"), [
    ("torch==2.13.0", True), ("nvidia-cublas-cu12==12.9", True), ("cuda-bindings==13.0", True),
    ("nvidia-nccl-cu13==2.28", True), ("nvidia-ml-py==13.580", False), ("torchdata==1", False),
    ("cudatoolkit==1", False)])
def test_torchs_own_packages_are_told_from_the_rest(name, torchs):
    assert bool(lock.TORCH_OWN.match(name)) == torchs


@pytest.fixture
def index(tmp_path):
    """Wheels of two packages, one of which has a newer version and needs the other on 3.12 on."""
    def wheel(name: str, version: str, needs: str = "") -> None:
        info = f"{name}-{version}.dist-info"
        with zipfile.ZipFile(tmp_path / f"{name}-{version}-py3-none-any.whl", "w") as file:
            file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\n"
                          f"Version: {version}\n" + (f"Requires-Dist: {needs}\n" if needs else ""))
            file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any")
            file.writestr(f"{info}/RECORD", "")

    wheel("one", "1.0", "two; python_version >= '3.12'")
    wheel("two", "1.0")
    wheel("two", "2.0")
    return tmp_path


def test_uv_resolves_each_python_and_keeps_what_is_held(index, tmp_path, monkeypatch):
    """The real uv, with a folder of wheels for its index."""
    uv, _ = environments.bootstrap_uv()
    (index / "requirements.txt").write_text("one\n")
    held = index / "held.txt"
    monkeypatch.setattr(lock, "REPO", index)
    for name in [name for name in os.environ if name.startswith("UV_")]:
        monkeypatch.delenv(name)
    config = index / "uv.toml"
    config.write_text(f'no-index = true\nfind-links = ["{index}"]\n')
    monkeypatch.setenv("UV_CONFIG_FILE", str(config))
    resolved = {p: lock.resolve(uv, p, "requirements.txt", None, held) for p in lock.PYTHONS}
    assert resolved == {"3.11": ["one==1.0"], "3.12": ["one==1.0", "two==2.0"],
                        "3.13": ["one==1.0", "two==2.0"]}
    held.write_text("one==1.0\ntwo==1.0 ; python_version == '3.12'\n")
    again = lock.resolve(uv, "3.12", "requirements.txt", None, held)
    assert again == ["one==1.0", "two==1.0"]  # a version that still fits is kept


def test_a_wheel_lying_on_this_machine_does_not_end_up_in_the_lock(index, monkeypatch):
    uv, _ = environments.bootstrap_uv()
    (index / "requirements.txt").write_text("one\n")
    monkeypatch.setattr(lock, "REPO", index)
    (index / "uv.toml").write_text("no-index = true\n")
    monkeypatch.setenv("UV_CONFIG_FILE", str(index / "uv.toml"))
    monkeypatch.setenv("UV_FIND_LINKS", str(index))
    with pytest.raises(lock.LockError, match="could not be resolved for Python 3.11"):
        lock.resolve(uv, "3.11", "requirements.txt", None, index / "held.txt")


def test_the_committed_constraints_are_as_make_lock_writes_them():
    for requirements, name, _, drop_torch in lock.SETS:
        header, *pins = (lock.CONSTRAINTS / name).read_text().splitlines()
        assert header + "\n" == lock.HEADER.format(requirements)
        resolved = {python: lock.for_python("\n".join(pins), python).splitlines()
                    for python in lock.PYTHONS}
        assert lock.merge(resolved) == pins
        assert not (drop_torch and [pin for pin in pins if lock.TORCH_OWN.match(pin)])
        assert all(re.match(r"[a-z0-9.-]+==\S+( ; |$)", pin) for pin in pins)


def test_make_lock_says_a_sentence_when_uv_does_not_resolve(tmp_path):
    uv, _ = environments.bootstrap_uv()
    offline = dict(os.environ, UV_OFFLINE="1", UV_CACHE_DIR=str(tmp_path / "cache"))
    done = subprocess.run([sys.executable, lock.__file__, uv], env=offline, capture_output=True,
                          text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "requirements.txt could not be resolved for Python 3.11" in done.stderr
