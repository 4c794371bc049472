"""What a process gives back of a GPU's memory, and who holds the rest; NVML's answers are given."""

import asyncio
import gc
import os
import re
import subprocess
import sys
import weakref
from dataclasses import replace
from types import SimpleNamespace

import nbformat
import pynvml
import pytest
import torch
from conftest import REPO
from jupyter_server.services.contents.filemanager import FileContentsManager
from jupyter_server.services.kernels.kernelmanager import MappingKernelManager
from jupyter_server.services.sessions.sessionmanager import SessionManager
from nbclient import NotebookClient
from transformers import AutoModelForCausalLM

from helpers import (
    WorkbookError,
    gpu_memory,
    hardware,
    models,
    phi4_slice,
    quantize,
    roofline,
    scheme_trials,
    serving,
)
from helpers.hardware import Gpu

A40 = Gpu(0, "NVIDIA A40", 48_305_799_168, (8, 6), "580")


@pytest.fixture
def nvml(monkeypatch):
    """A function that sets what NVML says of processes: {pid: bytes or None}."""
    said = {}
    for name, answer in {
            "nvmlInit": lambda: None, "nvmlShutdown": lambda: None,
            "nvmlDeviceGetHandleByIndex": lambda index: index,
            "nvmlDeviceGetGraphicsRunningProcesses": lambda device: [],
            "nvmlDeviceGetComputeRunningProcesses": lambda device: [
                SimpleNamespace(pid=pid, usedGpuMemory=nbytes) for pid, nbytes in said.items()]
    }.items():
        monkeypatch.setattr(pynvml, name, answer)
    return said.update


@pytest.fixture
def device(tmp_path, monkeypatch):
    """A file that stands for the driver's device."""
    file = tmp_path / "nvidia0"
    file.touch()
    monkeypatch.setattr(gpu_memory, "DEVICES", (str(file),))
    return file


async def with_a_kernel_of_jupyter(device, folder, then):
    """A kernel that Jupyter's own server has started for a notebook, with the device open."""
    kernels = MappingKernelManager()
    sessions = SessionManager(kernel_manager=kernels,
                              contents_manager=FileContentsManager(root_dir=str(folder)))
    name = "01_load_phi4.ipynb"
    made = await sessions.create_session(path=name, name=name, type="notebook",
                                         kernel_name="python3")
    kernel = kernels.get_kernel(made["kernel"]["id"])
    client = kernel.client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=60)
        opened = f"held = open({str(device)!r})"
        child = f"{opened}; print(1, flush=True); input()"
        client.execute(f"{opened}\nimport os, subprocess, sys\nchild = subprocess.Popen("
                       f"[sys.executable, '-c', {child!r}], stdin=-1, stdout=-1)\n"
                       "child.stdout.readline()\nprint(os.getpid(), child.pid)")
        while True:
            message = client.get_iopub_msg(timeout=60)
            assert message["msg_type"] != "error", message["content"]
            if message["msg_type"] == "stream":
                then(*map(int, message["content"]["text"].split()))
                return
    finally:
        client.stop_channels()
        await kernels.shutdown_kernel(made["kernel"]["id"], now=True)


def test_the_notebook_whose_memory_is_in_the_way_is_named(nvml, device, tmp_path):
    def look(kernel, child):
        nvml({kernel: 29_900_000_000})
        assert gpu_memory.in_the_way([A40]) == (
            "Memory of the NVIDIA A40 is held by the kernel of 01_load_phi4.ipynb (process "
            f"{kernel}, 29.9 GB).")
        nvml({child: 40_000_000_000})  # as a server that a notebook has started
        largest, least = gpu_memory.holders(A40)
        assert (largest.pid, least.pid) == (child, kernel)
        assert largest.name.endswith(", started by the kernel of 01_load_phi4.ipynb")

    asyncio.run(with_a_kernel_of_jupyter(device, tmp_path, look))


def test_in_a_container_it_is_who_has_the_device_open(nvml, device):
    """There NVML's numbers are the host's: 1 is another process here, or none."""
    nvml({2**22 + 1: 10**9, os.getppid(): 10**9})
    second = replace(A40, index=1)
    assert gpu_memory.in_the_way([A40, second]) == ""
    with open(device):  # which of the two it is, nobody says
        assert gpu_memory.in_the_way([A40, second]) == (
            "A GPU of this machine is open in this notebook or program itself (process "
            f"{os.getpid()}).")


def test_where_nvml_knows_a_process_only_its_gpu_is_said_to_be_held(device, monkeypatch):
    monkeypatch.setattr(gpu_memory, "_told",
                        lambda index: {os.getpid(): 10**9} if index == 1 else {})
    with open(device):
        assert gpu_memory.in_the_way([A40, replace(A40, index=1, name="Tesla T4")]) == (
            "Memory of the Tesla T4 is held by this notebook or program itself (process "
            f"{os.getpid()}, 1.0 GB).")


def test_where_nvml_fails_nobody_is_named_in_vain(monkeypatch, device):
    def fails():
        raise pynvml.NVMLError(pynvml.NVML_ERROR_DRIVER_NOT_LOADED)

    monkeypatch.setattr(pynvml, "nvmlInit", fails)
    assert gpu_memory.holders(A40) == [] and gpu_memory.in_the_way([]) == ""


def test_a_model_that_no_name_holds_is_gone(tiny_base, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("emptied"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: (
        500_000_000 + device * 10**9 if calls else 10**10))
    gc.disable()  # so that only `free` collects
    try:
        model = AutoModelForCausalLM.from_pretrained(tiny_base.path)
        model.itself = [model]  # as accelerate's hooks and many a cache are
        seen = weakref.ref(model)
        del model
        assert gpu_memory.free() == "This notebook's tensors hold 2.0 GB of GPU memory."
        assert seen() is None and calls == ["emptied"]
    finally:
        gc.enable()


def test_who_has_not_used_the_gpu_gets_no_context_by_freeing():
    """A CUDA context alone takes some hundred MB; torch would make one."""
    code = ("import sys; from helpers import gpu_memory; print(gpu_memory.free()); "
            "print('torch' in sys.modules)")
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "This notebook holds no GPU memory.\nFalse\n"


# What loads a model frees it

NOTHING_LEFT = """
import gc, transformers
print([type(each).__name__ for each in gc.get_objects()
       if issubclass(type(each), transformers.PreTrainedModel)])
"""


@pytest.mark.parametrize("name", ["01_load_phi4", "02_quantize_to_fp8"])
def test_at_a_notebooks_end_no_model_is_left(name, tmp_workspace, monkeypatch):
    """As it stays open in JupyterLab while vLLM wants the GPU's memory."""
    monkeypatch.setenv("PHI4_FP8_PROFILE", "tiny-phi4")
    source = REPO / "notebooks" / f"{name}.ipynb"
    nb = nbformat.read(source, as_version=4)
    loads = [cell for cell in nb.cells if "from_pretrained(base.path, dtype" in cell.source]
    assert loads, "this notebook loads no model any more"
    nb.cells = [cell for cell in nb.cells  # pictures and tasks take time, and load nothing
                if not re.search(r"\b(plots|widgets|check)\b", cell.source)]
    nb.cells.append(nbformat.v4.new_code_cell(NOTHING_LEFT))
    NotebookClient(nb, kernel_name="python3",
                   resources={"metadata": {"path": str(source.parent)}}).execute()
    assert [output["text"] for output in nb.cells[-1].outputs
            if output.get("name") == "stdout"] == ["[]\n"]


@pytest.fixture
def loaded(monkeypatch) -> list:
    """Weak references to every model that Transformers has loaded since."""
    found, load = [], AutoModelForCausalLM.from_pretrained

    def watched(*arguments, **more):
        model = load(*arguments, **more)
        found.append(weakref.ref(model))
        return model

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", watched)
    return found


@pytest.mark.parametrize("make", [
    lambda base, place: quantize.fp8_checkpoint(models.tiny(), base),
    lambda base, place: phi4_slice.quantized(base, quantize.recipe(), place),
    lambda base, place: scheme_trials.make(base, quantize.recipe(), place)])
def test_who_quantizes_keeps_no_model(make, loaded, tiny_base, tmp_workspace, tmp_path):
    """LLM Compressor's session would, and computes on the GPU where there is one."""
    gc.disable()
    try:
        make(tiny_base, tmp_path / "made")
        assert loaded and not any(each() for each in loaded)
    finally:
        gc.enable()


def test_the_speed_of_memory_is_measured_in_a_process_of_its_own():
    """So that neither copies nor a CUDA context stay on the GPU beside the server to come."""
    code = ("import sys; from helpers import roofline; print(roofline.measured_copy('cpu') > 1e8, "
            "'torch' in sys.modules)")
    ran = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert ran.stdout == "True False\n", ran.stderr


def test_a_memory_too_full_to_be_measured_is_a_sentence(monkeypatch):
    monkeypatch.setattr(gpu_memory, "in_the_way", lambda gpus: "Held by 01.")
    with pytest.raises(WorkbookError, match="could not be measured") as said:
        roofline.measured_copy("cuda" if not torch.cuda.is_available() else "cuda:99")
    assert said.value.remedy == "Held by 01. Free 3 GB of it, and run this again."
    assert "Traceback" not in str(said.value)


# A server that does not find its memory

REFUSED = """#!/bin/sh
echo "ValueError: Free memory on device cuda:0 (3.1/44.4 GiB) on startup is less than desired GPU \
memory utilization (0.9, 39.95 GiB). Decrease GPU memory utilization or reduce GPU memory used by \
other processes."
exit 1
"""


def test_a_server_that_finds_the_gpu_full_says_whose_memory_it_is(
    nvml, device, tmp_path, tmp_workspace, tiny_base, monkeypatch
):
    vllm = tmp_path / "vllm"
    vllm.write_text(REFUSED)
    vllm.chmod(0o755)
    monkeypatch.setattr(serving, "serve_python", lambda: vllm)
    monkeypatch.setattr(hardware, "_gpus", lambda: ((A40,), ""))
    nvml({os.getpid(): 40_000_000_000})
    with open(device), pytest.raises(WorkbookError, match="stopped while starting") as said:
        serving.VllmServer(tiny_base).start()
    assert "Free memory on device cuda:0 (3.1/44.4 GiB)" in said.value.meaning
    assert said.value.remedy.startswith(
        "Memory of the NVIDIA A40 is held by this notebook or program itself (process "
        f"{os.getpid()}, 40.0 GB). Something else holds memory of this GPU")
