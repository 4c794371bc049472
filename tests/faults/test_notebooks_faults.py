"""Faults that a reader can provoke in notebooks 00 to 04, or with what is turned in them."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import nbformat
import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import (
    WorkbookError,
    checkpoint,
    course,
    fp8,
    hardware,
    models,
    plots,
    quantize,
    roofline,
    scales,
    value_plots,
    verification,
    widgets,
    workspace,
)

REPO = workspace.repo()
DOWN = "model.layers.0.mlp.down_proj"


def cell(name: str, text: str) -> str:
    """The source of the only cell of a notebook that holds this text."""
    nb = nbformat.read(next((REPO / "notebooks").glob(f"{name}_*.ipynb")), as_version=4)
    found, = (cell.source for cell in nb.cells if cell.cell_type == "code" and text in cell.source)
    return found


def rewrite(directory, change):
    """The checkpoint's tensors, by name, as `change` leaves them."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def walk(widget):
    yield widget
    for child in getattr(widget, "children", ()):
        yield from walk(child)


@pytest.fixture
def own(tmp_workspace, tiny_base, tmp_path):
    """A reader's own model: the bundled one without its manifest, which would forbid any change."""
    copy = shutil.copytree(tiny_base.path, tmp_path / "own")
    (copy / workspace.MANIFEST).unlink()
    return copy


@pytest.fixture
def drawn(monkeypatch):
    """The titles of what was drawn."""
    seen = []
    monkeypatch.setattr(plots, "show", lambda figure, alt: seen.append(
        [axis.get_title(loc="left") for axis in figure.axes]))
    return seen


def edited(directory, **changes):
    """The directory, with its config.json changed; None takes a key away."""
    file = directory / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return directory


# 00


@pytest.mark.fault("a GPU that the list does not name, asked for in notebook 00")
def test_an_unknown_gpu(happened):
    config = roofline.load_config(REPO / "data" / "phi4")
    for ask in (roofline.explain, widgets.budget_table):
        with pytest.raises(WorkbookError, match="'RTX 9090' is not in data/gpus.json") as said:
            ask(config, "RTX 9090")
        assert "A40" in said.value.remedy
    happened(said.value)


@pytest.mark.fault("a list of GPUs that a reader has added to, and made a slip in")
@pytest.mark.parametrize("content, says", [
    ('[{"name": "mine", "memory_mib": 24576,}]', "is not JSON"),
    ('[{"name": "mine", "memory_mib": 24576}]',
     "'mine' of data/gpus.json has no usable nvml_name, compute_capability, bandwidth_gb_s"),
    ('[{"name": "mine", "nvml_name": "Mine", "memory_mib": "24576", "bandwidth_gb_s": 300, '
     '"compute_capability": [8, 9], "source": "its data sheet", '
     '"memory_source": "nvidia-smi"}]', "no usable memory_mib")],
    ids=["a comma", "missing fields", "a number in quotes"])
def test_a_slip_in_the_list_of_gpus(content, says, tmp_path, monkeypatch, happened):
    (tmp_path / "gpus.json").write_text(content)
    monkeypatch.setattr(workspace, "data", lambda *parts: tmp_path.joinpath(*parts))
    with pytest.raises(WorkbookError, match=says) as said:
        roofline.gpus()
    happened(said.value)


@pytest.mark.fault("a GPU that no list knows, and a torch that cannot use it")
def test_the_bandwidth_of_a_gpu_that_nobody_knows(monkeypatch, happened):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu = hardware.Gpu(0, "NVIDIA Imaginary 9000", 24 * 10**9, (8, 9), "")
    with pytest.raises(WorkbookError, match="of NVIDIA Imaginary 9000 is not known") as said:
        roofline.read_bandwidth(SimpleNamespace(gpus=(gpu,)))
    assert "data/gpus.json" in said.value.remedy
    happened(said.value)


# 01


@pytest.mark.fault("a model of another architecture, whose sizes have other names")
def test_a_config_of_another_architecture(own, happened):
    """GPT-2's names: n_embd, n_layer, n_head."""
    edited(own, model_type="gpt2", hidden_size=None, num_hidden_layers=None, n_embd=256, n_layer=4)
    with pytest.raises(WorkbookError, match="has no hidden_size, num_hidden_layers") as said:
        roofline.load_config(own)
    assert "'gpt2'" in said.value.meaning
    happened(said.value)


@pytest.mark.fault("heads that do not divide the model's width")
@pytest.mark.parametrize("changes", [{"num_attention_heads": 7}, {"num_key_value_heads": 3}],
                         ids=lambda changes: ", ".join(f"{k} {v}" for k, v in changes.items()))
def test_odd_numbers_of_heads(own, changes, happened):
    with pytest.raises(WorkbookError, match="query heads, . key-value heads and a width") as said:
        roofline.load_config(edited(own, **changes))
    happened(said.value)


@pytest.mark.fault("a config that leaves out what older Transformers did not write")
def test_an_old_config(own, happened):
    """No key-value heads: each head has its own. No word of tying: the head is a matrix."""
    old = roofline.load_config(edited(own, num_key_value_heads=None, tie_word_embeddings=None,
                                      head_dim=None))
    heads, width, layers = (old[k] for k in ("num_attention_heads", "hidden_size",
                                             "num_hidden_layers"))
    assert old["num_key_value_heads"] == heads
    assert roofline.kv_bytes_per_token(old) == 2 * 2 * width * layers
    assert any(checkpoint.role(t) == "lm_head" for t in roofline.tensors(old))
    wide = roofline.load_config(edited(own, head_dim=2 * width // heads))
    assert roofline.kv_bytes_per_token(wide) == 2 * 2 * 2 * width * layers
    happened("its key-value heads are its heads, and a head_dim of its own counts")


@pytest.mark.slow
@pytest.mark.fault("a model whose embedding is its output head: no lm_head is stored")
def test_a_tied_model_through_notebooks_01_to_03(own, tmp_workspace, drawn, happened):
    edited(own, tie_word_embeddings=True)
    rewrite(own, lambda tensors: tensors.pop("lm_head.weight"))
    profile = models.directory_profile(checkpoint.verified(own))
    base = checkpoint.verified(own)
    assert roofline.bytes_per_token(base.tensors) == checkpoint.total_bytes(base.tensors)
    plots.bytes_by_role({"tied": checkpoint.by_role(base.tensors)})
    made = quantize.fp8_checkpoint(profile, base)
    found = verification.verify_fp8(base, made)
    assert found.quantized == 16 and found.ignored == ()
    explorer = widgets.explorer(base, made)
    note, = (w.value for w in walk(explorer) if type(w).__name__ == "HTML")
    assert len(drawn) == 2 and note.startswith("largest scales")
    happened(f"{found.quantized} modules quantized and explored; nothing is left alone by name")


# 02


@pytest.mark.fault("the process ended while notebook 02 had its damaged copy")
def test_a_damaged_copy_is_left_over(tiny_fp8, tmp_workspace, capsys, happened):
    left = tmp_workspace / "damaged-copy"
    left.mkdir(parents=True)
    (left / "half").write_text("of a run that was cut off")
    exec(cell("02", "damaged-copy"), {"fp8": tiny_fp8, "checkpoint": checkpoint})
    printed = capsys.readouterr().out
    assert "What to do:" in printed and not left.exists()
    assert workspace.is_whole(tiny_fp8.path)  # the original keeps its bits
    happened(printed)


@pytest.mark.slow
@pytest.mark.fault("a model with a dead output channel: a weight row of zeros")
def test_a_row_of_zeros(own, tmp_workspace, drawn, happened):
    """LLM Compressor gives it a scale of its own; so does ours, and nothing is NaN."""
    rewrite(own, lambda tensors: tensors[f"{DOWN}.weight"][3].zero_())
    base = checkpoint.verified(own)
    made = quantize.fp8_checkpoint(models.directory_profile(base), base)
    assert verification.verify_fp8(base, made).quantized == 16
    codes, scale = fp8.quantize_per_channel(checkpoint.read_tensor(base, f"{DOWN}.weight"))
    stored = checkpoint.read_tensor(made, f"{DOWN}.weight").view(torch.uint8)
    assert torch.equal(codes, stored)
    assert torch.equal(scale, checkpoint.read_tensor(made, f"{DOWN}.weight_scale"))
    error = scales.relative_error(base, made, DOWN)
    assert error[3] == 0 and error.isfinite().all()
    for view in widgets.VIEWS:
        widgets.draw(base, made, DOWN, view)
    assert len(drawn) == len(widgets.VIEWS)
    happened(f"re-made bit for bit; its scale is {float(scale[3]):g}")


# 03


@pytest.mark.fault("an explorer of a checkpoint with one FP8 module")
def test_one_module(tmp_workspace, tiny_base, tiny_fp8, tmp_path, drawn, happened):
    place = shutil.copytree(tiny_fp8.path, tmp_path / "one")
    (place / workspace.MANIFEST).unlink()

    def keep_one(tensors):
        for name in [n for n in tensors if n.endswith(".weight_scale") and DOWN not in n]:
            del tensors[name]
            weight = name.removesuffix("_scale")
            tensors[weight] = tensors[weight].bfloat16()

    rewrite(place, keep_one)
    one = checkpoint.verified(place)
    explorer = widgets.explorer(tiny_base, one)
    controls = {w.description: w for w in walk(explorer) if getattr(w, "options", None)}
    buttons = [w for w in walk(explorer) if type(w).__name__ == "Button"]
    assert [len(controls[name].options) for name in ("layer", "module")] == [1, 1]
    assert len(buttons) == 1 and len(drawn) == 1
    controls["map"].value = "SQNR, dB"
    controls["view"].value = "error"
    value_plots.module_map(scales.spread_map(one), "largest / smallest", "title")
    assert len(drawn) == 3
    happened("one choice of layer and module, one button, and every view")


@pytest.mark.fault("an explorer of a base that is not the checkpoint's: q, k and v apart")
def test_a_base_of_another_architecture(own, tiny_fp8, drawn, happened):
    """As Llama stores them; Phi-3's are one matrix."""
    def part(tensors):
        fused = tensors.pop("model.layers.0.self_attn.qkv_proj.weight")
        for name, piece in zip("qkv", fused.chunk(3), strict=True):
            tensors[f"model.layers.0.self_attn.{name}_proj.weight"] = piece.contiguous()

    rewrite(own, part)
    explorer = widgets.explorer(checkpoint.verified(own), tiny_fp8)
    controls = {w.description: w for w in walk(explorer) if getattr(w, "options", None)}
    controls["module"].value, controls["view"].value = "qkv_proj", "error"
    controls["map"].value = "SQNR, dB"
    notes = [w.value for w in walk(explorer) if type(w).__name__ == "HTML"]
    assert len(notes) == 2  # under the controls, and in the map's place
    for note in notes:
        assert "There is no tensor model.layers.0.self_attn.qkv_proj.weight in own" in note
        happened(note)
    assert len(drawn) == 1  # qkv_proj's scales, shown first, which need no base


@pytest.mark.fault("a base with a NaN in a weight, looked at in the explorer")
def test_a_matrix_with_a_nan(own, tiny_fp8, drawn, happened):
    rewrite(own, lambda tensors: tensors[f"{DOWN}.weight"][3].__setitem__(5, torch.nan))
    base = checkpoint.verified(own)
    weight, codes, scale = (
        checkpoint.read_tensor(model, f"{DOWN}.{name}").float() for model, name in (
            (base, "weight"), (tiny_fp8, "weight"), (tiny_fp8, "weight_scale")))
    value_plots.weight_error(DOWN, weight, codes * scale)
    assert drawn == [["Does the grid's step bound a weight's relative error?"]]
    with pytest.raises(WorkbookError, match="not a number") as said:
        scales.channel_error(base, tiny_fp8, DOWN)
    assert DOWN in said.value.what
    happened(said.value)


@pytest.mark.fault("a model whose layers have other names, in notebook 03")
def test_a_model_without_a_gate(tiny_fp8, drawn, capsys, happened):
    """The cell takes the first Linear layer where none is called mlp.gate."""
    renamed = [dataclasses.replace(t, name=t.name.replace("gate_up_proj", "fc1"))
               for t in tiny_fp8.tensors]
    scope = {"checkpoint": checkpoint, "value_plots": value_plots, "tensors": renamed,
             "fp8": tiny_fp8}
    exec(cell("03", "value_plots.channel_scales"), scope)
    assert scope["layer"] == checkpoint.linears(renamed)[0] and len(drawn) == 1
    happened(capsys.readouterr().out)


@pytest.mark.fault("a profile that is misspelt")
def test_a_misspelt_profile(monkeypatch, happened):
    monkeypatch.setenv("PHI4_FP8_PROFILE", "phi4")
    with pytest.raises(WorkbookError, match="There is no profile 'phi4'") as said:
        course.open_course()
    assert "phi-4" in said.value.remedy
    happened(said.value)
