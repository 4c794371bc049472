"""How far one model's next-token distributions are from another's, on the same text.

A finer instrument than right and wrong: both servers read the same prompt and the same
continuation, and for every token of the continuation vLLM says what it expected there. The
servers are asked one after the other, so they need not be up at once.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from helpers import WorkbookError, client
from helpers.arm_names import titled
from helpers.endpoint import Endpoint

if TYPE_CHECKING:
    import pandas as pd

VLLM_DEFAULT_TOP = 20  # vLLM's --max-logprobs, unless it is told otherwise


@dataclass(frozen=True)
class Reading:
    """What a server expected at each token of some continuations.

    `tokens[i]`: the token ids of continuation i. `expected[i]`: one dict for each of them, token id
    to natural log-probability, of the `top` likeliest tokens and of the one that followed. `top`:
    -1 for the whole vocabulary. `pieces`: token id to text.
    """

    arm: str
    tokens: list[list[int]]
    expected: list[list[dict[int, float]]]
    top: int
    pieces: dict[int, str]


def read(server: Endpoint, arm: str, texts: list[tuple[str, str]],
         top: int = VLLM_DEFAULT_TOP) -> Reading:
    """Let the server read each (prompt, continuation), and keep what it expected.

    Prompt and continuation are tokenized apart with the server's tokenizer, without BOS. `top` is
    at most the server's `--max-logprobs` (20 unless set; `-1`, the whole vocabulary, needs
    `--max-logprobs -1`). The continuation is forced: nothing is sampled. Raises `WorkbookError`
    when the server refuses or is gone.
    """
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(str(server.model))
    tokens, expected = [], []
    for prompt, continuation in texts:
        before, after = (tokenizer(text, add_special_tokens=False).input_ids
                         for text in (prompt, continuation))
        tokens.append(after)
        expected.append(_prompt_logprobs(server, before + after, top)[len(before):])
    seen = {token for text in tokens for token in text}
    return Reading(arm, tokens, expected, top, {token: tokenizer.decode([token]) for token in seen})


def _prompt_logprobs(server: Endpoint, tokens: list[int], top: int) -> list[dict[int, float]]:
    answer = server.asked("/v1/completions", {
        "model": server.model_name, "prompt": tokens, "max_tokens": 1, "temperature": 0,
        "prompt_logprobs": top})
    if not answer.ok:
        raise WorkbookError(
            f"vLLM refused to read a text of {len(tokens)} tokens (HTTP {answer.status_code}).",
            client.refusal(answer)[:300],
            "Ask for fewer log-probabilities (`top`), start the server with --max-logprobs -1, or "
            "leave out what is longer than its --max-model-len.")
    found = answer.json()["choices"][0]["prompt_logprobs"]
    return [{int(token): entry["logprob"] for token, entry in (position or {}).items()}
            for position in found]


def compare(first: Reading, second: Reading) -> "pd.DataFrame":
    """KL divergence of the second arm from the first, and agreement, token by token.

    A DataFrame with a row for each token of the continuations: `text` and `position` (both from
    0), `token`, each arm's log-probability of it, `kl` in nats, and `agree`: whether both arms find
    the same token likeliest.

    kl = sum over tokens of p ln(p / q), p the first arm's. With the whole vocabulary it is exact;
    with the `top` likeliest, the tokens that are not in both lists are one class together, which
    can only make kl smaller (data-processing inequality: Cover and Thomas, Elements of
    Information Theory, section 2.8).
    """
    import pandas as pd

    if first.tokens != second.tokens:
        raise ValueError("the two arms have read different texts")
    rows = []
    for text, tokens in enumerate(first.tokens):
        for position, token in enumerate(tokens):
            p, q = first.expected[text][position], second.expected[text][position]
            rows.append({
                "text": text, "position": position, "token": first.pieces[token],
                f"{titled(first.arm)} logprob": p[token],
                f"{titled(second.arm)} logprob": q[token],
                "kl": _kl(p, q), "agree": max(p, key=p.get) == max(q, key=q.get),
            })
    names = ("text", "position", "token", f"{titled(first.arm)} logprob",
             f"{titled(second.arm)} logprob", "kl",
             "agree")
    return pd.DataFrame(rows, columns=list(dict.fromkeys(names))).astype(
        {"kl": float, "agree": bool})


def _kl(p: dict[int, float], q: dict[int, float]) -> float:
    import numpy as np
    from scipy.special import rel_entr

    both = sorted(p.keys() & q.keys())
    classes = []
    for arm in (p, q):
        known = np.exp([arm[token] for token in both])
        classes.append(np.append(known, max(1 - known.sum(), 1e-9)))  # and all others
    return float(max(rel_entr(*classes).sum(), 0))


def first_divergence(tokens: "pd.DataFrame") -> list[int | None]:
    """For each text, the position of the first token on which the arms disagree; None: on none.

    `tokens` is what `compare` returns. When the continuation is the first arm's own greedy answer,
    this is where the second arm's greedy answer would leave it.
    """
    return [None if text["agree"].all() else int(text.loc[~text["agree"], "position"].iloc[0])
            for _, text in tokens.groupby("text")]


def summary(tokens: "pd.DataFrame") -> dict[str, float]:
    """The figures of `compare` in one line: tokens, kl (nats per token), agreement, divergence.

    NaN where there were no tokens to compare.
    """
    import statistics

    diverging = [position for position in first_divergence(tokens) if position is not None]
    return {
        "tokens": len(tokens),
        "kl_mean": float(tokens["kl"].mean()),
        "kl_median": float(tokens["kl"].median()),
        "kl_p99": float(tokens["kl"].quantile(0.99)),
        "kl_max": float(tokens["kl"].max()),
        "top1_agreement": float(tokens["agree"].mean()),
        "texts": int(tokens["text"].nunique()),
        "texts_diverging": len(diverging),
        "median_first_divergence": float(statistics.median(diverging)) if diverging else None,
    }
