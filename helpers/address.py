"""Where a server listens: for this machine alone unless asked otherwise, and at which port."""

import errno
import socket
from collections.abc import Iterable

from helpers import WorkbookError

LOOPBACK = "127.0.0.1"


def reached_by(host: str) -> str:
    """The address under which this machine reaches its own server that listens at `host`."""
    return LOOPBACK if host == "0.0.0.0" else host


def free_port(taken: Iterable[int]) -> int:
    """A port that nobody has, and that is not `taken` by a server which does not listen yet."""
    while True:
        with socket.socket() as probe:
            probe.bind((LOOPBACK, 0))
            port = probe.getsockname()[1]
        if port not in taken:
            return port


def checked_port(port: int, host: str = LOOPBACK) -> int:
    """`port`, where it is free at `host`; else `WorkbookError`."""
    if not 1 <= port <= 65535:
        raise WorkbookError(f"There is no port {port}.", "Ports are numbered from 1 to 65535.",
                            "Leave `port` out and a free one is taken.")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as refused:
            what = "is taken" if refused.errno == errno.EADDRINUSE else "cannot be used"
            raise WorkbookError(
                f"Port {port} {what}.", f"The system says: {refused.strerror}.",
                "Leave `port` out and a free one is taken, or stop the program that uses it.",
            ) from None
    return port
