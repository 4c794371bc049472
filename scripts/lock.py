"""Write requirements/constraints/*.txt: the exact version of every package that is pulled in.

`make lock`, after editing the requirements. Versions already in constraints/ are kept where they
still fit. Resolved once for each Python, with PyPI's torch, so that the result does not depend on
the machine; torch's own CUDA packages are left out, because torch pins them itself and a machine
with a CPU build of torch must not get them.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
CONSTRAINTS = REPO / "requirements" / "constraints"
PYTHONS = ("3.11", "3.12", "3.13")
TORCH_OWN = re.compile(r"^(torch|cuda-[a-z-]+|nvidia-(?!ml-py)[a-z0-9-]+)==")
HEADER = "# Written by `make lock`; do not edit. Versions held for {}, Linux on x86-64.\n"

# requirements file, constraints file, overrides file or None, whether torch's packages are dropped
SETS = (
    ("requirements.txt", "notebook.txt", None, True),
    ("requirements/serve-cpu.txt", "serve-cpu.txt", "serve-cpu-overrides.txt", True),
    ("requirements/serve.txt", "serve.txt", None, False),
    ("requirements/browser.txt", "browser.txt", None, False),
)


class LockError(Exception):
    """What could not be resolved, and what uv said."""


def resolve(uv: Path, python: str, requirements: str, overrides: str | None,
            held: Path) -> list[str]:
    """The `name==version` lines that one Python gets. Raises `LockError` when there are none."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "resolved.txt"
        if held.exists():  # uv prefers the versions of an output file that is already there
            output.write_text(for_python(held.read_text(), python))
        command = [uv, "pip", "compile", "--quiet", "--no-annotate", "--no-header",
                   "--python-version", python, "--python-platform", "x86_64-manylinux_2_28",
                   REPO / requirements, "-o", output]
        if overrides:
            command += ["--overrides", REPO / "requirements" / overrides]
        # Without find-links: a wheel lying on this machine must not end up in the lock.
        environment = {k: v for k, v in os.environ.items() if k != "UV_FIND_LINKS"}
        environment["UV_PYTHON_DOWNLOADS"] = "never"
        done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise LockError(f"{requirements} could not be resolved for Python {python}; uv said:\n"
                            f"\n{done.stderr.strip()}\n\nNothing of {held.name} was changed.")
        return output.read_text().split()


def for_python(constraints: str, python: str) -> str:
    """The constraints that apply to one Python, without their markers."""
    lines = (line.partition(" ; ") for line in constraints.splitlines())
    return "\n".join(pin for pin, _, marker in lines if not marker or f"'{python}'" in marker)


def merge(resolved: dict[str, list[str]]) -> list[str]:
    """One line a pin, with a marker where not every Python has it."""
    lines = []
    for pin in sorted({pin for pins in resolved.values() for pin in pins}):
        having = [python for python, pins in resolved.items() if pin in pins]
        marker = " or ".join(f"python_version == '{python}'" for python in having)
        lines.append(pin if len(having) == len(resolved) else f"{pin} ; {marker}")
    return lines


def main(uv: Path) -> None:
    for requirements, name, overrides, drop_torch in SETS:
        held = CONSTRAINTS / name
        resolved = {p: resolve(uv, p, requirements, overrides, held) for p in PYTHONS}
        pins = [line for line in merge(resolved) if not (drop_torch and TORCH_OWN.match(line))]
        held.write_text(HEADER.format(requirements) + "\n".join(pins) + "\n")
        print(f"{held.relative_to(REPO)}: {len(pins)} pins")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except LockError as error:
        sys.exit(str(error))
