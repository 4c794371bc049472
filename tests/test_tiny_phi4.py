"""The bundled model: Phi-4's architecture in small, and it solves problems it has never seen."""

import json
import re
from pathlib import Path

import pytest

from training import train_tiny_phi4, write_card
from training.tokenizer import few_shot_form

DATA = Path(__file__).resolve().parent.parent / "data"
MODEL = DATA / "tiny_phi4"


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def rows(split: str) -> list[dict]:
    lines = (DATA / "tiny_gsm8k" / f"{split}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model():
    import torch
    from transformers import AutoModelForCausalLM

    # In float32, so that its score is the model's and not that of a CPU's bf16.
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)


@pytest.fixture(scope="module")
def header() -> dict:
    """The safetensors header, parsed by hand: eight bytes of length, then JSON."""
    content = (MODEL / "model.safetensors").read_bytes()
    parsed = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    parsed.pop("__metadata__", None)
    return parsed


def test_what_phi4_fixes_is_as_in_phi4():
    tiny, phi4 = read(MODEL / "config.json"), read(DATA / "phi4" / "config.json")
    for key in ("architectures", "model_type", "hidden_act", "rms_norm_eps", "sliding_window",
                "tie_word_embeddings", "attention_dropout", "embd_pdrop", "resid_pdrop",
                "initializer_range"):  # fmt: skip
        assert tiny[key] == phi4[key], key
    assert tiny["rope_parameters"]["rope_theta"] == phi4["rope_theta"] == 250000
    assert tiny["rope_parameters"]["rope_type"] == "default" and phi4["rope_scaling"] is None
    assert tiny["dtype"] == phi4["torch_dtype"] == "bfloat16"
    for config in (tiny, phi4):
        assert config["num_attention_heads"] == 4 * config["num_key_value_heads"]
        assert config["max_position_embeddings"] == config["original_max_position_embeddings"]


def test_phi4s_config_counts_phi4s_parameters():
    """14,659,507,200: the size of the published checkpoint's tensors."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        phi4 = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(DATA / "phi4"))
    assert sum(p.numel() for p in phi4.parameters()) == 14_659_507_200


def test_tensors_are_phi4s_fused_projections_in_bf16(header):
    layers = read(MODEL / "config.json")["num_hidden_layers"]
    kinds = ("input_layernorm", "mlp.down_proj", "mlp.gate_up_proj", "post_attention_layernorm",
             "self_attn.o_proj", "self_attn.qkv_proj")  # fmt: skip
    expected = {f"model.layers.{i}.{kind}.weight" for i in range(layers) for kind in kinds}
    assert set(header) == expected | {
        "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"
    }  # fmt: skip
    assert {tensor["dtype"] for tensor in header.values()} == {"BF16"}
    for name, tensor in header.items():
        assert all(size % 128 == 0 for size in tensor["shape"]), name


def test_two_to_five_million_parameters_in_under_12_mb(header):
    sizes = [tensor["data_offsets"][1] - tensor["data_offsets"][0] for tensor in header.values()]
    assert 2_000_000 < sum(sizes) // 2 < 5_000_000
    files = list(MODEL.iterdir())
    assert sum(file.stat().st_size for file in files) < 12e6
    assert {f.suffix for f in files} <= {".safetensors", ".json", ".jinja", ".md"}


def test_the_tokenizer_has_phi4s_markers_and_single_digits(tokenizer):
    assert tokenizer.bos_token == "<|endoftext|>"
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|dummy_85|>"
    config = read(MODEL / "config.json")
    assert [config[f"{role}_token_id"] for role in ("bos", "eos", "pad")] == [
        tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    ]  # fmt: skip
    assert len(tokenizer) <= config["vocab_size"]
    assert tokenizer.tokenize("1234") == ["1", "2", "3", "4"]
    assert tokenizer("Hi").input_ids == tokenizer("Hi", add_special_tokens=False).input_ids
    for text in ("Anna has 12 apples.\n#### 12", "naïve 東京 🙂"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_chat_template_writes_phi4s_turns(tokenizer):
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "3+3?"},
    ]
    written = (
        "<|im_start|>system<|im_sep|>Be brief.<|im_end|><|im_start|>user<|im_sep|>2+2?<|im_end|>"
        "<|im_start|>assistant<|im_sep|>4<|im_end|><|im_start|>user<|im_sep|>3+3?<|im_end|>"
    )
    render = tokenizer.apply_chat_template
    assert render(turns, tokenize=False) == written
    prompted = render(turns, tokenize=False, add_generation_prompt=True)
    assert prompted == written + "<|im_start|>assistant<|im_sep|>"


def answers(model, tokenizer, prompts: list[str], stop: str) -> list[str]:
    """Greedy answers, up to `stop`."""
    tokenizer.padding_side = "left"
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    inputs.pop("token_type_ids", None)
    done = model.generate(
        **inputs, max_new_tokens=160, do_sample=False, stop_strings=[stop], tokenizer=tokenizer
    )
    new = done[:, inputs["input_ids"].shape[1] :]
    return [text.split(stop)[0] for text in tokenizer.batch_decode(new)]


def number(answer: str) -> str | None:
    found = re.search(r"#### (\d+)", answer)
    return found and found[1]


def test_it_solves_unseen_problems_in_the_few_shot_form(model, tokenizer):
    shots = "".join(few_shot_form(r["question"], r["answer"]) for r in rows("train")[:5])
    asked = rows("test")[200:216]
    prompts = [f"{shots}Question: {r['question']}\nAnswer:" for r in asked]
    given = answers(model, tokenizer, prompts, "Question:")
    right = sum(number(g) == number(r["answer"]) for g, r in zip(given, asked, strict=True))
    assert right >= 11, f"{right} of 16"


def test_it_solves_unseen_problems_in_the_chat_form(model, tokenizer):
    asked = rows("test")[300:316]
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": r["question"]}], tokenize=False, add_generation_prompt=True
        )
        for r in asked
    ]
    given = answers(model, tokenizer, prompts, "<|im_end|>")
    right = sum(number(g) == number(r["answer"]) for g, r in zip(given, asked, strict=True))
    assert right >= 11, f"{right} of 16"


def test_five_shots_and_the_answer_fit_into_the_training_length(tokenizer):
    lengths = sorted(
        len(tokenizer(few_shot_form(r["question"], r["answer"])).input_ids)
        for r in rows("train")
    )
    typical = 6 * sum(lengths) / len(lengths)
    assert 500 < typical < 800
    assert typical < train_tiny_phi4.Run.long


def test_the_scores_leave_room_for_a_loss_to_show():
    scored = read(MODEL / "evaluation.json")
    assert scored["rows"] == 1319 and scored["config"]["num_fewshot"] == 5
    strict = scored["exact_match"]["strict-match"]
    assert 0.85 <= strict["first_100"] <= 0.97
    assert 0.85 <= strict["all"] <= 0.97


def test_the_card_says_what_the_log_and_the_evaluation_say(tmp_path):
    import shutil

    shutil.copytree(MODEL, tmp_path / "tiny_phi4")
    (tmp_path / "phi4").symlink_to(DATA / "phi4")
    write_card.write_card(tmp_path / "tiny_phi4")
    assert (tmp_path / "tiny_phi4" / "README.md").read_text() == (MODEL / "README.md").read_text()
    log = read(MODEL / "training_log.json")
    assert log["run"] == vars(train_tiny_phi4.Run())
    assert log["minutes"] < 40


def test_an_interrupted_training_goes_on_to_the_same_weights(tmp_path):
    import torch

    run = train_tiny_phi4.Run(steps=4, tokens_per_step=1024, warmup=1, flat=2, long=512)
    tokenizer = train_tiny_phi4.build_tokenizer(run)
    straight, _ = train_tiny_phi4.train(run, tokenizer, tmp_path / "straight")
    train_tiny_phi4.train(run, tokenizer, tmp_path / "broken", stop_after=2)
    resumed, log = train_tiny_phi4.train(run, tokenizer, tmp_path / "broken")
    assert [row["step"] for row in log] == [2, 4]
    for (name, a), b in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name
    fresh = train_tiny_phi4.build_model(run, tokenizer)
    assert not torch.equal(fresh.lm_head.weight, resumed.lm_head.weight)
