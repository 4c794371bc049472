"""Intervals, paired tests, and what n rows can and cannot show.

Everything is computed by scipy or statsmodels. Items are arrays of 0 and 1 (wrong, right), and two
arms are paired when position i of both is the same problem.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval, in the unit of the estimate."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"


def stderr(correct) -> float:
    """Standard error of the mean of n items, as lm-eval computes it: sample sd over sqrt(n)."""
    from scipy.stats import sem

    return float(sem(np.asarray(correct, dtype=float), ddof=1))


def wilson(correct, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion, from n items of 0 and 1.

    Unlike value ± 1.96 stderr it stays inside [0, 1] and has a width when all items are right.
    Source: Wilson (1927), JASA 22:209; statsmodels `proportion_confint`.
    """
    from statsmodels.stats.proportion import proportion_confint

    correct = np.asarray(correct)
    low, high = proportion_confint(correct.sum(), correct.size, 1 - confidence, method="wilson")
    return Interval(float(correct.mean()), float(low), float(high))


def paired_table(first, second, names: tuple[str, str] = ("bf16", "fp8")):
    """The 2 x 2 table of items: rows the first arm, columns the second, right before wrong.

    A DataFrame of counts. Off the diagonal are the items on which the arms differ; nothing else
    in the table says anything about a difference.
    """
    import pandas as pd

    first, second = _paired(first, second)
    label = {1: "right", 0: "wrong"}
    order = ["right", "wrong"]
    table = pd.crosstab(
        pd.Series(first).map(label), pd.Series(second).map(label)
    ).reindex(index=order, columns=order, fill_value=0)
    return table.rename_axis(index=names[0], columns=names[1])


def mcnemar(first, second) -> float:
    """Exact two-sided p of "both arms are right equally often", from the items that differ.

    Source: McNemar (1947), Psychometrika 12:153; statsmodels `mcnemar(exact=True)`. 1.0 when no
    item differs: no evidence of a difference, which is not evidence of none.
    """
    from statsmodels.stats.contingency_tables import mcnemar as test

    return float(test(paired_table(first, second).to_numpy(), exact=True).pvalue)


def paired_difference(first, second, confidence: float = 0.95) -> Interval:
    """Second arm's accuracy minus the first's, with the interval of the paired difference.

    Wald's interval after adding half an item to each cell of the 2 x 2 table, so that it has a
    width even when no item differs. Its estimate is the plain difference of the two accuracies.
    Source: Agresti and Min (2005), Statistics in Medicine 24:729.
    """
    from scipy.stats import norm
    from statsmodels.stats.weightstats import DescrStatsW

    table = paired_table(first, second).to_numpy()
    both, lost, gained, neither = table.ravel()
    cells = DescrStatsW([0, -1, 1, 0], weights=table.ravel() + 0.5)
    low, high = norm.interval(confidence, cells.mean, cells.std / np.sqrt(cells.nobs))
    return Interval(float((gained - lost) / table.sum()), float(low), float(high))


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
    that differ, which is binomial; given it, the items lost are binomial too. Only rejections
    that call it a loss count. Source: Duffy (1984), Biometrics 40:1005, the unconditional power.
    """
    from scipy.stats import binom

    differ = np.arange(n + 1)
    critical = binom.isf(alpha / 2, differ, 0.5) + 1
    rejects = binom.sf(critical - 1, differ, (gained + loss) / (2 * gained + loss))
    return float(binom.pmf(differ, n, 2 * gained + loss) @ rejects)


def detectable_loss_paired(n, gained: float = 0.0, power: float = 0.8, alpha: float = 0.05):
    """The smallest true loss of accuracy that n paired rows show with this power.

    `n` is a number or an array; the answer has its shape, as a fraction, NaN where no loss is
    large enough. `gained` as in `mcnemar_power`: 0 is the best case, no item the other way; the
    noise floor (bf16 against itself) says what is realistic. At 100 rows: 0.078 (0.096 with
    `gained` 0.01).
    """
    return _per_n(n, 1 - 2 * gained - 1e-6,
                  lambda rows, loss: mcnemar_power(rows, loss, gained, alpha) - power)


def detectable_loss_unpaired(n, accuracy: float = 0.93, power: float = 0.8, alpha: float = 0.05):
    """The smallest true loss that two runs of n rows show when only their accuracies are known.

    Two-sided z test of two independent proportions, statsmodels `power_proportions_2indep`.
    `n` and the answer as in `detectable_loss_paired`. At 100 rows and 0.93: 0.136.
    """
    from statsmodels.stats.proportion import power_proportions_2indep

    return _per_n(n, accuracy - 1e-6, lambda rows, loss: power_proportions_2indep(
        -loss, accuracy, rows, alpha=alpha, return_results=False) - power)


def ratio_by_round(numerator, denominator, confidence: float = 0.95, seed: int = 0) -> Interval:
    """Median over the rounds of one arm over the other, with a bootstrap percentile interval.

    `numerator[i]` and `denominator[i]` are of round i, measured next to each other: a machine that
    is slower in one round slows both, and their ratio stays. The rounds are resampled 9,999 times.
    With 5 rounds the interval is the range of their ratios, which holds the true median in 94 of
    100 cases (1 - 2 * 0.5^5); with fewer it holds it less often.
    Source: scipy `bootstrap`.
    """
    from scipy.stats import bootstrap

    ratios = np.asarray(numerator, dtype=float) / np.asarray(denominator, dtype=float)
    found = bootstrap((ratios,), np.median, confidence_level=confidence, method="percentile",
                      rng=np.random.default_rng(seed)).confidence_interval
    return Interval(float(np.median(ratios)), float(found.low), float(found.high))


def in_words(ratio: Interval) -> str:
    """A ratio with as many decimals as its interval bears, and a word where it bears none."""
    width = (ratio.high - ratio.low) / ratio.value
    interval = f"95 % interval {ratio.low:.2f} to {ratio.high:.2f}"
    if width > 0.25:
        return f"about {ratio.value:.1f}x: the rounds spread too widely to say more ({interval})"
    return f"{ratio.value:.2f}x, {interval}"


def _paired(first, second) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.asarray(first).astype(int), np.asarray(second).astype(int)
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(f"paired arms need the same items: {first.shape} and {second.shape}")
    return first, second


def _per_n(n, largest: float, missing):
    """Where `missing(rows, loss)` turns positive between 0 and `largest`, for each n."""
    from scipy.optimize import brentq

    def solve(rows: int) -> float:
        if missing(rows, largest) < 0:
            return float("nan")
        return brentq(lambda loss: missing(rows, loss), 1e-6, largest)

    found = np.array([solve(int(rows)) for rows in np.atleast_1d(n)])
    return found if np.ndim(n) else float(found[0])
