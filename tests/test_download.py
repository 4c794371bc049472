"""Downloads by the real huggingface_hub client from a hub on localhost, with faults."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from local_hub import Hub, etag, serve
from safetensors.torch import save

from helpers import workspace

REPO = workspace.repo()
SHA = "0123456789abcdef0123456789abcdef01234567"
PROGRAM = """
import dataclasses, sys
from helpers import WorkbookError, hub, models
profile = dataclasses.replace(models.PHI4, repo="some/model", revision=sys.argv[1],
                              bf16_bytes=10**6)
try:
    print("path", hub.obtain(profile).path)
except WorkbookError as error:
    print(error)
"""


@pytest.fixture
def hub(tiny_base):
    names = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
    files = {name: (tiny_base.path / name).read_bytes() for name in names}
    with serve(Hub("some/model", SHA, files | {"pytorch_model.bin": b"\x80pickle"})) as server:
        yield server


def settings(hub, home) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    return clean | {"HF_HOME": str(home), "HF_ENDPOINT": hub.url, "HF_HUB_DOWNLOAD_TIMEOUT": "5"}


def obtain(hub, home, **environment) -> str:
    """What `hub.obtain` says in a process of its own, as the client reads its settings once."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, SHA], capture_output=True, text=True,
                          cwd=REPO, env=settings(hub, home) | environment)
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
    hub.files["second.safetensors"] = large
    hub.cut["second.safetensors"] = 15_000_000
    assert obtain(hub, tmp_path).startswith("path ")
    assert hub.ranges == [f"bytes={10 * 2**20}-"]
    assert (snapshot(tmp_path) / "second.safetensors").read_bytes() == large


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_download_that_was_ended_asks_for_the_missing_bytes_alone(hub, tmp_path, how):
    large = save({"numbers": torch.arange(6_000_000, dtype=torch.float32)})
    hub.files["second.safetensors"] = large
    hub.hold["second.safetensors"] = 15_000_000
    # A run started with `&` in a script hands down an ignored SIGINT.
    running = subprocess.Popen([sys.executable, "-c", PROGRAM, SHA], cwd=REPO,
                               stderr=subprocess.DEVNULL,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
                               env=settings(hub, tmp_path) | {"HF_HUB_DOWNLOAD_TIMEOUT": "60"})
    blobs = tmp_path / "hub" / "models--some--model" / "blobs"

    def half_way() -> list[int]:
        return [piece.stat().st_size for piece in blobs.glob("*.incomplete")]

    deadline = time.monotonic() + 60
    while half_way() != [10 * 2**20] and time.monotonic() < deadline:  # the client's buffer
        time.sleep(0.05)
    running.send_signal(how)
    assert running.wait(timeout=20) != 0
    (kept,) = half_way()
    assert 10 * 2**20 <= kept < len(large)
    whole = [file for file in blobs.iterdir() if file.suffix != ".incomplete"]
    assert [file.read_bytes() for file in whole] == [hub.files["model.safetensors"]]

    hub.fetched.clear()
    assert obtain(hub, tmp_path) == f"path {snapshot(tmp_path)}\n"
    assert hub.ranges == [f"bytes={kept}-"] and "model.safetensors" not in hub.fetched
    for name in hub.files.keys() - {"pytorch_model.bin"}:
        arrived = (snapshot(tmp_path) / name).resolve()
        assert arrived.read_bytes() == hub.files[name]
        assert arrived.name == etag(hub.files[name], name)  # the sum that `obtain` held it to
    assert half_way() == []


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
