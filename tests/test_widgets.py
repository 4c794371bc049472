"""The explorer: its figures against whole tensors, its controls, and bad checkpoints."""

import json
import shutil

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import WorkbookError, checkpoint, plots, scales, widgets, workspace

DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture
def copy(tmp_workspace, tiny_fp8, tmp_path):
    """A user's copy, to be changed; without the manifest, which would find the change first."""
    made = shutil.copytree(tiny_fp8.path, tmp_path / "copy")
    (made / workspace.MANIFEST).unlink()
    return made


@pytest.fixture
def pictures(monkeypatch):
    """The alt texts of what was drawn, in order."""
    drawn = []
    monkeypatch.setattr(plots, "show", lambda figure, alt: drawn.append(alt))
    return drawn


def edit(directory, changes):
    file = directory / "model.safetensors"
    save_file(load_file(file) | changes, file, {"format": "pt"})


def walk(widget):
    yield widget
    for child in getattr(widget, "children", ()):
        yield from walk(child)


def parts(widget):
    by_name = {w.description: w for w in walk(widget) if getattr(w, "options", None)}
    buttons = [w for w in walk(widget) if type(w).__name__ == "Button"]
    notes = " ".join(w.value for w in walk(widget) if type(w).__name__ == "HTML")
    return by_name, buttons, notes


def test_channel_errors_and_maps_are_those_of_the_whole_tensors(tiny_base, tiny_fp8, monkeypatch):
    monkeypatch.setattr(scales, "SLICE", 100 * 768)  # so that the last slice is a short one
    base = load_file(tiny_base.path / "model.safetensors")
    stored = load_file(tiny_fp8.path / "model.safetensors")
    weight, scale = base[f"{DOWN}.weight"].double(), stored[f"{DOWN}.weight_scale"].double()
    noise = (stored[f"{DOWN}.weight"].double() * scale - weight).square().sum(1)
    found = scales.channel_error(tiny_base, tiny_fp8, DOWN)
    assert torch.allclose(found[0].double(), weight.square().sum(1), rtol=1e-5)
    assert torch.allclose(found[1].double(), noise, rtol=1e-4)
    spread = scales.spread_map(tiny_fp8)
    assert list(spread) == ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]  # as a layer runs
    assert list(spread.index) == [0, 1, 2, 3]
    assert spread.loc[0, "down_proj"] == pytest.approx(float(scale.max() / scale.min()))
    n = scales.MAP_ROWS
    expected = 10 * torch.log10(weight[:n].square().sum() / noise[:n].sum())
    assert scales.sqnr_map(tiny_base, tiny_fp8).loc[0, "down_proj"] == pytest.approx(
        float(expected), abs=1e-3)


def test_the_largest_channels_are_named():
    assert scales.largest(torch.tensor([1.0, 3.0, 2.0]), 2) == "1 (3), 2 (2)"


def test_every_control_changes_the_picture(tiny_base, tiny_fp8, pictures):
    controls, buttons, notes = parts(widgets.explorer(tiny_base, tiny_fp8))
    assert len(buttons) == 16 and "largest scales, by channel" in notes
    for name, value in (("layer", 2), ("module", "gate_up_proj"), ("view", "weights"),
                        ("view", "error")):
        before = list(pictures)
        controls[name].value = value
        assert len(pictures) == len(before) + 1 and pictures[-1] != before[-1]
    assert "model.layers.2.mlp.gate_up_proj" in pictures[-1]


def test_a_cell_of_the_map_selects_and_the_map_can_change(tiny_base, tiny_fp8, pictures):
    whole = widgets.explorer(tiny_base, tiny_fp8)
    controls, buttons, _ = parts(whole)
    cell = next(b for b in buttons if b.tooltip.startswith("layer 3, gate_up_proj"))
    cell.click()
    assert (controls["layer"].value, controls["module"].value) == (3, "gate_up_proj")
    assert "layers.3.mlp.gate_up_proj" in pictures[-1]
    controls["map"].value = "SQNR, dB"
    assert [b.tooltip for b in parts(whole)[1]] != [b.tooltip for b in buttons]


BAD = pytest.mark.parametrize("changes, says", [
    ({f"{DOWN}.weight_scale": torch.ones(1, dtype=torch.bfloat16)}, "per tensor"),
    ({f"{DOWN}.weight_scale": torch.full((256, 1), torch.nan, dtype=torch.bfloat16)}, "is nan"),
    ({f"{DOWN}.weight_scale": torch.zeros(256, 1, dtype=torch.bfloat16)}, "no positive number"),
    ({f"{DOWN}.weight": torch.ones(256, 768, dtype=torch.bfloat16)}, "not FP8"),
])


@BAD
def test_bad_scales_are_a_sentence(copy, changes, says):
    edit(copy, changes)
    with pytest.raises(WorkbookError, match=says):
        scales.of(checkpoint.verified(copy), DOWN)


@BAD
def test_each_is_a_sentence_in_the_explorer(tiny_base, copy, pictures, changes, says):
    edit(copy, changes)
    shown = widgets.explorer(tiny_base, checkpoint.verified(copy))
    parts(shown)[0]["module"].value = "gate_up_proj"
    drawn = list(pictures)
    parts(shown)[0]["module"].value = "down_proj"
    notes = parts(shown)[2]
    if says == "not FP8":  # then it is not among the FP8 modules of its layer
        says = "Layer 0 has no FP8 module down_proj"
    assert says in notes and "Traceback" not in notes
    assert pictures == drawn


def test_modules_stand_in_the_order_in_which_a_layer_runs_them(tiny_base, tiny_fp8, pictures):
    assert parts(widgets.explorer(tiny_base, tiny_fp8))[0]["module"].options == (
        "qkv_proj", "o_proj", "gate_up_proj", "down_proj")
    assert scales.in_run_order(["new", "down_proj", "k_proj", "down_proj"]) == [
        "k_proj", "down_proj", "new"]


def test_a_base_of_another_model_is_a_sentence(
        tmp_workspace, tiny_base, tiny_fp8, tmp_path, pictures):
    other = shutil.copytree(tiny_base.path, tmp_path / "other")
    (other / workspace.MANIFEST).unlink()
    edit(other, {f"{DOWN}.weight": torch.ones(128, 768, dtype=torch.bfloat16)})
    shown = widgets.explorer(checkpoint.verified(other), tiny_fp8)
    parts(shown)[0]["module"].value = "down_proj"
    for view in ("weights", "error"):
        parts(shown)[0]["view"].value = view
        assert "is [128, 768] in other and [256, 768] in" in parts(shown)[2]
    file = other / "model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if n != f"{DOWN}.weight"}, file)
    shown = widgets.explorer(checkpoint.verified(other), tiny_fp8)
    parts(shown)[0]["module"].value = "down_proj"
    parts(shown)[0]["view"].value = "weights"
    assert f"There is no tensor {DOWN}.weight in other" in parts(shown)[2]
    assert len(pictures) == 4  # the scales, which need no base, of two modules each time


def test_an_index_that_is_none_is_a_sentence(copy):
    for content in ("{", "[]", '{"weight_map": 3}'):
        (copy / "model.safetensors.index.json").write_text(content)
        with pytest.raises(WorkbookError, match="is no index of shards"):
            checkpoint.verified(copy)


def sparse(source, target, gigabytes=3):
    """The same checkpoint behind zeros that take no disk, so that its data begins beyond 2 GB."""
    shutil.copytree(source.path, target)
    tensors, end = load_file(source.path / "model.safetensors"), gigabytes * 2**30
    header = {"zeros": {"dtype": "BF16", "shape": [end // 2], "data_offsets": [0, end]}}
    types = {torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3"}
    for name, tensor in tensors.items():
        header[name] = {"dtype": types[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [end, end := end + tensor.nbytes]}
    words = json.dumps(header).encode()
    with open(target / "model.safetensors", "wb") as file:
        file.write(len(words).to_bytes(8, "little") + words)
        file.seek(gigabytes * 2**30, 1)
        for tensor in tensors.values():
            file.write(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    # The sum of gigabytes of zeros is not what is tried here.
    workspace.write_manifest(target, {"model.safetensors": "0" * 64})
    return checkpoint.just_written(target)


def test_files_of_several_gigabytes_are_read_by_the_slice(tiny_base, tiny_fp8, tmp_path, pictures):
    """The same pictures, and the file's length is nowhere in the memory taken."""
    base, fp8 = sparse(tiny_base, tmp_path / "base", 5), sparse(tiny_fp8, tmp_path / "fp8")
    before = psutil.Process().memory_info().rss
    for pair in ((tiny_base, tiny_fp8), (base, fp8)):
        controls = parts(widgets.explorer(*pair))[0]
        controls["view"].value = "weights"
        controls["view"].value = "error"
    assert pictures[:3] == pictures[3:] and len(pictures) == 6
    assert psutil.Process().memory_info().rss - before < 200e6


def test_a_checkpoint_without_fp8_is_a_sentence(tiny_base):
    assert "holds no FP8 weight" in widgets.explorer(tiny_base, tiny_base).value


def test_an_unknown_module_is_a_sentence(tiny_fp8):
    with pytest.raises(WorkbookError, match="There is no module model.layers.9.nothing"):
        scales.of(tiny_fp8, "model.layers.9.nothing")


@pytest.mark.parametrize("place, says", [
    ({"model.norm.weight": "model-00002.safetensors"}, "lacks model-00002.safetensors"),
    ({"model.nothing.weight": "model.safetensors"}, "disagree on model.nothing.weight"),
])
def test_an_index_that_does_not_fit_is_a_sentence(copy, place, says):
    names = load_file(copy / "model.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model.safetensors") | place}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WorkbookError, match=says):
        checkpoint.verified(copy)
