"""The whole set-up from the whole kit, on a machine without a network and with a new home."""

import os
import shutil
import subprocess

import pytest

from helpers import workspace

REPO = workspace.repo()
KIT = REPO / "build" / "kit"
LIMIT = 600  # seconds; two quiet cores take about a third of it


@pytest.mark.slow
@pytest.mark.fault("no network at all, and everything in a kit")
def test_a_set_up_without_a_network(tmp_path, happened):
    if not (KIT / "SHA256SUMS").is_file():
        pytest.skip("there is no build/kit: make kit")
    if os.geteuid() != 0:
        pytest.skip("a network namespace needs root here")
    place, home = tmp_path / "a kit", tmp_path / "home"
    home.mkdir()
    shutil.copytree(KIT, place, copy_function=os.link)
    inside = ("ip link set lo up && ! ip route get 192.0.2.1 && make setup && "
              ".venv/bin/python -c 'from helpers import smollm2; print(smollm2.obtain())'")
    done = subprocess.run(
        ["unshare", "--net", "sh", "-c", inside], cwd=place, capture_output=True, text=True,
        timeout=LIMIT, env={"HOME": str(home), "PATH": os.environ["PATH"], "LANG": "C.UTF-8",
                            **{k: v for k, v in os.environ.items() if k == "PYENV_ROOT"}})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Set up in" in done.stdout and "[FAIL]" not in done.stdout
    assert (place / "workspace" / "models" / "smollm2" / "model.safetensors").is_file()
    happened(next(line for line in done.stdout.splitlines() if line.startswith("Set up in")))
