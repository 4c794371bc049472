"""The process between a notebook and vLLM: it leaves nothing of vLLM behind, whatever ends first.

The notebook's process starts it (`python -m helpers.serve_side.supervisor PARENT GRACE LOG
COMMAND ...`) in a session of its own. A pipe runs from the notebook to it; when that closes, for
whatever reason, SIGKILL included, the supervisor ends every process that vLLM started, and itself.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil


def supervise(parent: int, grace: float, log_path: str, command: list[str]) -> int:
    """Run `command` until it ends or the notebook's process, `parent`, is gone; leave nothing.

    `grace`: seconds that vLLM has to end by itself before it is killed.

    As a subreaper it inherits vLLM's engine and workers when their own parent dies first, so that
    all of them stay below it and can be found.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
    env = dict(os.environ)
    # The notebook's own is not for vLLM's environment.
    env["PYTHONPATH"] = str(Path(__file__).parent)
    asked_to_stop = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: asked_to_stop.append(True))
    with (tempfile.TemporaryDirectory(prefix="vllm-", dir=socket_place()) as scratch,
          open(log_path, "wb") as log):
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
                child.wait(timeout=grace)
        end_descendants()
    return child.returncode if child.returncode is not None else 1


def socket_place() -> str:
    """A folder for vLLM's sockets, whose whole path may have 107 bytes (unix(7)).

    vLLM's own part is a UUID of 36 characters, and the folder between is called vllm-XXXXXXXX.
    Raises `OSError` where TMPDIR is too long and the usual places cannot be written.
    """
    for place in (tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm"):
        if len(os.fsencode(place)) <= 50 and os.access(place, os.W_OK | os.X_OK):
            return place
    raise OSError(f"no temporary folder has a path short enough for a socket: set TMPDIR to one "
                  f"of at most 50 bytes, not {tempfile.gettempdir()}")


def end_descendants() -> None:
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
    try:
        code = supervise(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3], sys.argv[4:])
    except Exception as error:  # nobody reads this process's own output
        with open(sys.argv[3], "a") as log:
            log.write(f"{type(error).__name__}: {error}\n")
        raise
    sys.exit(code if code >= 0 else 128 - code)
