"""Wrong results in silence: files that are not what they are taken for."""

import json
import os
import shutil
import struct
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
    identity,
    models,
    quantize,
    verification,
    workspace,
)

REPO = workspace.repo()
DOWN = "model.layers.0.mlp.down_proj.weight"


def copied(source, place: Path, change=None, manifest: bool = False) -> Path:
    """A user's copy of a checkpoint, a tensor of it changed, with a manifest of its own or none."""
    shutil.copytree(source.path, place)
    (place / workspace.MANIFEST).unlink()
    if change:
        file = place / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, {"format": "pt"})
    if manifest:
        workspace.write_manifest(place)
    return place


def retrain(tensors: dict) -> None:
    tensors[DOWN] = tensors[DOWN] * 2


def poison(name: str, value: float):
    def change(tensors: dict) -> None:
        tensors[name][3, 5] = value
    return change


@pytest.fixture
def small_memory(monkeypatch):
    """So that the model is streamed, which takes a second here, and not loaded."""
    monkeypatch.setattr(hardware, "available_ram", lambda: 1_000_000)


# What a checkpoint was made from


@pytest.mark.fault("an FP8 checkpoint that another base left under the same name")
def test_another_base(tmp_workspace, tiny_base, tmp_path, small_memory, capsys, happened):
    other = checkpoint.verified(copied(tiny_base, tmp_path / "other", retrain))
    quantize.stream(other, quantize.target(models.tiny()))
    made = quantize.fp8_checkpoint(models.tiny(), tiny_base)
    said = capsys.readouterr().out
    assert "tiny-phi4-fp8-dynamic was made from another base. It is made again." in said
    assert verification.verify_fp8(tiny_base, made).quantized == 16
    assert made.made_from.base == tiny_base.fingerprint
    assert quantize.fp8_checkpoint(models.tiny(), tiny_base) == made  # and then it is kept
    assert capsys.readouterr().out == ""
    happened(said)


@pytest.mark.fault("weights retrained in the same directory")
def test_retrained_weights(tmp_workspace, tiny_base, tmp_path, small_memory, happened):
    place = copied(tiny_base, tmp_path / "mine")
    first = models.directory_profile(checkpoint.verified(place))
    one = quantize.fp8_checkpoint(first, first.checkpoint)
    file = place / "model.safetensors"
    before = file.stat()
    with open(file, "r+b") as handle:
        handle.seek(-2, os.SEEK_END)
        low = handle.read(1)[0]
        handle.seek(-2, os.SEEK_END)
        handle.write(bytes([low ^ 1]))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # as rsync and tar would
    second = models.directory_profile(checkpoint.verified(place))
    other = quantize.fp8_checkpoint(second, second.checkpoint)
    assert first.revision != second.revision and one.fingerprint != other.fingerprint
    assert models.model_info(first) != models.model_info(second)  # so results are told apart too
    happened(f"another profile, {second.name}, with a checkpoint of its own")


@pytest.mark.fault("two model directories of one name")
def test_two_directories_of_one_name(tmp_workspace, tiny_base, tmp_path, happened):
    here, there = (models.directory_profile(checkpoint.verified(
                       copied(tiny_base, tmp_path / part / "model", change)))
                   for part, change in (("a", None), ("b", retrain)))
    assert quantize.target(here) != quantize.target(there)
    assert here.name != there.name
    happened(f"two profiles: {here.name} and {there.name}")


@pytest.mark.fault("an FP8 checkpoint of other versions of the libraries, or that names no base")
@pytest.mark.parametrize("change, says", [
    (lambda made: made["versions"].update(llmcompressor="0.1"), "by llmcompressor 0.1"),
    (lambda made: made["recipe"].update(ignore=[]), "by another recipe"),
    (lambda made: made.clear(), "from a base that it does not name"),
    (lambda made: made.update(base=3), "from another base"),
    (lambda made: made.update(versions=[]), "from a base that it does not name"),
])
def test_other_making(tmp_workspace, tiny_base, tiny_fp8, small_memory, capsys, change, says,
                      happened):
    place = quantize.target(models.tiny())
    shutil.copytree(tiny_fp8.path, place)
    made_from = json.loads((place / identity.MADE_FROM).read_text())
    change(made_from)
    workspace.write_json(place / identity.MADE_FROM, made_from)
    workspace.write_manifest(place)
    made = quantize.fp8_checkpoint(models.tiny(), tiny_base)
    said = capsys.readouterr().out
    assert f"was made {says}. It is made again." in said
    assert made.made_from == tiny_fp8.made_from
    happened(said)


@pytest.mark.fault("a recipe that was changed in the notebook is not taken for the standard one")
def test_a_changed_recipe_is_written_down(tmp_workspace, tiny_base, tmp_path, happened):
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM

    with quantize.quiet():
        model = AutoModelForCausalLM.from_pretrained(tiny_base.path, dtype=torch.bfloat16)
        oneshot(model=model, recipe=QuantizationModifier(
            targets="Linear", scheme="FP8_DYNAMIC", ignore=["lm_head", "re:.*down_proj"]))
    made = quantize.save(model, tiny_base, tmp_path / "mine")
    assert made.made_from.recipe != quantize.RECIPE
    assert any("down_proj" in name for name in made.made_from.recipe["ignore"])
    happened(f"recorded: {made.made_from.recipe['ignore']}")


@pytest.mark.fault("an FP8 checkpoint that fails its verification is not kept for the next time")
def test_a_wrong_checkpoint_is_not_kept(tmp_workspace, tiny_base, small_memory, monkeypatch,
                                        happened):
    from helpers import streaming

    straight = streaming._quantized  # a library that gives every module the first one's codes
    monkeypatch.setattr(streaming, "_quantized", lambda base, tensor, *rest: streaming.Block(
        tensor.nbytes, lambda: None))
    with pytest.raises(WorkbookError, match="is not the FP8_DYNAMIC checkpoint of") as said:
        quantize.fp8_checkpoint(models.tiny(), tiny_base)
    assert not quantize.target(models.tiny()).exists()
    monkeypatch.setattr(streaming, "_quantized", straight)
    assert quantize.fp8_checkpoint(models.tiny(), tiny_base).path.exists()
    happened(said.value)


# Numbers that no scale fits


@pytest.mark.fault("NaN or infinity in the base")
@pytest.mark.parametrize("name", [DOWN, "model.embed_tokens.weight", "lm_head.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("route", ["stream", "oneshot"])
def test_a_base_that_is_not_finite(tmp_workspace, tiny_base, tmp_path, name, value, route, happened,
                                   monkeypatch):
    base = checkpoint.verified(copied(tiny_base, tmp_path / "base", poison(name, value)))
    if route == "stream":
        monkeypatch.setattr(hardware, "available_ram", lambda: 1_000_000)
    else:
        monkeypatch.setattr(quantize, "quantized", lambda base: None)  # it is not looked at
    with pytest.raises(WorkbookError, match=f"{name} of the base, base, holds NaN or inf") as said:
        quantize.fp8_checkpoint(models.tiny(), base)
    assert "again" in said.value.remedy and "FP8 folder" not in str(said.value)
    assert not quantize.target(models.tiny()).exists()
    happened(said.value)


@pytest.mark.fault("NaN in the base, found when an FP8 checkpoint made elsewhere is verified")
@pytest.mark.parametrize("name", [DOWN, "lm_head.weight"])
def test_verification_names_the_base(tmp_workspace, tiny_base, tiny_fp8, tmp_path, name, happened):
    base = checkpoint.verified(copied(tiny_base, tmp_path / "base", poison(name, float("nan"))))
    with pytest.raises(WorkbookError, match=f"{name} of the base, base, holds NaN") as said:
        verification.verify_fp8(base, tiny_fp8)
    happened(said.value)


# Manifests


@pytest.fixture
def damaged(tiny_fp8, tmp_path) -> Path:
    """A finished checkpoint whose weights a failing disk has changed."""
    place = shutil.copytree(tiny_fp8.path, tmp_path / "damaged")
    workspace.flip_a_bit(place / "model.safetensors")
    return place


def without_weights(text: str) -> str:
    files = json.loads(text)
    del files["model.safetensors"]
    return json.dumps(files)


@pytest.mark.fault("a manifest that is empty, torn, of another form, or silent about the weights")
@pytest.mark.parametrize("change", [
    lambda text: "{}", lambda text: text[:-40], lambda text: "", lambda text: "[]",
    lambda text: "null", lambda text: "[" * 100_000,
    lambda text: text.replace('"bytes": ', '"b": '), without_weights,
    lambda text: text.replace("model.safetensors", "../damaged/model.safetensors"),
    lambda text: text.replace('"sha256": "', '"sha256": "x'),
], ids=["empty object", "torn", "empty", "list", "null", "nested", "no sizes", "no weights",
        "a way out", "no sums"])
def test_manifests(damaged, change, happened):
    manifest = damaged / workspace.MANIFEST
    manifest.write_text(change(manifest.read_text()))
    with pytest.raises(WorkbookError, match="damaged|is not in its manifest") as said:
        checkpoint.verified(damaged)
    assert not workspace.is_whole(damaged) or "not in its manifest" in str(said.value)
    happened(said.value)


@pytest.mark.fault("a file that a loader would read, added to a finished checkpoint")
@pytest.mark.parametrize("name", ["adapter_config.json", "more.safetensors", "more.jinja"])
def test_an_added_file(tiny_fp8, tmp_path, name, happened):
    place = shutil.copytree(tiny_fp8.path, tmp_path / "copy")
    if name.endswith(".safetensors"):
        save_file({"a": torch.zeros(1)}, place / name)
    else:
        (place / name).write_text("{}")
    with pytest.raises(WorkbookError, match=f"{name} is not in its manifest") as said:
        checkpoint.verified(place)
    happened(said.value)


# Headers


def with_header(place: Path, header: bytes, data: int) -> Path:
    (place / "config.json").write_text('{"model_type": "phi3"}')
    (place / "model.safetensors").write_bytes(
        struct.pack("<Q", len(header)) + header + bytes(data))
    return place


def entries(*tensors: tuple) -> bytes:
    return json.dumps({name: {"dtype": "U8", "shape": shape, "data_offsets": offsets}
                       for name, shape, offsets in tensors}).encode()


@pytest.mark.fault("a safetensors header that cannot be")
@pytest.mark.parametrize("header, says", [
    (entries(("a", [-2, -4], [0, 8])), "no natural number"),
    (entries(("a", [8], [0, 8]), ("b", [8], [4, 12])), "overlaps another tensor's"),
    (entries(("a", [4], [0, 4]), ("b", [4], [8, 12])), "leaves a hole before it"),
    (entries(("a", [12], [4, 16])), "its header announces 24|leaves a hole|announces"),
    (entries(("a", [8], [8, 0]), ("b", [12], [0, 12])), "does not fit"),
    (entries(("a", [2.0, 4], [0, 8])), "no natural number"),
    (entries(("a", [True, 8], [0, 8])), "no natural number"),
    (entries(("a", "8", [0, 8])), "no natural number"),
    (entries(("a", [8], [0, 8, 9])), "not a readable"),
    (entries(("a", [8], 8)), "not a readable"),
    (b'{"a": 3}', "not a readable"), (b"[]", "not a readable"), (b"\xff\xfe", "not a readable"),
    (b"[" * 200_000, "nested too deep"),
    (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deep"),
    (b'{"a": {"dtype": "F7", "shape": [12], "data_offsets": [0, 12]}}', "does not fit"),
])
def test_headers(tmp_path, header, says, happened):
    with pytest.raises(WorkbookError, match=says) as said:
        checkpoint.verified(with_header(tmp_path, header, 12))
    happened(said.value)


@pytest.mark.fault("an index that names a file outside of the checkpoint")
def test_an_index_that_leads_out(tmp_workspace, tiny_base, tmp_path, happened):
    place = copied(tiny_base, tmp_path / "inside" / "model")
    (place / "model.safetensors").rename(tmp_path / "inside" / "model.safetensors")
    (place / "model.safetensors.index.json").write_text(json.dumps(
        {"weight_map": dict.fromkeys(tiny_base.by_name, "../model.safetensors")}))
    with pytest.raises(WorkbookError, match="outside of the folder") as said:
        checkpoint.verified(place)
    happened(said.value)


# Places


@pytest.mark.fault("a relative workspace, a relative profile, a home folder's ~")
@pytest.mark.parametrize("cwd", [REPO, REPO / "notebooks", Path("/")], ids=["top", "notebook", "/"])
def test_places_are_the_same_from_everywhere(cwd, tmp_path, happened):
    code = ("from helpers import models, workspace\n"
            "print(workspace.root())\n"
            "print(models.choose(None, './data/tiny_phi4').checkpoint.path)\n"
            "print(workspace.resolved('~/gsm8k'))")
    relative = os.path.relpath(tmp_path / "mine", REPO)
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True,
        env=os.environ | {"PHI4_FP8_WORKSPACE": relative, "HOME": str(tmp_path)})
    assert ran.stdout.split() == [str(tmp_path / "mine"), str(REPO / "data" / "tiny_phi4"),
                                  str(tmp_path / "gsm8k")], ran.stderr
    happened(f"{relative} is {tmp_path / 'mine'}")


@pytest.mark.fault("a ~ where nobody has a home folder, and a directory that is not there")
@pytest.mark.parametrize("name, says", [("~nobody-of-that-name/model", "cannot be found"),
                                        ("./no/model", "no directory /.*/no/model")])
def test_a_place_that_is_nowhere(name, says, happened):
    with pytest.raises(WorkbookError, match=says) as said:
        models.choose(hardware.detect(), name)
    happened(said.value)


@pytest.mark.fault("a directory with a profile's name does not take the profile's place")
def test_a_profiles_name_comes_first(tmp_path, monkeypatch, happened):
    (tmp_path / "tiny-phi4").mkdir()
    monkeypatch.chdir(tmp_path)
    assert models.choose(hardware.detect(), "tiny-phi4").source == "bundled"
    happened("the bundled model; ./tiny-phi4 would be the directory")


@pytest.mark.fault("kept sums of files that are damaged")
@pytest.mark.parametrize("content", ["{", "[]", "null", '{"x": 1}'])
def test_damaged_sums(tmp_workspace, tiny_base, tmp_path, content, happened):
    place = copied(tiny_base, tmp_path / "mine")
    before = checkpoint.verified(place).fingerprint
    (workspace.root() / "sums.json").write_text(content)
    assert checkpoint.verified(place).fingerprint == before
    assert json.loads((workspace.root() / "sums.json").read_text())
    happened("the sums are taken again")


@pytest.mark.fault("the bundled model damaged, or its manifest deleted")
@pytest.mark.parametrize("loss", ["manifest", "byte", "folder"])
def test_the_bundled_model_is_never_taken_damaged(loss, tmp_path, monkeypatch, happened):
    place = tmp_path / "tiny_phi4"
    if loss != "folder":
        shutil.copytree(workspace.data("tiny_phi4"), place)
    if loss == "manifest":
        (place / workspace.MANIFEST).unlink()
    if loss == "byte":
        workspace.flip_a_bit(place / "model.safetensors")
    monkeypatch.setattr(workspace, "data", lambda *parts: tmp_path.joinpath(*parts))
    with pytest.raises(WorkbookError, match="tiny_phi4") as said:
        models.tiny()
    assert "git checkout data/tiny_phi4" in said.value.remedy
    happened(said.value)
