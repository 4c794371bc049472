"""Artefacts are finished and whole, or not there."""

import hashlib
import os
import shutil
import subprocess
import sys

import pytest

from helpers import WorkbookError, workspace


def make(target, **files):
    with workspace.building(target) as partial:
        for name, text in files.items():
            (partial / name).write_text(text)


def test_a_built_directory_is_whole_and_its_sums_are_those_of_sha256(tmp_path):
    make(tmp_path / "model", weights="abc", config="{}")
    workspace.verify(tmp_path / "model")
    assert workspace.is_whole(tmp_path / "model")
    entry = workspace.read_manifest(tmp_path / "model")["weights"]
    assert entry == {"bytes": 3, "sha256": hashlib.sha256(b"abc").hexdigest()}
    assert [f.name for f in tmp_path.iterdir()] == ["model"]


def test_a_flipped_bit_is_found_and_the_file_it_was_linked_to_keeps_its_own(tmp_path):
    make(tmp_path / "model", weights="abc", config="{}")
    shutil.copytree(tmp_path / "model", tmp_path / "copy", copy_function=os.link)
    workspace.flip_a_bit(tmp_path / "copy" / "weights")
    assert (tmp_path / "copy" / "weights").read_bytes() == b"abb"
    with pytest.raises(WorkbookError, match="weights has changed since it was written"):
        workspace.verify(tmp_path / "copy")
    workspace.verify(tmp_path / "model")


def test_an_error_inside_leaves_the_old_directory_and_nothing_else(tmp_path):
    make(tmp_path / "model", weights="old")
    with pytest.raises(RuntimeError), workspace.building(tmp_path / "model") as partial:
        (partial / "weights").write_text("new, half")
        raise RuntimeError
    assert (tmp_path / "model" / "weights").read_text() == "old"
    assert [f.name for f in tmp_path.iterdir()] == ["model"]


def test_a_killed_writer_leaves_no_target_and_its_leavings_are_removed(tmp_path):
    script = ("import os, signal\nfrom pathlib import Path\nfrom helpers import workspace\n"
              f"with workspace.building(Path({str(tmp_path / 'model')!r})) as partial:\n"
              "    (partial / 'weights').write_text('half')\n"
              "    os.kill(os.getpid(), signal.SIGKILL)\n")
    assert subprocess.run([sys.executable, "-c", script]).returncode == -9
    assert not (tmp_path / "model").exists()
    assert len(list(tmp_path.iterdir())) == 1
    make(tmp_path / "model", weights="whole")
    assert [f.name for f in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("damage, says", [
    (lambda d: (d / "weights").unlink(), "weights is missing"),
    (lambda d: (d / "weights").write_text("ab"), "2 bytes instead of 3"),
    (lambda d: (d / "weights").write_text("abd"), "weights has changed"),
    (lambda d: (d / workspace.MANIFEST).unlink(), "never finished"),
    (lambda d: (d / workspace.MANIFEST).write_text("{"), "MANIFEST.json is damaged: it is not"),
])
def test_damage_is_named(tmp_path, damage, says):
    make(tmp_path / "model", weights="abc")
    damage(tmp_path / "model")
    with pytest.raises(WorkbookError, match=says):
        workspace.verify(tmp_path / "model")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_disk_that_fills_up_is_a_sentence_and_leaves_nothing(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk]).returncode:
        pytest.skip("this container does not allow mounts")
    try:
        with (pytest.raises(WorkbookError, match="disk filled up"),
              workspace.building(disk / "model") as partial):
            (partial / "weights").write_bytes(bytes(2 * 2**20))
        assert list(disk.iterdir()) == []
        with (pytest.raises(WorkbookError, match="needs 0.0 GB of disk"),
              workspace.building(disk / "model", needs_bytes=10**7)):
            pytest.fail("it was started although the disk is too small")
    finally:
        subprocess.run(["umount", disk], check=True)


def test_write_json_keeps_the_old_content_when_the_new_cannot_be_written(tmp_path):
    workspace.write_json(tmp_path / "a.json", [1])
    with pytest.raises(TypeError, match="not JSON serializable"):
        workspace.write_json(tmp_path / "a.json", [object()])
    assert (tmp_path / "a.json").read_text() == "[\n 1\n]\n"


def test_the_workspace_moves_with_its_variable(tmp_workspace):
    assert workspace.root() == tmp_workspace.resolve()
    assert tmp_workspace.is_dir()
