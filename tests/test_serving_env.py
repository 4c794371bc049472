"""What vLLM is started with: its programs first, and no kernel compiled for sampling."""

import os
import subprocess

import pytest
from conftest import REPO

from helpers import hardware, roofline, serving, serving_env

# vLLM's own gate, on the platform told that it is a large GPU from 8.0 on, since the gate is closed
# to smaller ones as well: False, or what it asks next.
GATE = """
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability
platform = type(current_platform)
platform.is_cuda = lambda self: True
platform.get_device_capability = lambda self, device=0: DeviceCapability(8, 0)
platform.num_compute_units = lambda self, device=0: 108
from vllm.v1.sample.ops import topk_topp_sampler
try:
    answer = topk_topp_sampler.flashinfer_sampler_supported()
except Exception as asked:  # with no device, it can go no further than to FlashInfer itself
    answer = type(asked).__name__
print("ANSWER", answer)
"""


def gate(environ: dict) -> str:
    done = subprocess.run([serving.serve_python(), "-c", GATE], env=environ, cwd=REPO, text=True,
                          capture_output=True)
    answer = done.stdout.rpartition("\n")[0].rpartition("\n")[2]
    assert answer.startswith("ANSWER"), done.stderr[-2000:]
    return answer.removeprefix("ANSWER ")


def test_vllm_leaves_flashinfers_sampler_and_its_compiler_alone(monkeypatch):
    monkeypatch.setenv("VLLM_USE_FLASHINFER_SAMPLER", "1")  # a reader's, for another vLLM
    ours = serving.environment()
    assert gate(ours) == "False"
    ours.pop("VLLM_USE_FLASHINFER_SAMPLER")
    assert gate(ours) != "False"  # by itself it takes it, from capability 8.0 on


def test_the_serving_environments_programs_come_first(monkeypatch, tmp_path):
    theirs = tmp_path / "ninja"
    theirs.write_text("#!/bin/sh\necho another ninja\n")
    theirs.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    own = serving.environment()
    found = subprocess.check_output(["sh", "-c", "command -v ninja"], env=own, text=True).strip()
    assert found == str(serving_env.folder() / "bin" / "ninja")  # as FlashInfer calls it
    monkeypatch.delenv("PATH")
    assert serving.environment()["PATH"].endswith(os.defpath)


def test_a_servers_process_gets_both(tiny_base, tmp_workspace, monkeypatch):
    """The variables that reach the process itself, told by the supervisor's own child."""
    server = serving.VllmServer(tiny_base)
    told = tmp_workspace.parent / "told"
    monkeypatch.setattr(server, "command", lambda port: ["/bin/sh", "-c", f"env > {told}"])
    monkeypatch.setattr(serving.server_log, "create", lambda *of: tmp_workspace.parent / "log")
    server._begin([])
    server._supervisor.wait(30)
    variables = dict(line.split("=", 1) for line in told.read_text().splitlines() if "=" in line)
    assert variables["VLLM_USE_FLASHINFER_SAMPLER"] == "0"
    assert variables["PATH"].startswith(f"{serving_env.folder()}/bin:")


T4 = hardware.Gpu(0, "Tesla T4", 16_106_127_360, (7, 5), "580")
A40 = hardware.Gpu(1, "NVIDIA A40", 48_305_799_168, (8, 6), "580")
IN_THE_ORDER_OF_THE_BUS = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


@pytest.mark.parametrize("gpus, setting, variables", [
    ((A40,), None, {}), ((), "", {"CUDA_VISIBLE_DEVICES": ""}),
    ((A40,), "1", IN_THE_ORDER_OF_THE_BUS | {"CUDA_VISIBLE_DEVICES": "1"}),
    ((T4, A40), "0,1", IN_THE_ORDER_OF_THE_BUS | {"CUDA_VISIBLE_DEVICES": "1"}),
    ((T4, A40), None, IN_THE_ORDER_OF_THE_BUS | {"CUDA_VISIBLE_DEVICES": "1"})])
def test_cuda_counts_gpus_as_the_plan_does(monkeypatch, gpus, setting, variables):
    """By itself CUDA counts from the fastest, and a reader's 1 would be another GPU than NVML's."""
    for name in ("CUDA_DEVICE_ORDER", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    if setting is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", setting)
    monkeypatch.setattr(hardware, "_gpus", lambda: (gpus, ""))
    own = serving.environment()
    assert {name: value for name, value in own.items() if name.startswith("CUDA_")} == variables


def test_memory_is_measured_on_the_gpu_that_servers_are_shown(monkeypatch):
    shown = {}

    def ran(command, env, **more):
        shown.update(env)
        return subprocess.CompletedProcess(command, 0, "6e11\n", "")

    monkeypatch.setattr(hardware, "_gpus", lambda: ((T4, A40), ""))
    monkeypatch.setattr(roofline.subprocess, "run", ran)
    assert roofline.measured_copy() == 6e11
    assert (shown["CUDA_DEVICE_ORDER"], shown["CUDA_VISIBLE_DEVICES"]) == ("PCI_BUS_ID", "1")
