"""The CPU kernels against float64, and their place in vLLM, in the serving environment's Python."""

import dataclasses
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from helpers import WorkbookError, ablation, cpu, formats, hardware, serving, workspace
from helpers.serve_side import cpu_kernels, cpu_products

SCRIPT = Path(__file__).parent / "serve_side" / "kernels.py"
GREEDY = Path(__file__).parent / "serve_side" / "greedy.py"
STOCK = "ChannelWiseTorchFP8ScaledMMLinearKernel"


@pytest.fixture(scope="module", autouse=True)
def on_a_cpu():
    if hardware.serving_mode(hardware.detect()).device != "cpu":
        pytest.skip("a GPU's serving environment chooses no kernel of the CPU's")


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("kernels") / "measured.json"
    env = {name: value for name, value in os.environ.items() if name != cpu_kernels.VARIABLE}
    env["GOMP_SPINCOUNT"] = "1000"  # as `serving` sets it, for a machine that is busy
    ran = subprocess.run([serving.serve_python(), SCRIPT, out], capture_output=True, text=True,
                         env=env)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(out.read_text())


def test_every_finite_code_is_upcast_exactly(measured):
    assert measured["finite"] == 254
    assert measured["upcast"]


@pytest.mark.parametrize("numerics", cpu_kernels.NUMERICS)
def test_as_exact_as_its_arithmetic(measured, numerics):
    """Against float64, at Phi-4's layers, the bundled model's and odd ones, by `kernels.bound`."""
    accuracy = measured[numerics]["accuracy"]
    assert len(accuracy) > 50
    assert sum(len(found["errors"]) == 2 for found in accuracy.values()) > 45  # and on one thread
    for case, found in accuracy.items():
        assert max(found["errors"]) < found["bound"], (case, found)
        assert found["dtype"] == "torch.bfloat16", case


def test_where_the_packed_gemm_is_not_weights_are_unpacked_as_exactly(measured):
    """W8A16 on a CPU without AVX512-BF16."""
    assert len(measured["unpacked"]) == 12
    for case, found in measured["unpacked"].items():
        assert found["kernel"] == "CpuFp8W8A16LinearKernel", case
        assert max(found["errors"]) < found["bound"], (case, found)


def test_the_packed_gemm_is_used_where_its_build_is_and_can_run(measured):
    """Only vLLM's build for AVX512-BF16, `_C`, has it; the mode that is shown says the same."""
    assert measured["op"] == (measured["build"] == "_C.abi3.so"
                              and not cpu.lacking(cpu.read()[1]))
    mode = hardware.serving_mode(dataclasses.replace(hardware.detect(), gpus=()))
    assert (mode.key == "cpu-w8a16") == measured["op"]


@pytest.mark.parametrize("numerics", cpu_kernels.NUMERICS)
def test_vllm_selects_the_kernel_of_the_numerics(measured, numerics):
    names = {found["kernel"] for found in measured[numerics]["accuracy"].values()}
    assert names == {f"CpuFp8{numerics.upper()}LinearKernel"}


@pytest.mark.parametrize("numerics", cpu_kernels.NUMERICS)
def test_shapes_and_types(measured, numerics):
    found = measured[numerics]["shapes"]
    assert found["batch"] == [2, 5, 384]
    assert found["batch error"] < found["bound"]
    assert found["no rows"] == [0, 384]
    assert found["float16"] == "torch.float16"
    assert "NaN" in found["NaN"]


def test_w8a8_greedy_tokens_are_those_of_an_exact_emulation(tmp_path, tiny_base, tiny_fp8):
    """20 problems through vLLM with the W8A8 kernel, against Transformers with exact FP8 values.

    The emulation is `formats.quantized`, in float32, whose weights are the checkpoint's own. Given
    what vLLM has written so far, its likeliest next token must be vLLM's, or as likely as that
    within what the order of a sum decides: an activation on the border between two E4M3 numbers
    then goes to the other one. How much that is on this CPU is seen on the emulation itself, which
    reads a text at once and token by token.
    """
    problems = (workspace.data("tiny_gsm8k") / "test.jsonl").read_text().splitlines()[:20]
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps(
        [f"Question: {json.loads(line)['question']}\nAnswer:" for line in problems]))
    ran = subprocess.run(
        [serving.serve_python(), GREEDY, tiny_fp8.path, prompts, tmp_path / "out.json"],
        cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, cpu_kernels.VARIABLE: "w8a8"})
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["kernels"] == ["CpuFp8W8A8LinearKernel"]
    model, _ = ablation.load(tiny_base)
    behind, ahead, noise = [], [], 0.0
    with torch.inference_mode(), formats.quantized(model, formats.RECIPE):
        for number, answer in enumerate(found["1"] + found["2"]):  # on one thread, and on two
            logits = model(torch.tensor([answer["prompt"] + answer["tokens"]])).logits[0]
            logits = logits[len(answer["prompt"]) - 1:-1]
            if number < 4:
                noise = max(noise, (logits - _in_turn(model, answer)).abs().max().item())
            tokens = torch.tensor(answer["tokens"])[:, None]
            top = logits.topk(2).values
            behind.append(top[:, 0] - logits.gather(1, tokens)[:, 0])
            ahead.append(top[:, 0] - top[:, 1])
    behind, ahead = torch.cat(behind), torch.cat(ahead)
    assert len(behind) > 2000
    assert noise < ahead.median() / 10  # else the next line would say little
    assert behind.max() <= 2 * noise, (behind.max(), noise)  # each of two logits may be off


def _in_turn(model, answer: dict) -> torch.Tensor:
    """The logits after each beginning of an answer, read token by token with a KV cache."""
    rows, cache = [], None
    for read in (answer["prompt"], *([token] for token in answer["tokens"][:-1])):
        step = model(torch.tensor([read]), past_key_values=cache, use_cache=True)
        cache = step.past_key_values
        rows.append(step.logits[0, -1])
    return torch.stack(rows)


def test_scales_that_bf16_holds_are_kept_in_it_and_give_the_same_bits():
    """Every finite bf16 product, times scales as LLM Compressor stores them: rounded once."""
    products = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    products = products[products.isfinite()][:, None]
    scale = (torch.rand(64, generator=torch.Generator().manual_seed(0)) * 1e-2).bfloat16()
    kept = cpu_products.narrowed(scale.float(), torch.bfloat16)
    assert kept.dtype == torch.bfloat16
    exact = (products.double() * scale.double()).to(torch.float32).to(torch.bfloat16)
    for held in (kept, scale.float()):
        made = cpu_products.scaled(products.expand(-1, 64).clone(), held, None, torch.bfloat16)
        assert torch.equal(made, exact)
    assert torch.equal(cpu_products.narrowed(scale.float() * 1.001, torch.bfloat16),
                       scale.float() * 1.001)  # which bf16 does not hold


def test_w8a8_sees_activations_in_fp8(measured):
    """Its answers are far from those of unquantized activations, by E4M3's own error."""
    assert 0.01 < measured["w8a8"]["shapes"]["float16 error"] < 0.05
    assert measured["w8a16"]["shapes"]["float16 error"] < 0.001


def test_ours_stands_before_vllms_and_only_for_per_channel_weights(measured):
    found = measured["registration"]
    ours = "CpuFp8W8A16LinearKernel"
    assert found["stock choice"] == STOCK
    assert found["default"] == [ours, *found["stock"]]
    assert found["twice"] == found["default"]
    assert ours not in found["per tensor"]
    [(level, text)] = found["default said"]
    assert level == "INFO" and ours in text


def test_amx_is_asked_for_where_it_is(measured):
    assert measured["registration"]["asked for AMX"] == int(measured["registration"]["AMX"])


def test_where_amx_is_refused_it_says_what_to_do(measured):
    """vLLM's attention would end with SIGILL: no machine here refuses, so its answer is given."""
    said = [text for level, text in measured["registration"]["AMX refused said"]
            if level == "WARNING"]
    assert said == [cpu_kernels.AMX_REFUSED]


def test_elsewhere_it_does_nothing(measured):
    found = measured["registration"]
    assert found["elsewhere"] == found["stock"]
    assert found["elsewhere asked for AMX"] == 0


def test_a_vllm_that_has_moved_is_one_line_and_vllms_own_kernel(measured):
    moved = measured["registration"]["moved"]
    assert len(moved) == 4 + measured["op"]
    for name, found in moved.items():
        [(level, text)] = found["said"]
        assert level == "WARNING" and cpu_kernels.CHECKED_VLLM in text and name in text
        assert found["kernels"] == measured["registration"]["stock"], name


def test_another_version_is_said_in_one_line(measured):
    warnings = [text for level, text in measured["registration"]["other version said"]
                if level == "WARNING"]
    assert len(warnings) == 1 and "0.99.0" in warnings[0]


def test_the_reader_chooses_the_numerics():
    assert cpu_kernels.requested_numerics({}) is None
    assert cpu_kernels.requested_numerics({cpu_kernels.VARIABLE: ""}) is None
    assert cpu_kernels.requested_numerics({cpu_kernels.VARIABLE: "w8a8"}) == "w8a8"
    with pytest.raises(WorkbookError, match="w8a4 names no numerics"):
        cpu_kernels.requested_numerics({cpu_kernels.VARIABLE: "w8a4"})


def test_the_entry_point_is_in_the_serving_environment():
    """vLLM finds the plugin by this entry point, in every process that it starts."""
    code = ("from importlib.metadata import entry_points as e; "
            "print([p.value for p in e(group='vllm.general_plugins') if 'phi4' in p.name])")
    ran = subprocess.run([serving.serve_python(), "-c", code], capture_output=True, text=True)
    assert ran.stdout.strip() == "['helpers.serve_side.cpu_kernels:register']", ran.stderr
