"""Whether Triton can compile here: a C compiler, and the headers of the Python that runs vLLM.

vLLM's Triton kernels for a GPU are started by a small C module, which Triton compiles at run time
against Python.h. On a CPU nothing is compiled.
"""

import os
import shutil
import subprocess
import sys
import sysconfig

TRIAL = "#include <Python.h>\nint main(void) { return 0; }\n"


def found() -> str:
    """The C compiler that Triton takes: what CC names, else gcc, else clang; "" where none is.

    Source: triton.runtime.build._build, which does not look for `cc`, and takes CC for the path of
    a program, without arguments.
    """
    named = os.environ.get("CC")
    return (shutil.which("gcc") or shutil.which("clang") or "" if named is None
            else shutil.which(named) or "")


def include_folder() -> str:
    """Where the headers of the Python that runs this are looked for, as Triton asks for it."""
    scheme = sysconfig.get_default_scheme()
    return sysconfig.get_path("include", "posix_prefix" if scheme == "posix_local" else scheme)


def fault() -> str:
    """Why Triton cannot compile, and what to install; "" where a trial with Python.h succeeds.

    The headers are those of the Python that runs this, which the environments are made with.
    """
    compiler, include = found(), include_folder()
    if not compiler and os.environ.get("CC") is not None:
        return (f"CC is {os.environ['CC']!r}, which is no program, and Triton compiles with it: "
                "unset CC, or let it name a C compiler alone, without arguments")
    if not compiler:
        return ("there is no C compiler (gcc or clang), and vLLM's Triton needs one on a GPU: "
                "install one (on Debian or Ubuntu: apt install build-essential)")
    trial = subprocess.run([compiler, "-fsyntax-only", f"-I{include}", "-x", "c", "-"],
                           input=TRIAL, capture_output=True, text=True,
                           env=os.environ | {"LC_ALL": "C"})  # "error:" in English
    if trial.returncode == 0:
        return ""
    said = next((line for line in trial.stderr.splitlines() if "error:" in line), "no reason given")
    said = said.rpartition("error:")[2].strip()
    if "Python.h" in said:
        version = "{}.{}".format(*sys.version_info[:2])
        return (f"Python's header Python.h is not in {include}, and vLLM's Triton compiles with it "
                f"on a GPU: install it (on Debian or Ubuntu: apt install python{version}-dev; on "
                f"Fedora: dnf install python{version}-devel)")
    return (f"{compiler} does not compile ({said}), and vLLM's Triton needs it on a GPU: install "
            "the C library's headers (on Debian or Ubuntu: apt install build-essential)")
