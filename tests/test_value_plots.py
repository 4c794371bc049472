"""Titles of `value_plots`: a finding for data that shows it, a question for data that does not."""

import pandas as pd
import pytest
import torch

from helpers import ablation, fp8, plots, value_plots

CODES = torch.arange(256, dtype=torch.uint8)
E4M3, E5M2 = fp8.decode(CODES), fp8.decode(CODES, fp8.E5M2)
EVEN = {448: torch.linspace(-448, 448, 256), 57344: torch.linspace(-57344, 57344, 256)}


@pytest.fixture
def drawn(monkeypatch):
    """What was drawn: the titles of its axes, and the alt text."""
    seen = []
    monkeypatch.setattr(plots, "show", lambda figure, alt: seen.append(
        ([axis.get_title(loc="left") for axis in figure.axes], alt)))
    return seen


def normal(rows=64, columns=256):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def test_number_lines(drawn):
    value_plots.number_lines(E4M3, E5M2)
    value_plots.number_lines(EVEN[448], EVEN[57344])
    (shown, words), (asked, _) = drawn
    assert shown == ["Floats crowd their values around zero",
                     "and keep their relative step far down"]
    assert "12.5 % in E4M3, 25.0 % in E5M2" in words and "100.0 % in INT8" in words
    assert all(title.endswith("?") for title in asked)


def test_weight_error(drawn):
    """Rounded to E4M3 the step bounds the error; rounded to INT8, or damaged, it does not."""
    weight = normal().bfloat16()
    codes, scale = fp8.quantize_per_channel(weight)
    rebuilt = fp8.decode(codes) * scale.float()
    damaged = rebuilt.clone()
    damaged[3, 5] = torch.nan
    for other in (rebuilt, ablation.rounded(weight.float(), "int8"), damaged):
        value_plots.weight_error("a module", weight.float(), other)
    titles = [title for (title,), _ in drawn]
    assert titles[0] == "The grid's step bounds a normal weight's relative error"
    assert titles[1] == titles[2] == "Does the grid's step bound a weight's relative error?"


def test_weight_error_of_rows_of_zeros(drawn):
    value_plots.weight_error("a module", torch.zeros(4, 8), torch.zeros(4, 8))
    assert "unknown" in drawn[0][1]


def test_weights_on_grid(drawn):
    weight = normal(1, 4096)[0]
    scale = float(weight.abs().max()) / 448
    even = (weight / scale).round()  # off by as much everywhere
    value_plots.weights_on_grid("a", 0, weight, fp8.decode(fp8.encode(weight / scale)), scale)
    value_plots.weights_on_grid("a", 0, weight, even, scale)
    assert [titles[1] for titles, _ in drawn] == ["the error grows with the step",
                                                  "does the error grow with the step?"]


def test_token_amax(drawn):
    apart = pd.DataFrame([[1.0, 2.0], [3.0, 7.0]], index=["0.a", "0.b"])
    alike = pd.DataFrame([[1.0, 1.1], [1.0, 1.1]], index=["0.a", "0.b"])
    one_apart = pd.DataFrame([[1.0, 2.0], [3.0, 3.1]], index=["0.a", "0.b"])
    for table in (apart, alike, one_apart):
        value_plots.token_amax(table, ["x", "$"])
    titles = [titles[0] for titles, _ in drawn]
    assert titles[0] == "Every token and every module has its own reach"
    assert titles[1] == titles[2] == "Does every token and every module have its own reach?"


def test_titles_that_are_figures_follow_the_data(drawn):
    value_plots.channel_scales("m", torch.tensor([1.0, 3.0, 2.0]))
    value_plots.channel_error("m", torch.tensor([0.01, 0.03, 0.02]))
    assert drawn[0][0][1] == "sorted: 3.0x from least to largest"
    assert drawn[1][0][1] == "sorted: median 2.00%"


def test_gate_and_up_are_told_apart(drawn):
    value_plots.channel_scales("0.mlp.gate_up_proj", torch.tensor([1.0, 2.0, 5.0, 6.0]))
    assert "of gate 1.00e+00 to 2.00e+00; of up 5.00e+00 to 6.00e+00" in drawn[0][1]


def test_a_map_with_a_hole_and_a_map_of_one_cell(drawn):
    hole = pd.DataFrame({"a": [1.0, 2.0], "b": [torch.nan, 4.0]})
    value_plots.module_map(hole, "dB", "title")
    value_plots.module_map(pd.DataFrame({"a": [1.5]}), "dB", "title")
    assert "from 1.0 to 4.0" in drawn[0][1] and "1 layers by 1 modules" in drawn[1][1]


def test_outliers_of_a_model_of_one_layer_and_of_a_silent_token(drawn):
    row = {"weight scales": 2.0, "tokens": torch.inf, "features": 1234.0}
    value_plots.outliers({"one": pd.DataFrame({"0.mlp.down_proj": row}).T})
    assert "inf between tokens, 1,234 between features" in drawn[0][1]
