"""A vLLM server's whole life: start, ready, watch, stop.

The notebook's process starts a supervisor (`python -m helpers.serving`, the second half of this
file) in a session of its own, and the supervisor starts vLLM. A pipe runs from the notebook to the
supervisor; when it closes, for whatever reason, SIGKILL included, the supervisor ends every
process that vLLM started, and itself.
"""

import contextlib
import ctypes
import http.client
import json
import os
import re
import secrets
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil

from helpers import WorkbookError, models, workspace

STARTUP_TIMEOUT = 1800  # seconds; Phi-4 in bf16 from a slow disk, compiled, takes several minutes
GRACE = 4  # seconds that vLLM has to end by itself before it is killed

# Forces Marlin's W8A16 kernel, on GPUs with FP8 tensor cores too; a bf16 model is not concerned.
MARLIN = ["--linear-backend", "marlin"]

# vLLM is told to keep to itself, and to this machine: the model is always a local directory.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
    "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "PYTHONUNBUFFERED": "1", "NO_COLOR": "1",
}


def serve_python() -> Path:
    """The Python of the serving environment, `.venv-serve`."""
    python = workspace.repo() / ".venv-serve" / "bin" / "python"
    if not python.exists():
        raise WorkbookError(
            "There is no serving environment (.venv-serve).",
            "vLLM lives in an environment of its own, which `make` sets up on first use.",
            "Run `make setup` in a terminal, at the top of the workbook.",
        )
    return python


def default_flags(profile, path) -> list[str]:
    """vLLM's flags for a profile on a path, beside the ones every server gets.

    CPU: eager, since compiling costs more than it gains in a course; engine and worker in one
    process (`uni`), which shortens the start; 1 GiB of KV cache. GPU: compiled, 90 % of its memory;
    where FP8 weights meet 16-bit activations, Marlin's kernel by name, since vLLM 0.32 would take
    another package's first (Humming, in `_POSSIBLE_WFP8A16_KERNELS`) and not say in its log which.
    """
    flags = ["--dtype", "bfloat16", "--max-model-len", str(profile.max_model_len)]
    if path.device == "cpu":
        return [*flags, "--enforce-eager", "--max-num-seqs", "16",
                "--kv-cache-memory-bytes", str(2**30), "--distributed-executor-backend", "uni"]
    marlin = MARLIN if path.key == "gpu-w8a16" else []
    return [*flags, "--max-num-seqs", "64", "--gpu-memory-utilization", "0.90", *marlin]


class VllmServer:
    """A running vLLM server, as a context manager.

    `model` is a directory with a config and safetensors; `flags` go to vLLM as they are; `name` is
    the name it serves the model under, by default the directory's; `env` is added to vLLM's
    environment; `port` is taken if given, else a free one.

    Once started: `url`, `api_key`, `model_name`, `log_path`, `kernel` (the linear kernel that vLLM
    chose, "unquantized" for a bf16 model) and `startup_seconds`. Raises `WorkbookError` when the
    model is not whole, the port is taken, `.venv-serve` is missing, or vLLM dies.
    """

    def __init__(self, model: Path, flags: list[str] = (), name: str | None = None,
                 env: dict[str, str] | None = None, port: int | None = None):
        self.model = Path(model).resolve()
        self.flags = list(flags)
        self.model_name = name or self.model.name
        self.api_key = secrets.token_urlsafe(24)
        self.kernel = ""
        self.startup_seconds = 0.0
        self.url = ""
        self.log_path = None
        self._port = port
        self._env = env or {}
        self._supervisor = None
        self.session = 0  # the session that all its processes share: the supervisor's id

    def __enter__(self) -> "VllmServer":
        return self.start()

    def __exit__(self, *_) -> None:
        self.stop()

    def start(self) -> "VllmServer":
        """Start vLLM and return when it has generated a token."""
        models.check_directory(self.model)  # now, not after half a minute of vLLM's start
        if self._port is not None:
            _check_port(self._port)
        port = self._port or _free_port()
        self.url = f"http://127.0.0.1:{port}"
        logs = workspace.root() / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        stamp = time.strftime("%Y%m%d-%H%M%S")
        self.log_path = logs / f"vllm-{self.model_name}-{stamp}-{port}.log"
        self.log_path.touch()
        began = time.monotonic()
        progress = _Progress(f"vLLM: {self.model_name}")
        self._supervisor = self._start_supervisor(port)
        self.session = self._supervisor.pid
        try:
            self._wait_until_ready(began, progress)
        except BaseException:
            self.stop()
            progress.close(f"vLLM: {self.model_name} did not start.")
            raise
        self.startup_seconds = time.monotonic() - began
        self.kernel = _selected_kernel(self.model, self.log())
        progress.close(f"vLLM: {self.model_name} is ready after {self.startup_seconds:.0f} s; "
                       f"linear layers: {self.kernel}.")
        return self

    def stop(self) -> None:
        """End vLLM and every process of it; returns when they are gone."""
        supervisor, self._supervisor = self._supervisor, None
        if supervisor is None:
            return
        supervisor.stdin.close()
        try:
            supervisor.wait(timeout=3 * GRACE)
        except subprocess.TimeoutExpired:  # it should never hang
            supervisor.kill()
        while left := processes(self):  # of a supervisor that was killed, or hung
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(left, timeout=1)

    def log(self) -> str:
        """What vLLM has written so far."""
        return self.log_path.read_text(errors="replace") if self.log_path else ""

    def complete(self, prompt: str, max_tokens: int = 64, **sampling) -> str:
        """The continuation of `prompt`; greedy unless `sampling` says otherwise."""
        body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, **sampling}
        return self._post("/v1/completions", body)["choices"][0]["text"]

    def chat(self, messages: list[dict], max_tokens: int = 256, **sampling) -> str:
        """The answer to a list of {"role", "content"}; greedy unless `sampling` says otherwise."""
        body = {"messages": messages, "max_tokens": max_tokens, "temperature": 0, **sampling}
        return self._post("/v1/chat/completions", body)["choices"][0]["message"]["content"]

    def command(self, port: int) -> list[str]:
        """The command line that starts vLLM; the key is in its environment, VLLM_API_KEY."""
        return [str(serve_python()), "-m", "vllm.entrypoints.openai.api_server",
                "--model", str(self.model), "--served-model-name", self.model_name,
                "--host", "127.0.0.1", "--port", str(port), "--disable-uvicorn-access-log",
                *self.flags]

    def _start_supervisor(self, port: int) -> subprocess.Popen:
        env = {**os.environ, **ENVIRONMENT, "VLLM_API_KEY": self.api_key, **self._env}
        if "uni" in self.flags:
            # vLLM 0.32's CPU platform turns `uni` back into `mp` unless this is off. The API
            # server still runs its engine in a process of its own, and still notices its death.
            env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
            env.setdefault("OMP_NUM_THREADS", str(threads(self.model)))
            # OpenMP's threads spin for milliseconds when they wait, against the API server and the
            # notebook on a machine of few cores: 36 tokens/s, and 140 with this, on two busy ones.
            env.setdefault("GOMP_SPINCOUNT", "1000")
        return subprocess.Popen(
            [sys.executable, "-m", "helpers.serving", str(os.getpid()), str(self.log_path),
             *self.command(port)],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env=env, cwd=workspace.repo(), start_new_session=True,
        )

    def _wait_until_ready(self, began: float, progress: "_Progress") -> None:
        while True:
            if self._supervisor.poll() is not None:
                raise self._died(f"while starting, after {time.monotonic() - began:.0f} s")
            if self._is_healthy():
                break
            if time.monotonic() - began > STARTUP_TIMEOUT:
                raise WorkbookError(
                    f"vLLM was not ready after {STARTUP_TIMEOUT / 60:.0f} minutes.",
                    f"The last it said: {_last_line(self.log())}",
                    f"Read its log, {self._log_name()}; a slow disk may need another start.",
                )
            progress.show(_phase(self.log()))
            time.sleep(0.25)
        progress.show("the first token")
        self.complete("1", max_tokens=1)

    def _is_healthy(self) -> bool:
        try:
            with _OPENER.open(f"{self.url}/health", timeout=5):
                return True
        except (OSError, http.client.HTTPException):
            return False

    def _post(self, route: str, body: dict) -> dict:
        if self._supervisor is None:
            raise WorkbookError("The server is not running.",
                                "It was stopped, or never started.",
                                "Use it inside its `with` block, or call start() first.")
        request = urllib.request.Request(
            self.url + route, data=json.dumps({"model": self.model_name, **body}).encode(),
            headers={"Authorization": f"Bearer {self.api_key}",
                     "Content-Type": "application/json"})
        try:
            with _OPENER.open(request, timeout=STARTUP_TIMEOUT) as response:
                return json.load(response)
        except urllib.error.HTTPError as refused:
            if not self._is_dying():
                said = refused.read().decode(errors="replace")
                raise WorkbookError(
                    f"vLLM refused the request (HTTP {refused.code}).",
                    _message_of(said), "Change the request: its prompt, length or sampling.",
                ) from None
        except (OSError, http.client.HTTPException) as broken:
            if not self._is_dying():
                raise WorkbookError(
                    "vLLM did not answer.", f"The connection broke: {broken}.",
                    f"Read its log, {self._log_name()}, and start the server again.",
                ) from None
        raise self._died("while answering") from None

    def _is_dying(self) -> bool:
        """Whether vLLM ends within a few seconds, as it does when its engine has died."""
        try:
            self._supervisor.wait(timeout=GRACE)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _died(self, when: str) -> WorkbookError:
        meaning, remedy = explain(self.log(), self._supervisor.returncode)
        return WorkbookError(f"vLLM stopped {when}.", meaning,
                             f"{remedy} The whole log is in {self._log_name()}.")

    def _log_name(self) -> str:
        return str(self.log_path.relative_to(workspace.root().parent))


def processes(server: VllmServer) -> list[psutil.Process]:
    """The living processes of a server: its supervisor, vLLM's API server, engine and workers."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if (server.session and os.getsid(process.pid) == server.session
                    and process.status() != psutil.STATUS_ZOMBIE):
                found.append(process)
    return found


_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never through a proxy


def threads(model: Path) -> int:
    """Threads to compute with on a CPU: a core each, hyperthreads not counted, and one if small.

    A layer of a model that fits the cache is done before a second thread has woken up: the bundled
    one is as fast on one thread as on two when the machine is quiet, and faster when it is not.
    """
    if sum(file.stat().st_size for file in model.glob("*.safetensors")) < 64 * 2**20:
        return 1
    allowed = len(os.sched_getaffinity(0))
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as refused:
            raise WorkbookError(
                f"Port {port} is taken.", f"The system says: {refused.strerror}.",
                "Leave `port` out and a free one is taken, or stop the program that uses it.",
            ) from None


# Progress, read from the log.

_PHASES = (  # (what the log says, what vLLM is then doing), in order
    ("Starting vLLM server", "opening its port"),
    ("KV cache size", "preparing the KV cache"),
    ("apturing CUDA graph", "capturing CUDA graphs"),
    ("ompiling a graph", "compiling"),
    ("Loading safetensors", "loading the weights"),
    ("Starting to load model", "loading the weights"),
    ("Initializing a V1 LLM engine", "starting the engine"),
    ("Resolved architecture", "starting the engine's process"),
)


def _phase(log: str) -> str:
    return next((doing for said, doing in _PHASES if said in log), "importing")


def in_notebook() -> bool:
    """Whether this process is a notebook's kernel, and not one that has merely imported it."""
    if "ipykernel" not in sys.modules:
        return False
    from IPython import get_ipython

    return hasattr(get_ipython(), "kernel")


class _Progress:
    """One line that changes in a notebook and a terminal; in a plain file, a line per phase."""

    def __init__(self, title: str):
        self._title, self._began, self._last = title, time.monotonic(), ""
        self._handle = None
        if in_notebook():
            from IPython.display import display

            self._handle = display({"text/plain": title}, raw=True, display_id=True)

    def show(self, phase: str) -> None:
        line = f"{self._title}: {phase}, {time.monotonic() - self._began:.0f} s"
        if line == self._last:
            return
        if self._handle is not None:
            self._handle.update({"text/plain": line}, raw=True)
        elif sys.stdout.isatty():
            print(f"\r{line:<79}", end="", flush=True)
        elif phase not in self._last:
            print(line, flush=True)
        self._last = line

    def close(self, line: str) -> None:
        if self._handle is not None:
            self._handle.update({"text/plain": line}, raw=True)
        else:
            print(("\r" if sys.stdout.isatty() else "") + f"{line:<79}", flush=True)


def _selected_kernel(model: Path, log: str) -> str:
    quantized = "quantization_config" in json.loads((model / "config.json").read_text())
    chosen = re.findall(r"Selected (\w+) for", log)
    if not chosen and "leveraging the Marlin kernel" in log:  # all that vLLM 0.32 says of W8A16
        return "MarlinFP8ScaledMMLinearKernel"
    return chosen[-1] if chosen else ("not named in the log" if quantized else "unquantized")


# Why it died, read from the log.

_PREFIX = re.compile(r"^(\(\w+[^)]*\) )?((INFO|WARNING|ERROR|CRITICAL) [\d-]+ [\d:]+ \[\S+\] )?")
_RAISED = re.compile(r"^(?:[\w.]+\.)?(\w*(?:Error|Exception|Interrupt|NotFound|Exceeded))(?::|$)")
# Raised because of something that another process has already said.
_SECOND_HAND = re.compile(
    r"EngineDeadError|Engine core initialization failed|WorkerProc initialization failed|"
    r"Executor failed|cancelled|See stack trace|See root cause")
_REMEDIES = (  # (what the reason says, what to do), first match
    (r"SafetensorError|safetensors|incomplete metadata|header",
     "The weights are damaged: make the checkpoint again."),
    (r"Address already in use|Errno 98", "Start it again: another program took its port."),
    (r"unrecognized arguments|error: argument", "Correct the flags given to the server."),
    (r"out of memory|exit code: -9|No available memory|Free memory|KV cache is needed|"
     r"larger than the maximum number of tokens|memory",
     "Stop other servers and programs that hold memory, or lower --max-model-len and "
     "--max-num-seqs."),
    (r"NVIDIA driver on your system is too old|driver version is insufficient",
     "Run `make preflight` in a terminal: it says which driver is needed."),
    (r"exit code: -4|SIGILL",
     "An instruction was refused, as AMX is before it is permitted: see that the workbook's plugin "
     "is installed in .venv-serve (`make setup`)."),
    (r"ModuleNotFoundError|ImportError|No module named|operator torchvision",
     "The serving environment is incomplete: run `make setup` again."),
)


def explain(log: str, exit_code: int | None = None) -> tuple[str, str]:
    """Why vLLM died, from its log: (one paragraph, what to do)."""
    lines = [_PREFIX.sub("", line).rstrip() for line in log.splitlines()]
    reason = _raised(lines) or next(
        (line for line in reversed(lines) if re.search(r"error: |died unexpectedly", line)), "")
    if not reason and exit_code is not None and exit_code > 128:
        number = exit_code - 128
        reason = f"it was ended by {signal.Signals(number).name} (exit code: -{number})"
    reason = reason or f"it gave no reason; the last line is: {_last_line(log)}"
    remedy = next((todo for said, todo in _REMEDIES if re.search(said, reason)),
                  "Correct what it names, then start it again.")
    return f"Its log says: {reason}", remedy


def _raised(lines: list[str]) -> str:
    """The first exception of the log that is not just the news of another one, with its message."""
    for at, line in enumerate(lines):
        raised = _RAISED.match(line)
        if not raised or _SECOND_HAND.search(line):
            continue
        told = [line]
        for more in lines[at + 1:at + 4]:  # pydantic's messages go on over indented lines
            if not more.startswith("  ") or more.lstrip().startswith(("File ", "^", "For further")):
                break
            told.append(more.strip())
        return " ".join(told)[:600]
    return ""


def _last_line(log: str) -> str:
    return next((line.strip() for line in reversed(log.splitlines()) if line.strip()), "nothing")


def _message_of(body: str) -> str:
    try:
        return json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return body[:300] or "It gave no reason."


# The supervisor: its own process, its own session.


def _supervise(parent: int, log_path: str, command: list[str]) -> int:
    """Run `command` until it ends or the notebook's process, `parent`, is gone; leave nothing.

    As a subreaper it inherits vLLM's engine and workers when their own parent dies first, so that
    all of them stay below it and can be found.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
    env = dict(os.environ)
    # The notebook's own is not for vLLM's environment.
    env["PYTHONPATH"] = str(workspace.repo() / "helpers" / "at_start")
    asked_to_stop = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: asked_to_stop.append(True))
    with tempfile.TemporaryDirectory(prefix="vllm-") as scratch, open(log_path, "wb") as log:
        env["TMPDIR"] = scratch  # sockets and rendezvous files that a killed vLLM would leave
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env,
            preexec_fn=lambda: libc.prctl(1, signal.SIGTERM),  # PR_SET_PDEATHSIG: if we are killed
        )
        while child.poll() is None and not asked_to_stop:
            closed, _, _ = select.select([0], [], [], 0.5)
            # A fork of the notebook's process can hold the pipe open after it: so look for it, too.
            if closed or os.getppid() != parent:
                break
        if child.poll() is None:
            child.terminate()  # vLLM then ends its own processes, and its shared memory with them
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=GRACE)
        _end_descendants()
    return child.returncode if child.returncode is not None else 1


def _end_descendants() -> None:
    """Kill every descendant, again and again until there is none: they may still be forking."""
    for _ in range(20):
        below = psutil.Process().children(recursive=True)
        for one in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        _, alive = psutil.wait_procs(below, timeout=1)
        if not below and not alive:
            break


if __name__ == "__main__":
    code = _supervise(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
    sys.exit(code if code >= 0 else 128 - code)
