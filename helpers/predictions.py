"""What the reader expected before measuring, kept in the workspace."""

from helpers import WorkbookError, workspace

FILE = "predictions.json"


def keep(name: str, value: object) -> None:
    """Keep a prediction, anything that JSON holds, in the place of an earlier one of that name.

    Raises `WorkbookError` when the workspace cannot be written.
    """
    workspace.write_json(workspace.root() / FILE, kept() | {name: value})


def kept() -> dict:
    """Every prediction by its name; empty where there is none, or nothing that can be read."""
    try:
        return workspace.read_json(workspace.root() / FILE)
    except WorkbookError:
        return {}
