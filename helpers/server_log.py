"""A vLLM server's log, and what it says: what vLLM is doing, its kernel, why it died."""

import re
import shutil
import signal
import sys
import time
from pathlib import Path

from helpers import WorkbookError, workspace


def create(model_name: str, port: int) -> Path:
    """A new, empty file for the log of a server, in the workspace's logs.

    Raises `WorkbookError` where it cannot be written: all that is known of a server comes from it.
    """
    logs = workspace.root() / "logs"
    served = re.sub(r"[^\w.-]+", "-", model_name)[:60]
    path = logs / f"vllm-{served}-{time.strftime('%Y%m%d-%H%M%S')}-{port}.log"
    try:
        logs.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(2**16))  # as much as a start says: a full disk is noticed now
        path.write_bytes(b"")
    except OSError as refused:
        raise WorkbookError(
            f"The server's log cannot be written: {path}.",
            f"The system says: {refused.strerror}.",
            "Free some disk there, or let PHI4_FP8_WORKSPACE name a folder that can be written.",
        ) from None
    return path


def read(path: Path | None) -> str:
    """What has been written to the log so far; nothing where there is none, or no longer."""
    try:
        return path.read_text(errors="replace") if path else ""
    except OSError:
        return ""


# (what the log says, what vLLM is then doing). On a GPU it compiles and captures CUDA graphs: some
# to see what memory they take, all of them once the size of the KV cache is known. There vLLM 0.32
# has two model runners, whose words differ: by default the one of "Loading model from scratch".
_PHASES = (
    ("Resolved architecture", "starting the engine's process"),
    ("Initializing a V1 LLM engine", "starting the engine"),
    ("Starting to load model", "loading the weights"),
    ("Loading model from scratch", "loading the weights"),
    ("Loading safetensors", "loading the weights"),
    ("for vLLM's torch.compile", "compiling"),
    ("Dynamo bytecode transform", "compiling"),
    ("ompiling a graph", "compiling"),
    ("Profiling CUDA graph memory", "measuring the memory that is left"),
    ("KV cache size", "preparing the KV cache"),
    ("apturing CUDA graph", "capturing CUDA graphs"),
    ("Starting vLLM server", "opening its port"),
)


def phase(log: str) -> str:
    """What vLLM is doing: the phase of the last line that `_PHASES` knows."""
    at, doing = max((log.rfind(said), doing) for said, doing in _PHASES)
    return doing if at >= 0 else "importing"


def selected_kernel(config: dict, log: str) -> str:
    """The linear kernel that vLLM's log names, for a model with this config.json.

    vLLM 0.32 says "Selected K for S" of 8-bit schemes, "Using K for S" of 4-bit ones, and of FP8
    weights with 16-bit activations nothing but that Marlin is used, if it is.
    """
    if "quantization_config" not in config:
        return "unquantized"
    if chosen := re.findall(r"(?:Selected|Using) (\w+Kernel) for", log):
        return chosen[-1]
    marlin = "leveraging the Marlin kernel" in log
    return "MarlinFP8ScaledMMLinearKernel" if marlin else "not named in the log"


_PREFIX = re.compile(r"^(\(\w+[^)]*\) )?((INFO|WARNING|ERROR|CRITICAL) [\d-]+ [\d:]+ \[\S+\] )?")
_RAISED = re.compile(r"^(?:[\w.]+\.)?(\w*(?:Error|Exception|Interrupt|NotFound|Exceeded))(?::|$)")
_ABORTED = re.compile(
    r"terminate called (?:after throwing an instance of '(?P<type>.+?)'|without|recursively)")
# Raised because of something that another process has already said.
_SECOND_HAND = re.compile(
    r"EngineDeadError|Engine core initialization failed|WorkerProc initialization failed|"
    r"Executor failed|cancelled|See stack trace|See root cause")
# What a program that was called to compile says for itself, before Python's exception: gcc or
# clang of a header, the shell or ninja of a program.
_BUILDING = re.compile(r"CalledProcessError|Ninja build failed")
_BUILD_FAULT = re.compile(
    r"fatal error: (.*)|(\S*(?:nvcc|[gc]\+\+|gcc|clang): (?:not found|No such file or directory))")
_REMEDIES = (  # (what the reason says, what to do), first match
    (r"Python\.h",
     "Triton compiles against Python's headers: install them (on Debian or Ubuntu: apt install "
     "python{}.{}-dev).".format(*sys.version_info[:2])),
    (r"Failed to find C compiler|C\+\+ compiler|(\+\+|gcc|clang): (not found|No such)",
     "Install a C and C++ compiler (on Debian or Ubuntu: apt install build-essential)."),
    (r"No such file or directory: '\S*\b(cc|gcc|clang)\b",
     "Unset CC, or let it name a C compiler alone, without arguments."),
    (r"nvcc",
     "vLLM took a kernel of FlashInfer's, which is compiled with nvcc: install the CUDA toolkit, "
     "or keep to kernels that come compiled: VLLM_USE_FLASHINFER_SAMPLER=0, --attention-backend "
     "FLASH_ATTN."),
    (r"No such file or directory: 'ninja'",
     "The serving environment brings ninja, and is incomplete: run `make setup` again."),
    (r"libcuda\.so",
     "libcuda.so.1 belongs to the NVIDIA driver: in a container, start it with the GPU (--gpus "
     "all); else `sudo ldconfig` lets it be found."),
    (r"No space left on device|Errno 28",
     "Free some disk where PHI4_FP8_WORKSPACE and TMPDIR point to."),
    (r"Read-only file system|Errno 30|Permission denied|Errno 13",
     "Let PHI4_FP8_WORKSPACE and TMPDIR name folders that can be written."),
    (r"could not create a primitive|dnnl::error",
     "oneDNN cannot compute this on this CPU, or not with the instructions that "
     "ONEDNN_MAX_CPU_ISA and ATEN_CPU_CAPABILITY leave it: unset them, then start it again."),
    (r"Too many open files|Errno 24", "Raise the limit of open files: `ulimit -n 4096`."),
    (r"exit code: -7|SIGBUS",
     "/dev/shm is full: free it, or give the container more of it (--shm-size)."),
    (r"SafetensorError|safetensors|incomplete metadata|header",
     "The weights are damaged: make the checkpoint again."),
    (r"Address already in use|Errno 98", "Start it again: another program took its port."),
    (r"unrecognized arguments|error: argument", "Correct the flags given to the server."),
    (r"Free memory on device",
     "Something else holds memory of this GPU, and `nvidia-smi` names it: a desktop, another "
     "server, a notebook whose kernel is still there (JupyterLab: Running Terminals and Kernels). "
     "End it and start the server again: its share follows from what is then free."),
    (r"No available memory for the cache|cache is needed, which is larger",
     "The weights leave too little of the memory that vLLM was given: end what else holds memory "
     "of the GPU (`nvidia-smi` names it), or lower --max-model-len and --max-num-seqs."),
    (r"out of memory|exit code: -9|"
     r"larger than the maximum number of tokens|bad_alloc|(?<!illegal )memory",
     "Stop other servers and programs that hold memory, or lower --max-model-len and "
     "--max-num-seqs."),
    (r"NVIDIA driver on your system is too old|driver version is insufficient",
     "Run `make preflight` in a terminal: it says which driver is needed."),
    (r"exit code: -4|SIGILL|Illegal instruction",
     "An instruction was refused, as AMX is before it is permitted: see that the workbook's plugin "
     "is installed in .venv-serve (`make setup`)."),
    (r"exit code: -(6|11)\b|SIGABRT|SIGSEGV|C\+\+",
     "Native code crashed: start it again, and if it does so again, report the end of the log to "
     "vLLM."),
    (r"ModuleNotFoundError|ImportError|No module named|operator torchvision",
     "The serving environment is incomplete: run `make setup` again."),
)


def why_it_ended(path: Path, exit_code: int) -> tuple[str, str]:
    """As `explain`, of the log at `path`; a log on a full disk lacks the end, which says why."""
    if shutil.disk_usage(path.parent).free < 2**16:
        return (f"The disk is full, and its log, {path.name}, could not be written to the end.",
                f"Free some disk in {path.parent}, then start it again.")
    return explain(read(path), exit_code)


def explain(log: str, exit_code: int | None = None) -> tuple[str, str]:
    """Why vLLM died, from its log: (one paragraph, what to do)."""
    lines = [_PREFIX.sub("", line).rstrip() for line in log.splitlines()]
    reason = _raised(lines) or next(
        (line for line in reversed(lines) if re.search(r"error: |died unexpectedly", line)), "")
    if not reason and exit_code is not None and exit_code > 128:
        number = exit_code - 128
        reason = f"it was ended by {signal.Signals(number).name} (exit code: -{number})"
    if _BUILDING.search(reason):
        told = next(filter(None, map(_BUILD_FAULT.search, lines)), None)
        reason = f"{told[1] or told[2]} (in: {reason[:200]})" if told else reason
    reason = reason or f"it gave no reason; the last line is: {last_line(log)}"
    remedy = next((todo for said, todo in _REMEDIES if re.search(said, reason)),
                  "Correct what it names, then start it again.")
    return f"Its log says: {reason}", remedy


def _raised(lines: list[str]) -> str:
    """The first exception of the log that is not just the news of another one, with its message.

    It may be a C++ one, which ends the process: the runtime then writes "terminate called after
    throwing an instance of 'TYPE'" and, on the next line, "what():  MESSAGE".
    """
    for at, line in enumerate(lines):
        if abort := _ABORTED.search(line):
            said = [more.partition("what():")[2].strip() for more in lines[at + 1:at + 4]]
            message = next(filter(None, said), "it gave no reason")
            return f"a C++ {abort['type'] or 'abort'}: {message}"[:600]
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


def last_line(log: str) -> str:
    return next((line.strip() for line in reversed(log.splitlines()) if line.strip()), "nothing")
