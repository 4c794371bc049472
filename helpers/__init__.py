"""The plumbing under the notebooks: small modules, one subject each.

All of them run in the notebook's environment, .venv, but for `helpers.serve_side`, which runs in
vLLM's, or wraps a process of it.
"""

from __future__ import annotations  # make doctor imports this on an old Python

__version__ = "0.1.0"


class WorkbookError(Exception):
    """An error meant for the reader of a notebook.

    `what` happened, what it means (`meaning`), and what to do (`remedy`): one sentence each.
    IPython shows these three lines and no traceback.
    """

    def __init__(self, what: str, meaning: str, remedy: str):
        super().__init__(what, meaning, remedy)
        self.what, self.meaning, self.remedy = what, meaning, remedy

    def __str__(self) -> str:
        return f"{self.what}\n  What it means: {self.meaning}\n  What to do:    {self.remedy}"

    def _render_traceback_(self) -> list[str]:
        """IPython's hook for exceptions that know how to show themselves."""
        return str(self).splitlines()
