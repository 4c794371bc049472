"""The rehearsal's libnvidia-ml.so.1, which says what a test wants of a driver and its GPUs.

Both ways of asking NVML, ctypes in the set-up and nvidia-ml-py in the helpers, load it for the real
one where LD_LIBRARY_PATH names its folder, which a process reads when it starts.
"""

import os
import shutil
from pathlib import Path

import pytest
from rehearsal import stand_in
from rehearsal.cases import DRIVER, Card, Case, card

OLD = Card("NVIDIA GeForce GTX 1080", 8_589_934_592, (6, 1))
L4 = card("L4")
SLICED = card("A100 SXM 80 GB", slices=(20_937_965_568,), mig=1)


def compiled(folder: Path, gpus=(L4,), driver=DRIVER) -> dict:
    """The variables of a process that sees these GPUs; skips where there is no C compiler.

    The first GPU is GPU-0, a slice of it MIG-0-0. The driver: its version, and its CUDA as NVML
    counts it, 1000 for each major and 10 for each minor.
    """
    if not (shutil.which("gcc") or shutil.which("clang")):
        pytest.skip("there is no C compiler to make a stand-in for NVML with")
    (folder / "gpus.txt").write_text(Case("a test's", tuple(gpus), driver=driver).described())
    environ = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    return environ | {"LD_LIBRARY_PATH": str(stand_in.libraries(folder / "lib")),
                      "NVML_STUB": str(folder / "gpus.txt")}
