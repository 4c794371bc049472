"""A vLLM server's whole life: start, ready, watch, stop.

The notebook's process starts a supervisor (`helpers.serve_side.supervisor`) in a session of its
own, and the supervisor starts vLLM. A pipe runs from the notebook to the supervisor; when it
closes, for whatever reason, SIGKILL included, the supervisor ends every process that vLLM started,
and itself.
"""

import contextlib
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence

import psutil
import requests

from helpers import (
    WorkbookError,
    address,
    checkpoint,
    client,
    gpu_memory,
    hardware,
    models,
    server_log,
    workspace,
)
from helpers.checkpoint import Checkpoint
from helpers.endpoint import Endpoint, checked_name
from helpers.hardware import Machine, ServingMode
from helpers.models import Profile
from helpers.progress import Progress
from helpers.serving_env import IN_ONE_PROCESS, environment, serve_python

STARTUP_TIMEOUT = 1800  # seconds; Phi-4 in bf16 from a slow disk, compiled, takes several minutes
GRACE = 4  # seconds that vLLM has to end by itself before it is killed

MAX_STREAMS = {"cpu": 16, "cuda": 64}  # requests that a server answers at once, by device

# Forces Marlin's W8A16 kernel, on GPUs with FP8 tensor cores too; a bf16 model is not concerned.
MARLIN = ["--linear-backend", "marlin"]

# vLLM's own check of the key covers /v1 and a few more: this one covers every route but /health.
# The last one named stands outside all others.
GUARD = ["--middleware", "helpers.serve_side.guard.KeyGuard"]


def attention(machine: Machine) -> list[str]:
    """vLLM's flags for attention on a GPU: FlashAttention by name on capability 10.x (B200).

    There alone vLLM 0.32 takes FlashInfer's first (`vllm/platforms/cuda.py`,
    `_get_backend_priorities`), which is compiled with nvcc or downloaded while the server starts.
    FlashAttention 4 compiles itself with what the environment has.
    """
    if machine.gpus and hardware.best_gpu(machine).compute_capability[0] == 10:
        return ["--attention-backend", "FLASH_ATTN"]
    return []


def default_flags(profile: Profile, mode: ServingMode, machine: Machine | None = None) -> list[str]:
    """vLLM's flags for a profile in a serving mode, beside the ones every server gets.

    CPU: eager, since compiling costs more than it gains in a course; engine and worker in one
    process (`uni`), which shortens the start; 1 GiB of KV cache. GPU: compiled; 90 % of its memory,
    or what is free now; two equal GPUs where one does not hold both arms (`models.gpus`); where FP8
    weights meet 16-bit activations, Marlin's kernel by name, since vLLM 0.32 would take another
    package's first (Humming, in `_POSSIBLE_WFP8A16_KERNELS`) and not say in its log which.
    `machine`: by default this one.
    """
    flags = ["--dtype", mode.dtype, "--max-model-len", str(profile.max_model_len),
             "--max-num-seqs", str(MAX_STREAMS[mode.device])]
    if mode.device == "cpu":
        return [*flags, "--enforce-eager",
                "--kv-cache-memory-bytes", str(2**30), "--distributed-executor-backend", "uni"]
    machine = machine or hardware.detect()
    share, gpus = models.gpu_share(profile, machine), models.gpus(profile, machine)
    return [*flags, "--gpu-memory-utilization", f"{share:.2f}",
            *(["--tensor-parallel-size", str(gpus)] if gpus > 1 else []),
            *(MARLIN if mode.key == "gpu-w8a16" else []), *attention(machine)]


class VllmServer(Endpoint):
    """A running vLLM server, as a context manager.

    `model` is a verified checkpoint; `flags` go to vLLM as they are; `name` is
    the name it serves the model under, by default the directory's; `env` is added to vLLM's
    environment; `port` is taken if given, else a free one; `key` is asked for, by default a random
    one; it listens at `host`, by default for this machine alone.

    Once started: `url`, `api_key`, `model_name`, `log_path`, `kernel` (the linear kernel that vLLM
    chose, "unquantized" for a bf16 model) and `startup_seconds`. Every route but /health asks for
    the key. Raises `WorkbookError` when the model has been replaced meanwhile, the port cannot be
    used, its log cannot be written, its environment is missing, or vLLM dies.
    """

    def __init__(self, model: Checkpoint, flags: list[str] = (), name: str | None = None,
                 env: dict[str, str] | None = None, port: int | None = None,
                 key: str | None = None, host: str = address.LOOPBACK):
        self.checkpoint = model
        self.model = model.path.resolve()
        self.flags = list(flags)
        self.model_name = checked_name(name or self.model.name)
        self.api_key = key or secrets.token_urlsafe(24)
        self.host = host
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
        start_together([self])
        return self

    def _begin(self, taken: Iterable[int]) -> None:
        """Start the processes, and wait for nothing; `taken`: ports that are not free any more."""
        self.checkpoint.require_unchanged()  # now, not after half a minute of vLLM's start
        port = (address.free_port(taken) if self._port is None
                else address.checked_port(self._port, self.host))
        self.url = f"http://{address.reached_by(self.host)}:{port}"
        self.log_path = server_log.create(self.model_name, port)
        self._began, self.startup_seconds = time.monotonic(), 0.0
        self._supervisor = self._start_supervisor(port)
        self.session = self._supervisor.pid

    def _is_ready(self) -> bool:
        """Whether it has generated a token. Raises `WorkbookError` when it has died, or is late."""
        gone = time.monotonic() - self._began
        if self._supervisor.poll() is not None:
            raise self._died(f"while starting, after {gone:.0f} s")
        if not (self._is_healthy() and self._listens()):
            if gone > STARTUP_TIMEOUT:
                raise WorkbookError(
                    f"vLLM was not ready after {STARTUP_TIMEOUT / 60:.0f} minutes.",
                    f"The last it said: {server_log.last_line(self.log())}",
                    f"Read its log, {self.log_path}; a slow disk may need another start.")
            return False
        self.complete("1", max_tokens=1)
        self.checkpoint.require_unchanged()  # while vLLM read it
        self.startup_seconds = time.monotonic() - self._began
        self.kernel = server_log.selected_kernel(self.checkpoint.config, self.log())
        return True

    def stop(self) -> None:
        """End vLLM and every process of it; returns when they are gone."""
        stop_together([self])

    @property
    def is_running(self) -> bool:
        """Whether it was started, and not stopped since."""
        return self._supervisor is not None

    @property
    def gpus(self) -> int:
        """How many GPUs share its layers."""
        flag = "--tensor-parallel-size"
        return int(self.flags[self.flags.index(flag) + 1]) if flag in self.flags else 1

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def log(self) -> str:
        """What vLLM has written so far."""
        return server_log.read(self.log_path)

    def command(self, port: int) -> list[str]:
        """The command line that starts vLLM; the key is in its environment, VLLM_API_KEY."""
        return [str(serve_python()), "-m", "vllm.entrypoints.openai.api_server",
                "--model", str(self.model), "--served-model-name", self.model_name,
                "--host", self.host, "--port", str(port), "--disable-uvicorn-access-log",
                *self.flags, *GUARD]

    def _start_supervisor(self, port: int) -> subprocess.Popen:
        env = {**environment(), **self._env, "VLLM_API_KEY": self.api_key}
        if "uni" in self.flags:
            env = {"OMP_NUM_THREADS": str(threads(self.checkpoint)), **IN_ONE_PROCESS, **env,
                   "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        return subprocess.Popen(
            [sys.executable, "-m", "helpers.serve_side.supervisor", str(os.getpid()),
             str(GRACE), str(self.log_path), *self.command(port)],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env=env, cwd=workspace.repo(), start_new_session=True,
        )

    def _is_healthy(self) -> bool:
        try:
            with client.session() as session:
                return session.get(f"{self.url}/health", timeout=5).ok
        except requests.RequestException:
            return False

    def _listens(self) -> bool:
        """Whether it is our vLLM that has the port: whoever else took it must not get the key."""
        for process in processes(self):
            with contextlib.suppress(psutil.Error):
                if any(each.laddr.port == self.port and each.status == psutil.CONN_LISTEN
                       for each in process.net_connections("tcp")):
                    return True
        return False

    def post(self, route: str, body: dict) -> dict:
        if not self.is_running:
            raise WorkbookError("The server is not running.",
                                "It was stopped, or never started.",
                                "Use it inside its `with` block, or call start() first.")
        return super().post(route, body)

    def check_alive(self) -> None:
        if self._is_dying():
            raise self._died("while answering")

    def unreached(self, broken: requests.RequestException) -> WorkbookError:
        if self._is_dying():
            return self._died("while answering")
        return WorkbookError(
            "vLLM did not answer.", f"The connection broke: {broken}.",
            f"Read its log, {self.log_path}, and start the server again.")

    def since(self) -> str:
        return f"ready after {self.startup_seconds:.0f} s"

    def why_away(self) -> str:
        return server_log.explain(self.log())[0]

    def how_back(self) -> str:
        return f"Start the server again (its log is {self.log_path}) and run this cell again"

    def require_alive(self) -> None:
        """Raise `WorkbookError` when it has ended by itself."""
        if self._supervisor.poll() is not None:
            raise self._died("while serving")

    def _is_dying(self) -> bool:
        """Whether vLLM ends within a few seconds, as it does when its engine has died."""
        try:
            self._supervisor.wait(timeout=GRACE)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _died(self, when: str) -> WorkbookError:
        meaning, remedy = server_log.why_it_ended(self.log_path, self._supervisor.returncode)
        if "memory" in remedy:
            remedy = f"{gpu_memory.in_the_way(hardware.detect().gpus)} {remedy}".strip()
        return WorkbookError(f"vLLM stopped {when}.", meaning,
                             f"{remedy} The whole log is in {self.log_path}.")


def start_together(servers: Sequence[VllmServer]) -> None:
    """Start servers side by side; returns when each of them has generated a token.

    When one does not start, or at an interruption, all are stopped and its reason is raised.
    """
    if any(server.is_running for server in servers):
        raise WorkbookError("The server is already running.",
                            "A second start would leave the first one without an owner.",
                            "Call stop() first, or make a second VllmServer.")
    title = "vLLM: " + " and ".join(server.model_name for server in servers)
    progress = Progress(title)
    try:
        for at, server in enumerate(servers):
            server._begin([other.port for other in servers[:at]])
        starting = list(servers)
        while starting := [server for server in starting if not server._is_ready()]:
            phases = dict.fromkeys(server_log.phase(server.log()) for server in starting)
            progress.show(" and ".join(phases))
            time.sleep(0.25)
    except BaseException:
        stop_together(servers)
        progress.close(f"{title} did not start.")
        raise
    progress.close("\n".join(
        f"vLLM: {server.model_name} is ready after {server.startup_seconds:.0f} s; "
        f"linear layers: {server.kernel}." for server in servers))


def stop_together(servers: Iterable[VllmServer]) -> None:
    """End servers side by side; returns when no process of any is left."""
    ending = []
    for server in servers:
        if server.is_running:
            ending.append((server, server._supervisor))
            server._supervisor.stdin.close()
            server._supervisor = None
    for server, supervisor in ending:
        try:
            supervisor.wait(timeout=3 * GRACE)
        except subprocess.TimeoutExpired:  # it should never hang
            supervisor.kill()
        while left := processes(server):  # of a supervisor that was killed, or hung
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(left, timeout=1)


def processes(server: VllmServer) -> list[psutil.Process]:
    """The living processes of a server: its supervisor, vLLM's API server, engine and workers."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if (server.session and os.getsid(process.pid) == server.session
                    and process.status() != psutil.STATUS_ZOMBIE):
                found.append(process)
    return found


def threads(model: Checkpoint) -> int:
    """Threads to compute with on a CPU: a core each, hyperthreads not counted, and one if small.

    A layer of a model that fits the cache is done before a second thread has woken up: the bundled
    one is as fast on one thread as on two when the machine is quiet, and faster when it is not.
    """
    if checkpoint.total_bytes(model.tensors) < 64 * 2**20:
        return 1
    allowed = len(os.sched_getaffinity(0))
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))
