"""One line that says how far a long step is, in a notebook, a terminal or a plain file."""

import sys
import time


def in_notebook() -> bool:
    """Whether this process runs a notebook's cells, and has not merely imported ipykernel."""
    if "ipykernel" not in sys.modules:
        return False
    from IPython import get_ipython

    return hasattr(get_ipython(), "kernel")


class Progress:
    """One line that changes in a notebook and a terminal; in a plain file, a line per phase."""

    def __init__(self, title: str):
        self._title, self._began, self._last, self._phase = title, time.monotonic(), "", ""
        self._handle = None
        if in_notebook():
            from IPython.display import display

            self._handle = display({"text/plain": title}, raw=True, display_id=True)

    def show(self, phase: str, detail: str = "") -> None:
        """Say what is being done, and how far; `detail` may change often and needs no new line."""
        words = f"{phase}, {detail}" if detail else phase
        line = f"{self._title}: {words}, {time.monotonic() - self._began:.0f} s"
        if line == self._last:
            return
        if self._handle is not None:
            self._handle.update({"text/plain": line}, raw=True)
        elif sys.stdout.isatty():
            print(f"\r{line:<79}", end="", flush=True)
        elif phase != self._phase:
            print(line, flush=True)
        self._last, self._phase = line, phase

    def close(self, line: str) -> None:
        if self._handle is not None:
            self._handle.update({"text/plain": line}, raw=True)
        else:
            print(("\r" if sys.stdout.isatty() else "") + f"{line:<79}", flush=True)
