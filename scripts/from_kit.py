"""Setting up from a kit (`make kit`), without a network or from a laptop in the room.

A workbook that comes from a kit has SHA256SUMS at its top, which names every wheel of the kit. The
wheels stand beside it, in wheels/, or are fetched from the server that KIT names, those of this
Python only. Either way each is checked before anything is installed from it.

Only the standard library: this runs before anything is installed.
"""

import hashlib
import os
import re
import shutil
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from one_set_up import SetupError, say

SUMS, WHEELS = "SHA256SUMS", "wheels"
# What else could send pip or uv to another place than the kit.
ELSEWHERE = ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "UV_INDEX", "UV_INDEX_URL",
             "UV_DEFAULT_INDEX", "UV_EXTRA_INDEX_URL", "UV_FIND_LINKS")


def used(repo: Path) -> bool:
    """Whether this set-up is from a kit: its wheels are here, or KIT names where they are."""
    return bool(os.environ.get("KIT")) or (repo / WHEELS).is_dir()


def sums(repo: Path) -> dict[str, str]:
    """The SHA-256 of each of the kit's wheels that fits this Python, by file name."""
    try:
        lines = (repo / SUMS).read_text().splitlines()
    except OSError:
        raise SetupError(
            f"There is no {SUMS} beside the Makefile, so this workbook is from no kit. Fetch the "
            "kit's phi4-fp8-workbook.tar.gz from the same server, unpack it and set up there; or "
            "leave KIT out, to set up from the package index.") from None
    pairs = (line.split("  ", 1) for line in lines)
    return {name.removeprefix(f"{WHEELS}/"): digest for digest, name in pairs
            if name.startswith(f"{WHEELS}/") and fits(name)}


def fits(wheel: str, version: tuple[int, int] = sys.version_info[:2]) -> bool:
    """Whether a wheel's name is of this CPython, of its stable ABI, or of any Python."""
    of = re.search(r"-cp(\d)(\d+)-cp\1\2t?-", wheel)
    return not of or (int(of[1]), int(of[2])) == version and "t-" not in of[0]


def sha256(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def require(repo: Path) -> Path:
    """The folder of wheels, each there and whole; what is missing is fetched from KIT.

    Raises `SetupError` for what is damaged or missing and cannot be fetched.
    """
    wanted, folder, server = sums(repo), repo / WHEELS, os.environ.get("KIT", "")
    if not any("-cp{}{}-".format(*sys.version_info[:2]) in name for name in wanted):
        raise SetupError(
            "The kit has no wheels for Python {}.{}. make PYTHON=/path/to/python3.11 names another "
            "Python, or ask the instructor which ones the kit was made for.".format(
                *sys.version_info[:2]))
    say(f"      the kit: {len(wanted)} wheels for this Python, by their SHA-256")
    missing = [name for name, digest in wanted.items()
               if not (folder / name).is_file() or sha256(folder / name) != digest]
    if missing and not server:
        raise SetupError(
            f"{len(missing)} of the kit's wheels are missing or damaged, {missing[0]} for one. "
            "Copy the kit again; or, where the instructor serves it, name the server: "
            "make setup KIT=http://ADDRESS:8000")
    folder.mkdir(exist_ok=True)
    started = said = time.monotonic()
    for number, name in enumerate(missing, start=1):
        fetch(server, folder / name, wanted[name])
        if time.monotonic() - said > 5:
            said = time.monotonic()
            say(f"      {number} of {len(missing)} wheels fetched, {said - started:.0f} s")
    return folder


def fetch(server: str, file: Path, digest: str) -> None:
    """Fetch one wheel to `file`. Raises `SetupError` when it cannot be had, or is another one."""
    address = f"{server.rstrip('/')}/{WHEELS}/{urllib.parse.quote(file.name)}"
    part = file.with_name(f".{file.name}.part")
    # The server is in the room: no proxy stands between.
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(address, timeout=30) as answer, open(part, "wb") as into:
            shutil.copyfileobj(answer, into, 1 << 20)
    except (OSError, ValueError, urllib.error.URLError) as error:
        part.unlink(missing_ok=True)
        raise SetupError(
            f"{file.name} could not be fetched from {server} ({getattr(error, 'reason', error)}). "
            "Check that this machine is in the instructor's network and that KIT is the address on "
            "the screen, such as http://192.168.1.10:8000, then run the same command again: what "
            "was fetched is kept.") from None
    if sha256(part) != digest:
        part.unlink()
        raise SetupError(f"{file.name} came from {server} with another SHA-256 than the kit's. "
                         "Nothing was installed. Run the same command again; if it stays so, tell "
                         "the instructor.")
    os.replace(part, file)


def settle(uv_folder: Path, wheels: Path | None) -> None:
    """Have the pip of an environment, and through it uv, take wheels from the kit alone.

    By pip's own means: the environment's pip.conf. Without a kit there is none.
    """
    config = uv_folder / "pip.conf"
    if wheels is None:
        config.unlink(missing_ok=True)
        return
    for name in ELSEWHERE:
        os.environ.pop(name, None)
    config.write_text(f"[global]\nno-index = true\nfind-links = {wheels.resolve().as_uri()}\n")
