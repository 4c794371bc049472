"""What a GPU holds, by the one rule, against vLLM's own two checks at a server's start."""

import json
import os
import subprocess
from dataclasses import replace

import pytest
from conftest import REPO

from helpers import (
    WorkbookError,
    capacity,
    hardware,
    models,
    roofline,
    server_log,
    serving,
    serving_env,
)
from helpers.hardware import Gpu, Machine

PHI4 = roofline.load_config(REPO / "data" / "phi4")
MIB, GB = 2**20, 10**9


@pytest.fixture(scope="module")
def ask_vllm(tmp_path_factory):
    """A function: what vLLM's checks say of total, free, share, taken (beside the KV cache), kv."""
    log = tmp_path_factory.mktemp("memory") / "log"
    with log.open("w") as said, subprocess.Popen(
            [serving.serve_python(), REPO / "tests" / "serve_side" / "memory.py"], cwd=REPO,
            text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said,
            env=os.environ | serving_env.ENVIRONMENT) as process:

        def ask(**asked) -> dict:
            print(json.dumps({"tokens": 4096} | asked), file=process.stdin, flush=True)
            for line in process.stdout:
                if line.startswith("ANSWER "):
                    return json.loads(line.removeprefix("ANSWER "))
            raise AssertionError(log.read_text()[-2000:])

        yield ask


def machine(*gpus: Gpu) -> Machine:
    return Machine(gpus, "CPU", 8, frozenset(), 64 * GB, 500 * GB, "Linux", "3.11", "")


def gpu(memory: int, used: int | None = None, capability=(8, 6), index: int = 0) -> Gpu:
    return Gpu(index, "a GPU", memory, capability, "580",
               free_bytes=None if used is None else memory - used)


def flag(flags: list[str], name: str) -> str | None:
    return flags[flags.index(name) + 1] if name in flags else None


def served(profile: models.Profile, *gpus: Gpu) -> list[str]:
    where = machine(*gpus)
    return serving.default_flags(profile, hardware.serving_mode(where), where)


def test_what_fits_is_what_vllm_starts_on_every_gpu_of_the_list(ask_vllm):
    """Of each arm of both models: 0.90 of NVML's total, less the weights, less 1.5 GB."""
    cases = [(entry, profile, weights) for entry in roofline.gpus()
             for profile in (models.PHI4, models.PHI4_MINI)
             for weights in models.sizes(profile).values()]
    answers = [ask_vllm(
        total=roofline.memory_bytes(entry), free=roofline.memory_bytes(entry), share=0.9,
        taken=weights + 1_500_000_000, kv=profile.kv_bytes) for entry, profile, weights in cases]
    for (entry, profile, weights), answer in zip(cases, answers, strict=True):
        fits = capacity.fits(weights, profile.kv_bytes, roofline.memory_bytes(entry))
        assert fits == ("left" in answer), (entry["name"], profile.name, answer)
        left = capacity.room(weights, roofline.memory_bytes(entry))
        assert not fits or abs(left - answer["left"]) <= 1
    assert len({"left" in answer for answer in answers}) == 2


def test_the_kv_cache_of_a_profile_is_that_of_its_config():
    assert models.PHI4.kv_bytes == 204_800 * 4096 == 4096 * roofline.kv_bytes_per_token(PHI4)
    mini = PHI4 | {"hidden_size": 3072, "num_attention_heads": 24, "num_key_value_heads": 8,
                   "num_hidden_layers": 32, "vocab_size": 200064}
    assert models.PHI4_MINI.kv_bytes == 4096 * roofline.kv_bytes_per_token(mini)
    assert 2 in roofline.tensor_parallel_sizes(PHI4) and models.PHI4.divides
    assert 2 in roofline.tensor_parallel_sizes(mini) and models.PHI4_MINI.divides
    small = PHI4 | {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3,
                    "num_hidden_layers": 30, "vocab_size": 49152}
    assert models.SMOLLM2.kv_bytes == 4096 * roofline.kv_bytes_per_token(small)
    assert 2 not in roofline.tensor_parallel_sizes(small) and not models.SMOLLM2.divides


@pytest.fixture(autouse=True)
def own_choice(monkeypatch):
    """The machine chooses the model, whatever the tests' environment names."""
    monkeypatch.delenv(models.VARIABLE, raising=False)


@pytest.mark.parametrize("name, bf16, fp8", [
    ("T4", False, False), ("RTX 3090", False, True), ("L4", False, True), ("RTX 5090", False, True),
    ("A100 SXM 40 GB", True, True), ("A40", True, True), ("B200", True, True)])
def test_the_table_the_sentence_the_arms_and_the_plan_say_the_same(name, bf16, fp8):
    line = roofline.gpu_table(PHI4).loc[name]
    card = machine(roofline.listed(roofline.named(name)))
    arms = models.arms(models.PHI4, card)
    assert (line["bf16 fits"], line["FP8 fits"]) == (bf16, fp8)
    assert ("bf16" in arms, "fp8" in arms) == (bf16, fp8)
    said = roofline.explain(PHI4, name)
    assert ("Both fit" in said, "Neither" in said) == (bf16, not fp8)
    assert (models.choose(card).name == "phi-4") == fp8


def test_a_card_of_32_gb_has_no_bf16_arm():
    """By decimal gigabytes and 15 % to spare it would: 29.3 x 1.15 = 33.7 of NVML's 34.2 GB."""
    card = machine(roofline.listed(roofline.named("RTX 5090")))
    assert models.PHI4.bf16_bytes * 1.15 < card.gpus[0].memory_bytes
    assert models.arms(models.PHI4, card) == ("fp8",)


# The share

def test_a_gpu_that_nobody_uses_gets_090():
    for used in (None, 0, 400 * MIB):
        assert flag(served(models.PHI4, gpu(24576 * MIB, used)), "--gpu-memory-utilization") == (
            "0.90")


def test_a_desktop_that_uses_3_gb_gets_a_share_that_vllm_takes(ask_vllm):
    card = gpu(24576 * MIB, used=3 * GB)
    share = float(flag(served(models.PHI4, card), "--gpu-memory-utilization"))
    assert 0.80 < share < 0.90
    asked = {"total": card.memory_bytes, "free": card.free_bytes - capacity.CONTEXT,
             "taken": models.PHI4.fp8_bytes + capacity.REST, "kv": models.PHI4.kv_bytes}
    own, fixed = ask_vllm(**asked, share=share), ask_vllm(**asked, share=0.90)
    assert "left" in own and "less than desired GPU memory utilization" in fixed["refused"]


def test_with_too_little_free_it_is_what_the_model_needs_and_vllms_refusal_is_explained(ask_vllm):
    card = gpu(24576 * MIB, used=12 * GB)
    share = float(flag(served(models.PHI4, card), "--gpu-memory-utilization"))
    needed = models.PHI4.fp8_bytes + models.PHI4.kv_bytes + capacity.REST
    assert needed <= share * card.memory_bytes < needed + card.memory_bytes / 100
    held = ask_vllm(total=card.memory_bytes, free=card.free_bytes, share=share,
                    taken=needed - models.PHI4.kv_bytes, kv=models.PHI4.kv_bytes)
    meaning, remedy = server_log.explain(held["refused"])
    assert "Free memory on device cuda:0 (12.82/24.0 GiB)" in meaning
    assert "nvidia-smi" in remedy and "kernel" in remedy
    assert "max-model-len" not in remedy  # vLLM stops before that is looked at


@pytest.mark.parametrize("taken", [23 * GB, 22 * GB], ids=["no room", "too little room"])
def test_weights_that_leave_no_kv_cache_are_explained(taken, ask_vllm):
    refused = ask_vllm(total=24576 * MIB, free=24576 * MIB, share=0.9, taken=taken, kv=2 * GB)
    _, remedy = server_log.explain(refused["refused"])
    assert "too little" in remedy and "--max-model-len" in remedy


# More than one GPU

def test_two_equal_cards_of_24_gb_serve_both_arms_each_over_both(ask_vllm):
    cards = [gpu(24576 * MIB, 0, index=index) for index in range(2)]
    where = machine(*cards)
    assert models.arms(models.PHI4, where) == ("bf16", "fp8")
    assert flag(served(models.PHI4, *cards), "--tensor-parallel-size") == "2"
    assert flag(served(models.PHI4_MINI, *cards), "--tensor-parallel-size") is None  # one is enough
    assert "left" in ask_vllm(  # half a model on each
        total=cards[0].memory_bytes, free=cards[0].memory_bytes, share=0.9,
        taken=models.PHI4.bf16_bytes // 2 + capacity.REST, kv=models.PHI4.kv_bytes // 2)
    server = serving.VllmServer(models.tiny().checkpoint, served(models.PHI4, *cards))
    assert server.gpus == 2
    assert models.PHI4.bf16_bytes < models.for_weights(where) < 2 * 24576 * MIB
    with pytest.raises(WorkbookError, match=r"needs 10\.9 GB .* each of two GPUs has 8\.6 GB"):
        models.choose(machine(*[gpu(8192 * MIB, index=index) for index in range(2)]), "phi-4")


@pytest.mark.parametrize("gpus", [
    (gpu(24576 * MIB),), (gpu(24576 * MIB), gpu(49140 * MIB // 4, index=1)),
    (gpu(24576 * MIB), gpu(24576 * MIB - 1, index=1))], ids=["one", "a small one too", "unequal"])
def test_unequal_cards_share_nothing(gpus):
    assert models.arms(models.PHI4, machine(*gpus)) == ("fp8",)
    assert flag(served(models.PHI4, *gpus), "--tensor-parallel-size") is None
    assert models.for_weights(machine(*gpus)) == models.for_weights(machine(gpu(24576 * MIB)))


def test_a_model_that_does_not_divide_by_two_stays_on_one():
    large = replace(models.SMOLLM2, bf16_bytes=30 * GB, fp8_bytes=16 * GB)
    two = machine(*[gpu(24576 * MIB, index=index) for index in range(2)])
    assert models.arms(large, two) == ("fp8",)


def test_the_gpu_that_has_least_free_decides_for_both():
    cards = gpu(24576 * MIB, 3 * GB), gpu(24576 * MIB, 0, index=1)
    share = float(flag(served(models.PHI4, *cards), "--gpu-memory-utilization"))
    assert share < 0.90


# Turing

def test_a_t4_gets_phi4_mini_in_fp16():
    t4 = machine(roofline.listed(roofline.named("T4")))
    mode, profile = hardware.serving_mode(t4), models.choose(t4)
    assert (profile.name, models.arms(profile, t4)) == ("phi-4-mini", ("bf16", "fp8"))
    flags = serving.default_flags(profile, mode, t4)
    assert flag(flags, "--dtype") == "float16" and flag(flags, "--linear-backend") == "marlin"
    assert "fp16, because bf16 needs 8.0" in mode.why


def test_from_ampere_on_it_is_bf16():
    for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (12, 0)):
        assert flag(served(models.PHI4, gpu(81920 * MIB, capability=capability)),
                    "--dtype") == "bfloat16"


def test_a_model_too_large_says_what_it_needs():
    with pytest.raises(WorkbookError, match=r"needs 20\.0 GB .* the GPU has 16\.1 GB"):
        models.choose(machine(roofline.listed(roofline.named("T4"))), "phi-4")
