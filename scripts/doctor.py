"""`make doctor`: whether a machine can run the workbook, before anything is installed.

Only the standard library, on any Python from 3.8 on, so that it also runs where the answer is no;
`python3 scripts/doctor.py` does without make. Nothing is installed or sent.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))
from helpers import cpu, visible_gpus  # noqa: E402  (with `helpers`, they run on Python 3.8)

PYTHONS = ("3.13", "3.12", "3.11")
GB = 10**9
# The environments as measured (scripts/environments.py), with 2 GB for the bundled model's files.
DISK = {"cpu": 9 * GB, "gpu": 19 * GB}
RAM = 6 * GB  # helpers.preflight says what for
GLIBC = (2, 31)  # of the wheels of llguidance, which vLLM needs; all others ask for less
# nvidia-smi says no CUDA version in this form; 580 is the oldest driver of CUDA 13, which vLLM's
# torch is built for (requirements/constraints/serve.txt, helpers.hardware.OLDEST_DRIVER).
DRIVER = 580
# Where a container's limit of memory is: cgroup v2, cgroup v1 (as in `helpers.hardware.CGROUPS`).
LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
OLDEST = (7, 5)  # helpers.hardware.W8A16_CAPABILITY
ELSEWHERE = "use GitHub Codespaces, a hub, WSL 2 or a cloud machine (workshop/README.md)"

Finding = namedtuple("Finding", "ok name detail short")  # short: its part of the instructor's line
Gpu = namedtuple("Gpu", "name memory_bytes capability driver uuid")


def system() -> Finding:
    """Linux on x86-64 with glibc, WSL 2 included; anything else is told where to go."""
    kind, machine, release = platform.system(), platform.machine(), platform.release()
    short = f"{kind} {machine}"
    if (kind, machine) != ("Linux", "x86_64"):
        return Finding(False, "system", f"{kind} on {machine}, and vLLM's wheels are for Linux on "
                                        f"x86-64: {ELSEWHERE}", short)
    name = _distribution()
    if "microsoft" in release.lower():
        if "wsl2" not in release.lower() and release.startswith("4.4"):
            return Finding(False, "system", f"{name} in WSL 1: `wsl --set-version {name.split()[0]}"
                                            " 2` in PowerShell makes it WSL 2", f"{short} WSL 1")
        name, short = f"{name} in WSL 2", f"{short} WSL 2"
    libc, version = platform.libc_ver()
    found = tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())
    if libc != "glibc" or found < GLIBC:
        return Finding(False, "system", f"{name}, whose C library is {libc or 'not glibc'} "
                       f"{version}, and the wheels need glibc {_dotted(GLIBC)}: use a newer "
                       "Debian, Ubuntu or Fedora", f"{short} {libc or 'no glibc'} {version}")
    return Finding(True, "system", f"{name}, Linux {release} on {machine}, glibc {version}", short)


def _distribution() -> str:
    for file in (Path("/etc/os-release"), Path("/usr/lib/os-release")):
        if file.is_file():
            lines = dict(line.split("=", 1) for line in file.read_text().splitlines()
                         if "=" in line)
            return lines.get("PRETTY_NAME", "Linux").strip('"')
    return "Linux"


def _dotted(version) -> str:
    return ".".join(map(str, version))


def pythons() -> list:
    """The Pythons of the right version that make would find, each with whether it has venv.

    A name on the path may be a shim without a Python behind it, so each is asked.
    """
    asked = ("import importlib.util as u, platform; "
             "print(platform.python_version(), all(map(u.find_spec, ('venv', 'ensurepip'))))")
    names = filter(None, (sys.executable, "python3", *("python" + each for each in PYTHONS)))
    commands = filter(None, dict.fromkeys(map(shutil.which, names)))
    answers = [(command, _run([command, "-c", asked]).split()) for command in commands]
    return [(command, answer[0], answer[1] == "True") for command, answer in answers
            if answer and answer[0].startswith(PYTHONS)]


def python(found) -> Finding:
    """A Python of the right version with its venv package, among `pythons()`."""
    if not found:
        here = platform.python_version()
        return Finding(False, "Python", f"{here}, and the workbook needs 3.11, 3.12 or 3.13: on "
                       "Debian or Ubuntu `apt install python3 python3-venv`, or `uv python install "
                       "3.12`", f"Python {here}")
    command, version, has_venv = found[0]
    if not has_venv:
        return Finding(False, "Python", f"{version} ({command}) without its venv package: on "
                       f"Debian or Ubuntu `apt install python{version.rpartition('.')[0]}-venv`",
                       f"Python {version} without venv")
    return Finding(True, "Python", f"{version} with venv ({command})", f"Python {version}")


def _run(command) -> str:
    """What a command prints; "" where it fails, hangs or is not there."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                              stdin=subprocess.DEVNULL, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode(errors="replace").strip() if done.returncode == 0 else ""


def make() -> Finding:
    if shutil.which("make"):
        return Finding(True, "make", "there", "")
    return Finding(False, "make", "missing: on Debian or Ubuntu `apt install make`", "no make")


def library() -> Finding:
    missing = cpu.missing_library()
    return Finding(not missing, "libnuma", missing or "there", "no libnuma" if missing else "")


def disk(needed: int) -> Finding:
    free = shutil.disk_usage(REPO).free
    short = f"disk {free / GB:.0f} GB"
    if free < needed:
        return Finding(False, "disk", f"{free / GB:.1f} GB free where this folder lies, and "
                       f"{needed / GB:.0f} are needed: free some, or move the folder", short)
    return Finding(True, "disk", f"{free / GB:.0f} GB free, of which the set-up needs "
                                 f"{needed / GB:.0f}", short)


def hub_cache() -> Path:
    """Where the hub's client puts what it fetches (a test compares)."""
    home = os.environ.get("HF_HOME") or Path(
        os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home, "hub")).expanduser()


def model_disk(profile) -> Finding:
    """Room for a model of the hub: its download, and the FP8 checkpoint in the workspace.

    The environments count too, where they are not made yet; places on one disk share it.
    """
    cache = hub_cache()
    workspace = REPO / Path(os.environ.get("PHI4_FP8_WORKSPACE") or "workspace").expanduser()
    fetched = (cache / ("models--" + profile.repo.replace("/", "--")) / "snapshots"
               / profile.revision).is_dir()
    disks = {}  # by device: its free bytes, bytes needed
    for place, nbytes in ((REPO, 0 if (REPO / ".venv-serve-gpu").is_dir() else DISK["gpu"]),
                          (cache, 0 if fetched else profile.bf16_bytes),
                          (workspace, profile.fp8_bytes)):
        there = next(each for each in (place, *place.parents) if each.exists())
        device = disks.setdefault(there.stat().st_dev, [shutil.disk_usage(there).free, 0])
        device[1] += nbytes
    needs = (f"{profile.bf16_bytes / GB:.1f} GB to fetch into {cache} (HF_HOME) and "
             f"{profile.fp8_bytes / GB:.1f} to write into {workspace} (PHI4_FP8_WORKSPACE)")
    if all(free >= needed for free, needed in disks.values()):
        return Finding(True, "disk for the model", needs, "")
    lacking = ", ".join(f"{free / GB:.0f} GB free of {needed / GB:.0f}"
                        for free, needed in disks.values() if free < needed)
    return Finding(False, "disk for the model", f"{needs}; {lacking} that are needed: let these "
                   "variables name folders on a larger disk, or choose the bundled model: "
                   "PHI4_FP8_PROFILE=tiny-phi4", "no disk for the model")


def memory() -> int:
    """Bytes of RAM, within a container's limit; 0 where the system does not say."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return 0
    for limit in LIMITS:
        if limit.is_file() and limit.read_text().strip().isdecimal():
            total = min(total, int(limit.read_text()))
    return total


def ram(has: int) -> Finding:
    short = f"RAM {has / GB:.0f} GB"
    if has < RAM:
        return Finding(False, "RAM", f"{has / GB:.1f} GB, and {RAM / GB:.0f} are needed: "
                                     + ("raise WSL's limit in .wslconfig, or " if "microsoft" in
                                        platform.release().lower() else "") + ELSEWHERE, short)
    return Finding(True, "RAM", f"{has / GB:.0f} GB, of which the bundled model needs "
                                f"{RAM / GB:.0f}", short)


def processor(model: str, features) -> Finding:
    """The CPU and what of it counts here. PyTorch and vLLM are compiled for AVX2 at least."""
    cores = len(os.sched_getaffinity(0))
    counts = [name for name in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")
              if name in features]
    short = f"CPU {model} {cores} cores {'+'.join(counts[-3:]) or 'no avx2'}"
    if "avx2" not in features:
        return Finding(False, "CPU", f"{model} without AVX2, which vLLM needs on a CPU: "
                                     + ELSEWHERE, short)
    if cores < 2:
        return Finding(False, "CPU", f"{model}, one core, and a server and a notebook need two",
                       short)
    return Finding(True, "CPU", f"{model}, {cores} cores; {', '.join(counts)}", short)


def compilation(command) -> Finding:
    """For a GPU: whether Triton can compile with the Python that will run vLLM, its `command`."""
    asked = (f"import sys; sys.path[0] = {str(REPO)!r}; from helpers import compiler; "
             "print(compiler.fault() or 'OK')")
    said = _run([command, "-c", asked])
    if said == "OK":
        return Finding(True, "C compiler", "there, with Python's headers", "")
    return Finding(False, "C compiler", said or f"{command} gave no answer to whether there is one",
                   "no compiler or headers" if said else "compiler not known")


def gpus() -> list:
    """What nvidia-smi says of the GPUs; none where it is missing or does not answer.

    Of a GPU cut into MIG slices it is the slices, which CUDA sees, each of the size in its name.
    """
    printed = _run(["nvidia-smi", "--format=csv,noheader,nounits",
                    "--query-gpu=name,memory.total,compute_cap,driver_version,uuid"])
    listed, found = _run(["nvidia-smi", "-L"]), []
    for line in printed.splitlines():
        told = re.fullmatch(r"(.+), (\d+), (\d+)\.(\d+), (\d[\d.]*), (GPU-\S+)", line.strip())
        if told:
            name, mib, major, minor, driver, uuid = told.groups()
            gpu = Gpu(name, int(mib) << 20, (int(major), int(minor)), driver, uuid)
            below = listed.partition(f"(UUID: {uuid})")[2].partition("\nGPU ")[0]
            slices = re.findall(r"MIG (\S*?(\d+)gb\S*) .*\(UUID: (MIG-\S+)\)", below)
            found += [gpu._replace(name=f"{name} MIG {profile}", memory_bytes=int(size) * GB,
                                   uuid=own) for profile, size, own in slices] or [gpu]
    return found


def shown(every) -> list:
    """Those of the GPUs that CUDA sees, by CUDA_VISIBLE_DEVICES; of MIG slices only the first."""
    indices = visible_gpus.indices([gpu.uuid for gpu in every],
                                   os.environ.get("CUDA_VISIBLE_DEVICES"))
    seen = [every[index] for index in indices]
    return [gpu for gpu in seen if gpu.uuid.startswith("MIG-")][:1] or seen


def graphics(found, every) -> Finding:
    """Whether the GPUs that CUDA sees will do, of `every` one that is there."""
    setting = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not found and (every or setting in ("", "-1")):
        return Finding(True, "GPU", f"none is used: CUDA_VISIBLE_DEVICES={setting!r} hides what "
                                    "there is", "no GPU")
    if not found and shutil.which("nvidia-smi"):
        return Finding(False, "GPU", "nvidia-smi is there and names no GPU: restart the machine "
                       "or install the driver; CUDA_VISIBLE_DEVICES= (empty) does without a GPU",
                       "GPU does not answer")
    if not found:
        return Finding(True, "GPU", "none, and none is needed", "no GPU")
    said = "; ".join(f"{gpu.name}, {gpu.memory_bytes / 2**30:.1f} GiB, compute capability "
                     f"{_dotted(gpu.capability)}, driver {gpu.driver}" for gpu in found)
    short = f"GPU {len(found)} x {found[0].name} driver {found[0].driver}"
    if max(gpu.capability for gpu in found) < OLDEST:
        return Finding(False, "GPU", f"{said}: FP8 in vLLM needs {_dotted(OLDEST)} or newer, so "
                       "leave it out: export CUDA_VISIBLE_DEVICES= (empty)", short)
    if int(found[0].driver.partition(".")[0]) < DRIVER:
        return Finding(False, "GPU", f"{said}: vLLM's torch needs driver {DRIVER} or newer; "
                       "install one, or do without the GPU: CUDA_VISIBLE_DEVICES= (empty)", short)
    return Finding(True, "GPU", said, short)


def will_run(found, model: str, features, ram_bytes: int) -> tuple:
    """Which model in which serving mode, by the workbook's own rules: a sentence, in short, disk.

    The last is a finding for a model that is fetched, or that PHI4_FP8_PROFILE names in vain, else
    None. Its modules need Python 3.11 and import nothing that is to be installed.
    """
    from helpers import WorkbookError, hardware, models

    cards = tuple(hardware.Gpu(i, gpu.name, gpu.memory_bytes, gpu.capability, gpu.driver)
                  for i, gpu in enumerate(found))
    machine = hardware.Machine(cards, model, len(os.sched_getaffinity(0)), features, ram_bytes,
                               0, "", "", "")
    mode = hardware.serving_mode(machine)
    best = next((profile for profile in (models.PHI4, models.PHI4_MINI)
                 if mode.device == "cuda" and "fp8" in models.arms(profile, machine)), None)
    asked = os.environ.get(models.VARIABLE, "")
    try:
        if asked:
            best = None if asked == "tiny-phi4" else models.choose(machine, asked)
    except WorkbookError as error:
        return "", "", Finding(False, "model", f"{models.VARIABLE}={asked}: {error.what} "
                                               f"{error.remedy}", f"no model {asked}")
    room = model_disk(best) if best and best.source == "hub" else None
    if best is None:
        title, name = "the bundled model of Phi-4's architecture", "tiny-phi4"
    else:
        title, name = best.title, best.name
        if "bf16" not in models.arms(best, machine):
            title += " (FP8 alone: its bf16 weights do not fit)"
    return f"{title}; {mode.title}: {mode.why}", f"{name} {mode.key}", room


def examine(known) -> tuple:
    """All findings, then what the machine will run, in a sentence and in short ("" if unknown)."""
    findings = [system(), python(known), make()]
    if platform.system() != "Linux":
        return [*findings, disk(DISK["cpu"])], "", ""
    every = gpus()
    found = shown(every)
    model, features = cpu.read()
    has = memory()
    if found and known:
        findings.append(compilation(known[0][0]))
    findings += [*([] if found else [library()]), disk(DISK["gpu" if found else "cpu"]), ram(has),
                 processor(model, features), graphics(found, every)]
    sentence, short, room = (("", "", None) if sys.version_info < (3, 11)
                             else will_run(found, model, features, has))
    return [*findings, *([room] if room else [])], sentence, short


def main() -> int:
    found = pythons()
    if sys.version_info < (3, 11) and found:  # the newer one can say more
        return subprocess.run([found[0][0], __file__]).returncode
    findings, sentence, short = examine(found)
    well = all(finding.ok for finding in findings)
    for finding in findings:
        print(f"{'[OK]' if finding.ok else '[FAIL]':<6} {finding.name}: {finding.detail}")
    if sentence:
        print(f"\n{'Will run' if well else 'Once that is mended, it will run'}: {sentence}.")
    failed = ", ".join(finding.name for finding in findings if not finding.ok)
    line = "; ".join(filter(None, ["OK" if well else f"NOT YET ({failed})",
                                   *(finding.short for finding in findings), short]))
    print("\nSend this line to your instructor (it names neither you nor the machine):\n"
          f"phi4-fp8: {line}")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
