"""The CPU kernels' tests and one served answer, as each kind of CPU that vLLM has a build for.

`make test-isa`. A CPU is taken for an older one: vLLM is told that newer instructions are missing
(`tests/serve_side/other_cpu.py`), and so loads the build of its C++ library for the older one;
torch, oneDNN and MKL are held back by variables of their own. What this machine lacks itself cannot
be shown here, and is reported so.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from helpers import WorkbookError, cpu, hardware, hub, models, quantize, server_log, serving

REPO = Path(__file__).resolve().parent.parent
QUESTION = "Question: Tom has 3 apples and buys 2 more. How many apples has he?\nAnswer:"


@dataclass(frozen=True)
class Kind:
    name: str
    needs: frozenset[str]  # features of /proc/cpuinfo
    hides: str  # beginnings of torch's names of features
    onednn: str  # values of the libraries' own variables
    aten: str
    mkl: str
    build: str  # vLLM's C++ library


AVX512 = frozenset({"avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl"})
KINDS = (
    Kind("AMX (Sapphire Rapids)", cpu.PACKED_FEATURES | {"amx_tile", "amx_bf16"}, "",
         "AVX512_CORE_AMX", "avx512", "AVX512", "_C"),
    Kind("AVX512-BF16 (Zen 4)", cpu.PACKED_FEATURES, "amx", "AVX512_CORE_BF16", "avx512",
         "AVX512", "_C"),
    Kind("AVX512 (Ice Lake)", AVX512 | {"avx512_vnni"}, "amx avx512_bf16", "AVX512_CORE_VNNI",
         "avx512", "AVX512", "_C_AVX512"),
    Kind("AVX2 (Zen 3, Haswell)", frozenset({"avx2", "fma"}), "amx avx512 avx_vnni avx10", "AVX2",
         "avx2", "AVX2", "_C_AVX2"),
)


class Server(serving.VllmServer):
    """A server that takes this CPU for another: the supervisor gives vLLM a path of its own."""

    def command(self, port: int) -> list[str]:
        return ["env", f"PYTHONPATH={os.environ['PYTHONPATH']}", *super().command(port)]


@contextmanager
def plugin() -> Iterator[str]:
    """A PYTHONPATH on which vLLM finds `other_cpu.become`, as a distribution that is installed."""
    with tempfile.TemporaryDirectory() as folder:
        info = Path(folder) / "other_cpu-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other-cpu\nVersion: 1\n")
        (info / "entry_points.txt").write_text(
            "[vllm.platform_plugins]\nother_cpu = other_cpu:become\n")
        yield os.pathsep.join([folder, str(REPO / "tests" / "serve_side"),
                               str(REPO / "helpers" / "serve_side")])


def as_kind(kind: Kind, path: str) -> dict[str, str]:
    """The environment in which a process takes this CPU for one of that kind."""
    held = {"ONEDNN_MAX_CPU_ISA": kind.onednn, "ATEN_CPU_CAPABILITY": kind.aten,
            "MKL_ENABLE_INSTRUCTIONS": kind.mkl}
    return {**os.environ, **held, "OTHER_CPU_LACKS": kind.hides, "PYTHONPATH": path,
            "CUDA_VISIBLE_DEVICES": "",
            # What torch.compile has kept was made for the CPU that this machine has.
            "TORCHINDUCTOR_CACHE_DIR": str(Path(path.partition(os.pathsep)[0]) / kind.build)}


def tried(kind: Kind, path: str, workspace: str) -> list[str]:
    """The row of a kind of CPU: its name, vLLM's build, the kernel tests, the served answer."""
    lacks = sorted(kind.needs - cpu.read()[1])
    if lacks:
        return [kind.name, "", f"not this machine: lacks {', '.join(lacks)}", ""]
    environ = as_kind(kind, path) | {"PHI4_FP8_WORKSPACE": workspace}
    tests = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
         "tests/test_cpu_kernels.py"],
        cwd=REPO, env=environ, capture_output=True, text=True)
    if tests.returncode:
        print(tests.stdout[-6000:], file=sys.stderr)
    answer = subprocess.run([sys.executable, __file__, "answer"], cwd=REPO, env=environ,
                            capture_output=True, text=True)
    if answer.returncode:
        print(answer.stdout[-2000:], answer.stderr[-2000:], file=sys.stderr)
        build, said = "", "FAILED"
    else:
        found = json.loads(answer.stdout.splitlines()[-1])
        build, said = found["build"], f"{found['kernel']}: {found['text']!r}"
        if build != f"{kind.build}.abi3.so":
            said = f"FAILED: {kind.build} was expected"
        elif "####" not in found["text"]:  # which every answer that the model was taught ends with
            said = f"FAILED: {found['text']!r} is no answer"
    verdict = "FAILED" if tests.returncode else "passed"
    counts = (tests.stdout.strip().splitlines() or ["nothing was run"])[-1]
    return [kind.name, build, f"{verdict} ({counts.partition(' in ')[0].strip('= ')})", said]


def answer() -> int:
    """Serve the bundled model's FP8 checkpoint, answer a question, and print JSON on one line."""
    profile = models.tiny()
    mode = hardware.serving_mode(hardware.detect())
    fp8 = quantize.fp8_checkpoint(profile, hub.obtain(profile))
    try:
        with Server(fp8, serving.default_flags(profile, mode)) as server:
            text = server.complete(QUESTION, max_tokens=64, stop=["\n\n"])
            builds = {Path(each.path).name for process in serving.processes(server)
                      for each in process.memory_maps() if "/vllm/_C" in each.path}
            print(json.dumps({"kernel": server.kernel, "text": text.strip(), "mode": mode.key,
                              "build": ", ".join(sorted(builds))}))
    except WorkbookError as stopped:
        print(stopped, server_log.explain(server.log(), 1), server.log()[-3000:], file=sys.stderr)
        return 1
    return 0


def main() -> int:
    started = time.monotonic()
    with plugin() as path, tempfile.TemporaryDirectory() as workspace:
        rows = []
        for kind in KINDS:
            print(f"As {kind.name} ...", flush=True)
            rows.append(tried(kind, path, workspace))
    head = ["CPU", "build loaded", "kernel tests", "served answer"]
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(4)]
    for row in [head, *rows]:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
    print(f"{time.monotonic() - started:.0f} s")
    return int(any("FAILED" in cell for row in rows for cell in row))


if __name__ == "__main__":
    sys.exit(answer() if sys.argv[1:] == ["answer"] else main())
