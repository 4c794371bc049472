"""A server's life with the real vLLM: ready, refused, dead, and gone, however its owner ends."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from on_a_gpu import require_gpus, server_flags

from helpers import (
    WorkbookError,
    checkpoint,
    client,
    divergence,
    hardware,
    models,
    server_log,
    serving,
    verdicts,
    workspace,
)
from helpers.checkpoint import Checkpoint

GONE_WITHIN = 10  # seconds

# An owner of a server, in a process of its own: says which session the server is, then goes on.
OWNER = """
import json, os, sys, threading, time
from helpers import checkpoint, serving
server = serving.VllmServer(checkpoint.verified(sys.argv[1]), json.loads(sys.argv[2]))
threading.Thread(target=server.start, daemon=True).start()
while len(serving.processes(server)) < 3:  # the supervisor, the API server, an engine
    time.sleep(0.2)
os.write(1, f"\\nsession {server.session}\\n".encode())  # whole, beside the thread's own lines
"""


def left_after(session: int, seconds: float) -> list[str]:
    """The commands of the session's processes that live on after so many seconds at most."""
    end = time.monotonic() + seconds
    while left := serving.processes(SimpleNamespace(session=session)):
        if time.monotonic() > end:
            return [" ".join(process.cmdline()) for process in left]
        time.sleep(0.1)
    return []


def start_owner(model: Checkpoint, then: str) -> tuple[subprocess.Popen, int]:
    owner = subprocess.Popen([sys.executable, "-c", OWNER + then, model.path,
                              json.dumps(server_flags())],
                             stdout=subprocess.PIPE, text=True)
    session = next(int(line.split()[1]) for line in owner.stdout if line.startswith("session"))
    return owner, session


# Ready


def test_ready_means_it_answers(fp8_server):
    assert isinstance(fp8_server.complete("Question", max_tokens=5), str)
    assert isinstance(fp8_server.chat([{"role": "user", "content": "1 + 1"}], max_tokens=5), str)
    assert fp8_server.startup_seconds > 0


def test_two_replicas_answer_behind_one_endpoint(tiny_fp8, fp8_server):
    """Data parallel, run; two tensor-parallel ranks vLLM 0.32 refuses on a CPU of one NUMA node.

    They expect of each other's answers what one server expects, but for bf16's own noise: a sum
    depends on how many requests are computed at once.
    """
    require_gpus(2)
    prompts = [f"Question: Tom has {n} apples and buys 2 more. How many has he?\nAnswer:"
               for n in range(3, 11)]
    with serving.VllmServer(tiny_fp8, [*server_flags(), "--data-parallel-size", "2"]) as server:
        with ThreadPoolExecutor(len(prompts)) as at_once:
            answers = list(at_once.map(lambda prompt: server.complete(prompt, 24), prompts))
        texts = list(zip(prompts, answers, strict=True))
        ours = divergence.read(server, "replicas", texts)
        metrics = client.session(server.api_key).get(f"{server.url}/metrics").text
        assert client.session().get(f"{server.url}/metrics").status_code == 401
        session = server.session
    found = divergence.summary(divergence.compare(
        ours, divergence.read(fp8_server, "one", texts)))
    assert found["tokens"] > 100 and found["kl_mean"] < 0.01, found
    served = {engine: float(count) for engine, count in re.findall(
        r'^vllm:generation_tokens_total{engine="(\d)".*} (\S+)$', metrics, re.MULTILINE)}
    assert served.keys() == {"0", "1"} and min(served.values()) > 0
    assert not left_after(session, GONE_WITHIN)


def is_forked(process: psutil.Process) -> bool:
    """Whether it goes on in its parent's program (Linux's flag PF_FORKNOEXEC)."""
    after_name = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return bool(int(after_name[6]) & 0x40)


def engine_of(server) -> psutil.Process:
    [engine] = [process for process in serving.processes(server)
                if "EngineCore" in "".join(process.cmdline())]
    return engine


@pytest.mark.parametrize("threads", [1, 2])
def test_on_a_cpu_the_engine_is_forked_and_computes(threads, tmp_workspace, tiny_fp8):
    """With two threads as well: OpenMP's must not be there before the fork, and be there after."""
    if hardware.serving_mode(hardware.detect()).device != "cpu":
        pytest.skip("on a GPU vLLM starts its engine in its own way")
    env = {"OMP_NUM_THREADS": str(threads)}
    with serving.VllmServer(tiny_fp8, server_flags(), env=env) as server:
        assert is_forked(engine_of(server)) and not is_forked(psutil.Process(server.session))
        assert "(EngineCore pid=" in server.log()
        assert server.complete("1 + 2 = " * 150, max_tokens=20)


def test_an_engine_of_several_processes_is_started_in_vllms_way(tmp_workspace, tiny_fp8):
    if hardware.serving_mode(hardware.detect()).device != "cpu":
        pytest.skip("on a GPU vLLM starts its engine in its own way")
    several = [flag if flag != "uni" else "mp" for flag in server_flags()]
    with serving.VllmServer(tiny_fp8, several) as server:
        assert not is_forked(engine_of(server))
        assert server.complete("1", max_tokens=2)


def test_a_two_token_prompt_is_answered(fp8_server):
    """Stock vLLM 0.32 dies of it, with SIGILL, on a CPU with AMX."""
    reply = client.session(fp8_server.api_key).post(
        f"{fp8_server.url}/v1/completions",
        json={"model": fp8_server.model_name, "prompt": [5, 6], "max_tokens": 3}).json()
    assert reply["usage"]["prompt_tokens"] == 2
    assert reply["usage"]["completion_tokens"] >= 1


def test_the_kernel_is_read_from_the_log(fp8_server, bf16_server):
    mode = hardware.serving_mode(hardware.detect())
    kernel, _ = verdicts.KERNELS[mode.key]
    assert fp8_server.kernel == kernel
    # Of W8A16 vLLM 0.32 says on a GPU that Marlin is used, and selects nothing by name.
    assert ("leveraging the Marlin kernel" if mode.key == "gpu-w8a16" else
            f"Selected {kernel} for") in fp8_server.log()
    assert bf16_server.kernel == "unquantized"


def test_only_this_machine_and_only_with_the_key(fp8_server):
    assert client.session().get(f"{fp8_server.url}/health").status_code == 200
    for route in ("/v1/models", "/metrics", "/openapi.json", "/invocations"):
        assert client.session().get(fp8_server.url + route).status_code == 401
        assert client.session("another").get(fp8_server.url + route).status_code == 401
    family = serving.processes(fp8_server)
    assert len(family) >= 3
    listening = {c.laddr.ip for p in family for c in p.net_connections("inet")
                 if c.status == psutil.CONN_LISTEN}
    assert "127.0.0.1" in listening
    port = int(fp8_server.url.rsplit(":", 1)[1])
    assert {c.laddr.ip for p in family for c in p.net_connections("inet")
            if c.laddr.port == port} == {"127.0.0.1"}


def test_the_key_is_in_no_command_line_and_no_log(fp8_server):
    for process in psutil.process_iter(["cmdline"]):
        assert fp8_server.api_key not in " ".join(process.info["cmdline"] or [])
    assert fp8_server.api_key not in fp8_server.log()


def test_a_refused_request_says_why(fp8_server):
    with pytest.raises(WorkbookError, match="maximum context length"):
        fp8_server.complete("1 " * 5000)


# Refused before it starts


def test_an_occupied_port(tmp_workspace, tiny_base):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(WorkbookError, match=f"Port {port} is taken"):
            serving.VllmServer(tiny_base, port=port).start()


@pytest.mark.parametrize(("device", "name"), [("cpu", ".venv-serve"), ("cuda", ".venv-serve-gpu")])
def test_no_serving_environment(tmp_path, monkeypatch, device, name):
    monkeypatch.setattr(hardware, "REPO", tmp_path)
    monkeypatch.setattr(hardware, "serving_mode", lambda machine: SimpleNamespace(device=device))
    with pytest.raises(WorkbookError, match=rf"no serving environment \({name}\)"):
        serving.serve_python()


@pytest.mark.parametrize(("damage", "says"), [
    ("no config", "there is no config.json"), ("no weights", "no safetensors"),
    ("half a file", "its header announces"), ("lost file", "tokenizer.json is missing")])
def test_a_model_that_is_not_whole(damage, says, tmp_path, tmp_workspace, tiny_fp8):
    model = Path(shutil.copytree(tiny_fp8.path, tmp_path / "model"))
    weights = model / "model.safetensors"
    if damage == "no config":
        (model / "config.json").unlink()
    elif damage == "no weights":
        weights.unlink()
    elif damage == "half a file":
        os.truncate(weights, weights.stat().st_size // 2)
    else:
        (model / "tokenizer.json").unlink()
    with pytest.raises(WorkbookError, match=says):
        serving.VllmServer(checkpoint.verified(model)).start()
    assert not list(workspace.root().glob("logs/*"))


# Dead


def test_a_server_that_dies_says_why(tmp_path, tmp_workspace, tiny_base):
    """The config promises a fifth layer that the weights do not have: the engine finds out."""
    model = Path(shutil.copytree(tiny_base.path, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    config["num_hidden_layers"] += 1
    (model / "config.json").write_text(json.dumps(config))
    workspace.write_manifest(model)
    server = serving.VllmServer(checkpoint.verified(model), server_flags())
    with pytest.raises(WorkbookError, match="stopped while starting") as died:
        server.start()
    assert "not initialized from checkpoint" in died.value.meaning
    assert "\n" not in died.value.meaning
    assert server.log_path.name in died.value.remedy
    assert left_after(server.session, GONE_WITHIN) == []


def test_a_flag_that_vllm_does_not_know(tmp_workspace, tiny_base):
    with pytest.raises(WorkbookError, match="no-such-flag") as died:
        serving.VllmServer(tiny_base, ["--no-such-flag"]).start()
    assert "flags" in died.value.remedy


@pytest.mark.parametrize("log, reason, remedy", [
    ("(EngineCore pid=7) ERROR 11-23 09:18:06 [core.py:1] RuntimeError: Engine core "
     "initialization failed. See root cause above.\n", "RuntimeError", ""),
    ("(EngineCore pid=7) RuntimeError: Worker proc died unexpectedly (exit code: -4)\n",
     "exit code: -4", "AMX"),
    ("(EngineCore pid=7) ERROR 01-02 03:04:05 [core.py:9] Traceback (most recent call last):\n"
     "(EngineCore pid=7) ERROR 01-02 03:04:05 [core.py:9] torch.OutOfMemoryError: CUDA out of "
     "memory. Tried to allocate 2.00 GiB.\n"
     "(APIServer pid=3) RuntimeError: Engine core initialization failed. See root cause above.\n",
     "CUDA out of memory", "--max-model-len"),
    ("pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n"
     "  Value error, User-specified max_model_len (9999) is greater than 2048\n"
     "    For further information visit a page\n", "max_model_len (9999)", ""),
    ("", "last line is: nothing", ""),
])
def test_the_reason_is_the_first_cause_in_the_log(log, reason, remedy):
    meaning, todo = server_log.explain(log, 1)
    assert reason in meaning and remedy in todo and "\n" not in meaning


def test_a_server_killed_for_memory_says_so():
    meaning, todo = server_log.explain("INFO loading\n", 128 + signal.SIGKILL)
    assert "SIGKILL" in meaning and "memory" in todo


# Gone


def test_gone_after_an_exception_and_its_engine_missed(tmp_workspace, tiny_fp8):
    """The engine is killed behind its back: the next answer says so, and the block is left."""
    server = serving.VllmServer(tiny_fp8, server_flags())
    with pytest.raises(WorkbookError, match="stopped while answering"), server:
        family = serving.processes(server)
        engine_of(server).kill()
        server.complete("1")
    assert left_after(server.session, GONE_WITHIN) == []
    assert not any(process.is_running() for process in family)
    with pytest.raises(WorkbookError, match="not running"):
        server.complete("1")


def test_gone_after_its_owner_ended(tmp_workspace, tiny_base):
    owner, session = start_owner(tiny_base, "")
    assert owner.wait(timeout=30) == 0
    assert left_after(session, GONE_WITHIN) == []


def test_gone_after_its_owner_was_killed(tmp_workspace, tiny_base):
    owner, session = start_owner(tiny_base, "time.sleep(600)")
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    assert left_after(session, GONE_WITHIN) == []


def test_gone_after_its_supervisor_was_killed(tmp_workspace, tiny_base):
    """Killed while vLLM starts, which then does not listen to SIGTERM: its owner ends it."""
    owner, session = start_owner(tiny_base, "time.sleep(600)")
    os.kill(session, signal.SIGKILL)
    assert left_after(session, GONE_WITHIN) == []
    owner.kill()
    owner.wait()


def test_gone_after_a_kernel_restart(tmp_workspace, tiny_fp8):
    """A real Jupyter kernel starts a server in a cell, and is restarted."""
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel(kernel_name="python3")
    try:
        said = []
        client.execute_interactive(
            "from helpers import checkpoint, serving\n"
            f"model = checkpoint.verified({str(tiny_fp8.path)!r})\n"
            f"server = serving.VllmServer(model, {server_flags()!r}).start()\n"
            "print('session', server.session)",
            output_hook=lambda message: said.append(message["content"]), timeout=600)
        text = "".join(content.get("text", "") for content in said)
        session = int(text.split("session")[1].split()[0])
        assert len(serving.processes(SimpleNamespace(session=session))) >= 3
        manager.restart_kernel(now=True)
        assert left_after(session, GONE_WITHIN) == []
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


# Flags


def test_the_default_flags_of_a_path():
    cpu, w8a16, w8a8 = (
        serving.default_flags(models.PHI4, hardware.ServingMode(key, device, "", ""))
        for key, device in (("cpu-w8a16", "cpu"), ("gpu-w8a16", "cuda"), ("gpu-w8a8", "cuda")))
    for flags in (cpu, w8a16, w8a8):
        assert flags[flags.index("--max-model-len") + 1] == "4096"
    assert "--enforce-eager" in cpu and "--enforce-eager" not in w8a8
    assert "--gpu-memory-utilization" in w8a8
    assert w8a16 == w8a8 + ["--linear-backend", "marlin"]


# As vLLM 0.32 writes them, with its own formats; of W8A16 it says only that Marlin is used.
@pytest.mark.parametrize("log, kernel", [
    ("INFO 11-23 09:18:06 [__init__.py:797] Selected CutlassFP8ScaledMMLinearKernel for "
     "CompressedTensorsW8A8Fp8\n", "CutlassFP8ScaledMMLinearKernel"),
    ("WARNING 11-23 09:18:06 [marlin_utils_fp8.py:108] Your GPU does not have native support for "
     "FP8 computation but FP8 quantization is being used. Weight-only FP8 compression will be used "
     "leveraging the Marlin kernel. This may degrade performance for compute-heavy workloads.\n",
     "MarlinFP8ScaledMMLinearKernel"),
    ("INFO nothing of kernels\n", "not named in the log"),
])
def test_the_kernels_of_a_gpu_are_read_from_the_log(tiny_fp8, tiny_base, log, kernel):
    assert server_log.selected_kernel(tiny_fp8.config, log) == kernel
    assert server_log.selected_kernel(tiny_base.config, "") == "unquantized"
