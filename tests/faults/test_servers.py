"""A server's faults: its name, port, log, environment and user; refused, aborted, frozen, dying."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from on_a_gpu import server_flags

from helpers import (
    WorkbookError,
    checkpoint,
    client,
    hardware,
    server_log,
    serving,
    workspace,
)


@contextlib.contextmanager
def small_disk(at: Path, size: str, *options: str):
    """A tmpfs of so many bytes, where this process may mount one."""
    at.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}", *options]),
                              "tmpfs", at], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"mounting a tmpfs takes root's rights: {mounted.stderr.strip()}")
    try:
        yield at
    finally:
        subprocess.run(["umount", "-l", at], check=True)


# Before it starts


@pytest.mark.fault("a port that there is not")
@pytest.mark.parametrize("port", [-1, 0, 65536, 10**9])
def test_a_port_out_of_range(port, tmp_workspace, tiny_base, happened):
    with pytest.raises(WorkbookError, match=f"There is no port {port}") as said:
        serving.VllmServer(tiny_base, port=port).start()
    happened(said.value)


@pytest.mark.fault("a name that a file could not have")
@pytest.mark.parametrize("name", ["microsoft/phi-4", "../../outside", "x" * 300, "a b\t?*"],
                         ids=["a slash", "dots", "300 characters", "spaces"])
def test_a_log_for_every_name(name, tmp_workspace, happened):
    log = server_log.create(name, 1234)
    assert log.is_file() and log.resolve().parent == tmp_workspace.resolve() / "logs"
    happened(f"its log is {log.name[:40]}")


@pytest.mark.fault("a name that nothing can be called by")
@pytest.mark.parametrize("name", [" ", "a\nb", "a\0b"], ids=["blank", "two lines", "a null"])
def test_a_name_that_is_none(name, tiny_base, happened):
    with pytest.raises(WorkbookError, match="is no name for a model") as said:
        serving.VllmServer(tiny_base, name=name)
    happened(said.value)


@pytest.mark.fault("the server's log cannot be written")
@pytest.mark.parametrize("case", ["full disk", "read-only disk", "a file in its place"])
def test_no_place_for_the_log(case, tmp_path, monkeypatch, tiny_base, happened):
    monkeypatch.setenv("PHI4_FP8_WORKSPACE", str(tmp_path / "workspace"))
    with contextlib.ExitStack() as disk:
        if case == "full disk":
            disk.enter_context(small_disk(tmp_path / "workspace", "32k"))
        elif case == "read-only disk":
            disk.enter_context(small_disk(tmp_path / "workspace", "32k", "ro"))
        else:
            (tmp_path / "workspace").mkdir()
            (tmp_path / "workspace" / "logs").write_text("")
        with pytest.raises(WorkbookError, match="log cannot be written") as said:
            serving.VllmServer(tiny_base).start()
    happened(f"{said.value} {said.value.meaning}")


@pytest.mark.fault("the supervisor itself fails")
def test_a_supervisor_that_fails_says_so(tmp_path, happened):
    log = tmp_path / "log"
    done = subprocess.run(
        [sys.executable, "-m", "helpers.serve_side.supervisor", str(os.getpid()), "4", log,
         "/no/vllm"],
        cwd=workspace.repo(), stdin=subprocess.PIPE, capture_output=True)
    meaning, _ = server_log.explain(log.read_text(), done.returncode)
    assert "No such file or directory: '/no/vllm'" in meaning
    happened(meaning)


@pytest.mark.fault("no temporary folder is short enough for a socket")
def test_only_long_temporary_folders(tmp_path, monkeypatch, happened):
    from helpers.serve_side import supervisor

    monkeypatch.setattr(supervisor.tempfile, "gettempdir", lambda: "/" + "long/" * 24)
    monkeypatch.setattr(supervisor.os, "access", lambda *_: False)
    with pytest.raises(OSError, match="set TMPDIR to one of at most 50 bytes") as said:
        supervisor.socket_place()
    happened(said.value)


# In trying circumstances, all at once


@pytest.fixture(scope="module")
def beset(tiny_base, tmp_path_factory):
    """A server whose owner has an odd workspace, TMPDIR, folder, name and logging."""
    place = tmp_path_factory.mktemp("beset") / "мой курс, é à"
    temporary = place / ("t" * (120 - len(str(place))))
    temporary.mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tiny_base.path.parent)
        patch.setenv("PHI4_FP8_WORKSPACE", str(place / "work space"))
        patch.setenv("TMPDIR", str(temporary))
        patch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
        patch.setenv("VLLM_LOGGING_PREFIX", "mine: ")
        model = checkpoint.verified(Path(tiny_base.path.name))
        with serving.VllmServer(model, server_flags(), name="me/tiny phi-4 é") as server:
            yield SimpleNamespace(server=server, place=place, temporary=temporary)
    assert not serving.processes(server)


@pytest.mark.slow
@pytest.mark.fault("a workspace whose path has spaces and letters beyond ASCII")
def test_an_odd_workspace(beset, happened):
    assert beset.server.log_path.parent == beset.place / "work space" / "logs"
    assert beset.server.complete("1", max_tokens=2)
    happened("it serves, and its log is there")


@pytest.mark.slow
@pytest.mark.fault("a TMPDIR of 120 characters")
def test_a_long_temporary_folder(beset, happened):
    assert len(str(beset.temporary)) >= 120
    assert beset.server.complete("1", max_tokens=2)
    happened("it serves: its sockets are in a shorter place")


@pytest.mark.slow
@pytest.mark.fault("a model named by a path from here")
def test_a_relative_model_path(beset, tiny_base, happened):
    assert beset.server.model == tiny_base.path.resolve()
    happened("it is served")


@pytest.mark.slow
@pytest.mark.fault("a served name with a slash and a space")
def test_a_name_with_a_slash(beset, happened):
    assert beset.server.complete("1", max_tokens=2)
    answer = client.session(beset.server.api_key).get(f"{beset.server.url}/v1/models").json()
    [served] = answer["data"]
    assert served["id"] == "me/tiny phi-4 é"
    happened(f"clients ask for {served['id']!r}")


@pytest.mark.slow
@pytest.mark.fault("the reader's own settings of vLLM's log")
def test_the_reader_has_silenced_vllm(beset, happened):
    assert beset.server.kernel == "unquantized"
    assert "KV cache size" in beset.server.log() and "mine: " not in beset.server.log()
    happened("the log still says what vLLM does")


NOBODY = """
import json, os, sys
assert os.getuid() == 54321
from helpers import checkpoint, serving
with serving.VllmServer(checkpoint.verified(sys.argv[1]), json.loads(sys.argv[2])) as server:
    print("ANSWER", repr(server.complete("1", max_tokens=2)))
"""


@pytest.mark.slow
@pytest.mark.fault("a user without a home and without a line in /etc/passwd, as in containers")
def test_a_user_that_the_system_does_not_know(tmp_path, tiny_base, happened):
    # It keeps root's right to read: the Python of these environments may lie in root's own home.
    as_nobody = ["setpriv", "--reuid", "54321", "--regid", "54321", "--clear-groups",
                 "--inh-caps", "+dac_override", "--ambient-caps", "+dac_override"]
    if os.getuid() or subprocess.run([*as_nobody, "true"], capture_output=True).returncode:
        pytest.skip("becoming another user takes root's rights and setpriv")
    place = Path("/tmp") / f"phi4-{os.getpid()}"  # pytest's own folders are root's alone
    place.mkdir(mode=0o777)
    place.chmod(0o777)
    environment = {name: value for name, value in os.environ.items()
                   if name not in ("HOME", "USER", "LOGNAME")}
    try:
        done = subprocess.run(
            [*as_nobody, sys.executable, "-c", NOBODY, tiny_base.path,
             json.dumps(server_flags())], cwd=workspace.repo(), capture_output=True,
            text=True, env={**environment, "PHI4_FP8_WORKSPACE": str(place / "work")})
        assert "ANSWER" in done.stdout, done.stdout[-1500:] + done.stderr[-3000:]
    finally:
        subprocess.run(["rm", "-rf", place], check=True)
    assert not (workspace.repo() / "~").exists()
    happened("it serves")


# Asked


@pytest.mark.slow
@pytest.mark.fault("a request that is refused")
@pytest.mark.parametrize("body, code", [
    ({"prompt": "1 " * 5000}, 400), ({"prompt": "1", "model": "another"}, 404),
    ({"prompt": "1", "temperature": -1}, 400)], ids=["too long", "another model", "a wrong value"])
def test_a_refusal_comes_at_once(body, code, fp8_server, monkeypatch, happened):
    """It does not wait to see whether the server is dying: of a refused request it does not."""
    monkeypatch.setattr(fp8_server, "_is_dying", lambda: pytest.fail("it waited"))
    with pytest.raises(WorkbookError, match=f"HTTP {code}") as said:
        fp8_server.complete(**body)
    assert said.value.meaning
    happened(f"{said.value.what} {said.value.meaning}")


@pytest.mark.slow
@pytest.mark.fault("a request with another key")
def test_another_key_is_refused_at_once(fp8_server, monkeypatch, happened):
    monkeypatch.setattr(fp8_server, "_is_dying", lambda: pytest.fail("it waited"))
    monkeypatch.setattr(fp8_server, "api_key", "another")
    with pytest.raises(WorkbookError, match="HTTP 401") as said:
        fp8_server.complete("1")
    happened(said.value)


@pytest.mark.slow
@pytest.mark.fault("a sampling value that JSON does not have")
def test_not_a_number(fp8_server, monkeypatch, happened):
    monkeypatch.setattr(fp8_server, "_is_dying", lambda: pytest.fail("it waited"))
    with pytest.raises(WorkbookError, match="not JSON") as said:
        fp8_server.complete("1", temperature=float("nan"))
    happened(said.value)


@pytest.mark.slow
@pytest.mark.fault("start() of a server that runs")
def test_a_second_start(fp8_server, happened):
    before = fp8_server.session
    with pytest.raises(WorkbookError, match="already running") as said:
        fp8_server.start()
    assert fp8_server.session == before and fp8_server.complete("1", max_tokens=2)
    happened(said.value)


# Dying


@pytest.mark.slow
@pytest.mark.fault("Stop is pressed while servers start")
@pytest.mark.parametrize("count", [1, 2], ids=["one", "a pair"])
def test_interrupted_while_starting(count, tmp_workspace, tiny_base, monkeypatch, happened):
    def pressed(text):
        if all(len(serving.processes(server)) > 1 for server in starting):
            raise KeyboardInterrupt

    starting = [serving.VllmServer(tiny_base, server_flags()) for _ in range(count)]
    monkeypatch.setattr(serving.Progress, "show", lambda self, text: pressed(text))
    with pytest.raises(KeyboardInterrupt):
        serving.start_together(starting)
    assert all(server.session for server in starting)
    assert not any(serving.processes(server) for server in starting)
    happened("no process is left")


@pytest.mark.slow
@pytest.mark.fault("every process of a server is frozen, and it is stopped")
def test_a_frozen_server_is_ended(tmp_workspace, tiny_base, happened):
    server = serving.VllmServer(tiny_base, server_flags()).start()
    family = serving.processes(server)
    for process in family:
        process.send_signal(signal.SIGSTOP)
    server.stop()
    assert len(family) >= 3 and not serving.processes(server)
    happened("no process is left")


@pytest.mark.slow
@pytest.mark.fault("the disk of the log fills while a server starts")
def test_a_log_on_a_full_disk(tmp_path, monkeypatch, tiny_fp8, happened):
    monkeypatch.setenv("PHI4_FP8_WORKSPACE", str(tmp_path / "workspace"))
    with small_disk(tmp_path / "workspace", "128k") as disk:
        create = server_log.create

        def and_fill(*arguments):
            made = create(*arguments)
            with contextlib.suppress(OSError), open(disk / "filler", "wb") as filler:
                while True:
                    filler.write(bytes(4096))
                    filler.flush()
            return made

        monkeypatch.setattr(serving.server_log, "create", and_fill)
        with pytest.raises(WorkbookError) as said:
            serving.VllmServer(tiny_fp8, server_flags()).start()
        happened(str(said.value))
    assert "disk is full" in said.value.meaning and "Free some disk" in said.value.remedy


@pytest.mark.fault("the log is deleted while a server runs")
def test_a_log_that_is_gone(tmp_path, happened):
    assert server_log.read(tmp_path / "gone") == ""
    happened(server_log.explain(server_log.read(tmp_path / "gone"), 1)[0])


# As the runtime of C++ writes them; those of PyTorch go on with a trace.
ABORTS = {
    "oneDNN": ("terminate called after throwing an instance of 'std::runtime_error'\n"
               "  what():  could not create a primitive descriptor for a matmul primitive\n",
               "could not create a primitive descriptor", "ONEDNN_MAX_CPU_ISA"),
    "dnnl::error": ("(Worker pid=3) INFO 11-23 09:18:06 [a.py:1] loading\n"
                    "terminate called after throwing an instance of 'dnnl::error'\n"
                    "  what():  could not create a primitive\n", "could not create a primitive",
                    "ONEDNN_MAX_CPU_ISA"),
    "PyTorch": ("terminate called after throwing an instance of 'c10::Error'\n"
                "  what():  Expected is_contiguous to be true, but got false.\n"
                "Exception raised from check at ../c10/core/x.cpp:7 (most recent call first):\n"
                "frame #0: c10::Error::Error(...)\n", "Expected is_contiguous", "report"),
    "memory": ("terminate called after throwing an instance of 'std::bad_alloc'\n"
               "  what():  std::bad_alloc\n", "bad_alloc", "memory"),
    "no exception": ("terminate called without an active exception\n", "C++ abort", "report"),
    "illegal instruction": ("Fatal Python error: Illegal instruction\n", "Illegal instruction",
                            "instruction was refused"),
    "shared memory": ("(EngineCore pid=7) RuntimeError: Worker proc died unexpectedly "
                      "(exit code: -7)\n", "-7", "/dev/shm"),
    "a crash": ("(EngineCore pid=7) RuntimeError: Worker proc died unexpectedly (exit code: -11)\n",
                "-11", "crashed"),
    "full disk": ("OSError: [Errno 28] No space left on device: '/tmp/vllm-x'\n", "No space",
                  "Free some disk"),
    "open files": ("OSError: [Errno 24] Too many open files\n", "Too many", "ulimit"),
}


@pytest.mark.fault("vLLM's native code ends the process")
@pytest.mark.parametrize("case", ABORTS)
@pytest.mark.parametrize("then", [
    "", "(APIServer pid=3) RuntimeError: Engine core initialization failed. See root cause above. "
    "Failed core proc(s): {'EngineCore': -6}\n"], ids=["alone", "and the API server after it"])
def test_an_abort_is_explained(case, then, happened):
    log, reason, remedy = ABORTS[case]
    meaning, todo = server_log.explain(log + then, 128 + signal.SIGABRT)
    assert reason in meaning and remedy in todo and "frame #0" not in meaning
    happened(meaning)


@pytest.mark.fault("a config.json that asks for what vLLM does not have")
@pytest.mark.slow
def test_a_broken_config(tmp_path, tmp_workspace, tiny_base, happened):
    model = tmp_path / "model"
    subprocess.run(["cp", "-r", tiny_base.path, model], check=True)
    config = json.loads((model / "config.json").read_text()) | {"hidden_act": "no-such-act"}
    (model / "config.json").write_text(json.dumps(config))
    workspace.write_manifest(model)
    with pytest.raises(WorkbookError) as said:
        serving.VllmServer(checkpoint.verified(model), server_flags()).start()
    assert "no-such-act" in said.value.meaning
    happened(f"{said.value.what} {said.value.meaning}")


@pytest.mark.slow
@pytest.mark.fault("logprobs are asked for, and there is no C++ compiler")
def test_no_compiler(tmp_path, tmp_workspace, tiny_base, happened):
    if hardware.serving_mode(hardware.detect()).device != "cpu":
        pytest.skip("on a GPU a compiler is asked for at set-up")
    (tmp_path / "bin").mkdir()
    for tool in ("lscpu", "uname", "sh"):  # vLLM asks the first for the cores
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    env = {"PATH": str(tmp_path / "bin"), "CXX": "g++", "CC": "gcc",
           "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "compiled")}
    with serving.VllmServer(tiny_base, server_flags(), env=env) as server:
        answer = server.post("/v1/completions", {"prompt": "Question:", "max_tokens": 4,
                                                 "temperature": 0, "logprobs": 2})
    assert len(answer["choices"][0]["logprobs"]["token_logprobs"]) == 4
    assert not list((tmp_path / "compiled").rglob("*.so"))
    happened("they are answered, and nothing is compiled")
