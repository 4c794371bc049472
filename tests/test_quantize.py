"""The recipe's run: the checkpoint it leaves, and what happens to one that is not whole."""

import json
import os

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import checkpoint, models, quantize, workspace


@pytest.fixture
def profile():
    return models.tiny()


def test_the_checkpoint_is_whole_and_holds_all_that_a_server_needs(tiny_base, tiny_fp8):
    workspace.verify(tiny_fp8)
    names = {file.name for file in tiny_fp8.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
            "tokenizer_config.json", "MANIFEST.json", "recipe.yaml"} <= names
    ours, base = (AutoTokenizer.from_pretrained(d) for d in (tiny_fp8, tiny_base))
    talk = [{"role": "user", "content": "How many?"}]
    assert ours.apply_chat_template(talk) == base.apply_chat_template(talk)


def test_the_config_names_the_scheme_that_vllm_reads(tiny_fp8):
    config = json.loads((tiny_fp8 / "config.json").read_text())["quantization_config"]
    (group,) = config["config_groups"].values()
    assert config["quant_method"] == "compressed-tensors"
    assert (group["weights"]["strategy"], group["weights"]["dynamic"]) == ("channel", False)
    activations = group["input_activations"]
    assert (activations["strategy"], activations["dynamic"]) == ("token", True)


def test_transformers_reads_it_back_and_agrees_with_the_base_within_fp8s_error(tiny_base, tiny_fp8):
    ids = torch.arange(40)[None] + 10
    base, fp8 = (AutoModelForCausalLM.from_pretrained(d, dtype=torch.bfloat16)(ids).logits.float()
                 for d in (tiny_base, tiny_fp8))
    difference = (fp8 - base).norm() / base.norm()
    assert 0 < difference < 0.2


def test_a_whole_checkpoint_is_not_made_again(tmp_workspace, profile, tiny_base, tiny_fp8):
    place = quantize.target(profile)
    place.parent.mkdir(parents=True)
    os.symlink(tiny_fp8, place)
    before = (place / "model.safetensors").stat().st_mtime_ns
    assert quantize.fp8_checkpoint(profile, tiny_base) == place
    assert (place / "model.safetensors").stat().st_mtime_ns == before


def test_a_half_written_checkpoint_is_made_again_and_said_so(
        tmp_workspace, profile, tiny_base, tiny_fp8, capsys):
    place = quantize.target(profile)
    place.mkdir(parents=True)
    (place / "config.json").write_bytes((tiny_fp8 / "config.json").read_bytes())
    half = (tiny_fp8 / "model.safetensors").read_bytes()[:1_000_000]
    (place / "model.safetensors").write_bytes(half)
    quantize.fp8_checkpoint(profile, tiny_base)
    assert "never finished. It is made again" in capsys.readouterr().out
    assert checkpoint.verify_fp8(tiny_base, place).quantized == 16
    ours, reference = ((d / "model.safetensors").read_bytes() for d in (place, tiny_fp8))
    assert ours == reference
