"""`make kernel`: the notebooks' environment as a kernel of the Jupyter that is already there.

A pod's or a hub's Jupyter runs in an environment of its own, in which a notebook would find nothing
that it imports. A kernel is a small file that names our Python; that Jupyter itself says where it
looks for kernels, and afterwards whether it sees this one.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

NAME, TITLE = "phi4-fp8", "Phi-4 FP8 workbook"
PRIVATE = ("DO_NOT_TRACK", "HF_HUB_DISABLE_TELEMETRY", "VLLM_NO_USAGE_STATS")  # as in the Makefile
WIDGETS = "labextensions/@jupyter-widgets/jupyterlab-manager"


def jupyter() -> str:
    """The first `jupyter` on the PATH that is not of this environment; else this one's."""
    own = Path(sys.executable).parent
    found = (shutil.which("jupyter", path=folder) for folder in os.get_exec_path())
    others = (each for each in found if each and Path(each).parent.resolve() != own.resolve())
    return next(others, str(own / "jupyter"))


def ask(program: str, *words: str) -> dict:
    """What a `jupyter` command says as JSON; it may print lines of its own before."""
    done = subprocess.run([program, *words, "--json"], capture_output=True, text=True)
    begins = done.stdout.find("{")
    if done.returncode or begins < 0:
        sys.exit(f"{program} {' '.join(words)} failed: {done.stderr.strip()[-300:]}\n"
                 "Open a terminal in the Jupyter that you use, and run `make kernel` there.")
    return json.loads(done.stdout[begins:])


def can_write(folder: Path) -> bool:
    """Whether a folder, which need not be there yet, can be written to by this user."""
    there = next(each for each in (folder, *folder.parents) if each.exists())
    return there.is_dir() and os.access(there, os.W_OK)


def main() -> int:
    program = jupyter()
    data = [Path(each) for each in ask(program, "--paths")["data"]]
    # This environment's own folder is seen by this environment's JupyterLab alone.
    places = [each for each in data if not each.is_relative_to(sys.prefix) and can_write(each)]
    if not places:
        sys.exit(f"None of the folders in which {program} looks for kernels can be written: "
                 f"{', '.join(map(str, data))}. Set JUPYTER_DATA_DIR, for that Jupyter and here, "
                 "to a folder of your own.")
    private = [word for name in PRIVATE for word in ("--env", name, "1")]
    subprocess.run([sys.executable, "-m", "ipykernel", "install", "--user", "--name", NAME,
                    "--display-name", TITLE, *private], check=True, stdout=subprocess.DEVNULL,
                   env=os.environ | {"JUPYTER_DATA_DIR": str(places[0])})
    seen = ask(program, "kernelspec", "list")["kernelspecs"].get(NAME)
    if not seen or seen["spec"]["argv"][0] != sys.executable:
        sys.exit(f"The kernel was written to {places[0]}, and {program} does not see it.")
    print(f"Kernel “{TITLE}”: in {seen['resource_dir']}, seen by {program}.\n"
          "Reload the page of your Jupyter, open a notebook of notebooks/, and choose that kernel.")
    if not any((each / WIDGETS).is_dir() for each in data):
        print("That Jupyter has no ipywidgets, so sliders and buttons show as text: install it "
              "there (pip install ipywidgets), and restart it.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
