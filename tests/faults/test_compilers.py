"""Faults of what vLLM compiles on a GPU: no compiler, no headers of Python, no nvcc, no ninja."""

import os
import shutil
import subprocess
import sys

import pytest

from helpers import server_log, serving

# Triton's own build of the module that launches its kernels; {} is done before it.
TRITON = """
import sysconfig
{}
from triton.runtime.build import compile_module_from_src
compile_module_from_src("#include <Python.h>", "cuda_utils")
"""
NO_HEADERS = ("get = sysconfig.get_paths; sysconfig.get_paths = "
              "lambda *of, **by: get(*of, **by) | {'include': '/nonexistent'}")
HEADERS = "python{}.{}-dev".format(*sys.version_info[:2])
PREFIX = "(EngineCore pid=7) ERROR 11-25 09:18:06 [core.py:1] "
AFTER = ("(APIServer pid=3) RuntimeError: Engine core initialization failed. See root cause above. "
         "Failed core proc(s): {}\n")


def log_of(command: list, environ: dict) -> str:
    """A server's log as far as a compiler comes in: its words as they are, Python's by vLLM."""
    without_cc = {name: value for name, value in os.environ.items() if name != "CC"}
    done = subprocess.run(command, env=without_cc | environ, capture_output=True, text=True)
    assert done.returncode, "it was built"
    said, begins, raised = done.stderr.partition("Traceback")
    return said + "".join(f"{PREFIX}{line}\n" for line in (begins + raised).splitlines()) + AFTER


@pytest.mark.parametrize(("before", "variables", "reason", "remedy"), [
    pytest.param(NO_HEADERS, {}, "Python.h: No such file", f"apt install {HEADERS}",
                 marks=pytest.mark.fault("Python's headers are missing on a GPU")),
    pytest.param("", {"PATH": "/nonexistent"}, "Failed to find C compiler", "build-essential",
                 marks=pytest.mark.fault("no C compiler on a GPU")),
    pytest.param("", {"CC": "gcc -O2"}, "'gcc -O2'", "Unset CC",
                 marks=pytest.mark.fault("CC names a compiler with arguments, on a GPU")),
], ids=["headers", "compiler", "CC"])
def test_triton_cannot_compile(tmp_path, happened, before, variables, reason, remedy):
    if not shutil.which("gcc") and "headers" in before:
        pytest.skip("gcc is to say what it does not find, and is not here")
    log = log_of([serving.serve_python(), "-c", TRITON.format(before)],
                 {"TRITON_CACHE_DIR": str(tmp_path)} | variables)
    meaning, todo = server_log.explain(log, 1)
    assert reason in meaning and remedy in todo and "\n" not in meaning
    happened(f"{meaning} {todo}")


# FlashInfer's own words (flashinfer/jit/cpp_ext.py), and ninja's and the shell's.
FLASHINFER = {
    "no nvcc on the PATH": (
        "RuntimeError: Could not find nvcc and default cuda_home='/usr/local/cuda' doesn't exist",
        "Could not find nvcc", "CUDA toolkit"),
    "no nvcc where it is called": (
        "RuntimeError: Ninja build failed. Ninja output:\nninja: Entering directory `/tmp/.cache'"
        "\n[1/2] /usr/local/cuda/bin/nvcc -c sampling.cu -o sampling.o\nFAILED: [code=127] a.o\n"
        "/bin/sh: 1: /usr/local/cuda/bin/nvcc: not found\nninja: build stopped: subcommand failed.",
        "/usr/local/cuda/bin/nvcc: not found", "CUDA toolkit"),
    "no ninja": ("FileNotFoundError: [Errno 2] No such file or directory: 'ninja'", "'ninja'",
                 "make setup"),
    "no libcuda for Triton": ("AssertionError: libcuda.so cannot found!", "libcuda", "ldconfig"),
    "no libcuda for vLLM": (
        "ImportError: libcuda.so.1: cannot open shared object file: No such file or directory",
        "libcuda.so.1", "--gpus all"),
    "no C++ compiler for torch.compile": (
        "torch._inductor.exc.InductorError: InvalidCxxCompiler: No working C++ compiler found in "
        "torch._inductor.config.cpp.cxx: (None, 'g++')", "No working C++", "build-essential"),
}


@pytest.mark.fault("what a kernel is compiled with is missing on a GPU")
@pytest.mark.parametrize("case", FLASHINFER)
def test_what_compiles_is_missing(case, happened):
    raised, reason, remedy = FLASHINFER[case]
    log = "".join(f"{PREFIX}{line}\n" for line in
                  ["Traceback (most recent call last):", '  File "x.py", line 1, in f',
                   *raised.splitlines()]) + AFTER
    meaning, todo = server_log.explain(log, 1)
    assert reason in meaning and remedy in todo and "\n" not in meaning
    happened(f"{meaning} {todo}")


@pytest.mark.fault("FlashInfer compiles, and nvcc or ninja is missing")
def test_flashinfers_own_build(tmp_path, happened):
    if not list(serving.serve_python().parents[1].glob("lib/python3*/site-packages/flashinfer")):
        pytest.skip("without a GPU FlashInfer is in no environment")
    (tmp_path / "build.ninja").write_text(
        "rule cc\n  command = /nonexistent/bin/nvcc -c $in -o $out\nbuild a.o: cc a.cu\n")
    (tmp_path / "a.cu").touch()
    build = ("from pathlib import Path; from flashinfer.jit import cpp_ext; "
             f"cpp_ext.run_ninja(Path('{tmp_path}'), Path('{tmp_path}/build.ninja'), False)")
    for path, reason in ((serving.environment()["PATH"], "nvcc: not found"),
                         ("/nonexistent", "'ninja'")):
        log = log_of([serving.serve_python(), "-c", build], {"PATH": path})
        meaning, todo = server_log.explain(log, 1)
        assert reason in meaning, meaning
    happened(f"{meaning} {todo}")
