"""One set-up at a time: its lock, its children, which end with it, and what it says.

Only the standard library: this runs before anything is installed.
"""

import contextlib
import ctypes
import fcntl
import os
import signal
from collections.abc import Iterator
from pathlib import Path

REMEDY = ("Check the network connection, the proxy and the package index that pip is configured "
          "with (pip config list), then run the same command again: what was downloaded is kept.")
FULL = ("The disk is full. Free some space where this workbook lies and where uv keeps what it "
        "downloads (~/.cache/uv, or what UV_CACHE_DIR names), then run the same command again.")
FULL_DISK = ("No space left", "os error 28", "Disk quota exceeded", "os error 122", "os error 27")


class SetupError(Exception):
    """What stopped the set-up and what to do about it, in a sentence or two."""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock on the environments; wait for another set-up that has it, and say so.

    Every child that is started with `WITH_US` inherits the lock, so it is held as long as any
    of them is at work, also when this process alone is killed.
    """
    try:
        lock = os.open(folder / ".set-up.lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise SetupError(
            f"Nothing can be written where this workbook lies ({folder}: {error.strerror}), and "
            "its environments are not whole. Copy the workbook to a folder of your own, and run "
            "the same command there.") from error
    try:
        os.set_inheritable(lock, True)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("Another set-up is at work here; waiting for it.")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def die_with_us() -> None:
    """In a child: end when the parent does, whatever ended it. Linux only, as vLLM's wheels are."""
    set_signal = 1  # PR_SET_PDEATHSIG, linux/prctl.h
    ctypes.CDLL(None).prctl(set_signal, signal.SIGKILL, 0, 0, 0)


# How every child of a set-up is started: it ends with us, and until then holds the lock with us.
WITH_US = {"preexec_fn": die_with_us, "close_fds": False}


def say(text: str) -> None:
    print(text, flush=True)


def is_full_disk(said: str) -> bool:
    return any(words in said for words in FULL_DISK)


def remedy(said: str) -> str:
    """What to do about what pip or uv said."""
    return FULL if is_full_disk(said) else REMEDY
