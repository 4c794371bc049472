"""`make accept-gpu`: its order, its words and its steps, walked on a CPU as far as one goes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import accept_gpu
import accept_steps
import pytest
from accept_steps import STEPS, Failed, Here, NotHere, Step
from conftest import REPO

from helpers import (
    WorkbookError,
    hardware,
    ledger,
    preflight,
    server_log,
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


@pytest.mark.parametrize("answer, kernel, says", [
    ("I do not know.", None, "not as the bundled model does: 'I do not know.'"),
    (None, "not named in the log", "was to be served; the kernel: not named in the log."),
    (None, accept_steps.MARLIN, "W8A16 on the CPU was to be served; the kernel: Marlin")])
def test_a_server_that_is_not_right_is_found_out(answer, kernel, says, here, monkeypatch):
    if answer:
        monkeypatch.setattr(serving.VllmServer, "chat", lambda *_, **__: answer)
    if kernel:
        monkeypatch.setattr(server_log, "selected_kernel", lambda *_: kernel)
    with pytest.raises(Failed, match="not as|was to be served") as said:
        accept_steps.serve_bundled(here)
    assert says in str(said.value)


def test_layers_that_compute_something_else_are_found_out(here, monkeypatch):
    wrong = {"auto": {"qkv, 1": {"kernel": "K", "w8a16": 0.03, "w8a8": 0.1, "rounding": 0.03,
                                 "plain": 0.002}}}
    monkeypatch.setattr(accept_steps, "ask", lambda *_: (wrong, ""))
    with pytest.raises(Failed, match="K is further from float64"):
        accept_steps.compare_layers(here)


def test_a_script_that_dies_in_vllms_environment_is_a_sentence():
    with pytest.raises(Failed, match="gpu_layers.py did not end well. Its log says: KeyError"):
        accept_steps.ask("gpu_layers.py", "nobody's", "auto")
