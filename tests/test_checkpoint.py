"""The census and the verification, against safetensors' own reading and real damage."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import REPO
from safetensors.torch import load_file, save_file

from helpers import (
    WorkbookError,
    checkpoint,
    identity,
    phi4_slice,
    quantize,
    roofline,
    verification,
    workspace,
)
from helpers import fp8 as e4m3


@pytest.fixture
def copy(tiny_fp8, tmp_path):
    """A user's copy, to be damaged; without the manifest, which would find the damage first."""
    made = shutil.copytree(tiny_fp8.path, tmp_path / "copy")
    (made / workspace.MANIFEST).unlink()
    return made


def edit(directory, **changes):
    """Rewrite a checkpoint's single file with changed tensors (None removes one)."""
    file = directory / "model.safetensors"
    tensors = load_file(file) | {k.replace("__", "."): v for k, v in changes.items()}
    save_file({k: v for k, v in tensors.items() if v is not None}, file, {"format": "pt"})


def test_the_census_is_what_safetensors_loads(tiny_base):
    loaded = load_file(tiny_base.path / "model.safetensors")
    census = {t.name: t for t in tiny_base.tensors}
    assert census.keys() == loaded.keys()
    for name, tensor in loaded.items():
        assert census[name].shape == tuple(tensor.shape)
        assert census[name].nbytes == tensor.nbytes
        assert torch.equal(checkpoint.read_tensor(tiny_base, name), tensor)


def test_roles_and_types_add_up(tiny_fp8):
    tensors = tiny_fp8.tensors
    for table in (checkpoint.by_dtype(tensors), checkpoint.by_role(tensors)):
        assert table["bytes"].sum() == checkpoint.total_bytes(tensors)
        assert table["tensors"].sum() == len(tensors)
    assert checkpoint.by_dtype(tensors).loc["F8_E4M3", "tensors"] == 16
    assert checkpoint.by_role(tensors).loc["scale", "tensors"] == 16


def test_llm_compressors_checkpoint_is_the_predicted_one_to_the_byte(tiny_base, tiny_fp8):
    found = verification.verify_fp8(tiny_base, tiny_fp8)
    assert (found.quantized, found.ignored) == (16, ("lm_head",))
    assert found.predicted_bytes == found.actual_bytes
    header = int.from_bytes((tiny_fp8.path / "model.safetensors").read_bytes()[:8], "little")
    assert (tiny_fp8.path / "model.safetensors").stat().st_size == found.actual_bytes + header + 8
    assert 0.9 < found.worst_step <= 1 + 2**-4


LAYER = "model__layers__0__mlp__down_proj__weight"


@pytest.mark.parametrize("changes, says", [
    ({LAYER: None}, "down_proj.weight is missing"),
    ({f"{LAYER}_scale": torch.ones(256, dtype=torch.bfloat16)}, "weight_scale is"),
    ({f"{LAYER}_scale": torch.ones(256, 1)}, "F32"),
    ({f"{LAYER}_scale": torch.full((256, 1), float("nan"), dtype=torch.bfloat16)}, "half steps"),
    ({f"{LAYER}_scale": torch.zeros(256, 1, dtype=torch.bfloat16)}, "half steps"),
    ({LAYER: torch.zeros(256, 768, dtype=torch.float8_e4m3fn)}, "off by"),
    ({"lm_head__weight": torch.zeros(896, 256, dtype=torch.bfloat16)}, "not the base's"),
    ({"extra": torch.zeros(1)}, "extra is not expected"),
])
def test_every_disagreement_is_named(tmp_workspace, tiny_base, copy, changes, says):
    edit(copy, **changes)
    with pytest.raises(WorkbookError, match=says):
        verification.verify_fp8(tiny_base, checkpoint.verified(copy))


@pytest.mark.parametrize("block, says", [
    (None, "no quantization_config"), ({"ignore": [], "format": "float-quantized"}, "ignores"),
    ({"ignore": ["lm_head"], "format": "int-quantized"}, "int-quantized"),
])
def test_a_wrong_quantization_config_is_named(tmp_workspace, tiny_base, copy, block, says):
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] = block
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(WorkbookError, match=says):
        verification.verify_fp8(tiny_base, checkpoint.verified(copy))


@pytest.mark.parametrize("cut, says", [(-1, "has .* bytes, its header announces"),
                                       (100, "not a readable"), (5, "not a readable")])
def test_a_truncated_file_is_named(copy, cut, says):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(WorkbookError, match=says):
        checkpoint.census(copy)


def test_shards_are_read_by_their_index_and_a_missing_one_is_named(tiny_base, tmp_path):
    tensors = load_file(tiny_base.path / "model.safetensors")
    names = sorted(tensors)
    shards = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
    for file, part in shards.items():
        save_file({n: tensors[n] for n in part}, tmp_path / file)
    placed = {name: file for file, part in shards.items() for name in part}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": placed}))
    assert (checkpoint.total_bytes(checkpoint.census(tmp_path))
            == checkpoint.total_bytes(tiny_base.tensors))
    index.write_text(json.dumps({"weight_map": placed | {"ghost": "a.safetensors"}}))
    with pytest.raises(WorkbookError, match="disagree on ghost"):
        checkpoint.census(tmp_path)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(WorkbookError, match="lacks b.safetensors"):
        checkpoint.census(tmp_path)


def test_a_tensor_that_is_not_there_is_a_sentence(tiny_base):
    with pytest.raises(WorkbookError, match="no tensor model.layers.99"):
        checkpoint.read_tensor(tiny_base, "model.layers.99")


def test_the_fingerprint_follows_every_byte(tmp_path):
    for name, content in {"a": "abc", "b": "abc", "c": "abd"}.items():
        with workspace.building(tmp_path / name) as partial:
            (partial / "weights").write_text(content)
    a, b, c = (identity.fingerprint(tmp_path / name) for name in "abc")
    assert a == b != c


def test_without_a_manifest_the_fingerprint_tells_retrained_weights_of_the_same_size(
        tmp_workspace, copy, monkeypatch):
    """Also with the old size and time, and each file is hashed once."""
    weights = copy / "model.safetensors"
    before, stat = checkpoint.verified(copy), weights.stat()
    hashed = []
    sha256 = workspace.sha256
    monkeypatch.setattr(workspace, "sha256", lambda file: hashed.append(file.name) or sha256(file))
    assert checkpoint.verified(copy).fingerprint == before.fingerprint and not hashed
    with open(weights, "r+b") as handle:
        handle.seek(-1, os.SEEK_END)
        last = handle.read(1)[0]
        handle.seek(-1, os.SEEK_END)
        handle.write(bytes([last ^ 1]))
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after = checkpoint.verified(copy)
    assert hashed == ["model.safetensors"] and after.fingerprint != before.fingerprint


def test_in_the_hubs_cache_the_blobs_names_are_the_sums(tmp_workspace, tiny_base, tmp_path,
                                                        monkeypatch):
    """The names are made by `helpers.hub`, which checks them; nothing is hashed again."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "1"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        content = (tiny_base.path / name).read_bytes()
        blob = blobs / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        (snapshot / name).symlink_to(blob)
    monkeypatch.setattr(workspace, "sha256", None)
    found = checkpoint.verified(snapshot)
    assert found.tensors == tiny_base.tensors
    other = blobs / ("0" * 64)
    (snapshot / "model.safetensors").resolve().rename(other)
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(other)
    assert checkpoint.verified(snapshot).fingerprint != found.fingerprint


# By blocks of rows


@pytest.mark.parametrize("rows", [1, 100, 1024])
def test_blocks_are_the_tensor_in_order(rows, tiny_fp8):
    name = "model.layers.1.mlp.gate_up_proj.weight"
    blocks = list(checkpoint.read_blocks(tiny_fp8, name, rows))
    assert [len(block) for block in blocks[:-1]] == [rows] * (len(blocks) - 1)
    assert torch.equal(torch.cat(blocks).view(torch.uint8),
                       checkpoint.read_tensor(tiny_fp8, name).view(torch.uint8))
    with pytest.raises(WorkbookError, match="layers.99"):
        next(checkpoint.read_blocks(tiny_fp8, "model.layers.99"))


def test_notebook_03_makes_a_large_module_anew_in_little_memory(tmp_path):
    """Phi-4's largest whole would take 6 GB beside it; this one, of 34 million weights, 1 GB."""
    peak = Path("/proc/self/clear_refs")
    if not os.access(peak, os.W_OK):
        pytest.skip("the system does not let a process count its peak of memory anew")
    config = phi4_slice.sliced(roofline.load_config(REPO / "data" / "phi4"), 1) | {
        "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16,
        "num_key_value_heads": 4}
    base = phi4_slice.random_checkpoint(config, tmp_path / "base")
    fp8 = phi4_slice.quantized(base, quantize.recipe(), tmp_path / "fp8")
    nb = json.loads((REPO / "notebooks" / "03_inspect_the_scales.ipynb").read_text())
    (cell,) = (cell for cell in nb["cells"] if cell["id"] == "03-22")
    names = {"base": base, "fp8": fp8, "checkpoint": checkpoint, "e4m3": e4m3, "torch": torch}
    peak.write_text("5")  # from here on the peak is counted anew
    before = in_memory("VmRSS")
    exec("".join(cell["source"]), names)
    assert names["identical"] == len(names["modules"]) == 4
    assert in_memory("VmHWM") - before < 600_000_000


def in_memory(field: str) -> int:
    """Bytes of this process, by a field of Linux's /proc/self/status."""
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
