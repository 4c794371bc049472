"""The ratios of `outliers.table`, against a hook of the test's own and the committed figures."""

import json

import pytest
import torch
from safetensors.torch import load_file

from helpers import ablation, outliers, workspace

DOWN = "model.layers.2.mlp.down_proj"


@pytest.fixture(scope="module")
def tiny(tiny_base):
    return ablation.load(tiny_base)


@pytest.fixture(scope="module")
def table(tiny, tiny_fp8):
    model, tokenizer = tiny
    return outliers.table(model, tiny_fp8, outliers.text(tokenizer))


def test_the_text_is_the_first_held_out_problem(tiny):
    _, tokenizer = tiny
    with open(workspace.data("tiny_gsm8k", "test.jsonl")) as lines:
        row = json.loads(next(lines))
    ids = outliers.text(tokenizer)
    assert ids.shape[0] == 1
    assert tokenizer.decode(ids[0]) == f"Question: {row['question']}\nAnswer: {row['answer']}"


def test_each_ratio_is_that_of_the_input_itself(tiny, tiny_fp8, table):
    model, tokenizer = tiny
    seen = []
    hook = model.get_submodule(DOWN).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        with torch.no_grad():
            model(outliers.text(tokenizer))
    finally:
        hook.remove()
    size = seen[0][0].abs()  # [tokens, features]
    tokens = [float(row.max()) for row in size]
    features = sorted(float(column.median()) for column in size.T)
    scale = load_file(tiny_fp8.path / "model.safetensors")[f"{DOWN}.weight_scale"].float()
    row = table.loc["2.mlp.down_proj"]
    assert row["tokens"] == pytest.approx(max(tokens) / min(tokens))
    assert row["features"] == pytest.approx(features[-1] / features[(len(features) - 1) // 2])
    assert row["weight scales"] == pytest.approx(float(scale.max() / scale.min()))


def test_the_bundled_models_committed_figures_are_these(table):
    kept = outliers.measured()["tiny-phi4"]
    assert list(table.index) == list(kept.index) and list(table) == list(kept)
    # Kept with four figures; sums are in another order on another machine.
    assert table.to_numpy() == pytest.approx(kept.to_numpy(), rel=1e-2)
