"""What the reader expected before measuring, kept in the workspace."""

from helpers import WorkbookError, workspace

FILE = "predictions.json"


def keep(name: str, value: object) -> None:
    """Keep a prediction, anything that JSON holds, in the place of an earlier one of that name.

    Raises `WorkbookError` when the workspace cannot be written.
    """
    workspace.write_json(workspace.root() / FILE, kept() | {name: value})


def keep_number(name: str, answer: object, most: float) -> None:
    """Keep the reader's number from 0 to `most`; `...` is no answer yet.

    Whatever cannot be used is said, and stops nothing.
    """
    if answer is ...:
        print("Not predicted yet: put a number in place of the three dots.")
        return
    try:
        number = float(answer)
    except Exception:  # an answer may be anything
        number = -1.0
    if not 0 <= number <= most:
        print(f"Not kept: put a number from 0 to {most:g}.")
        return
    try:
        keep(name, [number])
    except WorkbookError as error:
        print(f"Not kept: {error.what}")
        return
    print(f"Kept: {number:g}. What is measured stands beside it in notebook 09.")


def number(name: str) -> float | None:
    """What `keep_number` kept of that name; None where there is none."""
    found = kept().get(name)
    return float(found[0]) if isinstance(found, list) and len(found) == 1 and isinstance(
        found[0], int | float) else None


def kept() -> dict:
    """Every prediction by its name; empty where there is none, or nothing that can be read."""
    try:
        return workspace.read_json(workspace.root() / FILE)
    except WorkbookError:
        return {}
