"""Where artefacts live, and whether one is finished and whole.

A directory that took work to make (a checkpoint) is written beside its place and renamed into it,
with a manifest of SHA-256 sums. So a directory with a manifest is finished; one whose files still
have those sums is whole.
"""

import contextlib
import hashlib
import json
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from helpers import WorkbookError

MANIFEST = "MANIFEST.json"


def repo() -> Path:
    """The repository's root."""
    return Path(__file__).resolve().parent.parent


def data(*parts: str) -> Path:
    """A file or folder of the repository's `data`."""
    return repo().joinpath("data", *parts)


def root() -> Path:
    """The workspace: PHI4_FP8_WORKSPACE, or `workspace` in the repository; made if not there."""
    place = Path(os.environ.get("PHI4_FP8_WORKSPACE") or repo() / "workspace").resolve()
    place.mkdir(parents=True, exist_ok=True)
    return place


def require_disk(place: Path, nbytes: int, purpose: str) -> None:
    """Raise `WorkbookError` unless `nbytes` are free where `place` is or will be."""
    there = next(folder for folder in (place, *place.parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if free < nbytes:
        raise WorkbookError(
            f"{purpose} needs {nbytes / 1e9:.1f} GB of disk at {place}, and {free / 1e9:.1f} GB "
            "are free.",
            "It was not started, so nothing half-written is left.",
            "Free some space, or set PHI4_FP8_WORKSPACE to a folder on a larger disk.")


@contextlib.contextmanager
def building(target: Path, needs_bytes: int = 0) -> Iterator[Path]:
    """A directory to fill, which becomes `target` when the block ends well.

    Then it has a manifest, is on the disk, and replaces an older `target` in one rename. When the
    block raises, or the process dies, `target` is as it was; leftovers of dead processes are
    removed the next time. A full disk is a `WorkbookError`.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target)
    require_disk(target.parent, needs_bytes, f"Writing {target.name}")
    partial = target.parent / f".{target.name}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        write_manifest(partial)
        replace(partial, target)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if is_full_disk(error):
            raise WorkbookError(
                f"The disk filled up while {target.name} was being written.",
                "What was written so far has been removed; nothing half-written is left.",
                "Free some space, or set PHI4_FP8_WORKSPACE to a folder on a larger disk, and run "
                "this again.") from error
        raise


def is_full_disk(error: BaseException) -> bool:
    """ENOSPC, EFBIG or EDQUOT, also where a Rust library passes it on as text only."""
    words = ("No space left", "os error 28", "File too large", "os error 27", "quota exceeded")
    return isinstance(error, Exception) and any(word in str(error) for word in words)


def _remove_leftovers(target: Path) -> None:
    for left in target.parent.glob(f".{target.name}.*-*"):
        pid = left.name.rpartition("-")[2]
        if pid.isdecimal() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(left, ignore_errors=True)


def replace(partial: Path, target: Path) -> None:
    """Rename `partial` to `target`; an older target is moved aside first and removed after."""
    old = target.parent / f".{target.name}.old-{os.getpid()}"
    if target.exists():
        target.rename(old)
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def write_manifest(directory: Path, known: Mapping[str, str] = MappingProxyType({})) -> None:
    """Write MANIFEST.json: for every file its size in bytes and SHA-256; flush all to the disk.

    `known`: sums that were taken when the files were written, by name.
    """
    files = {}
    for file in sorted(path for path in directory.rglob("*") if path.is_file()):
        if file.name == MANIFEST:
            continue
        name = str(file.relative_to(directory))
        files[name] = {"bytes": file.stat().st_size, "sha256": known.get(name) or sha256(file)}
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
    write_json(directory / MANIFEST, files)


def read_manifest(directory: Path) -> dict | None:
    """The manifest's files, or None where there is no readable one."""
    try:
        return json.loads((directory / MANIFEST).read_text())
    except (OSError, ValueError):
        return None


def is_whole(directory: Path) -> bool:
    """Whether the directory was finished and all its files have their sizes (not their sums)."""
    manifest = read_manifest(directory)
    return manifest is not None and not _wrong_sizes(directory, manifest)


def _wrong_sizes(directory: Path, manifest: dict) -> list[str]:
    wrong = []
    for name, entry in manifest.items():
        file = directory / name
        if not file.is_file():
            wrong.append(f"{name} is missing")
        elif file.stat().st_size != entry["bytes"]:
            wrong.append(f"{name} has {file.stat().st_size:,} bytes instead of {entry['bytes']:,}")
    return wrong


def verify(directory: Path) -> None:
    """Raise `WorkbookError` unless every file of the manifest is there with its SHA-256."""
    manifest = read_manifest(directory)
    if manifest is None:
        wrong = ["it has no manifest, so it was never finished"]
    else:
        wrong = _wrong_sizes(directory, manifest) or [
            f"{name} has changed since it was written" for name, entry in manifest.items()
            if sha256(directory / name) != entry["sha256"]]
    if wrong:
        raise WorkbookError(
            f"{directory.name} is not whole: {'; '.join(wrong)}.",
            "Its weights cannot be trusted, and no loader would notice.",
            f"Delete the folder {directory} and make it again.")


def fingerprint(directory: Path) -> str:
    """One SHA-256 for a finished directory: of its manifest, so of every byte in it."""
    manifest = read_manifest(directory)
    if manifest is None:
        raise WorkbookError(f"{directory.name} has no manifest.",
                            "Only a finished directory has a fingerprint.",
                            "Make it again, or wait until it is finished.")
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def sha256(file: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def flip_a_bit(file: Path) -> None:
    """Change the file's last bit, as a failing disk would; other hard links to it keep theirs."""
    copy = Path(shutil.copyfile(file, f"{file}.copy"))
    with open(copy, "r+b") as handle, mmap.mmap(handle.fileno(), 0) as content:
        content[-1] ^= 1
    copy.replace(file)


def write_json(path: Path, content) -> None:
    """Write JSON so that `path` holds either all of it or what it held before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as handle:
        json.dump(content, handle, indent=1)
        handle.write("\n")
        handle.flush()
        os.fsync(handle.fileno())
    os.chmod(handle.name, 0o644)
    os.replace(handle.name, path)
