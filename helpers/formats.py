"""Which number format costs a model what, on text enough to decide, with paired intervals.

Every arm reads the same texts, so two arms are compared text by text: a text that is hard for one
is mostly hard for the other, and their difference is far surer than either figure by itself.
`scripts/measure_formats.py` measures the bundled model and SmolLM2 with the functions here and
keeps the figures in `data/measured/formats.json`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from helpers import ablation, workspace
from helpers.ablation import Format

if TYPE_CHECKING:
    from pandas import DataFrame
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MEASURED = workspace.data("measured", "formats.json")
RECIPE = Format("E4M3 per channel", "e4m3")  # what FP8_DYNAMIC makes
FORMATS = (
    RECIPE,
    Format("E4M3 128x128 blocks", "e4m3", "block", "group"),
    Format("E4M3 per tensor", "e4m3", "tensor", "tensor"),
    Format("E4M3, weights per tensor", "e4m3", "tensor"),
    Format("E5M2 per channel", "e5m2"),
    Format("INT8 per channel", "int8"),
    Format("INT8 per tensor", "int8", "tensor", "tensor"),
)
DRAWS = 3  # of other scales, `moved`


@dataclass(frozen=True)
class Losses:
    """What several arms lose against one model on the same texts.

    `tokens`: how many tokens each text has. By arm: `kl`, the mean KL of each text in nats per
    token; `top1`, the share of tokens with the same likeliest successor; `sqnr`, that of all
    logits in dB, each token's mean taken off, which the softmax does not see.
    """

    tokens: list[int]
    kl: dict[str, list[float]]
    top1: dict[str, float]
    sqnr: dict[str, float]


def texts(tokenizer: PreTrainedTokenizerBase, count: int = 100,
          split: str = "test") -> list[Tensor]:
    """The first `count` problems with their answers, int64 [1, tokens] each; none was trained on.

    `split`: "test", or "train" for the text that static scales are set on.
    """
    with open(workspace.data("tiny_gsm8k", f"{split}.jsonl")) as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(count), strict=False)]
    return ablation.encoded(tokenizer, rows)


def stored(weight: Tensor, format: Format, factor: Tensor | float = 1.0) -> Tensor:
    """A weight [out, in] as LLM Compressor would store it in a bf16 checkpoint, scaled back.

    The scale is amax / largest rounded to bf16, and so is the quotient that is then rounded to the
    grid: compressed-tensors computes both in the weight's own type. Returns float32. For
    `RECIPE` this is the FP8_DYNAMIC checkpoint's own weight, to the bit. `factor`, [out, 1] or one
    for all, makes the scales larger, as `moved` needs them.
    """
    import torch

    weight = weight.to(torch.bfloat16)
    largest = ablation.LARGEST[format.grid]
    scale = (factor * ablation.amax(weight, format.weights).float() / largest).to(torch.bfloat16)
    scale = scale.clamp_min(ablation.TINY)
    codes = ablation.rounded((weight / scale).float(), format.grid, scale=1.0)
    return codes * scale.float()


def quantized(model: PreTrainedModel, format: Format, activations: bool = True,
              more: tuple[str, ...] = (), static: Mapping[str, Tensor] | None = None):
    """`ablation.applied` with weights as `stored` makes them: W8A8, or without `activations` W8A16.

    `more`: modules rounded beside the Linears. `static`: a module's name to the one scale of all
    its inputs, instead of dynamic scales in the format's scope.
    """
    def activation(name, x):
        scale = static.get(name) if static is not None else None
        return ablation.rounded(x, format.grid, format.activations, scale)

    return ablation.applied(model, ablation.targets(model) + list(more),
                            lambda _, weight: stored(weight, format),
                            activation if activations else None)


def moved(model: PreTrainedModel, draw: int):
    """The recipe's W8A8 with other scales: each channel's 1 to 2 times as large, drawn at random.

    E4M3 bears it, for its relative step stays, so such arms differ by the luck of rounding alone:
    which weights happen to lie near a number of the grid. The intervals over texts do not cover
    that luck. `draw`: the seed.
    """
    import torch

    random = torch.Generator().manual_seed(draw)

    def weight(_, values):
        return stored(values, RECIPE, 2 ** torch.rand(len(values), 1, generator=random))

    return ablation.applied(model, ablation.targets(model), weight,
                            lambda _, x: ablation.rounded(x, RECIPE.grid, RECIPE.activations))


def static_scales(model: PreTrainedModel, texts: list[Tensor],
                  grid: str = "e4m3") -> dict[str, Tensor]:
    """The scale that covers all inputs of a Linear over the texts: module's name to float32 [].

    amax / largest, as LLM Compressor's observer "minmax" sets a static per-tensor scale.
    """
    found: dict = {}
    with ablation.threads(model):
        for ids in texts:
            for name, peak in ablation.observe(model, ids, lambda x: x.abs().max()).items():
                found[name] = max(peak, found.get(name, peak))
    return {name: peak / ablation.LARGEST[grid] for name, peak in found.items()}


def measure(model: PreTrainedModel, texts: list[Tensor],
            arms: Mapping[str, Callable]) -> Losses:
    """Every arm beside the model as it is, text by text.

    `arms`: a title to a function that returns a context manager, within which the model computes
    as that arm. Holds the logits of all texts; `scripts/measure_formats.py` keeps a larger model's
    on disk.
    """
    reference = [seen(model, ids) for ids in texts]
    rows = {title: one_arm(model, texts, reference, arm) for title, arm in arms.items()}
    return losses([ids.numel() for ids in texts], rows)


def one_arm(model: PreTrainedModel, texts: list[Tensor], reference: Iterable[Tensor],
            arm: Callable) -> list[tuple]:
    """`_beside` of every text, with the arm's logits against the reference's."""
    with arm(), ablation.threads(model):
        return [_beside(true, seen(model, ids)) for true, ids in zip(reference, texts, strict=True)]


def losses(tokens: list[int], rows: Mapping[str, list[tuple]]) -> Losses:
    """The figures of `one_arm`'s rows, by title; `tokens`: how many each text has."""
    import torch

    sums = {title: torch.tensor(each, dtype=torch.float64).sum(0) for title, each in rows.items()}
    return Losses(tokens,
                  {title: [kl / count for (kl, *_), count in zip(each, tokens, strict=True)]
                   for title, each in rows.items()},
                  {title: float(same) / sum(tokens) for title, (_, same, _, _) in sums.items()},
                  {title: float(10 * torch.log10(signal / noise))
                   for title, (_, _, signal, noise) in sums.items()})


def seen(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """A text's logits [tokens, vocabulary], each token's mean taken off; ids int64 [1, tokens]."""
    import torch

    with torch.inference_mode(), ablation.threads(model):
        logits = model(ids).logits[0]
        return logits - logits.mean(-1, keepdim=True)


def _beside(true: Tensor, found: Tensor) -> tuple[float, ...]:
    """Sums over the tokens of two `seen`: KL, equal tops, squared logits, squared differences.

    In float32, which is off by 1e-7 nats in one token: a hundredth of the least KL met here.
    """
    p, q = true.log_softmax(-1), found.log_softmax(-1)
    return (float((p.exp() * (p - q)).double().sum()),
            float((true.argmax(-1) == found.argmax(-1)).sum()),
            float(true.square().sum()), float((found - true).square().sum()))


def table(losses: Losses, against: str = RECIPE.name) -> DataFrame:
    """KL of every arm and its difference from one of them, with 95 % intervals over texts.

    A DataFrame, index arm, least KL first. "KL", "KL low" to "KL high": nats per token, over all
    tokens. "difference", "low" to "high": this arm's KL minus that of `against` on the same texts.
    The intervals are 95 % ones over texts (`stats.paired_over_texts`), and each stands for itself;
    the luck of rounding is in none (`moved`).
    "told apart": "less", "more", or "no" where the difference's holds zero. "top-1",
    "logits, dB": as in `Losses`.
    """
    import numpy as np
    import pandas as pd

    from helpers import stats

    weights = np.array(losses.tokens)
    rows = {}
    for title, each in losses.kl.items():
        own = stats.paired_over_texts(np.array(each), np.zeros(len(each)), weights)
        gap = stats.paired_over_texts(np.array(each), np.array(losses.kl[against]), weights)
        rows[title] = {
            "KL": own.value, "KL low": own.low, "KL high": own.high,
            "difference": gap.value, "low": gap.low, "high": gap.high,
            "told apart": "-" if title == against else
            "less" if gap.high < 0 else "more" if gap.low > 0 else "no",
            "top-1": losses.top1[title], "logits, dB": losses.sqnr[title]}
    return pd.DataFrame(rows).T.sort_values("KL").rename_axis("arm").infer_objects()


def format_arms(model: PreTrainedModel) -> dict[str, Callable]:
    """W8A8 in every format, and the recipe's with other scales."""
    return {form.name: lambda form=form: quantized(model, form) for form in FORMATS} | {
        f"E4M3, other scales {draw}": lambda draw=draw: moved(model, draw)
        for draw in range(1, DRAWS + 1)}


def activation_arms(model: PreTrainedModel,
                    calibration: list[Tensor]) -> dict[str, Callable]:
    """E4M3 weights per channel; inputs unrounded, with dynamic scales, and with static ones.

    `calibration`: the texts that the static scales are set on, all of them and the first alone.
    """
    few, many = (static_scales(model, part) for part in (calibration[:1], calibration))
    per_tensor = Format("", "e4m3", activations="tensor")
    return {
        "W8A16": lambda: quantized(model, RECIPE, activations=False),
        RECIPE.name: lambda: quantized(model, RECIPE),
        "dynamic, one scale a text": lambda: quantized(model, per_tensor),
        f"static, set on {len(calibration)} texts":
            lambda: quantized(model, RECIPE, static=many),
        "static, set on 1 text": lambda: quantized(model, RECIPE, static=few)}


def left_alone_arms(model: PreTrainedModel) -> dict[str, Callable]:
    """FP8_DYNAMIC's Linears, and what it leaves alone rounded as well; E4M3 per channel.

    lm_head's input is rounded per token too; the embedding has no input to round. A model
    with tied weights has one tensor for both.
    """
    head, embedding = "lm_head", "model.embed_tokens"
    arms = {RECIPE.name: ()} | (
        {"and lm_head, the embedding too": (head,)} if model.config.tie_word_embeddings else
        {"and lm_head": (head,), "and the embedding": (embedding,), "and both": (head, embedding)})
    return {title: lambda more=more: quantized(model, RECIPE, more=more)
            for title, more in arms.items()}


def kept() -> dict[str, dict]:
    """The models' entries of `MEASURED`, by name; none before `make measure-formats` has run."""
    return json.loads(MEASURED.read_text())["models"] if MEASURED.exists() else {}


def measured(model: str, part: str) -> Losses:
    """The kept figures of "tiny-phi4" or "smollm2".

    `part`: "formats", "activations", "left alone" or "kv cache".
    """
    entry = kept()[model]
    return Losses(entry["losses"]["tokens"], *(
        {title: entry["losses"][column][title] for title in entry["parts"][part]}
        for column in ("kl", "top1", "sqnr")))


def companion(name: str) -> list[str]:
    """The model whose kept figures stand beside this one's, if they are kept: SmolLM2, or, beside
    SmolLM2, the bundled model."""
    other = "tiny-phi4" if name == "smollm2" else "smollm2"
    return [other] if other in kept() else []


def beside(name: str, losses: Losses, part: str,
           against: str = RECIPE.name) -> dict[str, DataFrame]:
    """`table` of what was measured on the model `name`, and of its `companion`'s same part."""
    return {name: table(losses, against)} | {
        other: table(measured(other, part), against) for other in companion(name)}
