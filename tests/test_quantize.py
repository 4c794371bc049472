"""The recipe's run: the checkpoint it leaves, and what happens to one that is not whole."""

import json
import os
import subprocess

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import WorkbookError, models, quantize, verification, workspace


@pytest.fixture
def profile():
    return models.tiny()


def test_the_checkpoint_is_whole_and_holds_all_that_a_server_needs(tiny_base, tiny_fp8):
    workspace.verify(tiny_fp8.path)
    names = {file.name for file in tiny_fp8.path.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
            "tokenizer_config.json", "MANIFEST.json", "recipe.yaml"} <= names
    ours, base = (AutoTokenizer.from_pretrained(d.path) for d in (tiny_fp8, tiny_base))
    talk = [{"role": "user", "content": "How many?"}]
    assert ours.apply_chat_template(talk) == base.apply_chat_template(talk)


def test_every_file_can_be_read_by_the_user_that_a_container_runs_as(tiny_fp8):
    assert all(file.stat().st_mode & 0o044 == 0o044 for file in tiny_fp8.path.iterdir())


def test_the_config_names_the_scheme_that_vllm_reads(tiny_fp8):
    config = json.loads((tiny_fp8.path / "config.json").read_text())["quantization_config"]
    (group,) = config["config_groups"].values()
    assert config["quant_method"] == "compressed-tensors"
    assert (group["weights"]["strategy"], group["weights"]["dynamic"]) == ("channel", False)
    activations = group["input_activations"]
    assert (activations["strategy"], activations["dynamic"]) == ("token", True)


def test_transformers_reads_it_back_and_agrees_with_the_base_within_fp8s_error(tiny_base, tiny_fp8):
    ids = torch.arange(40)[None] + 10
    base, fp8 = (AutoModelForCausalLM.from_pretrained(each.path, dtype=torch.bfloat16)(ids)
                 .logits.float() for each in (tiny_base, tiny_fp8))
    difference = (fp8 - base).norm() / base.norm()
    assert 0 < difference < 0.2


def test_a_whole_checkpoint_is_not_made_again(tmp_workspace, profile, tiny_base, tiny_fp8):
    place = quantize.target(profile)
    place.parent.mkdir(parents=True)
    os.symlink(tiny_fp8.path, place)
    before = (place / "model.safetensors").stat().st_mtime_ns
    assert quantize.fp8_checkpoint(profile, tiny_base).path == place
    assert (place / "model.safetensors").stat().st_mtime_ns == before


def test_a_half_written_checkpoint_is_made_again_and_said_so(
        tmp_workspace, profile, tiny_base, tiny_fp8, capsys):
    place = quantize.target(profile)
    place.mkdir(parents=True)
    (place / "config.json").write_bytes((tiny_fp8.path / "config.json").read_bytes())
    half = (tiny_fp8.path / "model.safetensors").read_bytes()[:1_000_000]
    (place / "model.safetensors").write_bytes(half)
    made = quantize.fp8_checkpoint(profile, tiny_base)
    assert "never finished. It is made again" in capsys.readouterr().out
    assert verification.verify_fp8(tiny_base, made).quantized == 16
    ours, reference = ((d.path / "model.safetensors").read_bytes() for d in (made, tiny_fp8))
    assert ours == reference


class FillsTheDisk:
    """A quantized model, next to somebody who fills the disk at the moment it is written."""

    def __init__(self, model, disk):
        self.model, self.disk = model, disk

    def save_pretrained(self, *arguments, **keywords):
        (self.disk / "somebody-elses").write_bytes(bytes(6 * 2**20))
        self.model.save_pretrained(*arguments, **keywords)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_disk_full_while_quantizing_is_a_sentence_and_leaves_nothing(tiny_base, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk]).returncode:
        pytest.skip("this container does not allow mounts")
    try:
        model = FillsTheDisk(quantize.quantized(tiny_base), disk)
        with pytest.raises(WorkbookError, match="The disk filled up while mine was being written"):
            quantize.save(model, tiny_base, disk / "mine")
        assert [file.name for file in disk.iterdir()] == ["somebody-elses"]
        with pytest.raises(WorkbookError, match="Writing mine needs 0.0 GB of disk"):
            quantize.save(model, tiny_base, disk / "mine")
    finally:
        subprocess.run(["umount", disk], check=True)
