"""The rule that chooses a scheme, on made-up figures and on kept ones."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from conftest import REPO

from helpers import formats, hardware, ledger, roofline, scheme_choice, schemes
from helpers.scheme_choice import WORKS, recommend

GB = {"bf16": 29.3, "FP8_DYNAMIC": 15.7, "INT8 W8A8": 15.7, "W4A16": 9.1, "W4A16, GPTQ": 9.1}
LOSS = {"bf16": 0, "FP8_DYNAMIC": 1, "INT8 W8A8": 0.3, "W4A16": 7, "W4A16, GPTQ": 3}
LARGE = 80 * 10**9
SIZES = schemes.table(roofline.load_config(REPO / "data" / "phi4"))
CPU = hardware.Machine((), "a CPU", 2, frozenset({"avx512_bf16"}), 64 * 10**9, 0, "", "", "")


def test_the_fastest_that_loses_no_more_than_is_allowed():
    speed = {"FP8_DYNAMIC": 1.9, "INT8 W8A8": 1.9, "W4A16": 2.9}
    assert recommend(GB, LOSS, speed, LARGE, allowed=3)[0] == "FP8_DYNAMIC"
    assert recommend(GB, LOSS, speed, LARGE, allowed=7)[0] == "W4A16"
    assert recommend(GB, LOSS, speed | {"W4A16, GPTQ": 2.9}, LARGE, allowed=7)[0] == "W4A16, GPTQ"


def test_int8_is_taken_where_it_is_faster_and_not_where_it_merely_loses_less():
    assert recommend(GB, LOSS, {"FP8_DYNAMIC": 1.0, "INT8 W8A8": 1.6}, LARGE)[0] == "INT8 W8A8"
    assert recommend(GB, LOSS, {"FP8_DYNAMIC": 1.5, "INT8 W8A8": 1.6}, LARGE)[0] == "FP8_DYNAMIC"


def test_bf16_stays_where_nothing_gains_a_tenth():
    assert recommend(GB, LOSS, {"FP8_DYNAMIC": 1.09, "INT8 W8A8": 0.8}, LARGE)[0] == "bf16"


@pytest.mark.parametrize("memory, chosen", [
    (29, "FP8_DYNAMIC"), (15, "W4A16, GPTQ"), (9, "")])
def test_what_does_not_fit_is_out(memory, chosen):
    speed = {"FP8_DYNAMIC": 1.02, "W4A16": 1.02, "W4A16, GPTQ": 1.02}
    found, why = recommend(GB, LOSS, speed, memory * 10**9, allowed=1)
    assert found == chosen
    assert ("more than" in why) == (memory == 15) and ("nothing fits" in why) == (memory == 9)


def test_a_multiple_is_of_the_same_models_fp8_and_the_larger_one_counts():
    def losses(fp8, w4):
        return formats.Losses([1, 3], {"FP8_DYNAMIC": fp8, "W4A16": w4}, {}, {})

    found = scheme_choice.multiples(losses([4, 4], [8, 8]), losses([1, 1], [3, 7]))
    assert found == {"bf16": 0, "FP8_DYNAMIC": 1, "W4A16": pytest.approx(6)}


def test_ceilings_are_bytes_for_streams_and_activations_for_prompts():
    ada, blackwell = (scheme_choice.ceilings(SIZES, capability) for capability in (89, 120))
    assert ada.loc["FP8_DYNAMIC", "prompt of 512"] == 2
    assert ada.loc["FP8 128x128 blocks", "prompt of 512"] == 1  # W8A16 there
    assert ada.loc["W4A16", "1 stream"] == pytest.approx(SIZES.loc["W4A16", "most it can gain"])
    assert "INT8 W8A8" not in blackwell.index and blackwell.loc["NVFP4", "prompt of 512"] == 4
    reached = dict(zip(WORKS, (ada.loc["FP8_DYNAMIC", "1 stream"] / 2, 1.0, 1.5), strict=True))
    scaled = scheme_choice.ceilings(SIZES, 89, reached)
    assert scaled.loc["FP8_DYNAMIC"].tolist() == pytest.approx(list(reached.values()))
    assert scaled.loc["INT8 W8A8", "prompt of 512"] == pytest.approx(1.5)
    assert scaled.loc["W4A16", "1 stream"] == pytest.approx(ada.loc["W4A16", "1 stream"] / 2)


def row(arm, numerics, work, ratio, cpu="a CPU", gpus=(), experiment="slice"):
    streams, prompt, generated = {"1 stream": (1, 1, 12), "8 streams": (8, 1, 12),
                                  "prompt of 512": (1, 512, 1)}[work]
    return {"experiment": experiment, "arm": arm, "model": {"profile": "2 layers of Phi-4"},
            "hardware": {"gpus": list(gpus), "cpu": cpu, "cores": 2},
            "work": {"numerics": numerics, "concurrency": streams, "input_tokens": prompt,
                     "output_tokens": generated, "rounds": 5}, "metrics": {"ratio": ratio}}


def read_from(monkeypatch, own, kept):
    for each in kept:
        each["model"]["profile"] = scheme_choice.cpu_bench.PHI4
    monkeypatch.setattr(ledger, "read", lambda place=None: kept if place else own)


def test_the_newest_of_this_machine_and_the_bench_for_what_it_lacks(monkeypatch):
    read_from(monkeypatch, [
        row("fp8", "w8a16", "1 stream", 1.5), row("fp8", "w8a16", "1 stream", 1.9),
        row("int8", "w8a8", "prompt of 512", 1.6), row("bf16", "", "1 stream", 1),
        row("int8", "w8a8", "prompt of 512", 9, cpu="another"),
        row("fp8", "w8a16", "8 streams", 9, experiment="bench-cpu")],
        [row("fp8", "w8a16", "8 streams", 8), row("int4", "w4a16", "1 stream", 2.9),
         row("int4", "w4a16", "1 stream", 2.5, cpu="another"),
         row("fp8", "w8a8", "1 stream", 0.5)])
    found = scheme_choice.measured(CPU, hardware.serving_mode(CPU))
    assert list(found.index) == ["FP8_DYNAMIC", "INT8 W8A8", "W4A16"]
    assert found.loc["FP8_DYNAMIC", "1 stream"] == 1.9
    assert np.isnan(found.loc["FP8_DYNAMIC", "8 streams"])  # one scheme, one machine
    assert found.loc["INT8 W8A8", "prompt of 512"] == 1.6
    assert found.loc["W4A16", "1 stream"] == 2.9
    assert found["measured on"].tolist() == ["this machine", "this machine",
                                             "a CPU, 2 cores, kept"]
    other = scheme_choice.measured(replace(CPU, cpu_model="unknown"), hardware.serving_mode(CPU))
    assert set(other["measured on"]) == {"a CPU, 2 cores, kept"}  # the newest in the bench


def test_a_gpu_has_its_own_arithmetic_and_no_cpus_figures(monkeypatch):
    gpu = hardware.Gpu(0, "L4", 24 * 10**9, (8, 9), "")
    machine = replace(CPU, gpus=(gpu,))
    rows = [row("fp8", numerics, work, ratio, gpus=["L4"]) for numerics, ratio in (
        ("w8a8", 1.8), ("w8a16", 1.7)) for work in WORKS]
    read_from(monkeypatch, rows, [row("int8", "w8a8", "1 stream", 1.5)])
    found = scheme_choice.measured(machine, hardware.serving_mode(machine))
    assert found[list(WORKS)].to_dict("index") == {"FP8_DYNAMIC": dict.fromkeys(WORKS, 1.8)}


def test_a_gpu_that_nothing_was_timed_on_is_taken_at_its_ceilings(monkeypatch):
    machine = replace(CPU, gpus=(hardware.Gpu(0, "a new one", 48 * 10**9, (8, 6), ""),))
    mode = hardware.serving_mode(machine)
    read_from(monkeypatch, [], [])
    speed = scheme_choice.measured(machine, mode)
    assert speed.empty
    found = scheme_choice.by_machine(
        SIZES, dict.fromkeys(("bf16", *schemes.RECIPES), 1.0), machine, mode, speed)
    assert found.loc["this machine"].tolist() == found.loc["A40, 45.0 GiB"].tolist()


def test_other_machines_get_other_answers_from_the_kept_figures():
    loss = scheme_choice.multiples(formats.measured("smollm2", "schemes"))
    mode = hardware.serving_mode(CPU)
    speed = pd.DataFrame([[1.95, 1.2, 0.76], [1.85, 1.78, 1.6]], columns=list(WORKS),
                         index=["FP8_DYNAMIC", "INT8 W8A8"])
    found = scheme_choice.by_machine(SIZES, loss, CPU, mode, speed)
    assert found.loc["this machine"].tolist() == ["FP8_DYNAMIC", "INT8 W8A8", "INT8 W8A8"]
    assert found.loc["A40, 45.0 GiB"].tolist() == ["FP8_DYNAMIC", "FP8_DYNAMIC", "INT8 W8A8"]
    assert found.loc["L4, 22.5 GiB"].tolist() == ["FP8_DYNAMIC"] * 3
    assert all(chosen.startswith("W4A16") for chosen in found.loc["T4, 15.0 GiB"])
    generous = scheme_choice.by_machine(SIZES, loss, CPU, mode, speed, allowed=1000)
    assert generous.loc["RTX 5090, 31.8 GiB", "prompt of 512"] in ("NVFP4", "MXFP4")
    assert generous.loc["A40, 45.0 GiB", "1 stream"].startswith("W4A16")
