"""The outlier experiment: the product stays, and the theory of steps foretells the crossing."""

import pytest
import torch

from helpers import ablation, formats, reach


@pytest.fixture(scope="module")
def linear(tiny_base):
    model, tokenizer = ablation.load(tiny_base)
    (ids,) = formats.texts(tokenizer, 1)
    name = "model.layers.1.mlp.gate_up_proj"
    return reach.inputs(model, ids, name), model.get_submodule(name).weight.detach(), model, ids


def test_an_outlier_in_every_token_changes_no_output(linear):
    x, weight, _, _ = linear
    raised, lowered = reach.with_outlier(x, weight, 1024.0)
    peaks, before = raised.abs().amax(0), x.abs().amax(0)
    assert (peaks != before).sum() == 1 and (lowered != weight).any(0).sum() == 1
    assert (peaks / before).max() == pytest.approx(1024)
    assert torch.equal(raised.double() @ lowered.double().T, x.double() @ weight.double().T)


def test_an_outlier_in_one_token_touches_that_token_only(linear):
    x, weight, _, _ = linear
    raised, same = reach.with_outlier(x, weight, 64.0, slice(0, 1))
    assert torch.equal(same, weight) and torch.equal(raised[1:], x[1:])
    assert (raised[0] != x[0]).sum() == 1


def test_int8_loses_six_db_a_doubling_and_e4m3_nothing(linear):
    """Uniform steps grow with the outlier; a float's do not, until 448 / 2^-6 lies below it."""
    x, weight, _, _ = linear
    table = reach.sweep(x, weight, (1, 32, 64, 4096))["in every token"]
    int8, e4m3 = table["INT8, per token"], table["E4M3, per token"]
    assert int8[1] > e4m3[1] + 6
    assert int8[32] - int8[64] == pytest.approx(6.02, abs=1)
    assert int8[4096] < 1 and abs(e4m3[4096] - e4m3[1]) < 1
    crossing = reach.crossing(table, "row")
    assert 1 < crossing < 32


def test_a_token_of_its_own_scale_is_spared_its_neighbours_outlier(linear):
    x, weight, _, _ = linear
    table = reach.sweep(x, weight, (1, 4096))["in one token"]
    assert table.loc[4096, "INT8, per token"] == table.loc[1, "INT8, per token"]
    assert table.loc[4096, "INT8, per tensor"] < 1
    assert abs(table["E4M3, per tensor"].diff().iloc[-1]) < 1


def test_crossing_lies_between_the_sizes_where_the_lead_changes():
    import pandas as pd

    table = pd.DataFrame({"INT8, per token": [40.0, 34, 28], "E4M3, per token": [31.0, 31, 31]},
                         index=[1, 2, 4])
    assert reach.crossing(table, "row") == pytest.approx(2**1.5)
    assert reach.crossing(table.iloc[:2], "row") is None


def test_token_sqnr_is_the_definition(linear):
    x, weight, _, _ = linear
    found = reach.token_sqnr(x, weight, "int8", "row")
    error = ablation.rounded(x, "int8") @ weight.T - x @ weight.T
    assert float(found[3]) == pytest.approx(
        ablation.sqnr(x[3] @ weight.T, x[3] @ weight.T + error[3]), abs=0.05)


def test_every_linear_is_measured_and_smollm2s_are_kept(linear):
    _, _, model, ids = linear
    table = reach.modules(model, ids)
    assert len(table) == 16 and list(table.columns) == ["features", *reach.TITLES.values()]
    assert len(reach.measured("smollm2")) == 210
    # what a wide range costs INT8 and not E4M3 is seen without an artificial outlier
    wide = reach.measured("smollm2").nlargest(10, "features")
    assert (wide["E4M3, per tensor"] > wide["INT8, per tensor"]).all()
