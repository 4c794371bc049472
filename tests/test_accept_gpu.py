"""`make accept-gpu`: its order, its words and its steps, walked on a CPU as far as one goes."""

import contextlib
import dataclasses
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import accept_gpu
import accept_steps
import nbformat
import pytest
from accept_steps import STEPS, Failed, Here, NotHere, Step
from conftest import REPO

from helpers import (
    WorkbookError,
    hardware,
    ledger,
    preflight,
    roofline,
    serving,
    shared,
    workspace,
)
from helpers.hardware import Gpu

A40 = Gpu(0, "NVIDIA A40", 48_305_799_168, (8, 6), "580.95.05", (13, 0))
GTX = Gpu(0, "NVIDIA GeForce GTX 1080", 8 * 2**30, (6, 1), "580.95.05", (13, 0))


def cpu_only() -> hardware.Machine:
    machine = hardware.detect()
    if machine.gpus:
        pytest.skip("this walks the steps on a CPU")
    return machine


@pytest.fixture
def here(tmp_path, monkeypatch) -> Here:
    """This machine's CPU in the GPU's place, Phi-4's size that of the bundled model."""
    machine = cpu_only()
    monkeypatch.setenv("PHI4_FP8_WORKSPACE", str(tmp_path / "accept"))
    monkeypatch.setenv("PHI4_FP8_PROFILE", "tiny-phi4")
    return Here(machine, hardware.serving_mode(machine), tmp_path / "accept",
                large=workspace.data("tiny_phi4"), shapes="bundled", asked=("03",))


# Without a GPU


def test_without_a_gpu_it_says_so_and_nothing_is_run():
    why = cpu_only().note or "no NVIDIA GPU was found"  # or it is hidden
    ran = subprocess.run([sys.executable, "scripts/accept_gpu.py"], cwd=REPO, text=True,
                         capture_output=True)
    assert (ran.returncode, ran.stderr) == (accept_gpu.NO_GPU, "")
    assert ran.stdout == (
        f"Nothing was run: this is for a machine with a GPU that serves FP8, and here {why}. "
        "`make test` checks a machine without one.\n")


@pytest.mark.parametrize("gpus, note, says", [
    ((GTX,), "", "has compute capability 6.1, and FP8 in vLLM needs 7.5"),
    ((), "CUDA_VISIBLE_DEVICES='' hides 1 GPU(s)", "here CUDA_VISIBLE_DEVICES='' hides 1 GPU(s)."),
    ((A40,), "", None)])
def test_a_gpu_that_cannot_serve_fp8_is_no_gpu_for_it(gpus, note, says, monkeypatch):
    monkeypatch.setattr(hardware, "_gpus", lambda: (gpus, note))
    said = accept_gpu.no_gpu(hardware.detect())
    assert says in said if says else said == ""


# The run


def found(here):
    return "well"


def failing(error: Exception):
    def step(here):
        raise error
    return step


@pytest.mark.parametrize("error, says", [
    (Failed("it was too slow."), "it was too slow."),
    (WorkbookError("A happened.", "It means B.", "Do C."),
     "A happened. What it means: It means B. What to do: Do C."),
    (KeyError("kernel"), "KeyError: 'kernel' (test_accept_gpu.py, line ")])
def test_a_step_that_fails_is_a_sentence_and_the_others_run(error, says):
    said = []
    steps = [Step("a", "A holds", found), Step("b", "B holds", failing(error)),
             Step("c", "C holds", failing(NotHere("no room"))), Step("d", "D holds", found)]
    assert accept_gpu.accept(None, steps, said.append) == 1
    assert said[0] == "[1/4] a: A holds" and said[1] == "[OK]   a, 0 s: well"
    assert said[3].startswith(f"[FAIL] b, 0 s: {says}") and "\n" not in said[3]
    assert said[5] == "[--]   c, 0 s: no room" and said[7] == "[OK]   d, 0 s: well"
    assert said[8:] == ["Not accepted: b."]


def test_after_a_failed_preflight_nothing_is_run(monkeypatch):
    """The real first step, on a check that fails."""
    wrong = preflight.Check(False, "GPU", "the NVIDIA driver 550 supports CUDA up to 12.4")
    monkeypatch.setattr(preflight, "preflight", lambda: [wrong])
    said = []
    assert accept_gpu.accept(None, STEPS, said.append) == 1
    assert said[1].endswith("GPU: the NVIDIA driver 550 supports CUDA up to 12.4")
    assert said[2:] == ["What follows needs this first, and was not run.",
                        "Not accepted: preflight."]


def test_the_report_holds_what_was_printed(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PHI4_FP8_WORKSPACE", str(tmp_path))
    monkeypatch.setenv("PHI4_FP8_PROFILE", "phi-4")
    monkeypatch.setattr(hardware, "_gpus", lambda: ((A40,), ""))
    monkeypatch.setenv(shared.SERVERS, "fp8=http://127.0.0.1:9")  # a room's; 05 would take it

    def alone(here):
        assert shared.named() == {}
        return "well"

    monkeypatch.setattr(accept_gpu, "STEPS", [Step("a", "A holds", alone)])
    assert accept_gpu.main() == 0
    printed = capsys.readouterr().out
    (report,) = tmp_path.glob("accept-gpu/*/report.txt")
    assert report.read_text() == printed
    for words in ("NVIDIA A40, 46068 MiB, capability 8.6, driver 580.95.05", "[OK]   a, 0 s: well",
                  "Accepted: no step failed.", "Send us this: ", f"{report.parent}/ledger.jsonl"):
        assert words in printed


# The steps


def test_the_steps_come_in_the_order_in_which_things_fail():
    assert [step.name for step in STEPS] == [
        "preflight", "layers", "bundled model", "no toolkit", "notebooks", "full size", "beside 01"]
    assert [step.first for step in STEPS] == [True] + [False] * 6
    assert all(step.proves for step in STEPS)


@pytest.mark.slow
def test_all_steps_walked_on_a_cpu(here, monkeypatch):
    """The steps' own code, with vLLM, LLM Compressor and the notebooks, where there is no GPU."""
    monkeypatch.setattr(accept_steps, "DECODE", (64, 50, 1))  # a CPU takes its time
    said = []
    status = accept_gpu.accept(here, STEPS, said.append)
    assert status == 0, "\n".join(said)
    marks = [line for line in said if line.startswith("[OK]")]
    assert len(marks) == 7 and said[-1] == "Accepted: no step failed."
    rows = ledger.read()
    assert {(row["experiment"], row["arm"]) for row in rows} == {
        ("serve", "fp8"), ("scales", "fp8"), ("throughput", "bf16"), ("throughput", "fp8")}
    assert all(row["mode"] == here.mode.key for row in rows)
    assert all(row["kernel"] for row in rows if row["experiment"] in ("serve", "throughput"))
    toolkits = [row["work"]["toolkit"] for row in rows if "toolkit" in row["work"]]
    assert toolkits == [shutil.which("nvcc") is not None, False]
    speeds = [row["metrics"] for row in rows if "share_of_roofline" in row["metrics"]]
    assert len(speeds) == 2 and all(0 < each["share_of_roofline"] < 1 for each in speeds)


def test_neither_nvcc_nor_ninja_is_found_and_what_was_compiled_before_is_not(tmp_path, monkeypatch):
    for name in ("nvcc", "ninja", "gcc-of-the-toolkit"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert shutil.which("nvcc") and shutil.which("ninja")
    with accept_steps.without_toolkit(tmp_path) as environment:
        path = environment["PATH"]
        assert not shutil.which("nvcc", path=path) and not shutil.which("ninja", path=path)
        assert shutil.which("sh", path=path) and shutil.which("gcc-of-the-toolkit", path=path)
        assert not any(Path(environment[name]).exists() for name in environment if name != "PATH")
    assert not (tmp_path / "bare").exists()


def test_layers_that_compute_something_else_are_found_out(here, monkeypatch):
    wrong = {"auto": {"qkv, 1": {"kernel": "K", "w8a16": 0.03, "w8a8": 0.1, "rounding": 0.03,
                                 "plain": 0.002}}}
    monkeypatch.setattr(accept_steps, "ask", lambda *_: (wrong, ""))
    with pytest.raises(Failed, match="K is further from float64"):
        accept_steps.compare_layers(here)


def test_a_script_that_dies_in_vllms_environment_is_a_sentence():
    with pytest.raises(Failed, match="gpu_layers.py did not end well. Its log says: KeyError"):
        accept_steps.ask("gpu_layers.py", "nobody's", "auto")


# On a GPU: what cannot be provoked on vLLM itself, or not here

@pytest.fixture
def a40(tmp_path, monkeypatch, tiny_fp8) -> Here:
    """A machine with an A40 whose memory nobody uses."""
    machine = dataclasses.replace(hardware.detect(), gpus=(A40,))
    monkeypatch.setenv("PHI4_FP8_WORKSPACE", str(tmp_path / "accept"))
    monkeypatch.setattr(hardware, "detect", lambda: machine)
    monkeypatch.setattr(Here, "fp8", lambda here: tiny_fp8)
    using(monkeypatch, 0)
    return Here(machine, hardware.serving_mode(machine), tmp_path / "accept")


def using(monkeypatch, *nbytes: int) -> None:
    """What is used of the GPU's memory, each time it is asked; the last one stays."""
    told = itertools.chain(nbytes, itertools.repeat(nbytes[-1]))
    monkeypatch.setattr(accept_steps, "used", lambda here: next(told))


def serving_as(monkeypatch, kernel=accept_steps.MARLIN, answer="2 + 2 = 4\n#### 4",
               log="Dynamo bytecode transform time: 4.10 s\nGraph capturing finished in 5 secs"):
    """Servers that say this; by default what a good one on an A40 says."""
    @contextlib.contextmanager
    def server(model, flags, env):
        yield SimpleNamespace(kernel=kernel, chat=lambda *_, **__: answer, log=lambda: log,
                              log_path=Path("vllm.log"), startup_seconds=60.0, checkpoint=model)

    monkeypatch.setattr(serving, "VllmServer", server)


@pytest.mark.parametrize("cache", ["", "Directly load AOT compilation from path /c\n"])
def test_a_server_that_is_right_is_taken(cache, a40, monkeypatch):
    using(monkeypatch, 10**9, 6 * 10**9, 3 * 10**9, 10**9)  # the driver takes a moment
    serving_as(monkeypatch, **({"log": f"{cache}Graph capturing finished"} if cache else {}))
    assert accept_steps.serve_bundled(a40) == f"{accept_steps.MARLIN}, ready after 60 s"
    [row] = ledger.read()
    assert (row["mode"], row["metrics"]["bytes_held"]) == ("gpu-w8a16", 5 * 10**9)


@pytest.mark.parametrize("wrong, says", [
    ({"answer": "I do not know."}, "not as the bundled model does: 'I do not know.'"),
    ({"kernel": "not named in the log"}, "W8A16 on the GPU was to be served; the kernel: not"),
    ({"kernel": "CutlassKernel"}, "W8A16 on the GPU was to be served; the kernel: CutlassKernel."),
    ({"log": "Dynamo bytecode transform time: 4.10 s"}, "vLLM has captured no CUDA graph"),
    ({"log": "Graph capturing finished in 5 secs"}, "vLLM has compiled nothing")])
def test_a_server_that_is_not_right_is_found_out(wrong, says, a40, monkeypatch):
    serving_as(monkeypatch, **wrong)
    with pytest.raises(Failed) as said:
        accept_steps.serve_bundled(a40)
    assert says in str(said.value) and ledger.read() == []


def test_marlin_where_there_are_fp8_tensor_cores_is_found_out(a40, monkeypatch):
    a40.mode = hardware.gpu_mode(dataclasses.replace(A40, compute_capability=(8, 9)))
    serving_as(monkeypatch)
    with pytest.raises(Failed, match="W8A8 on the GPU was to be served; the kernel: Marlin"):
        accept_steps.serve_bundled(a40)


def test_memory_that_a_server_does_not_give_back_is_found_out(a40, monkeypatch):
    using(monkeypatch, 10**9, 6 * 10**9, 3 * 10**9)
    serving_as(monkeypatch)
    clock = itertools.count(0, 5)
    monkeypatch.setattr(accept_steps, "time", SimpleNamespace(
        monotonic=lambda: next(clock), sleep=lambda seconds: None))
    monkeypatch.setattr(accept_steps.gpu_memory, "in_the_way", lambda gpus: f"{gpus[0].name}: VLLM")
    with pytest.raises(Failed, match="2.0 GB of GPU memory have not come back. NVIDIA A40: VLLM"):
        accept_steps.serve_bundled(a40)


@pytest.mark.parametrize("bf16, fp8, says", [
    (18, 33, None),
    (24, 33, "bf16: 24.0 tokens/s would read faster than the memory can: 113% of 600 GB/s"),
    (20, 20, "FP8 over bf16: 1.00x of at most 1.93x"),
    (16, 33, "FP8 over bf16: 2.06x of at most 1.93x")])
def test_a_speed_that_cannot_be_or_shows_no_gain_is_found_out(bf16, fp8, says, a40, monkeypatch):
    """An A40 whose memory copies 600 GB/s: 21 tokens/s of Phi-4's bf16 weights, 41 of FP8's."""
    speeds = {"bf16": bf16, "fp8": fp8}
    monkeypatch.setattr(accept_steps, "one_stream", lambda here, arm: (float(speeds[arm]), "K"))
    monkeypatch.setattr(roofline, "measured_copy", lambda: 600e9)
    if says:
        with pytest.raises(Failed) as said:
            accept_steps.decode_at_full_size(a40)
        assert says in str(said.value)
    else:
        assert "FP8 over bf16: 1.83x" in accept_steps.decode_at_full_size(a40)
        assert [row["metrics"]["output_tok_s"] for row in ledger.read()] == [bf16, fp8]


@pytest.mark.parametrize("nbytes", [accept_steps.CONTEXT, accept_steps.CONTEXT + 1])
def test_a_notebook_that_keeps_the_gpus_memory_is_found_out(nbytes, a40, tmp_path, monkeypatch):
    opened, served = tmp_path / "01.ipynb", []
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1")]), opened)
    monkeypatch.setattr(accept_steps, "notebooks", lambda only: [opened])
    monkeypatch.setattr(accept_steps, "run_notebook", lambda here, number: served.append(number))
    using(monkeypatch, 10**9, 10**9 + nbytes)
    if nbytes > accept_steps.CONTEXT:
        with pytest.raises(Failed, match="01.ipynb has freed its model, .* still holds 1.1 GB"):
            accept_steps.open_beside(a40)
        assert served == []
    else:
        assert "which holds 1.1 GB" in accept_steps.open_beside(a40)
        assert served == ["05"]
