"""What a committed notebook holds: the outputs of one clean run, and a stamp tying them to it."""

import hashlib
import json
import re
from pathlib import Path

from nbformat import NotebookNode

STAMP = "phi4_fp8"
VIEW = "application/vnd.jupyter.widget-view+json"
STATE = "application/vnd.jupyter.widget-state+json"
PROGRESS = re.compile(r"\d+%\|")  # as tqdm draws it
ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def code_cells(nb: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in nb.cells if cell.cell_type == "code" and cell.source.strip()]


def sources_sha256(nb: NotebookNode) -> str:
    """The SHA-256 of the code cells' sources: what the outputs come from."""
    sources = [cell.source for cell in nb.cells if cell.cell_type == "code"]
    return hashlib.sha256(json.dumps(sources).encode()).hexdigest()


def clean(nb: NotebookNode, places: dict[Path, str]) -> None:
    """Leave of a run what a reader wants, in place: no progress bars, no log, no machine's paths.

    `places`: folders of this machine and what to write in their stead, the longest first.
    """
    for cell in nb.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            kept = [_clean_stream(o) if o.output_type == "stream" else o for o in cell.outputs]
            cell.outputs = [_without_paths(o, places) for o in kept if not _is_debris(o)]
    nb.metadata = NotebookNode(
        kernelspec={"display_name": "Python 3 (ipykernel)", "language": "python",
                    "name": "python3"},
        language_info={"name": "python", "pygments_lexer": "ipython3"},
        **_widgets(nb),
        **{STAMP: {"sources_sha256": sources_sha256(nb)}},
    )


def _clean_stream(output: NotebookNode) -> NotebookNode:
    """A stream as a terminal would show it at the end: rewritten lines once, finished bars gone."""
    lines = [line.rstrip("\r").rpartition("\r")[2]
             for line in ESCAPES.sub("", output.text).split("\n")]
    kept = [line for line in lines if not PROGRESS.search(line)]
    text = "\n".join(kept)
    return NotebookNode(output, text=text if kept == lines else text.lstrip("\n"))


def _is_debris(output: NotebookNode) -> bool:
    """Whether an output is the libraries' log (stderr), an emptied stream, or a bar as a widget."""
    if output.output_type == "stream":
        return output.name == "stderr" or not output.text.strip()
    data = output.get("data", {})
    return VIEW in data and bool(PROGRESS.search(data.get("text/plain", "")))


def _without_paths(node, places: dict[Path, str]):
    """The same outputs with each folder's path replaced; images are left alone."""
    if isinstance(node, str):
        for folder, name in places.items():
            node = node.replace(f"{folder}/", f"{name}/" if name else "").replace(
                str(folder), name or ".")
        return node
    if isinstance(node, list):
        return [_without_paths(item, places) for item in node]
    if isinstance(node, dict):
        return NotebookNode({key: value if key.startswith("image/") and key != "image/svg+xml"
                             else _without_paths(value, places) for key, value in node.items()})
    return node


def _widgets(nb: NotebookNode) -> dict:
    """The state of the widgets that are still on show, and of the models they are made of."""
    saved = nb.metadata.get("widgets", {}).get(STATE)
    if not saved:
        return {}
    wanted, reached = [], {}
    for cell in nb.cells:
        for output in cell.get("outputs", []):
            if VIEW in output.get("data", {}):
                wanted.append(output.data[VIEW]["model_id"])
    while wanted:
        model = wanted.pop()
        if model in saved["state"] and model not in reached:
            reached[model] = saved["state"][model]
            wanted += re.findall(r"IPY_MODEL_([0-9a-f]+)", json.dumps(reached[model]))
    return {"widgets": {STATE: {**saved, "state": reached}}} if reached else {}
