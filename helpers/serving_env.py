"""What a process of vLLM's environment is started with: which Python, and which variables."""

import os
import pwd
from pathlib import Path

from helpers import WorkbookError, client, hardware, workspace

# vLLM is told to keep to itself, and to this machine: the model is always a local directory.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
    "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "PYTHONUNBUFFERED": "1", "NO_COLOR": "1",
    # Phase, kernel and cause of death are read from its log, and the guard is middleware of its
    # Python front end: what a reader has set for another vLLM must not take them away.
    "VLLM_CONFIGURE_LOGGING": "1", "VLLM_LOGGING_CONFIG_PATH": "", "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_LOGGING_PREFIX": "", "VLLM_USE_RUST_FRONTEND": "0",
    # From capability 8.0 on vLLM 0.32 samples by FlashInfer unless it is told not to, and its
    # warm-up then compiles a kernel with nvcc, which few machines have, and dies where it is not
    # there. All that the workbook asks for is greedy.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
}

# With vLLM's flag `--distributed-executor-backend uni`, on a CPU: engine and worker in one process.
IN_ONE_PROCESS = {
    # vLLM 0.32's CPU platform turns `uni` back into `mp` unless this is off. An API server still
    # runs its engine in a process of its own, and still notices its death.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # OpenMP's threads spin for milliseconds when they wait, against the API server and the
    # notebook on a machine of few cores: 36 tokens/s, and 140 with this, on two busy ones.
    "GOMP_SPINCOUNT": "1000",
    # NumPy's OpenBLAS starts threads when it is imported, and with threads no process may be forked
    # (`serve_side.cpu_platform`).
    "OPENBLAS_NUM_THREADS": "1",
    # vLLM's sampler has a function that torch.compile turns into C++ at the first request for
    # logprobs. Where there is no g++, as on many a laptop, the engine dies of it.
    "TORCH_COMPILE_DISABLE": "1",
}


def serve_python() -> Path:
    """The Python of this machine's serving environment: with a GPU, and without, another one."""
    where = folder()
    if not (where / "bin" / "python").exists():
        raise WorkbookError(
            f"There is no serving environment ({where.name}).",
            "vLLM lives in an environment of its own, which `make` sets up on first use: one for "
            "machines with a GPU, one for those without, or with the GPU hidden.",
            "Run `make setup` in a terminal, at the top of the workbook.",
        )
    return where / "bin" / "python"


def folder() -> Path:
    """The folder of this machine's serving environment."""
    return hardware.serving_folder(hardware.serving_mode(hardware.detect()).device)


def environment() -> dict[str, str]:
    """What a process in the serving environment gets: this process's variables, and ours.

    Without proxies; with the environment's own programs first on the PATH, since FlashInfer, say,
    calls `ninja` by its name; and with the GPUs that the plan is for (`hardware.cuda_variables`). A
    user whom the system does not know, as in a container that runs as any uid, gets a home in the
    workspace: vLLM would otherwise make a folder called ~ where it runs.
    """
    own = (client.without_proxies(os.environ) | ENVIRONMENT
           | hardware.cuda_variables(hardware.detect()))
    own["PATH"] = os.pathsep.join([str(folder() / "bin"), own.get("PATH") or os.defpath])
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        own = {"HOME": str(workspace.root() / "home"), "USER": str(os.getuid())} | own
    return own
