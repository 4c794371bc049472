"""Where artefacts live, and whether one is finished and whole.

A directory that took work to make (a checkpoint) is written beside its place and renamed into it,
with a manifest of SHA-256 sums. So a directory with a manifest is finished; one whose files still
have those sums is whole.
"""

import contextlib
import ctypes
import errno
import hashlib
import json
import mmap
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from helpers import WorkbookError

VARIABLE = "PHI4_FP8_WORKSPACE"
MANIFEST = "MANIFEST.json"
LOADED = (".safetensors", ".json", ".jinja")  # what a loader reads because it is there


def repo() -> Path:
    """The repository's root."""
    return Path(__file__).resolve().parent.parent


def data(*parts: str) -> Path:
    """A file or folder of the repository's `data`."""
    return repo().joinpath("data", *parts)


def resolved(named: str) -> Path:
    """The absolute place that a reader has named, in an environment variable for instance.

    `~` is the home folder. A relative place counts from the repository's top, where `make` is
    typed, and not from the working directory: a notebook's is the folder of the notebooks.
    """
    try:
        return (repo() / Path(named.strip()).expanduser()).resolve()
    except RuntimeError as error:
        raise WorkbookError(f"{named!r} cannot be found: {error}", "This user has no home folder.",
                            "Name the place by its whole path.") from None


def root() -> Path:
    """The workspace: PHI4_FP8_WORKSPACE, or `workspace` in the repository; made if not there."""
    where = resolved(os.environ.get(VARIABLE) or "workspace")
    with writing(where, "The workspace holds all that the notebooks make."):
        try:
            where.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError as refused:  # a file system that makes no folders, such as /proc
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM)) from refused
    return where


def folder(*parts: str) -> Path:
    """A folder of the workspace, `logs` for instance; made if not there."""
    where = root().joinpath(*parts)
    with writing(where):
        where.mkdir(parents=True, exist_ok=True)
    return where


def require_disk(where: Path, nbytes: int, purpose: str) -> None:
    """Raise `WorkbookError` unless `nbytes` are free where `where` is or will be."""
    there = next(each for each in (where, *where.parents) if each.exists())
    free = shutil.disk_usage(there).free
    if free < nbytes:
        raise WorkbookError(
            f"{purpose} needs {nbytes / 1e9:.1f} GB of disk at {where}, and {free / 1e9:.1f} GB "
            "are free.",
            "It was not started, so nothing half-written is left.",
            "Free some space, or set PHI4_FP8_WORKSPACE to a folder on a larger disk.")


@contextlib.contextmanager
def writing(where: Path, kept: str = "Nothing half-written is left.") -> Iterator[None]:
    """Put the system's refusal to write at `where` in words; `kept`: what is left of the work.

    Raises `WorkbookError` for a full disk, a read-only or foreign folder, a file where a folder
    should be, and a failing disk. Other errors go through as they are.
    """
    try:
        yield
    except WorkbookError:
        raise
    except Exception as error:
        if is_full_disk(error):
            raise WorkbookError(
                f"The disk filled up while {where.name} was being written.", kept,
                "Free some space, or set PHI4_FP8_WORKSPACE to a folder on a larger disk, and run "
                "this again.") from error
        number = error.errno if isinstance(error, OSError) else None
        if number in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise WorkbookError(
                f"{where} cannot be written: {os.strerror(number)}.", kept,
                "Set PHI4_FP8_WORKSPACE to a folder that you can write to, and run this again."
            ) from error
        if number in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
            raise WorkbookError(
                f"{where} cannot be written: {_in_the_way(where)}.", kept,
                "Move it away, or set PHI4_FP8_WORKSPACE to another folder, and run this again."
            ) from error
        if number in (errno.EIO, errno.ENAMETOOLONG, errno.ELOOP):
            raise WorkbookError(f"{where} cannot be written: {os.strerror(number)}.", kept,
                                "Set PHI4_FP8_WORKSPACE to another folder, and run this again."
                                ) from error
        raise


def _in_the_way(where: Path) -> str:
    """What stands where a folder or a file should be."""
    for folder in reversed(where.parents):
        if folder.exists() and not folder.is_dir():
            return f"{folder} is a file, and should be a folder"
    kind = "a folder" if where.is_dir() else "a file"
    return f"there is {kind} of that name, where something else should be"


@contextlib.contextmanager
def building(target: Path, needs_bytes: int = 0) -> Iterator[Path]:
    """A directory to fill, which becomes `target` when the block ends well.

    Then it has a manifest, is on the disk, and replaces an older `target` in one step. When the
    block raises, or the process dies, `target` is as it was; leftovers of dead processes are
    removed the next time. Raises `WorkbookError` as `writing` does.
    """
    partial = target.parent / f".{target.name}.partial-{os.getpid()}"
    with writing(target, "What was written so far has been removed; nothing half-written is left."):
        target.parent.mkdir(parents=True, exist_ok=True)
        clear(target)
        require_disk(target.parent, needs_bytes, f"Writing {target.name}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
            write_manifest(partial)
            replace(partial, target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def is_full_disk(error: BaseException) -> bool:
    """ENOSPC, EFBIG or EDQUOT, also where a Rust library passes it on as text only."""
    words = ("No space left", "os error 28", "File too large", "os error 27", "quota exceeded")
    return isinstance(error, Exception) and any(word in str(error) for word in words)


def clear(target: Path) -> None:
    """Remove what processes that are dead left beside `target` when they were making it.

    Raises NotADirectoryError when `target` is a file, which would be removed with an older one.
    """
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(target))
    for left in target.parent.glob(f".{target.name}.*-*"):
        pid = left.name.rpartition("-")[2]
        if pid.isdecimal() and not Path(f"/proc/{pid}").exists():
            _remove(left)


def _remove(left: Path) -> None:
    if left.is_symlink():
        left.unlink()
    else:
        shutil.rmtree(left, ignore_errors=True)


def replace(partial: Path, target: Path) -> None:
    """Give `partial` the name `target`, and remove an older `target`.

    The two change places in one step of the kernel's, so that at every moment there is a whole
    `target`; where the file system cannot do that, the older one is moved aside first.
    """
    old = target.parent / f".{target.name}.old-{os.getpid()}"
    if target.exists():
        try:
            _exchange(partial, target)
            partial.rename(old)
        except OSError:
            target.rename(old)
            partial.rename(target)
    else:
        partial.rename(target)
    _remove(old)


def _exchange(one: Path, other: Path) -> None:
    """Linux's renameat2 with RENAME_EXCHANGE, for which Python has no function."""
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE: linux/fcntl.h, linux/fs.h
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange):
        raise OSError(ctypes.get_errno(), "renameat2")


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
    _write_json(directory / MANIFEST, files)


def read_manifest(directory: Path) -> dict[str, dict] | None:
    """The manifest's files, each with "bytes" and "sha256"; None where there is no manifest.

    Raises `WorkbookError` when there is one and it is damaged: then nothing says what the
    directory should hold.
    """
    if not (directory / MANIFEST).exists():
        return None
    files = read_json(directory / MANIFEST)
    for name, entry in files.items():
        if not (isinstance(entry, dict) and type(entry.get("bytes")) is int
                and re.fullmatch(r"[0-9a-f]{64}", str(entry.get("sha256")))
                and not Path(name).is_absolute() and ".." not in Path(name).parts):
            raise damaged_json(directory / MANIFEST, f"its entry for {name!r} is no size and sum")
    if not files:
        raise damaged_json(directory / MANIFEST, "it names no file")
    return files


def is_whole(directory: Path) -> bool:
    """Whether the directory was finished and all its files have their sizes (not their sums)."""
    try:
        manifest = read_manifest(directory)
    except WorkbookError:
        return False
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
    """Raise `WorkbookError` unless every file of the manifest is there with its SHA-256.

    A file that a loader would read and the manifest does not name is refused too.
    """
    manifest = read_manifest(directory)
    if manifest is None:
        wrong = ["it has no manifest, so it was never finished"]
    else:
        wrong = _wrong_sizes(directory, manifest) + [
            f"{file.name} is not in its manifest" for file in sorted(directory.iterdir())
            if file.suffix in LOADED and file.name not in (MANIFEST, *manifest)] or [
            f"{name} has changed since it was written" for name, entry in manifest.items()
            if sha256(directory / name) != entry["sha256"]]
    if wrong:
        raise WorkbookError(
            f"{directory.name} is not whole: {'; '.join(wrong)}.",
            "Its weights cannot be trusted, and no loader would notice.",
            f"Delete the folder {directory} and make it again.")


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
    """Write JSON so that `path` holds either all of it or what it held before.

    Raises `WorkbookError` as `writing` does.
    """
    with writing(path, "What it held before is kept."):
        _write_json(path, content)


def _write_json(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1) + "\n"
    handle, name = tempfile.mkstemp(dir=path.parent)
    try:
        with open(handle, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def read_json(file: Path) -> dict:
    """The JSON object in a file.

    Raises `WorkbookError` when the file is not there, cannot be read, or holds anything else.
    """
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise WorkbookError(f"{file.parent}: there is no {file.name}.",
                            "It is a part of what the folder should hold.",
                            "Fetch or make it again.") from None
    except OSError as error:
        raise damaged_json(file, f"it cannot be read ({error.strerror})") from None
    except RecursionError:
        raise damaged_json(file, "it is nested too deep") from None
    except ValueError as error:
        raise damaged_json(file, f"it is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise damaged_json(file, "it is no JSON object")
    return content


def damaged_json(file: Path, why: str) -> WorkbookError:
    """The error of a file of JSON that does not hold what it should."""
    return WorkbookError(f"{file.parent}: {file.name} is damaged: {why}.",
                         "It was half-written, edited, or is another file of that name.",
                         f"Delete {file} and fetch or make it again.")
