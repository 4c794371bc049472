"""Next-token distributions from vLLM, against transformers and against numpy."""

import json

import numpy as np
import pytest
from conftest import REPO

from helpers import WorkbookError, divergence


@pytest.fixture(scope="module")
def texts() -> list[tuple[str, str]]:
    """Worked problems as the models read them: no shots, so that they are short."""
    with open(REPO / "data" / "tiny_gsm8k" / "test.jsonl") as lines:
        rows = [json.loads(next(lines)) for _ in range(4)]
    return [(f"Question: {row['question']}\nAnswer:", f" {row['answer']}") for row in rows]


@pytest.fixture(scope="module")
def reading(bf16_server, texts):
    return divergence.read(bf16_server, "bf16", texts)


def reading_of(probabilities: list[list[float]], arm: str) -> divergence.Reading:
    expected = [{token: float(np.log(p)) for token, p in enumerate(row)} for row in probabilities]
    return divergence.Reading(arm, [[0] * len(expected)], [expected], -1, {0: "a"})


def test_vllms_log_probabilities_are_transformers(reading, texts, tiny_base):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_base.path)
    model = AutoModelForCausalLM.from_pretrained(tiny_base.path, dtype=torch.float32)
    differences = []
    for index, (prompt, continuation) in enumerate(texts):
        before = tokenizer(prompt, add_special_tokens=False).input_ids
        after = tokenizer(continuation, add_special_tokens=False).input_ids
        with torch.no_grad():
            logits = model(torch.tensor([before + after])).logits[0]
        logprobs = logits.log_softmax(-1)[len(before) - 1:-1]
        assert reading.tokens[index] == after
        for position, token in enumerate(after):
            expected = reading.expected[index][position]
            ours = np.array([expected[t] for t in expected])
            theirs = logprobs[position, list(expected)].numpy()
            # bf16 has 8 bits: what is likely is known to a few parts in a hundred
            differences.extend(np.abs(np.exp(ours) - np.exp(theirs)))
            assert expected[token] == pytest.approx(float(logprobs[position, token]), abs=0.5)
    assert np.mean(differences) < 0.002


def test_every_position_has_the_likeliest_and_the_token_that_followed(reading):
    for tokens, expected in zip(reading.tokens, reading.expected, strict=True):
        assert len(tokens) == len(expected)
        for token, position in zip(tokens, expected, strict=True):
            assert token in position and divergence.VLLM_DEFAULT_TOP <= len(position) <= 21
            assert sum(np.exp(list(position.values()))) < 1 + 1e-4


def test_a_model_does_not_diverge_from_its_own_reading(reading):
    tokens = divergence.compare(reading, reading)
    assert tokens["kl"].max() < 1e-6 and tokens["agree"].all()
    assert divergence.summary(tokens)["texts_diverging"] == 0


def test_fp8_is_near_bf16_and_not_the_same(reading, fp8_server, texts):
    found = divergence.summary(divergence.compare(
        reading, divergence.read(fp8_server, "fp8", texts)))
    assert 0 < found["kl_mean"] < 0.1
    assert found["top1_agreement"] > 0.9


def test_too_many_log_probabilities_are_refused_in_words(bf16_server, texts):
    with pytest.raises(WorkbookError, match="--max-logprobs"):
        divergence.read(bf16_server, "bf16", texts[:1], top=100)


def test_kl_is_scipys_entropy():
    from scipy.stats import entropy

    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(30), 5), rng.dirichlet(np.ones(30), 5)
    found = divergence.compare(reading_of(p, "a"), reading_of(q, "b"))
    expected = [entropy(*pair) for pair in zip(p, q, strict=True)]
    assert found["kl"].tolist() == pytest.approx(expected, rel=1e-4)
    assert found["agree"].tolist() == (p.argmax(1) == q.argmax(1)).tolist()


def test_a_truncated_kl_is_never_larger():
    from scipy.stats import entropy

    rng = np.random.default_rng(1)
    for p, q in zip(rng.dirichlet(np.ones(30), 20), rng.dirichlet(np.ones(30), 20), strict=True):
        kept = [dict(sorted(((t, float(np.log(x))) for t, x in enumerate(row)),
                            key=lambda pair: -pair[1])[:20]) for row in (p, q)]
        kept[0].setdefault(0, float(np.log(p[0])))
        kept[1].setdefault(0, float(np.log(q[0])))
        one, other = (divergence.Reading(arm, [[0]], [[row]], 20, {0: "a"})
                      for arm, row in zip("ab", kept, strict=True))
        assert divergence.compare(one, other)["kl"][0] <= entropy(p, q) + 1e-6


def test_first_divergence_by_hand():
    same, other = [0.7, 0.3], [0.3, 0.7]
    one = reading_of([same, same, same, same], "a")
    two = reading_of([same, same, other, same], "b")
    assert divergence.first_divergence(divergence.compare(one, two)) == [2]
    assert divergence.first_divergence(divergence.compare(one, one)) == [None]


def test_readings_of_different_texts_are_not_compared():
    with pytest.raises(ValueError, match="different texts"):
        divergence.compare(reading_of([[1.0]], "a"), reading_of([[1.0], [1.0]], "b"))


def test_answers_without_a_token_diverge_nowhere():
    empty = divergence.Reading("a", [[], []], [[], []], -1, {})
    tokens = divergence.compare(empty, empty)
    found = divergence.summary(tokens)
    assert found["tokens"] == found["texts_diverging"] == 0
    assert np.isnan(found["kl_mean"]) and np.isnan(found["top1_agreement"])
