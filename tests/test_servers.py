"""The arms' servers with the real vLLM: up together or in turn, and gone, whatever ends first."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers import WorkbookError, checkpoint, hardware, models, servers, serving, workspace

GB = 10**9
CPU, GPU = SimpleNamespace(device="cpu"), SimpleNamespace(device="cuda")


@pytest.fixture
def mode(tmp_workspace):
    found = hardware.serving_mode(hardware.detect())
    if found.device != "cpu":
        pytest.skip("on a GPU servers are never up together")
    return found


def flags(mode) -> list[str]:
    return serving.default_flags(models.tiny(), mode)


def all_gone(sessions: list[int], within: float = 10) -> bool:
    end = time.monotonic() + within
    while any(serving.processes(SimpleNamespace(session=each)) for each in sessions):
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def test_both_are_up_together_and_gone_after_an_error(mode, tiny_base, tiny_fp8):
    arms, seen = {"bf16": tiny_base, "fp8": tiny_fp8}, {}
    with (pytest.raises(ZeroDivisionError),
          servers.running(arms, flags(mode), mode) as running):
        for arm, server in running:
            seen[arm] = server
            assert server.checkpoint is arms[arm] and server.complete("1", max_tokens=2)
        assert all(len(serving.processes(server)) >= 3 for server in seen.values())
        assert seen["bf16"].port != seen["fp8"].port
        assert seen["bf16"].kernel == "unquantized" and seen["fp8"].kernel.startswith("CpuFp8")
        raise ZeroDivisionError
    assert list(seen) == ["bf16", "fp8"]
    assert not any(serving.processes(server) for server in seen.values())


def test_where_memory_holds_one_they_take_turns(mode, tiny_base, tiny_fp8, monkeypatch):
    monkeypatch.setattr(hardware, "available_ram", lambda: servers.MEMORY + GB)
    turns = []
    with servers.running({"bf16": tiny_base, "fp8": tiny_fp8}, flags(mode), mode) as running:
        for _, server in running:
            assert server.complete("1", max_tokens=2)
            assert not any(serving.processes(earlier) for earlier in turns)
            turns.append(server)
    assert len(turns) == 2 and not any(serving.processes(server) for server in turns)


def test_one_that_does_not_start_stops_the_other_and_says_why(mode, tmp_path, tiny_base):
    model = Path(shutil.copytree(tiny_base.path, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    config["num_hidden_layers"] += 1  # a layer that the weights do not have
    (model / "config.json").write_text(json.dumps(config))
    workspace.write_manifest(model)
    pair = [serving.VllmServer(each, flags(mode))
            for each in (tiny_base, checkpoint.verified(model))]
    with pytest.raises(WorkbookError, match="stopped while starting") as died:
        serving.start_together(pair)
    assert "not initialized from checkpoint" in died.value.meaning
    assert not any(server.is_running for server in pair)
    assert all_gone([server.session for server in pair], within=0)


def test_one_that_runs_is_not_stopped_by_a_second_start(tmp_workspace, tiny_fp8, fp8_server):
    other = serving.VllmServer(tiny_fp8)
    with pytest.raises(WorkbookError, match="already running"):
        serving.start_together([other, fp8_server])
    assert not other.is_running and fp8_server.complete("1", max_tokens=2)


# An owner of two servers, in a process of its own: says which sessions they are, then goes on.
OWNER = """
import sys, threading, time
from helpers import checkpoint, hardware, models, serving
flags = serving.default_flags(models.tiny(), hardware.serving_mode(hardware.detect()))
pair = [serving.VllmServer(checkpoint.verified(sys.argv[1]), flags) for _ in range(2)]
threading.Thread(target=serving.start_together, args=[pair], daemon=True).start()
while not all(len(serving.processes(server)) >= 2 for server in pair):
    time.sleep(0.2)
print("\\nsessions", *(server.session for server in pair), flush=True)
time.sleep(600)
"""


def test_a_pair_is_gone_after_its_owner_was_killed(mode, tiny_base):
    owner = subprocess.Popen([sys.executable, "-c", OWNER, tiny_base.path],
                             stdout=subprocess.PIPE, text=True)
    said = next(line.split()[1:] for line in owner.stdout if line.startswith("sessions"))
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    assert len(said) == 2 and all_gone([int(session) for session in said])


# The rule


def test_the_rule_is_the_free_ram_on_a_cpu(tiny_base, tiny_fp8, monkeypatch):
    pair = [tiny_base, tiny_fp8]
    for free, fits in ((9 * GB, True), (8 * GB, False), (4 * GB, False)):
        monkeypatch.setattr(hardware, "available_ram", lambda free=free: free)
        assert servers.fit_together(pair, CPU) == fits
        assert not servers.fit_together(pair, GPU)


def test_weights_count(monkeypatch, tiny_base):
    huge = SimpleNamespace(tensors=(SimpleNamespace(nbytes=30 * GB),))
    monkeypatch.setattr(hardware, "available_ram", lambda: 16 * GB)
    assert servers.fit_together([tiny_base, tiny_base], CPU)
    assert not servers.fit_together([tiny_base, huge], CPU)
