"""A small libnvidia-ml.so.1, compiled from C, that says what a test wants of a driver and GPUs.

Both ways of asking NVML, ctypes in the set-up and nvidia-ml-py in the helpers, load it for the real
one where LD_LIBRARY_PATH names its folder, which a process reads when it starts.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = r"""
#include <string.h>
typedef struct { const char *name, *uuid; int major, minor; unsigned long long total; } Gpu;
static const Gpu gpus[] = { %(gpus)s { 0 } };
static const Gpu slices[] = { %(slices)s { 0 } };
static int length(const Gpu *of) { int n = 0; while (of[n].name) n++; return n; }
static const Gpu *at(void *device) {
    long n = (long)device;
    return n > 100 ? slices + n - 101 : gpus + n - 1;
}
const char *nvmlErrorString(int code) { return "a fault of the stub"; }
int nvmlInit_v2(void) { return 0; }
int nvmlInitWithFlags(unsigned flags) { return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlSystemGetDriverVersion(char *to, unsigned n) { strncpy(to, "%(driver)s", n); return 0; }
int nvmlSystemGetCudaDriverVersion(int *to) { *to = %(cuda)d; return 0; }
int nvmlDeviceGetCount_v2(unsigned *to) { *to = length(gpus); return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned n, void **to) { *to = (void *)(n + 1L); return 0; }
int nvmlDeviceGetName(void *of, char *to, unsigned n) { strncpy(to, at(of)->name, n); return 0; }
int nvmlDeviceGetUUID(void *of, char *to, unsigned n) { strncpy(to, at(of)->uuid, n); return 0; }
int nvmlDeviceGetCudaComputeCapability(void *of, int *major, int *minor) {
    *major = at(of)->major, *minor = at(of)->minor;
    return 0;
}
int nvmlDeviceGetMemoryInfo(void *of, unsigned long long *to) {  /* total, free, used */
    to[0] = to[1] = at(of)->total, to[2] = 0;
    return 0;
}
int nvmlDeviceGetMigMode(void *of, unsigned *now, unsigned *next) {
    *now = *next = length(slices) > 0;
    return 0;
}
int nvmlDeviceGetMaxMigDeviceCount(void *of, unsigned *to) { *to = 7; return 0; }
int nvmlDeviceGetMigDeviceHandleByIndex(void *of, unsigned n, void **to) {
    *to = (void *)(n + 101L);
    return n < length(slices) ? 0 : 6;  /* NVML_ERROR_NOT_FOUND */
}
"""

L4 = ("NVIDIA L4", "GPU-aa11", (8, 9), 24_152_899_584)
OLD = ("NVIDIA GeForce GTX 1080", "GPU-bb22", (6, 1), 8_589_934_592)
SLICE = ("NVIDIA A100-SXM4-40GB MIG 2g.10gb", "MIG-cc33", (8, 0), 10_468_982_784)


def compiled(folder: Path, gpus=(L4,), slices=(), driver="580.95.05", cuda=13000) -> dict:
    """The variables of a process that sees these GPUs; skips where there is no C compiler."""
    compiler = shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        pytest.skip("there is no C compiler to make a stand-in for NVML with")

    def listed(these) -> str:
        return "".join(f'{{"{name}", "{uuid}", {major}, {minor}, {total}ull}},'
                       for name, uuid, (major, minor), total in these)

    subprocess.run([compiler, "-shared", "-fPIC", "-w", "-x", "c", "-",
                    "-o", folder / "libnvidia-ml.so.1"], check=True, text=True,
                   input=SOURCE % {"gpus": listed(gpus), "slices": listed(slices),
                                   "driver": driver, "cuda": cuda})
    environ = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    return environ | {"LD_LIBRARY_PATH": str(folder)}
