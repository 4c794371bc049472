"""A real disk of a few megabytes: a tmpfs, which only root may mount."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A tmpfs at `folder`, "size=4m" say; the test is skipped where it cannot be mounted."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder],
                      capture_output=True).returncode:
        pytest.skip("this container does not allow mounts")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)
