"""What tells one checkpoint from another: a fingerprint of its bytes, and what it was made from."""

import contextlib
import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from helpers import WorkbookError, workspace

MADE_FROM = "made_from.json"  # what an `Origin` is kept in, inside the checkpoint
SUMS = "sums.json"  # in the workspace: sums of files that have no manifest


@dataclass(frozen=True)
class Origin:
    """What a quantized checkpoint was made from.

    `base`: the base's fingerprint; `recipe`: as `helpers.quantize` reads it from config.json;
    `versions`: of the libraries that made it, by name.
    """

    base: str
    recipe: dict = field(hash=False)
    versions: dict[str, str] = field(hash=False)


def origin(path: Path) -> Origin | None:
    """What the directory says it was made from; None where it says nothing readable."""
    try:
        found = Origin(**workspace.read_json(path / MADE_FROM))
    except (WorkbookError, TypeError):
        return None
    return found if isinstance(found.recipe, dict) and isinstance(found.versions, dict) else None


def fingerprint(directory: Path) -> str:
    """One SHA-256 for all that a loader reads of a directory: of its manifest, or of its sums.

    A directory without a manifest gets its sums from `sums`.
    """
    found = workspace.read_manifest(directory)
    known = sums(directory) if found is None else found
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def sums(directory: Path) -> dict[str, str]:
    """A sum of the content of each file that a loader reads, by the file's name.

    In the hub's cache a file is a link to a blob whose name is the sum of its content, which
    `helpers.hub` checked when it was fetched; that name is taken. Of any other file the SHA-256 is
    computed once, and kept in the workspace with the file's place, size, inode and times: when one
    of these has changed, it is computed again. No program can set back the time of the last change.
    """
    known = {}
    with contextlib.suppress(WorkbookError):  # not there yet, or not to be read: sums are taken
        known = workspace.read_json(workspace.root() / SUMS)
    found, new = {}, {}
    for file in sorted(directory.iterdir()):
        if not (file.suffix in workspace.LOADED
                or file.name.startswith(("tokenizer", "merges", "vocab"))):
            continue
        blob = file.resolve()
        if blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}|[0-9a-f]{40}", blob.name):
            found[file.name] = blob.name
            continue
        stat = blob.stat()
        key = f"{blob} {stat.st_size} {stat.st_ino} {stat.st_mtime_ns} {stat.st_ctime_ns}"
        kept = known.get(key)
        found[file.name] = new[key] = kept if isinstance(kept, str) else workspace.sha256(blob)
    if not new.items() <= known.items():
        with contextlib.suppress(WorkbookError):  # they only save time
            workspace.write_json(workspace.root() / SUMS, known | new)
    return found
