"""Faults of disks: full, read-only, with something in the way; nothing half-done, nothing lost."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from helpers import WorkbookError, checkpoint, hardware, models, quantize, streaming, workspace


def mount(*arguments) -> None:
    if os.geteuid():
        pytest.skip("mounting needs root")
    ran = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True)
    if ran.returncode:
        pytest.skip(f"this container does not allow mounts: {ran.stderr.strip()}")


@pytest.fixture
def disk(tmp_path):
    """A disk of its own of 16 MB, and a function that leaves so many bytes free on it."""
    place = tmp_path / "disk"
    place.mkdir()
    mount("-t", "tmpfs", "-o", "size=16m", "tmpfs", place)

    def leave(nbytes: int) -> None:
        with open(place / "somebody-elses", "ab") as file:
            file.write(bytes(max(0, shutil.disk_usage(place).free - nbytes)))

    yield place, leave
    subprocess.run(["umount", place], check=True)


@pytest.fixture
def read_only(tmp_path):
    """A function that makes a folder read-only, by a mount of its own."""
    mounted = []

    def make(folder: Path) -> Path:
        mount("--bind", folder, folder)
        mounted.append(folder)
        mount("-o", "remount,ro,bind", folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


def names(place: Path) -> set[str]:
    return {file.name for file in place.iterdir()}


# Full


@pytest.mark.fault("a disk that is full when a small file of results is written")
def test_a_full_disk_under_write_json(disk, happened):
    place, leave = disk
    workspace.write_json(place / "results" / "a.json", {"a": 1})
    leave(0)
    with pytest.raises(WorkbookError, match="The disk filled up while a.json was being") as said:
        workspace.write_json(place / "results" / "a.json", {"a": list(range(100_000))})
    assert json.loads((place / "results" / "a.json").read_text()) == {"a": 1}
    assert names(place / "results") == {"a.json"}
    happened(said.value)


@pytest.mark.fault("a disk that fills up after a stream's last shard")
@pytest.mark.parametrize("then", ["_describe", "write_manifest"])
def test_a_full_disk_after_the_last_shard(disk, tiny_base, monkeypatch, capsys, then, happened):
    place, leave = disk
    module = streaming if then == "_describe" else workspace
    original = getattr(module, then)

    def somebody_takes_the_space(*arguments):
        leave(0)
        original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, then, somebody_takes_the_space)
        with pytest.raises(WorkbookError, match="The disk filled up while made was") as said:
            quantize.stream(tiny_base, place / "made")
    assert "The shards that were finished are kept" in said.value.meaning
    assert not (place / "made").exists()
    (place / "somebody-elses").unlink()
    made = quantize.stream(tiny_base, place / "made")
    assert "1 of 1 shards are there" in capsys.readouterr().out
    workspace.verify(made.path)
    assert names(place) == {"made"}
    assert made.made_from == quantize.origin(tiny_base, quantize.RECIPE)
    happened(said.value)


@pytest.mark.fault("a disk with no room for the sums of a model without a manifest")
def test_a_full_disk_under_the_kept_sums(disk, tiny_base, tmp_path, monkeypatch, happened):
    place, leave = disk
    copy = shutil.copytree(tiny_base.path, tmp_path / "mine")
    (copy / workspace.MANIFEST).unlink()
    (place / "workspace").mkdir()
    monkeypatch.setenv("PHI4_FP8_WORKSPACE", str(place / "workspace"))
    leave(0)
    assert checkpoint.verified(copy).fingerprint == checkpoint.verified(copy).fingerprint
    assert names(place / "workspace") == set()
    happened("the sums are taken again each time")


# Not to be written


@pytest.mark.fault("a read-only workspace in which nothing has been made")
def test_a_read_only_workspace(read_only, tmp_path, tiny_base, monkeypatch, happened):
    (tmp_path / "workspace").mkdir()
    monkeypatch.setenv("PHI4_FP8_WORKSPACE", str(read_only(tmp_path / "workspace")))
    monkeypatch.setattr(hardware, "available_ram", lambda: 1_000_000)
    for write in (lambda: quantize.fp8_checkpoint(models.tiny(), tiny_base),
                  lambda: quantize.save(None, tiny_base, quantize.target(models.tiny())),
                  lambda: workspace.write_json(workspace.root() / "a" / "b.json", {}),
                  lambda: workspace.folder("logs")):
        with pytest.raises(WorkbookError, match="cannot be written: Read-only file sys") as said:
            write()
        assert "PHI4_FP8_WORKSPACE" in said.value.remedy
    happened(said.value)


@pytest.mark.fault("a read-only folder in which a new workspace should be")
def test_no_workspace_can_be_made(read_only, tmp_path, monkeypatch, happened):
    (tmp_path / "shelf").mkdir()
    monkeypatch.setenv("PHI4_FP8_WORKSPACE", str(read_only(tmp_path / "shelf") / "workspace"))
    with pytest.raises(WorkbookError, match="workspace cannot be written: Read-only") as said:
        workspace.root()
    happened(said.value)


@pytest.mark.fault("a read-only workspace that holds a finished checkpoint: it is read")
def test_a_read_only_workspace_is_read(read_only, tmp_path, tiny_base, tiny_fp8, monkeypatch,
                                       happened):
    (tmp_path / "workspace").mkdir()
    monkeypatch.setenv("PHI4_FP8_WORKSPACE", str(tmp_path / "workspace"))
    shutil.copytree(tiny_fp8.path, quantize.target(models.tiny()))
    read_only(tmp_path / "workspace")
    assert quantize.fp8_checkpoint(models.tiny(), tiny_base).fingerprint == tiny_fp8.fingerprint
    happened("it is read, and nothing is written")


@pytest.mark.fault("a file where a folder should be")
@pytest.mark.parametrize("blocked, use", [
    ("workspace", workspace.root),
    ("workspace/logs", lambda: workspace.folder("logs")),
    ("workspace/results", lambda: workspace.write_json(workspace.root() / "results/a.json", {})),
    ("workspace/checkpoints", lambda: quantize.stream(
        models.tiny().checkpoint, quantize.target(models.tiny()))),
    ("workspace/checkpoints", lambda: quantize.save(
        None, models.tiny().checkpoint, quantize.target(models.tiny()))),
    ("workspace/checkpoints/tiny-phi4-fp8-dynamic", lambda: quantize.save(
        None, models.tiny().checkpoint, quantize.target(models.tiny()))),
    ("workspace/checkpoints/tiny-phi4-fp8-dynamic", lambda: quantize.stream(
        models.tiny().checkpoint, quantize.target(models.tiny()))),
    ("workspace/checkpoints/.tiny-phi4-fp8-dynamic.streaming", lambda: quantize.stream(
        models.tiny().checkpoint, quantize.target(models.tiny()))),
])
def test_a_file_in_the_way(tmp_path, monkeypatch, blocked, use, happened):
    monkeypatch.setenv("PHI4_FP8_WORKSPACE", str(tmp_path / "workspace"))
    file = tmp_path / blocked
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("mine")
    with pytest.raises(WorkbookError, match="cannot be written: .*should be") as said:
        use()
    assert file.read_text() == "mine"
    happened(said.value)


@pytest.mark.fault("a folder where a file of results should be")
def test_a_folder_in_the_way(tmp_path, happened):
    (tmp_path / "a.json").mkdir()
    with pytest.raises(WorkbookError, match="there is a folder of that name") as said:
        workspace.write_json(tmp_path / "a.json", {})
    assert names(tmp_path) == {"a.json"}
    happened(said.value)


@pytest.mark.fault("a workspace whose name is longer than a file system takes")
def test_a_long_name(tmp_path, monkeypatch, happened):
    monkeypatch.setenv("PHI4_FP8_WORKSPACE", str(tmp_path / ("w" * 300)))
    with pytest.raises(WorkbookError, match="cannot be written: File name too long") as said:
        workspace.root()
    happened(said.value)


@pytest.mark.fault("a workspace where the system makes no folders")
def test_a_workspace_in_proc(monkeypatch, happened):
    monkeypatch.setenv(workspace.VARIABLE, "/proc/workspace")
    with pytest.raises(WorkbookError, match="/proc/workspace cannot be written") as said:
        workspace.root()
    assert "PHI4_FP8_WORKSPACE" in said.value.remedy
    happened(said.value)
