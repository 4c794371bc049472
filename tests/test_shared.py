"""Servers of `make serve`, and a participant who has nothing but their addresses and their key."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import serve
import stand_in
from conftest import REPO

from helpers import (
    WorkbookError,
    address,
    capacity,
    client,
    course,
    evaluation,
    hardware,
    ledger,
    models,
    serving,
    shared,
)

GB = 10**9


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """`make serve` of the bf16 arm in a workspace of its own, until Ctrl-C."""
    place, port = tmp_path_factory.mktemp("instructor"), address.free_port(())
    env = {**os.environ, "PHI4_FP8_WORKSPACE": str(place), models.VARIABLE: "tiny-phi4",
           "PYTHONPATH": str(REPO)}
    served = subprocess.Popen(
        [sys.executable, REPO / "scripts" / "serve.py", "bf16", address.LOOPBACK, str(port)],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said = []
    for line in served.stdout:
        said.append(line)
        if line.startswith("Then: export"):
            break
    assert served.poll() is None and said[-1].startswith("Then"), "".join(said)
    children = psutil.Process(served.pid).children(recursive=True)
    yield SimpleNamespace(url=f"http://127.0.0.1:{port}", key=place / "serve.key", port=port,
                          said="".join(said), processes=children)
    served.send_signal(signal.SIGINT)
    assert served.wait(timeout=30) == 0
    assert not psutil.wait_procs(children, timeout=10)[1]


@pytest.fixture
def participant(room, tmp_workspace, monkeypatch):
    monkeypatch.setenv(models.VARIABLE, "tiny-phi4")
    monkeypatch.setenv(shared.SERVERS, f"bf16={room.url}")
    monkeypatch.setenv(shared.KEY_FILE, str(room.key))


def test_the_key_is_its_owners_alone_and_asked_for_on_every_route(room):
    assert room.key.stat().st_mode & 0o777 == 0o600
    key = room.key.read_text().strip()
    assert len(key) >= 32 and key not in room.said
    assert not any(key in " ".join(process.cmdline()) for process in room.processes)
    routes = ("/about", "/about/tokenizer.json", "/v1/models", "/metrics", "/tokenize")
    for route in routes:
        assert client.session().get(room.url + route).status_code == 401
        assert client.session("another").get(room.url + route).status_code == 401
    assert client.session(key).get(room.url + "/about").ok


def test_this_machine_alone_can_reach_it(room):
    listening = {c.laddr.ip for process in room.processes for c in process.net_connections("inet")
                 if c.status == psutil.CONN_LISTEN and c.laddr.port == room.port}
    assert listening == {"127.0.0.1"}


def test_only_the_tokenizers_files_are_given_away(room):
    http = client.session(room.key.read_text().strip())
    own = REPO / "data" / "tiny_phi4"
    assert http.get(f"{room.url}/about/tokenizer.json").content == (
        own / "tokenizer.json").read_bytes()
    for name in ("model.safetensors", "manifest.json", "../serve.key", "..%2Fserve.key",
                 "/etc/hostname", "nothing"):
        assert http.get(f"{room.url}/about/{name}").status_code == 404, name
    assert "folder" not in http.get(f"{room.url}/about").json()


def test_a_participant_evaluates_on_it_and_the_ledger_says_so(room, participant, tiny_base):
    opened = course.open_course()
    assert "shared" in repr(opened) and shared.SERVERS in repr(opened)
    assert opened.served == models.Profile(**{**vars(models.tiny()), "checkpoint": None})
    with opened.serve(["--no-such-flag"]) as running:
        [(arm, server)] = running
    assert arm == "bf16" and server.kernel == "unquantized" and server.shared
    assert server.checkpoint.fingerprint == tiny_base.fingerprint
    assert server.model != tiny_base.path and "KV cache size" in server.log()
    score = evaluation.run(server, opened.served, arm, limit=4)
    assert score.n == 4 and all(item["response"] for item in score.samples)
    opened.record_served("gsm8k", arm, server, **evaluation.ledger_row(score))
    [row] = ledger.read()
    assert row["work"]["shared"] == server.shared and row["checkpoint"] == tiny_base.fingerprint
    assert row["model"]["profile"] == "tiny-phi4" and row["kernel"] == "unquantized"
    assert "shared" in ledger.table([row])["work"][0]
    assert opened.compares("gsm8k")
    server.stop()
    assert server.complete("1", max_tokens=2)  # others use it


def test_it_is_one_server_with_a_key_and_an_arm(room, participant, monkeypatch, tmp_path):
    monkeypatch.setenv(shared.SERVERS, f"fp8={room.url}")
    with pytest.raises(WorkbookError, match="is bf16's, and not fp8's"):
        shared.servers()
    monkeypatch.setenv(shared.SERVERS, f"bf16={room.url}")
    (tmp_path / "wrong.key").write_text("wrong\n")
    monkeypatch.setenv(shared.KEY_FILE, str(tmp_path / "wrong.key"))
    with pytest.raises(WorkbookError, match="refuses the key"):
        shared.servers()
    monkeypatch.setenv(shared.KEY_FILE, str(tmp_path / "no.key"))
    with pytest.raises(WorkbookError, match="cannot be read"):
        shared.servers()


def test_what_is_no_such_server_is_a_sentence(tmp_path, monkeypatch, tmp_workspace):
    (tmp_path / "key").write_text("its-key")
    monkeypatch.setenv(shared.KEY_FILE, str(tmp_path / "key"))
    with stand_in.listening(lambda request: (404, b"{}")) as another:  # as a vLLM without /about
        monkeypatch.setenv(shared.SERVERS, f"fp8={another.url}")
        with pytest.raises(WorkbookError, match="does not say what it serves"):
            shared.servers()
    assert [request.path for request in another.asked] == ["/about"]
    monkeypatch.setenv(shared.SERVERS, "fp8=http://127.0.0.1:9")
    with pytest.raises(WorkbookError, match="does not answer"):
        shared.servers()


@pytest.mark.parametrize("named", ["http://127.0.0.1:8001", "int8=http://127.0.0.1:8001",
                                   "fp8=127.0.0.1:8001", "fp8=http://a,fp8=http://b", "fp8=",
                                   "fp8=http://user@host:1", "fp8=file:///etc/passwd"])
def test_a_list_of_servers_that_is_none(named, monkeypatch):
    monkeypatch.setenv(shared.SERVERS, named)
    with pytest.raises(WorkbookError, match="names no server"):
        shared.named()


def test_a_list_of_servers(monkeypatch):
    monkeypatch.setenv(shared.SERVERS, " bf16=http://127.0.0.1:8001/, fp8=https://gpu.example:1 ")
    assert shared.named() == {"bf16": "http://127.0.0.1:8001", "fp8": "https://gpu.example:1"}
    monkeypatch.setenv(shared.SERVERS, "")
    assert shared.named() == {} == shared.servers()


# `make serve`, without starting any


def test_a_key_of_an_earlier_day_stays_and_is_closed_again(tmp_workspace):
    place = serve.key_file()
    first = place.read_text()
    place.chmod(0o644)
    assert serve.key_file().read_text() == first and place.stat().st_mode & 0o777 == 0o600


def fake(device: str, nbytes: int) -> SimpleNamespace:
    gpus = (hardware.Gpu(0, "a GPU", nbytes, (9, 0), "580"),) if device == "cuda" else ()
    machine = replace(hardware.detect(), gpus=gpus, cpu_features=frozenset())
    return SimpleNamespace(profile=models.PHI4, machine=machine,
                           mode=hardware.serving_mode(machine))


def model(nbytes: int) -> SimpleNamespace:
    return SimpleNamespace(tensors=(SimpleNamespace(nbytes=nbytes),))


def share(flags: list[str]) -> float:
    """vLLM takes the last of a flag's values."""
    return float([after for flag, after in zip(flags, flags[1:], strict=False)
                  if flag == "--gpu-memory-utilization"][-1])


def test_on_one_gpu_each_server_gets_its_weights_and_half_of_the_rest():
    arms = {"bf16": model(29 * GB), "fp8": model(16 * GB)}
    bf16, fp8 = (share(serve.flags(fake("cuda", 80 * GB), arms, arm)) for arm in arms)
    assert bf16 + fp8 == pytest.approx(serve.SHARE, abs=0.002)
    assert (bf16 - fp8) * 80 * GB == pytest.approx(13 * GB, rel=0.02)
    with pytest.raises(WorkbookError, match="does not hold bf16 and fp8") as said:
        serve.flags(fake("cuda", 48 * GB), arms, "fp8")
    assert said.value.remedy == "Serve one: ARMS=fp8."


def test_two_servers_fit_what_others_leave_of_a_gpu():
    """The second looks at what is free when the first has taken its share, and both a context."""
    size, used = 80 * GB, 12 * GB
    phi4 = fake("cuda", size)
    phi4.machine = replace(phi4.machine, gpus=tuple(
        replace(gpu, free_bytes=size - used) for gpu in phi4.machine.gpus))
    arms = {"bf16": model(29 * GB), "fp8": model(16 * GB)}
    bf16, fp8 = (share(serve.flags(phi4, arms, arm)) * size for arm in arms)
    assert fp8 <= size - used - (bf16 + capacity.CONTEXT) - capacity.CONTEXT + 0.001 * size
    assert bf16 + fp8 > 0.9 * (size - used)  # and leave no more than they must


def test_a_cpu_without_the_memory_says_so(monkeypatch, tiny_base):
    monkeypatch.setattr(serve.servers.hardware, "available_ram", lambda: 5 * GB)
    with pytest.raises(WorkbookError, match="does not hold both"):
        serve.flags(fake("cpu", 0), {"bf16": tiny_base, "fp8": tiny_base}, "fp8")
    assert serve.flags(fake("cpu", 0), {"fp8": tiny_base}, "fp8")[-2:] == serve.ABOUT


@pytest.mark.parametrize("arguments, says", [
    (("int8", "127.0.0.1", "8001"), "ARMS=int8"), ((",", "127.0.0.1", "8001"), "ARMS=,"),
    (("fp8", "127.0.0.1", "http"), "no port 'http'")])
def test_what_cannot_be_served_is_a_sentence(arguments, says, monkeypatch, tmp_workspace, tiny_fp8):
    monkeypatch.setenv(models.VARIABLE, "tiny-phi4")
    monkeypatch.setattr(course.quantize, "fp8_checkpoint", lambda profile, base: tiny_fp8)
    with pytest.raises(WorkbookError, match=says):
        serve.main(*arguments)


@pytest.mark.parametrize("host, says", [
    ("127.0.0.1", "ssh -N -L 8001:127.0.0.1:8001"), ("0.0.0.0", "not encrypted"),
    ("10.0.0.5", "10.0.0.5:8001")])
def test_what_participants_are_told(host, says, tiny_base):
    server = serving.VllmServer(tiny_base, port=8001, host=host, key="secret")
    server.url = f"http://{address.reached_by(host)}:8001"
    told = serve.words([("bf16", Path("about"), server)], Path("serve.key"), host)
    assert says in told and "secret" not in told and "PHI4_FP8_KEY_FILE" in told
