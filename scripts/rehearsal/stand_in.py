"""The stand-ins for the driver's libraries, and the PATH of a machine without a CUDA toolkit."""

import contextlib
import os
import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parent
LIBRARIES = {"libnvidia-ml.so.1": "nvml.c", "libcuda.so.1": "cuda.c"}
# Programs of a CUDA toolkit, and ninja, with which FlashInfer compiles.
TOOLKIT = {"nvcc", "ninja", "ninja-build", "ptxas", "nvlink", "fatbinary", "cicc", "cuobjdump",
           "nvdisasm", "nvprune", "cudafe++"}


def libraries(folder: Path) -> Path:
    """Compile both into a folder, for LD_LIBRARY_PATH; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        raise SystemExit("The rehearsal stands in for the NVIDIA driver's two libraries with C "
                         "code, and vLLM needs a C compiler on a GPU itself: install gcc or clang.")
    for name, source in LIBRARIES.items():
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", f"-Wl,-soname,{name}",
                        "-o", folder / name, HERE / source], check=True)
    return folder


def programs(folder: Path) -> Path:
    """A folder with this machine's programs, those of `TOOLKIT` left out; returns it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for place in map(os.path.abspath, os.get_exec_path()):
        with contextlib.suppress(OSError):  # a folder that is not there, or not to be read
            for name in os.listdir(place):
                if name not in TOOLKIT and not (folder / name).is_symlink():
                    (folder / name).symlink_to(os.path.join(place, name))
    return folder


def toolkit(folder: Path) -> Path:
    """A CUDA toolkit in name: its nvcc writes down how it was called, and fails; returns it."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True, exist_ok=True)
    nvcc.write_text(f'#!/bin/sh\necho "$@" >> "{folder}/called"\nexit 1\n')
    nvcc.chmod(0o755)
    (folder / "called").write_text("")
    return folder
