"""The environments: what goes into them, and making the ones that are missing.

`.venv` runs the notebooks, with CUDA torch where there is a GPU. vLLM's are two, side by side:
`.venv-serve-gpu`, and `.venv-serve` for a machine without a GPU, or whose GPU is hidden for a
command (CUDA_VISIBLE_DEVICES=).

Only the standard library: this runs before anything is installed. An environment is either whole,
with a stamp that says what it was made from, or it is made anew; uv keeps what was downloaded, so
making it anew after an interruption costs seconds.
"""

import ast
import contextlib
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import threading
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

import from_kit
from needs import GB, require_compiler, require_disk, require_driver, require_platform
from nvml import driver, usable_gpu
from one_set_up import FULL, WITH_US, SetupError, is_full_disk, locked, remedy, say

from helpers import hardware

REPO = Path(__file__).resolve().parent.parent
UV_VERSION = "0.13.9"
# Bytes on disk, as `du` measured them with Python 3.11 on 2026-11-25: 2.37 GB, and 6.40 with CUDA's
# torch and the packages it asks for; 3.29; 9.08. On one disk with uv's cache the two environments
# of a GPU take 10.6 GB together, since uv links what both have.
NOTEBOOK, CUDA_TORCH = int(2.4 * GB), int(4.1 * GB)
SERVE_CPU, SERVE_GPU = int(3.3 * GB), int(9.1 * GB)


@dataclass(frozen=True)
class Environment:
    folder: Path
    requirements: Path
    constraints: Path
    overrides: Path | None
    nbytes: int  # on disk, measured
    cuda: bool = False  # whether its torch must be built for CUDA

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def stamp(self) -> Path:
        return self.folder / "set-up.stamp"


def environments(gpu: bool, repo: Path = REPO) -> list[Environment]:
    """The notebook environment and the serving environment, for a machine with a GPU or without."""
    lists = repo / "requirements"
    held = lists / "constraints"
    notebook = (repo / ".venv", repo / "requirements.txt", held / "notebook.txt", None)
    if gpu:
        return [Environment(*notebook, NOTEBOOK + CUDA_TORCH, cuda=True),
                Environment(repo / ".venv-serve-gpu", lists / "serve.txt", held / "serve.txt", None,
                            SERVE_GPU, cuda=True)]
    return [Environment(*notebook, NOTEBOOK),
            Environment(repo / ".venv-serve", lists / "serve-cpu.txt", held / "serve-cpu.txt",
                        lists / "serve-cpu-overrides.txt", SERVE_CPU)]


def fingerprint(env: Environment, repo: Path = REPO) -> str:
    """The SHA-256 of everything an environment is made from: its lists, Python, place, helpers."""
    project = tomllib.loads((repo / "pyproject.toml").read_text())
    parts = [sys.version, str(env.folder),
             json.dumps([project["project"], project["build-system"]], sort_keys=True)]
    parts += [f.read_text() for f in (env.requirements, env.constraints, env.overrides) if f]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def is_whole(env: Environment, repo: Path = REPO) -> bool:
    """Whether the environment was finished, and made from what the lists say now.

    One with CUDA's torch is whole without a GPU too; a CPU build is not, where there is a GPU.
    """
    return (env.python.exists() and env.stamp.is_file()
            and env.stamp.read_bytes() == fingerprint(env, repo).encode()
            and (not env.cuda or hardware.torch_cuda(env.folder) is not None))


def pip_settings(python: Path) -> dict[str, str]:
    """What pip is configured with: its files, and stronger, its environment variables."""
    listing = subprocess.run([python, "-m", "pip", "config", "list"],
                             capture_output=True, text=True).stdout
    settings: dict[str, str] = {}
    for section in ("global", "install", ":env:"):
        for line in listing.splitlines():
            key, _, value = line.partition("=")
            if key.startswith(f"{section}."):
                settings[key.rpartition(".")[2]] = ast.literal_eval(value)
    return settings


def uv_environment(settings: dict[str, str], environ: dict[str, str]) -> dict[str, str]:
    """Environment variables for uv, which reads none of pip's: index, find-links, certificate."""
    result = dict(environ, UV_PYTHON_DOWNLOADS="never", UV_NO_PROGRESS="1")
    result.pop("VIRTUAL_ENV", None)
    if "find-links" in settings:
        result.setdefault("UV_FIND_LINKS", ",".join(settings["find-links"].split()))
    if "index-url" in settings and "UV_INDEX_URL" not in environ:
        result.setdefault("UV_DEFAULT_INDEX", settings["index-url"])
    if settings.get("no-index") == "true":  # a kit's: everything is in its folder
        result["UV_OFFLINE"] = "1"
    if "cert" in settings:
        result.setdefault("SSL_CERT_FILE", settings["cert"])
    return result


def bootstrap_uv(repo: Path = REPO) -> tuple[Path, dict[str, str]]:
    """The uv program, installed into .uv/ if it is not there, and its environment variables.

    Where the workbook is from a kit, both are bound to the kit's wheels.
    """
    wheels = from_kit.require(repo) if from_kit.used(repo) else None
    folder = repo / ".uv"
    python, uv = folder / "bin" / "python", folder / "bin" / "uv"
    stamp = folder / "set-up.stamp"
    wanted = f"{UV_VERSION} {sys.version}"
    there = uv.exists() and python.exists() and stamp.exists() and stamp.read_text() == wanted
    if not there:
        say(f"      uv {UV_VERSION}, which installs the rest")
        made = subprocess.run([sys.executable, "-m", "venv", "--clear", folder],
                              capture_output=True, text=True, **WITH_US)
        if made.returncode and is_full_disk(made.stdout + made.stderr):
            raise SetupError(FULL)
        if made.returncode:
            raise SetupError(
                f"{sys.executable} cannot make virtual environments. Install its venv package (on "
                f"Debian or Ubuntu: apt install python{sys.version_info[0]}.{sys.version_info[1]}"
                "-venv) and run the same command again.")
    from_kit.settle(folder, wheels)
    if not there:
        got = subprocess.run([python, "-m", "pip", "install", "--quiet", "--retries", "1",
                              "--timeout", "30", "--disable-pip-version-check",
                              f"uv=={UV_VERSION}"], capture_output=True, text=True, **WITH_US)
        if got.returncode:
            raise SetupError(
                f"uv {UV_VERSION} could not be had from the package index "
                f"({last_line(got.stderr)}). {remedy(got.stderr)}")
        stamp.write_text(wanted)
    return uv, uv_environment(pip_settings(python), dict(os.environ))


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return re.sub(r"//[^/@\s]*@", "//", lines[-1]) if lines else "no message"


def torch_build(uv: Path, environ: dict[str, str], python: Path, gpu: bool) -> list[str]:
    """uv's arguments for the right build of torch.

    With a GPU: not the CPU build, which uv would prefer where pip's find-links offers it, as its
    version is the higher one. Without: a CPU build if one can be had, first from pip's find-links,
    then from PyTorch's own index, which uv knows by itself; else PyPI's build, which runs on a CPU
    as well and is several GB larger.
    """
    version = re.search(r"^torch==(\S+)", (REPO / "requirements.txt").read_text(), re.M)[1]
    wanted = f"torch=={version}+cpu"
    if gpu:
        return [f"torch!={version}+cpu"]
    quick = dict(environ, UV_HTTP_RETRIES="0", UV_HTTP_TIMEOUT="20")
    for source, flags in (("pip's find-links", []),
                          ("PyTorch's index", ["--torch-backend", "cpu"])):
        if not flags and "UV_FIND_LINKS" not in environ:
            continue
        probe = [uv, "pip", "install", "--dry-run", "--no-deps", "--python", python, *flags, wanted]
        if subprocess.run(probe, env=quick, capture_output=True, **WITH_US).returncode == 0:
            say(f"      torch {version}: the CPU build from {source}")
            return [*flags, wanted]
    say(f"      torch {version}: PyPI's build, several GB, because no CPU build is to be had")
    return []


def watch(process: subprocess.Popen, what: str, nbytes: int) -> None:
    """While uv runs, say how much of about how much it has written, on one line or now and then."""
    started, said = time.monotonic(), 0.0
    tty = sys.stdout.isatty()
    while process.poll() is None:
        time.sleep(0.2)
        elapsed = time.monotonic() - started
        if elapsed - said < (1 if tty else 10):
            continue
        said = elapsed
        with contextlib.suppress(OSError, ValueError, IndexError):  # it has just ended
            io = Path(f"/proc/{process.pid}/io").read_text()
            written = int(re.search(r"^write_bytes: (\d+)", io, re.M)[1])
            of = f" of about {nbytes / GB:.1f}" if nbytes else ""
            line = f"      {what}: {elapsed:.0f} s, {written / GB:.1f}{of} GB written"
            print(f"\r{line}\033[K" if tty else line, end="" if tty else "\n", flush=True)
    if tty:
        print("\r\033[K", end="", flush=True)


def run_uv(command: list, environ: dict[str, str], what: str, nbytes: int = 0) -> None:
    """Run uv, saying how far it is. Raises `SetupError` with what uv said when it fails."""
    process = subprocess.Popen(command, env=environ, text=True, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, **WITH_US)
    errors: list[str] = []
    reader = threading.Thread(target=lambda: errors.extend(process.stderr))
    reader.start()
    try:
        watch(process, what, nbytes)
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise
    finally:
        reader.join()
    if process.returncode:
        message = re.sub(r"//[^/@\s]*@", "//", "".join(errors[-12:])).strip()
        raise SetupError(f"{what} could not be installed; uv said:\n\n{message}\n\n"
                         f"{remedy(message)}")


def install(env: Environment, uv: Path, environ: dict[str, str], torch: list[str]) -> None:
    """Make an environment anew; its stamp is written last, so a broken-off one is never used."""
    what = env.folder.name
    # Compiled now, vLLM starts in half the time, also where PYTHONDONTWRITEBYTECODE is set.
    run_uv([uv, "pip", "install", "--python", env.python, "--compile-bytecode",
            "-r", env.requirements,
            "-c", env.constraints, *(["--overrides", env.overrides] if env.overrides else []),
            *torch], environ, what, env.nbytes)
    run_uv([uv, "pip", "install", "--python", env.python, "--no-deps", "-e", REPO], environ, what)
    if env.cuda and hardware.torch_cuda(env.folder) is None:
        raise SetupError(f"The torch that {what} got is built without CUDA, so it cannot use the "
                         "GPU. Leave out the index of CPU builds that pip is configured with (pip "
                         "config list), and run the same command again.")
    if what == ".venv":
        no_announcements(env.folder)
    env.stamp.write_text(fingerprint(env))


def no_announcements(folder: Path) -> None:
    """JupyterLab asks the network for news and updates unless this extension is disabled."""
    config = folder / "etc" / "jupyter" / "labconfig" / "page_config.json"
    config.parent.mkdir(parents=True, exist_ok=True)
    extension = "@jupyterlab/apputils-extension:announcements"
    config.write_text(json.dumps({"disabledExtensions": {extension: True}}))


def set_up() -> None:
    gpu = usable_gpu()
    both = environments(gpu)
    missing = [env for env in both if not is_whole(env)]
    if not missing:
        return
    require_platform(platform.system(), platform.machine())
    if gpu and from_kit.used(REPO):
        raise SetupError(
            "This machine has a GPU, and the kit has the environments of machines without one. "
            "Leave the GPU out (export CUDA_VISIBLE_DEVICES= with nothing behind it, in every "
            "terminal), or set up from the package index in a clone of the workbook.")
    if gpu:
        require_compiler()
        require_driver(driver(), both[1].constraints)
    require_disk(REPO, sum(env.nbytes for env in missing) + GB)
    started = time.monotonic()
    say(f"Setting up for {'an NVIDIA GPU' if gpu else 'a machine without a GPU'}, with Python "
        f"{platform.python_version()}: {' and '.join(env.folder.name for env in missing)}. "
        "This happens once.")
    steps = len(missing) + 1
    say(f"[1/{steps}] tools")
    uv, environ = bootstrap_uv()
    for env in missing:
        run_uv([uv, "venv", "--quiet", "--clear", "--python", sys.executable, env.folder], environ,
               env.folder.name)
    torch = torch_build(uv, environ, missing[0].python, gpu)
    if not gpu and not torch:
        require_disk(REPO, sum(env.nbytes + CUDA_TORCH for env in missing) + GB)
    for step, env in enumerate(missing, start=2):
        packages = sum("==" in line for line in env.constraints.read_text().splitlines())
        say(f"[{step}/{steps}] {env.folder.name}: about {packages} packages, "
            f"{env.nbytes / GB:.1f} GB on disk")
        install(env, uv, environ, torch)
    say(f"Set up in {time.monotonic() - started:.0f} s.\n")


def preflight(show: bool) -> int:
    """Run the preflight in .venv; its lines are shown if asked for or if one of them is a FAIL."""
    python = environments(gpu=False)[0].python
    result = subprocess.run([python, "-m", "helpers.preflight"], capture_output=True, text=True)
    if show or result.returncode:
        say(result.stdout + result.stderr)
    return result.returncode


def main() -> int:
    """Set up what is missing, one set-up at a time, then look at the machine; the exit status."""
    try:
        whole = all(is_whole(env) for env in environments(usable_gpu()))
        if not whole:  # nothing is written where nothing is to be done
            with locked(REPO):
                set_up()
        return preflight(show=not whole)
    except SetupError as error:
        print(f"\nSet-up stopped: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"\nSet-up stopped: {FULL if is_full_disk(str(error)) else error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nSet-up interrupted. The same command goes on from here: what was downloaded is "
              "kept.", file=sys.stderr)
        return 130
