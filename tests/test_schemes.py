"""Schemes: their bits and bytes, their pictures, and their arithmetic against vLLM's choice."""

import json
import subprocess

import pandas as pd
import pytest
from conftest import REPO

from helpers import checkpoint, formats, roofline, scheme_plots, schemes, serving

PHI4 = roofline.load_config(REPO / "data" / "phi4")


def test_fp8_dynamic_is_what_the_checkpoint_module_predicts():
    base = roofline.tensors(PHI4)
    assert schemes.same(schemes.predict(base, "FP8_DYNAMIC"), checkpoint.predict_fp8(base))


@pytest.mark.parametrize("title, bits", [
    ("bf16", 16), ("FP8_DYNAMIC", 8.0025), ("FP8 128x128 blocks", 8.001), ("INT8 W8A8", 8.0025),
    ("W4A16", 4 + 16 / 128), ("NVFP4", 4 + 8 / 16), ("MXFP4", 4 + 8 / 32)])
def test_bits_per_weight_are_the_codes_and_their_share_of_a_scale(title, bits):
    assert schemes.table(PHI4).loc[title, "bits per weight"] == pytest.approx(bits, abs=1e-4)


def test_the_ceiling_of_fp8_is_that_of_the_first_notebook():
    table = schemes.table(PHI4)
    gain = roofline.decode_bytes(PHI4, "bf16") / roofline.decode_bytes(PHI4, "fp8")
    assert table.loc["FP8_DYNAMIC", "most it can gain"] == pytest.approx(gain)
    assert list(table.index) == ["bf16", *schemes.PRESETS] == ["bf16", *schemes.arithmetic().index]


def made_up() -> formats.Losses:
    return formats.Losses([10, 20, 30], {title: [0.01 * (n + 1), 0.02 * (n + 1), 0.03 * (n + 1)]
                                         for n, title in enumerate(schemes.RECIPES)}, {}, {})


def test_gptq_has_its_own_kl_and_the_bytes_of_its_scheme():
    found = schemes.beside(schemes.table(PHI4), made_up())
    assert list(found.index) == ["bf16", *schemes.RECIPES]
    assert found.loc["bf16", ["KL", "low", "high"]].tolist() == [0, 0, 0]
    assert found.loc["FP8_DYNAMIC", "KL"] == pytest.approx((0.1 + 0.4 + 0.9) / 60)
    read = found["GB read per token"]
    assert read[schemes.GPTQ] == read["W4A16"]
    assert found.loc[schemes.GPTQ, "KL"] == pytest.approx(5 / 4 * found.loc["W4A16", "KL"])
    assert (found["low"] <= found["KL"]).all() and (found["KL"] <= found["high"]).all()


def test_the_pictures_say_what_they_show(capsys):
    found = schemes.beside(schemes.table(PHI4), made_up())
    scheme_plots.kl_against_bytes(found, "a model")
    said = capsys.readouterr().out
    assert "W4A16, GPTQ 8.1 GB, 0.11667 nats" in said and "bf16 28.3 GB, 0." in said
    speed = pd.DataFrame({"1 stream": [1.9, 1.8], "8 streams": float("nan"),
                          "prompt of 512": [0.8, float("nan")], "measured on": ""},
                         index=["FP8_DYNAMIC", "INT8 W8A8"])
    scheme_plots.kl_against_speed(found, speed, "a model")
    said = capsys.readouterr().out
    assert "FP8_DYNAMIC 0.02333 nats, 1 stream 1.90x, prompt of 512 0.80x; INT8 W8A8" in said
    assert "INT8 W8A8 0.07000 nats, 1 stream 1.80x." in said


def computed(preset, kernel, capability):
    """What a kernel of vLLM's multiplies, by its class; "none" for no kernel, or one that refuses.

    CUTLASS's INT8 is chosen on Blackwell and raises at its first product: "Int8 not supported on
    SM120" (csrc/.../cutlass/c3x/scaled_mm_helper.hpp), for compiled code holds no such kernel.
    """
    if not kernel or (kernel == "CutlassInt8ScaledMMLinearKernel" and capability >= 100):
        return "none"
    bits = schemes.preset(preset).weights.num_bits
    unpacks = any(name in kernel for name in ("Marlin", "Humming", "Machete", "WNA16"))
    return f"W{bits}A{16 if unpacks else bits}"


def test_vllm_chooses_kernels_of_this_arithmetic():
    """vLLM's own choice, asked in its environment as if it stood on each GPU, and on this CPU."""
    script = REPO / "tests" / "serve_side" / "choose_kernels.py"
    machines = [*schemes.MACHINES.values(), 80, 120]  # both ends of Ampere and of Blackwell
    asked = subprocess.run([serving.serve_python(), script, *map(str, machines)],
                           capture_output=True, text=True, env=serving.environment())
    assert asked.returncode == 0, asked.stderr[-2000:]
    found = json.loads(asked.stdout.splitlines()[-1])
    columns = dict(zip(machines, [*range(len(schemes.MACHINES)), 1, 4], strict=True))
    for title, arithmetic in schemes.ARITHMETIC.items():
        preset = schemes.PRESETS[title]
        assert {capability: computed(preset, found[str(capability)][preset], capability)
                for capability in machines} == {
            capability: arithmetic[column] for capability, column in columns.items()}, title
    assert found["0"]["INT8"] == "CPUInt8ScaledMMLinearKernel"
    assert found["0"]["W4A16"] == "CPUWNA16LinearKernel"
    assert found["0"]["NVFP4"] == found["0"]["MXFP4"] == ""
