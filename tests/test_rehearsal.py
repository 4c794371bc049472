"""`make rehearse-gpu`: what is kept follows from the sources as they are, and the judge can fail.

The rehearsal itself, vLLM's part of it, takes minutes and the GPU's serving environment; here its
stand-ins, the project's part and the judge run.
"""

import copy
import json
import shutil
import subprocess
import sys

import pytest
import rehearse_gpu
from conftest import REPO
from rehearsal import cases, judge, stand_in

from helpers import hardware, rehearsed, roofline

COMMAND = "`make rehearse-gpu`, then `.venv/bin/python -m helpers.readme`"


@pytest.fixture(scope="module")
def machines():
    return [*cases.listed(), *cases.odd()]


@pytest.fixture(scope="module")
def decided(machines, tmp_path_factory):
    if not (shutil.which("gcc") or shutil.which("clang")):
        pytest.skip("there is no C compiler to make the stand-in for NVML with")
    return rehearse_gpu.decisions(machines, tmp_path_factory.mktemp("rehearsal"))


def test_the_kept_rehearsal_is_of_these_sources(decided):
    before, now = rehearsed.kept()["made from"], rehearse_gpu.made_from(decided)
    moved = [name for name in now if before.get(name) != now[name]]
    assert not moved, f"since the rehearsal {' and '.join(moved)} moved on: run {COMMAND}"


def test_every_machine_was_rehearsed_and_the_verdicts_are_good(machines):
    found = {row["machine"]: row for row in rehearsed.kept()["rows"]}
    assert list(found) == [case.name for case in machines]
    assert {gpu["name"] for gpu in roofline.gpus()} == {
        name for name, row in found.items() if row["listed"]}
    for name, row in found.items():
        if row["profile"] and "set-up" not in row["verdict"]:
            assert set(row["kv_tokens"]) == set(row["arms"]), name
            assert all(tokens >= 4096 for tokens in row["kv_tokens"].values()), name
            assert row["kernel"] == [judge.PROMISED[row["mode"]]], name


def test_the_odd_machines_get_what_is_expected(machines, decided):
    for case in machines:
        faults = judge.judge(case, decided["cases"][case.name], {}, None)
        assert not faults, f"{case.name}: {faults}"


def test_where_vllm_would_take_flashinfers_attention_it_is_told_another(machines, decided):
    """FlashInfer's is compiled with nvcc; vLLM prefers it on 10.x, as the rehearsal showed."""
    for case in machines:
        found = decided["cases"][case.name]
        told = {flag: value for flag, value in zip(found.get("flags", []),
                                                   found.get("flags", [])[1:], strict=False)}
        wanted = "FLASH_ATTN" if found.get("capability", [0])[0] == 10 else None
        assert told.get("--attention-backend") == wanted, case.name


def test_of_gpus_that_differ_a_server_is_shown_the_planned_one(decided):
    """vLLM asks NVML about the first on the bus; CUDA by itself counts from the fastest."""
    shown = {name: {key: value for key, value in found["variables"].items() if "CUDA" in key}
             for name, found in decided["cases"].items() if "variables" in found}
    assert shown.pop("two unequal, A40 beside T4") == {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "1"}
    assert len(shown) > 16 and not any(shown.values())


def test_the_stand_in_says_what_a_machine_is_described_by(tmp_path, a_compiler):
    """Read by nvidia-ml-py, in a process of its own, as the notebooks read it."""
    libraries = stand_in.libraries(tmp_path / "lib")
    case = next(each for each in cases.odd() if "MIG" in each.name)
    (tmp_path / "gpus.txt").write_text(case.described())
    script = ("import json, pynvml as n; n.nvmlInit(); d = n.nvmlDeviceGetHandleByIndex(0)\n"
              "s = n.nvmlDeviceGetMigDeviceHandleByIndex(d, 2); m = n.nvmlDeviceGetMemoryInfo(s)\n"
              "print(json.dumps([n.nvmlSystemGetDriverVersion(), n.nvmlDeviceGetCount(),\n"
              "  n.nvmlDeviceGetName(s), m.total, m.free, n.nvmlDeviceGetUUID(s),\n"
              "  n.nvmlDeviceGetCudaComputeCapability(d), n.nvmlDeviceGetMigMode(d)[0]]))")
    told = json.loads(subprocess.check_output(
        [sys.executable, "-c", script], text=True, env={
            "LD_LIBRARY_PATH": str(libraries), "NVML_STUB": str(tmp_path / "gpus.txt")}))
    card = case.cards[0]
    assert told == [case.driver[0], 1, f"{card.name} MIG 2g.20gb", card.slices[2], card.slices[2],
                    "MIG-0-2", list(card.capability), 1]


def test_the_path_of_the_rehearsal_has_no_toolkit(tmp_path, monkeypatch):
    place = tmp_path / "usr"
    place.mkdir()
    for name in ("nvcc", "ninja", "ptxas", "gcc"):
        (place / name).write_text("#!/bin/sh\n")
        (place / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(place))
    left = stand_in.programs(tmp_path / "programs")
    assert [each.name for each in left.iterdir()] == ["gcc"]


def serve(**more) -> dict:
    """What vLLM says of an arm that is served well on an L40S."""
    kernel = judge.PROMISED["gpu-w8a8"]
    return {"name": "fp8", "dtype": "bfloat16", "ranks": 1,
            "kernels": {name: [kernel, [1, 1]] for name in judge.LINEARS},
            "gates": {"FlashInfer kernels": False, "FlashInfer sampler": False,
                      "attention": "FLASH_ATTN", "Triton": True, "DeepGEMM kernels": 0,
                      "CuTe DSL kernels": 0}, "memory": {"tokens": 128304}} | more


DECISION = {"mode": "gpu-w8a8", "dtype": "bfloat16", "arms": ["fp8"], "gpus": 1,
            "capability": [8, 9], "profile": "phi-4"}


def faults(told: dict, decision: dict | None = None, **answer) -> list[str]:
    case = cases.Case("an L40S", ())
    return judge.judge(case, DECISION | (decision or {}),
                       {"capability": [8, 9], "Triton compiles": "sm_89",
                        "FlashAttention 4 compiles": "", "serves": [told]}
                       | answer, None)


def with_gate(name: str, value) -> dict:
    told = copy.deepcopy(serve())
    told["gates"][name] = value
    return told


def test_the_judge_lets_a_good_machine_pass():
    assert faults(serve()) == []


@pytest.mark.parametrize("told, said", [
    (serve(dtype="float16"), "served in float16"),
    (serve(ranks=2), "over 2 GPUs"),
    (serve(kernels={"qkv_proj": ["MarlinFP8ScaledMMLinearKernel", [1, 1]]}), "is promised"),
    ({"name": "fp8", "at": "memory", "refused": "No available memory"}, "offered, and vLLM"),
    ({"name": "bf16", "at": "model", "refused": "a bug"}, "held back, and vLLM refuses its model"),
    (serve(name="fp8 W8A16"), "MarlinFP8ScaledMMLinearKernel is promised"),
    (serve(name="bf16"), "bf16 is held back, and vLLM would serve it"),
    (with_gate("FlashInfer sampler", True), "sampler"),
    (with_gate("FlashInfer sampler", "on: RuntimeError"), "sampler"),
    (with_gate("FlashInfer kernels", True), "without a toolkit"),
    (with_gate("attention", "FLASHINFER"), "attention by FLASHINFER"),
    (with_gate("Triton", False), "Triton off"),
    (with_gate("DeepGEMM kernels", 12), "12 DeepGEMM kernels"),
    (with_gate("CuTe DSL kernels", 1), "1 CuTe DSL kernels"),
])
def test_the_judge_sees(told, said):
    assert any(said in fault for fault in faults(told)), faults(told)


def test_the_judge_sees_another_gpu_a_dead_process_and_a_triton_that_fails():
    assert "capability [7, 5]" in faults(serve(), capability=[7, 5])[0]
    assert "ended: killed" in faults(serve(), failed="killed")[0]
    assert "compiles nothing" in faults(serve(), **{"Triton compiles": "no: no gcc"})[0]
    plan = {"plan": {"tokens": {"bf16": 61797, "fp8": 128336}}}
    assert "the plan has ['bf16', 'fp8']" in faults(serve(), plan)[0]
    none = {"mode": "none", "capability": [7, 0]}
    assert "vLLM would serve fp8" in faults(serve(), none, capability=[7, 0])[0]


def test_a_table_says_fp16_and_how_many_gpus():
    row = {"machine": "T4", "mode": "gpu-w8a16", "profile": "phi-4-mini", "arms": ["bf16", "fp8"],
           "dtype": "float16", "gpus": 2, "kernel": ["MarlinFP8ScaledMMLinearKernel"],
           "kv_tokens": {"bf16": 40608, "fp8": 65152}, "verdict": ""}
    line = rehearsed.table([row]).loc["T4"]
    assert line["serves"] == "phi-4-mini in fp16 and FP8, on 2 GPUs"
    assert (line["kernel of FP8"], line["tokens of KV cache"]) == ("MarlinFP8", "40,608 and 65,152")


def test_the_driver_of_the_rehearsal_is_the_oldest_that_will_do():
    assert cases.DRIVER[0].startswith(f"{hardware.OLDEST_DRIVER[cases.DRIVER[1] // 1000]}.")


def test_no_path_of_a_machine_is_kept():
    assert str(REPO) not in rehearsed.KEPT.read_text() and "/root" not in rehearsed.KEPT.read_text()
