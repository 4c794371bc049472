"""`make test` on a machine with a GPU: its servers fit beside each other, and nothing is asked of
it that one GPU has not."""

import dataclasses
import re

import pytest
from conftest import REPO
from on_a_gpu import beside_others, require_gpus, server_flags

from helpers import hardware, serving_env
from helpers.hardware import Gpu

GIB = 2**30
T4, L4, H100 = (Gpu(0, name, memory, capability, "580") for name, memory, capability in (
    ("Tesla T4", 15360 * 2**20, (7, 5)), ("NVIDIA L4", 23034 * 2**20, (8, 9)),
    ("NVIDIA H100", 81559 * 2**20, (9, 0))))


def last(flags: list[str], name: str) -> str:
    """The value that vLLM takes of a flag that stands several times."""
    return [value for flag, value in zip(flags, flags[1:], strict=False) if flag == name][-1]


@pytest.mark.parametrize("gpu", [T4, L4, H100], ids=lambda gpu: gpu.name)
def test_a_server_of_the_tests_leaves_the_gpu_to_others(gpu, monkeypatch):
    """vLLM takes so much KV cache, whatever its share, and asks only that the share be free."""
    (worker,) = serving_env.folder().glob("lib/python3*/site-packages/vllm/v1/worker")
    machine = dataclasses.replace(hardware.detect(), gpus=(gpu,))
    monkeypatch.setattr(hardware, "detect", lambda *_: machine)
    flags = server_flags(hardware.gpu_mode(gpu))
    assert float(last(flags, "--gpu-memory-utilization")) * gpu.memory_bytes < 5 * GIB
    assert int(last(flags, "--kv-cache-memory-bytes")) == GIB / 4
    assert "skipped memory profiling" in (worker / "gpu_worker.py").read_text()


def test_on_a_cpu_they_are_the_readers_flags():
    cpu = hardware.serving_mode(dataclasses.replace(hardware.detect(), gpus=()))
    assert beside_others(cpu) == []


def test_no_test_starts_a_server_that_wants_the_whole_gpu():
    """The fixtures' two are up meanwhile: flags come from `on_a_gpu`, or the test skips on a GPU.
    """
    skip = [REPO / "tests" / "test_servers.py", REPO / "tests" / "faults" / "test_bare_machine.py"]
    wanting = [file for file in (REPO / "tests").rglob("test_*.py") if file not in skip
               and re.search(r"serving\.default_flags\(models\.tiny", file.read_text())]
    assert wanting == []
    assert all("pytest.skip(\"on a GPU" in file.read_text() for file in skip)


@pytest.mark.parametrize("gpus, skips", [((), False), ((L4,), True), ((L4, L4), False)])
def test_a_test_of_two_gpus_skips_where_there_is_one(gpus, skips, monkeypatch):
    machine = dataclasses.replace(hardware.detect(), gpus=gpus)
    monkeypatch.setattr(hardware, "detect", lambda *_: machine)
    if not skips:
        return require_gpus(2)
    with pytest.raises(pytest.skip.Exception, match="needs 2 GPUs, and there is one"):
        require_gpus(2)
