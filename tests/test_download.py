"""Downloads by the real huggingface_hub client from a hub on localhost, with faults."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import REPO
from local_hub import Hub, serve
from safetensors.torch import save

SHA = "0123456789abcdef0123456789abcdef01234567"
PROGRAM = """
import dataclasses, sys
from helpers import WorkbookError, models
profile = dataclasses.replace(models.PHI4, repo="some/model", revision=sys.argv[1],
                              bf16_bytes=10**6)
try:
    print("path", models.obtain(profile))
except WorkbookError as error:
    print(error)
"""


@pytest.fixture
def hub(tiny_base):
    names = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
    files = {name: (tiny_base / name).read_bytes() for name in names}
    with serve(Hub("some/model", SHA, files | {"pytorch_model.bin": b"\x80pickle"})) as server:
        yield server


def obtain(hub, home, **environment) -> str:
    """What `models.obtain` says in a process of its own, as the client reads its settings once."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    done = subprocess.run([sys.executable, "-c", PROGRAM, SHA], capture_output=True, text=True,
                          cwd=REPO, env=clean | {"HF_HOME": str(home), "HF_ENDPOINT": hub.url,
                                                 "HF_HUB_DOWNLOAD_TIMEOUT": "5"} | environment)
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout


def snapshot(home):
    return home / "hub" / "models--some--model" / "snapshots" / SHA


def test_what_is_needed_arrives_and_pickles_do_not(hub, tmp_path):
    assert obtain(hub, tmp_path) == f"path {snapshot(tmp_path)}\n"
    arrived = {f.name: f.read_bytes() for f in snapshot(tmp_path).iterdir()}
    assert arrived == {n: c for n, c in hub.files.items() if n != "pytorch_model.bin"}
    hub.asked.clear()
    assert obtain(hub, tmp_path, HF_HUB_OFFLINE="1").startswith("path ")
    assert obtain(hub, tmp_path).startswith("path ")
    assert hub.asked == []  # a pinned revision that is there needs no hub


def test_a_transfer_that_breaks_goes_on_where_it_was(hub, tmp_path):
    # larger than the ten megabytes that the client writes at once
    large = save({"numbers": torch.arange(6_000_000, dtype=torch.float32)})
    hub.files["large.safetensors"] = large
    hub.cut["large.safetensors"] = 15_000_000
    assert obtain(hub, tmp_path).startswith("path ")
    assert hub.ranges == [f"bytes={10 * 2**20}-"]
    assert (snapshot(tmp_path) / "large.safetensors").read_bytes() == large


def test_a_file_damaged_on_the_way_is_found_removed_and_fetched_again(hub, tmp_path):
    hub.flip = {"model.safetensors"}
    said = obtain(hub, tmp_path)
    assert "model.safetensors arrived damaged (its checksum differs) and has been removed" in said
    hub.flip = set()
    assert obtain(hub, tmp_path).startswith("path ")


def test_a_small_file_damaged_on_the_way_is_found_too(hub, tmp_path):
    hub.flip = {"config.json"}
    assert "config.json arrived damaged" in obtain(hub, tmp_path)


@pytest.mark.parametrize(("fault", "says"), [
    ("gated", "its owner asks for an agreement first"),
    ("missing", "the hub does not know it"),
    ("busy", "the hub asks for a pause (HTTP 429)"),
    ("broken", "the hub answered HTTP 503"),
])
def test_a_refusal_is_a_sentence(hub, tmp_path, fault, says):
    hub.fault = fault
    said = obtain(hub, tmp_path)
    assert f"some/model at 01234567 could not be downloaded: {says}." in said
    assert "tiny-phi4, which is bundled" in said


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_disk_that_fills_up_is_a_sentence(hub, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk]).returncode:
        pytest.skip("this container does not allow mounts")
    try:
        assert "could not be downloaded: the disk is full" in obtain(hub, disk)
    finally:
        subprocess.run(["umount", disk], check=True)
