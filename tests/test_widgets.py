"""The explorer: its figures against whole tensors, its controls, and bad checkpoints."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import WorkbookError, plots, widgets

DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture
def copy(tiny_fp8, tmp_path):
    return shutil.copytree(tiny_fp8, tmp_path / "copy")


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
    monkeypatch.setattr(widgets, "SLICE", 100 * 768)  # so that the last slice is a short one
    base = load_file(tiny_base / "model.safetensors")
    stored = load_file(tiny_fp8 / "model.safetensors")
    weight, scale = base[f"{DOWN}.weight"].double(), stored[f"{DOWN}.weight_scale"].double()
    noise = (stored[f"{DOWN}.weight"].double() * scale - weight).square().sum(1)
    found = widgets.channel_error(tiny_base, tiny_fp8, DOWN)
    assert torch.allclose(found[0].double(), weight.square().sum(1), rtol=1e-5)
    assert torch.allclose(found[1].double(), noise, rtol=1e-4)
    spread = widgets.spread_map(tiny_fp8)
    assert spread.shape == (4, 4)
    assert spread.loc[0, "down_proj"] == pytest.approx(float(scale.max() / scale.min()))
    n = widgets.MAP_ROWS
    expected = 10 * torch.log10(weight[:n].square().sum() / noise[:n].sum())
    assert widgets.sqnr_map(tiny_base, tiny_fp8).loc[0, "down_proj"] == pytest.approx(
        float(expected), abs=1e-3)


def test_the_largest_channels_are_named():
    assert widgets.largest(torch.tensor([1.0, 3.0, 2.0]), 2) == "1 (3), 2 (2)"


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


@pytest.mark.parametrize("changes, says", [
    ({f"{DOWN}.weight_scale": torch.ones(1, dtype=torch.bfloat16)}, "per tensor"),
    ({f"{DOWN}.weight_scale": torch.full((256, 1), torch.nan, dtype=torch.bfloat16)}, "is nan"),
    ({f"{DOWN}.weight_scale": torch.zeros(256, 1, dtype=torch.bfloat16)}, "no positive number"),
    ({f"{DOWN}.weight": torch.ones(256, 768, dtype=torch.bfloat16)}, "not FP8"),
])
def test_bad_scales_are_a_sentence(copy, changes, says):
    edit(copy, changes)
    with pytest.raises(WorkbookError) as caught:
        widgets.scales(copy, DOWN)
    assert says in str(caught.value)


def test_bad_scales_are_shown_where_the_module_is_chosen(tiny_base, copy, pictures):
    bad = torch.full((256, 1), torch.nan, dtype=torch.bfloat16)
    edit(copy, {f"{DOWN}.weight_scale": bad})
    whole = widgets.explorer(tiny_base, copy)
    parts(whole)[0]["module"].value = "gate_up_proj"
    drawn = len(pictures)
    assert drawn == 1
    parts(whole)[0]["module"].value = "down_proj"
    assert "256 of 256 scales" in parts(whole)[2] and "Traceback" not in parts(whole)[2]
    assert len(pictures) == drawn


def test_a_checkpoint_without_fp8_is_a_sentence(tiny_base):
    assert "holds no FP8 weight" in widgets.explorer(tiny_base, tiny_base).value


def test_an_unknown_module_is_a_sentence(tiny_fp8):
    with pytest.raises(WorkbookError, match="There is no module model.layers.9.nothing"):
        widgets.scales(tiny_fp8, "model.layers.9.nothing")


@pytest.mark.parametrize("place, says", [
    ({"model.norm.weight": "model-00002.safetensors"}, "lacks model-00002.safetensors"),
    ({"model.nothing.weight": "model.safetensors"}, "disagree on model.nothing.weight"),
])
def test_an_index_that_does_not_fit_is_a_sentence(tiny_base, copy, place, says):
    names = load_file(copy / "model.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model.safetensors") | place}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    assert says in widgets.explorer(tiny_base, copy).value
