"""Intervals, paired tests, and what n rows can and cannot show.

Everything is computed by scipy or statsmodels, from counts: how many of n items were right, and,
of two arms that answered the same items, how many only the first has right (`lost`) and how many
only the second (`gained`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval, in the unit of the estimate."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"


def wilson(right: int, n: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion: `right` of `n` items.

    Unlike value ± 1.96 stderr it stays inside [0, 1] and has a width when all items are right.
    Source: Wilson (1927), JASA 22:209; statsmodels `proportion_confint`.
    """
    from statsmodels.stats.proportion import proportion_confint

    low, high = proportion_confint(right, n, 1 - confidence, method="wilson")
    return Interval(right / n, float(low), float(high))


def paired_table(first: Sequence[int], second: Sequence[int],
                 names: tuple[str, str] = ("bf16", "fp8")) -> "pd.DataFrame":
    """The 2 x 2 table of two arms' items: rows the first arm, columns the second.

    `first` and `second`: 1 (right) or 0 (wrong) for each item, position i of both being the same
    problem. The table holds counts. Only the items off its diagonal, on which the arms differ, say
    anything about a difference between them.
    """
    import pandas as pd

    if len(first) != len(second):
        raise ValueError(f"paired arms need the same items: {len(first)} and {len(second)}")
    label = {1: "right", 0: "wrong"}
    order = ["right", "wrong"]
    table = pd.crosstab(
        pd.Series(first, dtype=int).map(label), pd.Series(second, dtype=int).map(label)
    ).reindex(index=order, columns=order, fill_value=0)
    return table.rename_axis(index=names[0], columns=names[1])


def lost_and_gained(first: Sequence[int], second: Sequence[int]) -> tuple[int, int]:
    """How many items only the first arm has right, and how many only the second."""
    table = paired_table(first, second)
    return int(table.loc["right", "wrong"]), int(table.loc["wrong", "right"])


def mcnemar(lost: int, gained: int) -> float:
    """Exact two-sided p of "both arms are right equally often", from the items that differ.

    Source: McNemar (1947), Psychometrika 12:153; statsmodels `mcnemar(exact=True)`. 1.0 when no
    item differs: no evidence of a difference, which is not evidence of none.
    """
    from statsmodels.stats.contingency_tables import mcnemar as test

    return float(test([[0, lost], [gained, 0]], exact=True).pvalue)


def paired_difference(lost: int, gained: int, n: int, confidence: float = 0.95) -> Interval:
    """Second arm's accuracy minus the first's on the same `n` items, with its interval.

    Wald's interval after adding half an item to each cell of the 2 x 2 table, so that it has a
    width even when no item differs. Its estimate is the plain difference of the two accuracies.
    Source: Agresti and Min (2005), Statistics in Medicine 24:729.
    """
    from scipy.stats import norm
    from statsmodels.stats.weightstats import DescrStatsW

    if lost + gained > n:
        raise ValueError(f"{lost} lost and {gained} gained are more than {n} items")
    unchanged = n - lost - gained  # both cells of the diagonal, hence 2 x 0.5 below
    cells = DescrStatsW([0, -1, 1], weights=[unchanged + 1, lost + 0.5, gained + 0.5])
    low, high = norm.interval(confidence, cells.mean, cells.std / np.sqrt(cells.nobs))
    return Interval((gained - lost) / n, float(low), float(high))


def significant_loss(alpha: float = 0.05) -> int:
    """The fewest items that must be lost, none being gained, for McNemar's exact test to reject.

    6 at alpha 0.05, since 2 x 0.5^6 = 0.031 and 2 x 0.5^5 = 0.063: on 100 rows no observed loss
    under 6 points can be told from chance, however the items are paired.
    """
    from scipy.stats import binomtest

    items = 1
    while binomtest(0, items).pvalue > alpha:
        items += 1
    return items


def mcnemar_power(n: int, loss: float, gained: float = 0.0, alpha: float = 0.05) -> float:
    """The chance that n paired rows show a true loss by McNemar's exact two-sided test.

    `gained` is the share of items that only the second arm gets right, `gained + loss` that only
    the first does, so that `loss` is the true loss of accuracy. Summed over the number of items
    that differ, which is binomial; given that number, the items lost are binomial too. Only
    rejections in the direction of a loss count. Source: Duffy (1984), Biometrics 40:1005, the
    unconditional power.
    """
    from scipy.stats import binom

    differ = np.arange(n + 1)
    critical = binom.isf(alpha / 2, differ, 0.5) + 1
    rejects = binom.sf(critical - 1, differ, (gained + loss) / (2 * gained + loss))
    return float(binom.pmf(differ, n, 2 * gained + loss) @ rejects)


def detectable_loss_paired(n: int | Sequence[int], gained: float = 0.0, power: float = 0.8,
                           alpha: float = 0.05) -> float | np.ndarray:
    """The smallest true loss of accuracy that n paired rows show with this power.

    `n` is a number or an array; the answer has its shape, as a fraction, NaN where no loss is
    large enough. `gained` as in `mcnemar_power`: 0 is the best case, in which no item changes the
    other way; the noise floor (bf16 against itself) says what is realistic. At 100 rows: 0.078
    (0.096 with `gained` 0.01).
    """
    return _per_n(n, 1 - 2 * gained - 1e-6,
                  lambda rows, loss: mcnemar_power(rows, loss, gained, alpha) - power)


def ratio_by_round(numerator: Sequence[float], denominator: Sequence[float],
                   confidence: float = 0.95, seed: int = 0) -> Interval:
    """Median over the rounds of one arm over the other, with a bootstrap percentile interval.

    `numerator[i]` and `denominator[i]` were measured in round i, one right after the other: a
    machine that slows down in that round slows both, and their ratio stays. The rounds are
    resampled 9,999 times. With 5 rounds the interval is the range of their ratios, which holds the
    true median in 94 of 100 cases (1 - 2 * 0.5^5); with fewer it holds it less often.
    Source: scipy `bootstrap`.
    """
    from scipy.stats import bootstrap

    ratios = np.asarray(numerator, dtype=float) / np.asarray(denominator, dtype=float)
    found = bootstrap((ratios,), np.median, confidence_level=confidence, method="percentile",
                      rng=np.random.default_rng(seed)).confidence_interval
    return Interval(float(np.median(ratios)), float(found.low), float(found.high))


def spreads(ratio: Interval) -> bool:
    """Whether a ratio's interval is too wide, over a quarter of it, for two decimals."""
    return (ratio.high - ratio.low) / ratio.value > 0.25


def brief(ratio: Interval) -> str:
    """A ratio with as many decimals as its interval bears: "1.88x" or "about 1.9x"."""
    return f"about {ratio.value:.1f}x" if spreads(ratio) else f"{ratio.value:.2f}x"


def in_words(ratio: Interval) -> str:
    """A ratio as `brief` writes it, and its interval in brackets."""
    both = f"{brief(ratio)} ({ratio.low:.2f} to {ratio.high:.2f})"
    return f"{both}: the rounds spread too widely to say more" if spreads(ratio) else both


def _per_n(n: int | Sequence[int], largest: float,
           missing: Callable[[int, float], float]) -> float | np.ndarray:
    """Where `missing(rows, loss)` turns positive between 0 and `largest`, for each n."""
    from scipy.optimize import brentq

    def solve(rows: int) -> float:
        if missing(rows, largest) < 0:
            return float("nan")
        return brentq(lambda loss: missing(rows, loss), 1e-6, largest)

    found = np.array([solve(int(rows)) for rows in np.atleast_1d(n)])
    return found if np.ndim(n) else float(found[0])


def paired_over_texts(first, second, tokens, confidence: float = 0.95) -> Interval:
    """Mean per token of the first arm less the second's, with an interval over texts.

    `first`, `second`: each text's mean per token in either arm, float [texts]; `tokens`: how many
    tokens it has. Texts are drawn with replacement, for the tokens of one text are not
    independent. Source: Efron (1987), JASA 82:171 (BCa); scipy `bootstrap`, 9,999 draws, seed 0.
    """
    from scipy.stats import bootstrap

    gap, tokens = np.asarray(first) - np.asarray(second), np.asarray(tokens, dtype=float)

    def mean(gap, tokens, axis=-1):
        return (gap * tokens).sum(axis) / tokens.sum(axis)

    value = float(mean(gap, tokens))
    if np.all(gap == gap[0]):  # nothing varies, so there is nothing to draw
        return Interval(value, value, value)
    found = bootstrap((gap, tokens), mean, paired=True, vectorized=True, n_resamples=9999,
                      confidence_level=confidence, method="BCa", rng=0).confidence_interval
    return Interval(value, float(found.low), float(found.high))
