"""The statistics against published worked examples, other libraries, and simulation."""

import math

import numpy as np
import pytest
import scipy.stats

from helpers import stats


def pairs(both: int, lost: int, gained: int, neither: int):
    first = [1] * both + [1] * lost + [0] * gained + [0] * neither
    second = [1] * both + [0] * lost + [1] * gained + [0] * neither
    return first, second


def test_wilson_is_newcombes_worked_example():
    # Newcombe (1998), Statistics in Medicine 17:857, table I, method 3: 81 of 263, and 0 of 20
    found = stats.wilson(81, 263)
    assert (round(found.low, 4), round(found.high, 4)) == (0.2553, 0.3662)
    found = stats.wilson(0, 20)
    assert (round(found.low, 4), round(found.high, 4)) == (0.0, 0.1611)


def test_wilson_is_scipys():
    ours = stats.wilson(93, 100)
    theirs = scipy.stats.binomtest(93, 100).proportion_ci(method="wilson")
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), rel=1e-9)
    assert ours.value == 0.93


def test_paired_table_counts_every_item_once():
    first, second = pairs(794, 150, 86, 570)
    table = stats.paired_table(first, second)
    assert table.to_numpy().tolist() == [[794, 150], [86, 570]]
    assert table.loc["right", "wrong"] == 150  # right in the first arm, wrong in the second


def test_the_items_that_changed_are_counted_by_their_direction():
    first, second = pairs(794, 150, 86, 570)
    assert stats.lost_and_gained(first, second) == (150, 86)
    assert stats.lost_and_gained(second, first) == (86, 150)
    assert stats.lost_and_gained([True, False], [False, False]) == (1, 0)


def test_a_difference_of_more_items_than_there_are_is_refused():
    with pytest.raises(ValueError, match="more than 5 items"):
        stats.paired_difference(4, 2, 5)


def test_the_difference_is_that_of_the_items_themselves():
    """The interval from the items, one by one, with half an item added to each of four cells."""
    first, second = (np.array(arm) for arm in pairs(80, 9, 4, 7))
    change = np.concatenate([second - first, [0, 0, -1, 1]])
    weights = np.array([1.0] * 100 + [0.5] * 4)
    mean = np.average(change, weights=weights)
    se = np.sqrt(np.average((change - mean) ** 2, weights=weights) / weights.sum())
    found = stats.paired_difference(9, 4, 100)
    assert found.value == pytest.approx(-0.05)
    assert (found.low, found.high) == pytest.approx(
        (mean - 1.959964 * se, mean + 1.959964 * se), rel=1e-6)


def test_paired_table_keeps_empty_cells():
    assert stats.paired_table([1, 1], [1, 1]).to_numpy().tolist() == [[2, 0], [0, 0]]


def test_paired_arms_of_different_length_are_refused():
    with pytest.raises(ValueError, match="same items"):
        stats.lost_and_gained([1, 0], [1])


@pytest.mark.parametrize("lost, gained", [(6, 0), (5, 0), (3, 1), (10, 2), (4, 4), (150, 86)])
def test_mcnemar_is_the_sign_test_on_the_items_that_differ(lost, gained):
    expected = scipy.stats.binomtest(gained, gained + lost, 0.5).pvalue
    assert stats.mcnemar(lost, gained) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_by_hand():
    assert stats.mcnemar(6, 0) == pytest.approx(2 / 2**6)
    assert stats.mcnemar(0, 0) == 1.0


def test_paired_difference_is_agrestis_example():
    # Agresti, Categorical Data Analysis, approval ratings of the same 1,600 people: the second
    # survey minus the first is -0.04, Wald's interval (-0.059, -0.021); half an item in each cell
    # does not change it at this n.
    found = stats.paired_difference(150, 86, 1600)
    assert found.value == pytest.approx(-0.04)
    assert (round(found.low, 3), round(found.high, 3)) == (-0.059, -0.021)


def test_paired_difference_has_a_width_when_nothing_differs():
    found = stats.paired_difference(0, 0, 100)
    half = 1.959964 / 102  # by hand: variance 1/102 of 102 items
    assert found.value == 0
    assert (found.low, found.high) == pytest.approx((-half, half), rel=1e-5)


def test_paired_difference_covers_the_truth():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        cell = rng.choice(4, size=100, p=[0.86, 0.06, 0.02, 0.06])  # true difference -0.04
        lost, gained = int((cell == 1).sum()), int((cell == 2).sum())
        found = stats.paired_difference(lost, gained, 100)
        covered += found.low <= -0.04 <= found.high
    assert 0.92 <= covered / 400 <= 0.99


def test_six_items_are_the_fewest_that_100_rows_can_tell_from_chance():
    fewest = stats.significant_loss()
    assert fewest == 6
    assert stats.mcnemar(fewest, 0) < 0.05
    assert stats.mcnemar(fewest - 1, 0) > 0.05


@pytest.mark.parametrize("n, loss, gained",
                         [(100, 0.08, 0.0), (100, 0.08, 0.02), (400, 0.03, 0.01)])
def test_mcnemar_power_is_what_simulation_finds(n, loss, gained):
    rng = np.random.default_rng(1)
    counts = rng.multinomial(n, [gained + loss, gained, 1 - 2 * gained - loss], size=4000)
    rejected = [b > c and scipy.stats.binomtest(int(c), int(b + c)).pvalue <= 0.05
                for b, c, _ in counts]
    assert stats.mcnemar_power(n, loss, gained) == pytest.approx(np.mean(rejected), abs=0.025)


def test_detectable_loss_is_where_the_power_is_reached():
    losses = stats.detectable_loss_paired([50, 100, 1319], gained=0.01)
    for n, loss in zip([50, 100, 1319], losses, strict=True):
        assert stats.mcnemar_power(n, loss, 0.01) == pytest.approx(0.8, abs=1e-6)
    assert losses[0] > losses[1] > losses[2]


def test_detectable_loss_at_100_rows_with_nothing_gained():
    # the six items of `significant_loss` must turn up with a chance of 0.8
    loss = stats.detectable_loss_paired(100)
    assert scipy.stats.binom.sf(5, 100, loss) == pytest.approx(0.8, abs=1e-6)
    assert loss == pytest.approx(0.078, abs=0.0005)


def test_no_loss_shows_on_five_rows():
    assert math.isnan(stats.detectable_loss_paired(5))


def test_a_round_that_slows_both_arms_leaves_their_ratio():
    bf16 = np.array([17, 8.5, 34, 17, 10])
    found = stats.ratio_by_round(2 * bf16, bf16)
    assert (found.low, found.value, found.high) == pytest.approx((2, 2, 2))


def test_with_five_rounds_the_interval_is_the_range_of_their_ratios():
    fp8, bf16 = [31, 32, 33, 32, 32.5], [17, 16.8, 17.2, 17.1, 16.9]
    ratios = sorted(a / b for a, b in zip(fp8, bf16, strict=True))
    found = stats.ratio_by_round(fp8, bf16)
    assert (found.low, found.value, found.high) == pytest.approx((ratios[0], ratios[2], ratios[4]))


def test_a_wide_spread_is_said_instead_of_decimals():
    steady = stats.ratio_by_round([32, 32.5, 31.5, 32, 32], [17, 17, 17.1, 16.9, 17])
    assert stats.in_words(steady).startswith("1.88x (1.8")
    noisy = stats.ratio_by_round([20, 32, 45, 32, 36], [17, 10, 25, 17, 14])
    said = stats.in_words(noisy)
    assert said.startswith("about 1.9x (") and "): the rounds spread too widely" in said


def test_the_ratios_interval_covers_the_truth():
    rng = np.random.default_rng(3)
    covered = 0
    for seed in range(60):
        a, b = rng.normal(20, 1, 15), rng.normal(10, 0.5, 15)
        found = stats.ratio_by_round(a, b, seed=seed)
        covered += found.low <= 2 <= found.high
    assert covered / 60 >= 0.85


def test_paired_over_texts_covers_the_truth_as_often_as_it_says():
    """Texts of unequal length and a skewed difference: 95 of 100 intervals hold it, about."""
    random, held = np.random.default_rng(0), 0
    for _ in range(40):
        tokens = random.integers(50, 150, 60)
        first = random.lognormal(size=60)
        gap = random.gamma(2.0, 0.5, 60)  # mean 1
        found = stats.paired_over_texts(first + gap, first, tokens)
        assert found.value == pytest.approx(np.average(gap, weights=tokens))
        held += found.low <= 1 <= found.high
    assert 35 <= held < 40


def test_paired_over_texts_of_equal_arms_is_zero():
    assert stats.paired_over_texts([1.0, 2.0], [1.0, 2.0], [5, 7]) == stats.Interval(0, 0, 0)
