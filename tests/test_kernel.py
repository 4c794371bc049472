"""`make kernel` and `make lab LAB_FLAGS=`, with a Jupyter in an environment of its own."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests
from conftest import REPO

from helpers import address, client

RUN = """
import nbformat
from nbclient import NotebookClient
cell = nbformat.v4.new_code_cell(
    "import os, sys, helpers; print(sys.prefix, helpers.__file__, os.environ['DO_NOT_TRACK'])")
book = NotebookClient(nbformat.v4.new_notebook(cells=[cell]), kernel_name="phi4-fp8").execute()
print(book.cells[0].outputs[0]["text"])
"""


@pytest.fixture
def host(tmp_path) -> Path:
    """Another environment with a Jupyter: its own prefix and programs, and our packages."""
    host = tmp_path / "host"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", host], check=True)
    (packages,) = host.glob("lib/python3*/site-packages")
    ours = next(each for each in sys.path if each.endswith("site-packages"))
    (packages / "ours.pth").write_text(f"{ours}\n")
    for name, module in (("jupyter", "jupyter_core.command"),
                         ("jupyter-kernelspec", "jupyter_client.kernelspecapp")):
        start = "main" if name == "jupyter" else "KernelSpecApp.launch_instance"
        program = host / "bin" / name
        program.write_text(f"#!{host}/bin/python\nfrom {module} import *\n{start}()\n")
        program.chmod(0o755)
    return host


# The environments are there, and would be made anew under other tests where the lists have changed.
MAKE = ["make", "--no-print-directory", "-o", "setup", f"PYTHON={sys.executable}"]


def make(*words: str, environ: dict) -> subprocess.CompletedProcess:
    return subprocess.run([*MAKE, *words], cwd=REPO, capture_output=True, text=True, env=environ)


def a_user(host: Path, home: Path) -> dict:
    environ = {name: value for name, value in os.environ.items()
               if not name.startswith(("JUPYTER", "VIRTUAL_ENV"))}
    home.mkdir(exist_ok=True)
    return environ | {"PATH": f"{host / 'bin'}:{os.environ['PATH']}", "HOME": str(home)}


@pytest.mark.parametrize("kind", ["its own folder", "JUPYTER_DATA_DIR"])
def test_the_kernel_is_one_of_the_jupyter_that_is_there_and_runs_the_notebooks(
        host, tmp_path, kind):
    environ = a_user(host, tmp_path / "home")
    place = host / "share" / "jupyter"
    if kind == "JUPYTER_DATA_DIR":  # a hub's, say; and what is installed belongs to another user
        place = tmp_path / "data"
        environ |= {"JUPYTER_DATA_DIR": str(place), "JUPYTER_PREFER_ENV_PATH": "0"}
    done = make("kernel", environ=environ)
    assert done.returncode == 0, done.stderr
    assert "choose that kernel" in done.stdout and str(host / "bin" / "jupyter") in done.stdout
    file = place / "kernels" / "phi4-fp8" / "kernel.json"
    spec = json.loads(file.read_text())
    assert spec["display_name"] == "Phi-4 FP8 workbook"
    listed = subprocess.check_output([host / "bin" / "jupyter", "kernelspec", "list", "--json"],
                                     env=environ, text=True)
    assert json.loads(listed)["kernelspecs"]["phi4-fp8"]["resource_dir"] == str(file.parent)
    said = subprocess.run([host / "bin" / "python", "-c", RUN], cwd=tmp_path, text=True,
                          capture_output=True, env=environ)
    prefix, module, track = said.stdout.split()[-3:]
    assert Path(prefix).resolve() == Path(sys.prefix).resolve() != host, said.stderr
    assert Path(module) == REPO / "helpers" / "__init__.py" and track == "1"


def test_a_jupyter_without_widgets_is_told_so(host, tmp_path):
    done = make("kernel", environ=a_user(host, tmp_path / "home"))
    assert "no ipywidgets" in done.stdout
    (host / "share/jupyter/labextensions/@jupyter-widgets/jupyterlab-manager").mkdir(parents=True)
    assert "no ipywidgets" not in make("kernel", environ=a_user(host, tmp_path / "home")).stdout


def test_a_jupyter_that_does_not_answer_is_a_sentence(host, tmp_path):
    (host / "bin" / "jupyter").write_text("#!/bin/sh\necho broken >&2\nexit 3\n")
    done = make("kernel", environ=a_user(host, tmp_path / "home"))
    assert done.returncode and "--paths failed: broken" in done.stderr
    assert "Traceback" not in done.stderr and "run `make kernel` there" in done.stderr


def test_lab_takes_flags_and_opens_what_notebooks_link_to(tmp_path):
    """JupyterLab itself, started by make with a port and a token of ours; the last flags count."""
    lab, end = None, time.monotonic() + 90
    try:
        while True:
            if lab is None or lab.poll() is not None:  # it ends where another takes its port
                port = address.free_port(())
                lab = started_lab(port, a_user(tmp_path, tmp_path / "home"), tmp_path / "log")
            try:
                listed, linked = (client.session().get(
                    f"http://127.0.0.1:{port}/api/contents/{place}?token=ours", timeout=5).json()
                    for place in ("notebooks", "helpers/fp8.py"))
                break
            except requests.RequestException:
                assert time.monotonic() < end, (tmp_path / "log").read_text()[-2000:]
                time.sleep(0.5)
        assert "00_start_here.ipynb" in {each["name"] for each in listed["content"]}
        assert linked["type"] == "file"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(lab.pid, 15)
        lab.wait(30)


def started_lab(port: int, environ: dict, log: Path) -> subprocess.Popen:
    flags = f"--no-browser --port={port} --ServerApp.port_retries=0 --IdentityProvider.token=ours"
    with open(log, "ab") as said:
        return subprocess.Popen([*MAKE, "lab", f"LAB_FLAGS={flags}"], cwd=REPO, env=environ,
                                stdout=said, stderr=said, start_new_session=True)
