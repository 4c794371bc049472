"""What a vLLM server's log says: what it is doing, which kernel it chose, why it died."""

import re
import signal

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


def phase(log: str) -> str:
    return next((doing for said, doing in _PHASES if said in log), "importing")


def selected_kernel(config: dict, log: str) -> str:
    """The linear kernel that vLLM's log names, for a model with this config.json."""
    quantized = "quantization_config" in config
    chosen = re.findall(r"Selected (\w+) for", log)
    if not chosen and "leveraging the Marlin kernel" in log:  # all that vLLM 0.32 says of W8A16
        return "MarlinFP8ScaledMMLinearKernel"
    return chosen[-1] if chosen else ("not named in the log" if quantized else "unquantized")


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
    reason = reason or f"it gave no reason; the last line is: {last_line(log)}"
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


def last_line(log: str) -> str:
    return next((line.strip() for line in reversed(log.splitlines()) if line.strip()), "nothing")
