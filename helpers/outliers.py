"""How far apart a model's channels and tokens lie: what one scale for many values has to bear.

`scripts/measure_outliers.py` measures the bundled model and SmolLM2 with it, and writes the figures
to `data/measured/outliers.json`, so that a notebook shows the second where it is not at hand.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from helpers import ablation, checkpoint, workspace
from helpers.checkpoint import Checkpoint

if TYPE_CHECKING:
    from pandas import DataFrame
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MEASURED = workspace.data("measured", "outliers.json")


def text(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The text all models read: the first held-out problem with its answer, int64 [1, tokens]."""
    with open(workspace.data("tiny_gsm8k", "test.jsonl")) as lines:
        return ablation.encoded(tokenizer, [json.loads(next(lines))])[0]


def table(model: PreTrainedModel, fp8: Checkpoint, ids: Tensor) -> DataFrame:
    """How far apart scales, tokens and features lie, by module in the model's order.

    `ids`: int64 [1, tokens]. "weight scales" is the largest output channel's scale over the
    smallest's, from the FP8 checkpoint; "tokens" is the amax of the loudest token of the module's
    input over the quietest's; "features" is the input's largest feature over
    the median one, each by its median magnitude over the tokens: a feature that is loud in one
    token alone (a massive activation) is not large by it.
    """
    import pandas as pd

    by_token = ablation.observe(model, ids, lambda x: x.abs().amax(dim=1))
    by_feature = ablation.observe(model, ids, lambda x: x.abs().median(dim=0).values)
    rows = {}
    for name, tokens in by_token.items():
        scales = checkpoint.read_tensor(fp8, f"{name}.weight_scale").float()
        features = by_feature[name]
        rows[name.removeprefix("model.layers.")] = {
            "weight scales": float(scales.max() / scales.min()),
            "tokens": float(tokens.max() / tokens.min()),
            "features": float(features.max() / features.median())}
    return pd.DataFrame(rows).T


def measured() -> dict[str, DataFrame]:
    """The committed figures: a table as `table` makes it, by the model's name."""
    import pandas as pd

    kept = json.loads(MEASURED.read_text())
    return {name: pd.DataFrame(entry["modules"]).T for name, entry in kept["models"].items()}
