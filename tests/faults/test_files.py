"""Faults of files: damaged configs, files that change while they are read."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import (
    WorkbookError,
    checkpoint,
    hardware,
    models,
    quantize,
    roofline,
    serving,
    verification,
    workspace,
)

REPO = workspace.repo()


@pytest.mark.fault("a safetensors file that was cut off")
def test_a_truncated_shard(tiny_fp8, tmp_path, happened):
    whole = next(tiny_fp8.path.glob("*.safetensors")).read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-1000])
    with pytest.raises(WorkbookError, match="its header announces") as said:
        checkpoint.census(tmp_path)
    happened(said.value)


# config.json


@pytest.fixture
def mine(tiny_base, tmp_path) -> Path:
    """A user's directory: the bundled model without its manifest."""
    place = shutil.copytree(tiny_base.path, tmp_path / "mine")
    (place / workspace.MANIFEST).unlink()
    return place


@pytest.mark.fault("a config.json with a value of the wrong type")
@pytest.mark.parametrize("name, value", [
    ("hidden_size", "256"), ("num_hidden_layers", 4.0), ("vocab_size", True), ("vocab_size", -1),
    ("num_attention_heads", [4]), ("num_key_value_heads", {}), ("intermediate_size", 0),
    ("max_position_embeddings", "2048"), ("tie_word_embeddings", "false"), ("model_type", 3),
    ("quantization_config", "fp8"), ("rope_parameters", 10_000.0)])
def test_wrong_types(mine, tmp_workspace, name, value, happened):
    config = json.loads((mine / "config.json").read_text())
    (mine / "config.json").write_text(json.dumps(config | {name: value}))
    for read in (checkpoint.verified, roofline.load_config):
        with pytest.raises(WorkbookError, match=f"config.json .*{name}") as said:
            read(mine)
    happened(said.value)


@pytest.mark.fault("a config.json that is no JSON object")
@pytest.mark.parametrize("content", [
    b"", b"{", b"[]", b"null", b"3", b"\xff\xfe\x00", b"[" * 100_000, b'{"model_type": NaN}'],
    ids=["empty", "torn", "list", "null", "number", "no text", "nested", "NaN"])
def test_no_config(mine, content, happened):
    (mine / "config.json").write_bytes(content)
    with pytest.raises(WorkbookError, match="config.json") as said:
        models.choose(hardware.detect(), str(mine))
    assert "save_pretrained" in said.value.remedy
    happened(said.value)


@pytest.mark.fault("a folder where config.json or the weights should be")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_folder_for_a_file(mine, name, happened):
    (mine / name).unlink()
    (mine / name).mkdir()
    with pytest.raises(WorkbookError, match=f"{name}.* cannot be read|Is a directory") as said:
        checkpoint.verified(mine)
    happened(said.value)


@pytest.mark.fault("a quantization_config that says little or odd things")
@pytest.mark.parametrize("block", [
    {}, {"ignore": 5}, {"config_groups": []}, {"config_groups": {"group_0": None}}])
def test_odd_quantization_configs(tiny_base, tiny_fp8, block, happened):
    odd = dataclasses.replace(tiny_fp8, config=tiny_fp8.config | {"quantization_config": block})
    with pytest.raises(WorkbookError, match="config.json ignores") as said:
        verification.verify_fp8(tiny_base, odd)
    assert quantize.recipe_in(odd.config) != quantize.RECIPE
    happened(said.value)


@pytest.mark.fault("a tokenizer file that is a link to a file outside of the model's folder")
@pytest.mark.parametrize("write", [
    quantize.stream, lambda base, place: quantize.save(
        quantize.quantized(base), base, place)], ids=["stream", "oneshot"])
def test_a_link_out(tmp_workspace, mine, tmp_path, write, happened):
    (tmp_path / "secret").write_text("a key")
    (mine / "tokenizer.key").symlink_to(tmp_path / "secret")
    with pytest.raises(WorkbookError, match="tokenizer.key of mine is a link to") as said:
        write(checkpoint.verified(mine), tmp_path / "made")
    assert not (tmp_path / "made").exists()
    happened(said.value)


# Another kernel


@pytest.fixture
def replaced(tiny_base, tiny_fp8, tmp_path) -> list[Path]:
    """Two whole checkpoints: a small change in one tensor and in its config tells them apart."""
    places = [shutil.copytree(tiny_fp8.path, tmp_path / name) for name in ("one", "other")]
    tensors = load_file(places[1] / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, places[1] / "model.safetensors", {"format": "pt"})
    config = json.loads((places[1] / "config.json").read_text())
    (places[1] / "config.json").write_text(json.dumps(config | {"other": True}))
    workspace.write_manifest(places[1])
    return places


REPLACE = """
import shutil, sys, time
from pathlib import Path
from helpers import workspace
one, other, place = map(Path, sys.argv[1:])
print("ready", flush=True)
for number in range(10**6):
    made = place.with_name(".made")
    shutil.copytree((one, other)[number % 2], made)
    workspace.replace(made, place)
    time.sleep(0.05)
"""


@pytest.mark.fault("a checkpoint that another notebook makes again while it is opened")
def test_replaced_while_opened(replaced, tmp_path, happened):
    """Always the one or the other whole: never a mixture, never a raw error."""
    whole = {checkpoint.verified(place).fingerprint: checkpoint.read_config(place)
             for place in replaced}
    place, found, refused = tmp_path / "place", set(), 0
    shutil.copytree(replaced[0], place)
    other = subprocess.Popen([sys.executable, "-c", REPLACE, *replaced, place], cwd=REPO,
                             stdout=subprocess.PIPE)
    try:
        other.stdout.readline()
        for _ in range(60):
            try:
                opened = checkpoint.verified(place)
            except WorkbookError as error:
                assert "is being written by another process" in str(error)
                refused += 1
                continue
            assert opened.config == whole[opened.fingerprint]
            found.add(opened.fingerprint)
    finally:
        other.kill()
        other.wait()
    assert found == set(whole)
    happened(f"60 times one or the other, whole; {refused} times asked to wait")


@pytest.mark.fault("a checkpoint that another notebook has made again since it was opened")
def test_replaced_after_it_was_opened(replaced, tmp_path, happened):
    place = tmp_path / "place"
    shutil.copytree(replaced[0], place)
    opened = checkpoint.verified(place)
    norm = checkpoint.read_tensor(opened, "model.norm.weight")
    workspace.replace(replaced[1], place)
    for use in (lambda: checkpoint.read_tensor(opened, "model.norm.weight"),
                lambda: verification.verify_fp8(models.tiny().checkpoint, opened),
                lambda: serving.VllmServer(opened).start()):
        with pytest.raises(WorkbookError, match="place has been replaced since it was") as said:
            use()
    assert torch.equal(checkpoint.read_tensor(checkpoint.verified(place), "model.norm.weight"),
                       norm + 1)
    happened(said.value)


@pytest.mark.fault("a base that changes while it is quantized")
def test_a_base_that_changes(tmp_workspace, mine, tmp_path, monkeypatch, happened):
    from helpers import streaming

    base, describe = checkpoint.verified(mine), streaming._describe

    def another_program(*arguments):
        (mine / "config.json").write_text((mine / "config.json").read_text() + " ")
        describe(*arguments)

    monkeypatch.setattr(streaming, "_describe", another_program)
    with pytest.raises(WorkbookError, match="mine has been replaced since it was opened") as said:
        quantize.stream(base, tmp_path / "made")
    assert not (tmp_path / "made").exists()
    happened(said.value)


@pytest.mark.fault("a file system that cannot swap two folders in one step")
def test_without_an_exchange(replaced, tmp_path, monkeypatch, happened):
    def refuse(*_):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(workspace, "_exchange", refuse)
    expected = checkpoint.verified(replaced[1]).fingerprint
    workspace.replace(replaced[1], replaced[0])
    assert checkpoint.verified(replaced[0]).fingerprint == expected
    assert [file.name for file in tmp_path.iterdir()] == ["one"]
    happened("the older one is moved aside first")
