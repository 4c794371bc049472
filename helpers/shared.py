"""Servers that somebody else has started with `make serve`: asked like one's own, never stopped.

PHI4_FP8_SERVERS names them, as in bf16=http://127.0.0.1:8001,fp8=http://127.0.0.1:8002, and
PHI4_FP8_KEY_FILE the file with their key. Each says itself what it serves
(`helpers.serve_side.about`) and gives its tokenizer, which is kept in the workspace.
"""

import os
import re
from dataclasses import fields
from pathlib import Path

import requests

from helpers import WorkbookError, client, workspace
from helpers.checkpoint import Checkpoint
from helpers.endpoint import Endpoint
from helpers.hardware import ServingMode
from helpers.models import Profile
from helpers.serve_side.about import FILES

SERVERS, KEY_FILE = "PHI4_FP8_SERVERS", "PHI4_FP8_KEY_FILE"
PATIENCE = 600.0  # seconds that a shared server may be away, and be started again
LARGEST = 64 * 2**20  # bytes of a tokenizer's file


def named() -> dict[str, str]:
    """Arm to URL, from the environment; empty where no servers are named."""
    found = {}
    for entry in filter(None, (os.environ.get(SERVERS) or "").replace(" ", "").split(",")):
        arm, _, url = entry.partition("=")
        if arm not in ("bf16", "fp8") or arm in found or not re.fullmatch(r"https?://[^/?#@]+/?",
                                                                          url):
            raise WorkbookError(
                f"{SERVERS} holds {entry!r}, which names no server.",
                "Each entry is an arm, bf16 or fp8, and where its server is.",
                f"Set it as in {SERVERS}=bf16=http://127.0.0.1:8001,fp8=http://127.0.0.1:8002, or "
                "unset it to start servers of your own.")
        found[arm] = url.rstrip("/")
    return found


def servers() -> dict[str, "SharedServer"]:
    """The shared servers by arm, each asked what it serves. Raises `WorkbookError`."""
    urls = named()
    key = _key() if urls else ""
    found = {arm: SharedServer(url, key) for arm, url in urls.items()}
    for arm, server in found.items():
        if server.arm != arm:
            raise WorkbookError(f"The server at {server.url} is {server.arm}'s, and not {arm}'s.",
                                "Compared with itself an arm loses nothing.",
                                f"Correct the order in {SERVERS}.")
    if len({server.profile.name for server in found.values()}) > 1:
        raise WorkbookError("The shared servers serve different models.",
                            "Two arms are compared on one model.", f"Correct {SERVERS}.")
    return found


def _key() -> str:
    place = os.environ.get(KEY_FILE) or ""
    try:
        key = Path(place).expanduser().read_text().strip() if place else ""
    except (OSError, UnicodeError) as error:
        raise WorkbookError(f"The key file {place} cannot be read: {error}.",
                            "Shared servers answer to those who have their key.",
                            f"Let {KEY_FILE} name the file that you were given.") from None
    if not re.fullmatch(r"[\x21-\x7e]+", key):
        raise WorkbookError(f"{KEY_FILE} names no file with a key.",
                            "Shared servers answer to those who have their key.",
                            f"Let {KEY_FILE} name the file that you were given: one line.")
    return key


class SharedServer(Endpoint):
    """A server that somebody else started; `arm`, `profile` and `mode` are what it says of itself.

    Raises `WorkbookError` when it is not there, refuses the key, or says nothing of the kind.
    """

    patience = PATIENCE
    session = 0  # no process of it is ours
    log_path = "on the machine that it runs on"

    def __init__(self, url: str, key: str):
        self.url, self.api_key = url, key
        try:
            about = self._got("/about").json()
            self.arm, self.kernel, self.shared = about["arm"], about["kernel"], about["runs on"]
            self.model_name, self._log = about["model"], about["log"]
            self.profile = Profile(**{each.name: about["profile"][each.name]
                                      for each in fields(Profile) if each.name != "checkpoint"})
            self.mode = ServingMode(**about["mode"])
            fingerprint, config, files = about["checkpoint"], about["config"], about["files"]
            texts = (self.arm, self.kernel, self.shared, self.model_name, self._log, fingerprint)
            if not (all(isinstance(text, str) for text in texts) and self.shared
                    and re.fullmatch(r"[0-9a-f]{64}", fingerprint)):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            raise WorkbookError(f"What answers at {url} does not say what it serves.",
                                "It is no server of this workbook, or one of another version.",
                                f"Ask who started it, or correct {SERVERS}.") from None
        self.model = workspace.folder("shared", fingerprint[:16])
        for name in set(FILES).intersection(files):
            self._keep(name)
        self.checkpoint = Checkpoint(self.model, fingerprint, (), config)

    def log(self) -> str:
        """The lines of its log that say which kernel it took and how many tokens fit."""
        return self._log

    def since(self) -> str:
        return f"shared by {self.shared}"

    def stop(self) -> None:
        """Nothing: others use it."""

    def unreached(self, broken: requests.RequestException) -> WorkbookError:
        return WorkbookError(f"The shared server at {self.url} does not answer.",
                             self.why_away(), f"{self.how_back()}.")

    def why_away(self) -> str:
        return f"It was waited for {self.patience / 60:.0f} minutes."

    def how_back(self) -> str:
        return "Ask who started it, see that your tunnel is open, and run this cell again"

    def _got(self, route: str) -> requests.Response:
        try:
            with client.session(self.api_key) as session:
                answer = session.get(self.url + route, timeout=(5, 60))
        except requests.RequestException as broken:
            raise WorkbookError(
                f"The shared server at {self.url} does not answer.",
                "It is not up, or the tunnel to it is closed.",
                f"Ask who started it, or unset {SERVERS} to start servers of your own."
            ) from broken
        if answer.status_code == 401:
            raise WorkbookError(f"The shared server at {self.url} refuses the key.",
                                "It answers to those who have its key.",
                                f"Let {KEY_FILE} name the file that you were given.")
        if not answer.ok or len(answer.content) > LARGEST:
            raise ValueError(answer.status_code)
        return answer

    def _keep(self, name: str) -> None:
        """A file of the model's tokenizer, in the workspace."""
        content, place = self._got(f"/about/{name}").content, self.model / name
        with workspace.writing(place):
            partial = place.with_name(f".{name}.{os.getpid()}")
            partial.write_bytes(content)
            partial.replace(place)
