"""Schemes: their bytes against LLM Compressor's own checkpoints, their arithmetic against vLLM."""

import json
import subprocess

import pytest
from conftest import REPO

from helpers import checkpoint, formats, headers, plots, roofline, schemes, serving

TINY = REPO / "data" / "tiny_phi4"
PHI4 = roofline.load_config(REPO / "data" / "phi4")


def stored(tensors):
    return {(tensor.name, tensor.dtype, tensor.shape, tensor.nbytes) for tensor in tensors}


# NVFP4 itself wants calibration data for its activations; its weights are NVFP4A16's.
@pytest.mark.parametrize("preset", ["FP8_DYNAMIC", "FP8_BLOCK", "INT8", "W4A16", "NVFP4A16",
                                    "MXFP4"])
def test_the_tensors_are_those_that_llm_compressor_writes(tmp_path, preset):
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(TINY, dtype="bfloat16")
    oneshot(model=model, recipe=QuantizationModifier(targets="Linear", scheme=preset,
                                                     ignore=["lm_head"]))
    model.save_pretrained(tmp_path, save_compressed=True)
    made = headers.read(tmp_path / "model.safetensors")
    assert stored(schemes.predict(headers.read(TINY / "model.safetensors"), preset)) == stored(made)


def test_fp8_dynamic_is_what_the_checkpoint_module_predicts():
    base = roofline.tensors(PHI4)
    assert stored(schemes.predict(base, "FP8_DYNAMIC")) == stored(checkpoint.predict_fp8(base))


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


def test_a_scheme_whose_kl_is_not_known_has_none(capsys):
    losses = formats.Losses([10, 20, 30], {form.name: [0.1 + 0.01 * n, 0.2, 0.3 + 0.02 * n]
                                           for n, form in enumerate(formats.FORMATS)},
                            *({form.name: 0.0 for form in formats.FORMATS} for _ in range(2)))
    found = schemes.beside(schemes.table(PHI4), losses)
    assert found["KL"].isna().to_dict() == {title: title not in ("bf16", *schemes.FORMATS)
                                            for title in found.index}
    assert found.loc["INT8 W8A8", "KL"] == pytest.approx(
        (10 * (0.1 + 0.01 * 4) + 20 * 0.2 + 30 * (0.3 + 0.02 * 4)) / 60)
    assert found.loc["bf16", "KL"] == 0
    plots.kl_against_bytes(found)
    text = capsys.readouterr().out
    assert "W4A16 8.1 GB, KL not measured" in text and "bf16 28.3 GB, 0.00000 nats" in text


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
