"""Tasks of notebook 06: a standard error, McNemar's test, the rows that one point of loss needs."""

import math
from collections.abc import Sequence

from helpers.check.answers import all_same, each, how_many, near, number, results
from helpers.check.task import Key, Mistake, Task, compared

LOSS, BASE = 0.01, 0.93  # a point, of a model that has 93 % right


def _scores() -> list[tuple]:
    """Right and wrong answers, 1 and 0: 90 of 100, 7 of 12, 1,200 of 1,319."""
    return [([1] * right + [0] * (n - right),) for right, n in ((90, 100), (7, 12), (1200, 1319))]


def _p(scores: Sequence[int]) -> float:
    return sum(scores) / len(scores)


def _error_key() -> Key:
    from scipy.stats import sem

    def variance(scores):
        return _p(scores) * (1 - _p(scores))

    return Key(lambda s: float(sem(s)), (
        Mistake(lambda s: math.sqrt(variance(s) / len(s)),
                "This takes the variance over n. lm-eval takes the sample's, over n − 1: "
                "p (1 − p) n / (n − 1), then over n."),
        Mistake(lambda s: math.sqrt(variance(s) * len(s) / (len(s) - 1)),
                "That is one answer's standard deviation. The mean of n varies √n times less."),
        Mistake(lambda s: variance(s) / (len(s) - 1), "That is the variance of the mean: take its "
                                                      "root."),
        Mistake(lambda s: 1.96 * float(sem(s)), "That is half of a 95 % interval; asked is one "
                                                "standard error.")))


def _pairs() -> list[tuple]:
    """Two arms' answers: counts of both right, lost, gained, both wrong."""
    counts = ((84, 6, 0, 10), (88, 3, 1, 8), (1150, 40, 21, 108), (90, 2, 2, 6), (93, 0, 0, 7),
              (60, 4, 15, 21))
    return [([1] * a + [1] * b + [0] * c + [0] * d, [1] * a + [0] * b + [1] * c + [0] * d)
            for a, b, c, d in counts]


PAIRS = ("6 lost, 0 gained", "3 lost, 1 gained", "40 lost, 21 gained", "2 lost, 2 gained",
         "none lost or gained", "4 lost, 15 gained")


def _flips(first, second) -> tuple[int, int]:
    pairs = list(zip(first, second, strict=True))
    return pairs.count((1, 0)), pairs.count((0, 1))


def _exact(first, second) -> float:
    from statsmodels.stats.contingency_tables import mcnemar

    lost, gained = _flips(first, second)
    return float(mcnemar([[0, lost], [gained, 0]], exact=True).pvalue)


def _binomial(first, second, alternative: str) -> float:
    from scipy.stats import binomtest

    lost, gained = _flips(first, second)
    return binomtest(lost, lost + gained, alternative=alternative).pvalue if lost + gained else 1.0


def _chi_square(first, second, correction: int) -> float:
    from scipy.stats import chi2

    lost, gained = _flips(first, second)
    gap = max(0, abs(lost - gained) - correction)
    return float(chi2.sf(gap**2 / (lost + gained), 1)) if lost + gained else 1.0


def _unpaired(first, second) -> float:
    from scipy.stats import fisher_exact

    return float(fisher_exact([[sum(arm), len(arm) - sum(arm)] for arm in (first, second)]).pvalue)


def _z(first, second) -> float:
    from statsmodels.stats.proportion import proportions_ztest

    return float(proportions_ztest([sum(first), sum(second)], [len(first), len(second)])[1])


def _mcnemar_key() -> Key:
    unpaired = ("This compares two independent samples. Both arms answered the same questions, so "
                "only those count that one arm alone has right.")
    return Key(_exact, (
        Mistake(_unpaired, unpaired), Mistake(_z, unpaired),
        Mistake(lambda a, b: _binomial(a, b, "greater"),
                "This is one-sided: it asks for a loss alone. Either arm might have been better, "
                "so both tails count."),
        Mistake(lambda a, b: _chi_square(a, b, 0),
                "This is the χ² approximation. With so few flips take the exact binomial "
                "distribution."),
        Mistake(lambda a, b: _chi_square(a, b, 1),
                "This is the χ² approximation, corrected. With so few flips take the exact "
                "binomial distribution."),
        Mistake(lambda a, b: min(2.0, 2 * _binomial(
            a, b, "greater" if _flips(a, b)[0] >= _flips(a, b)[1] else "less")),
                "Twice the tail is right until it exceeds 1: as many lost as gained is p = 1.")))


def _rows_needed(least: int = 6) -> int:
    """The fewest rows of which, with 80 % chance, at least 6 are lost: by scipy's binomial.

    Six flips in one direction are the least that McNemar's exact test takes for p < 0.05.
    """
    from scipy.stats import binom

    n = least
    while binom.sf(least - 1, n, LOSS) < 0.8:
        n += 1
    return n


def _unpaired_rows() -> float:
    from scipy.stats import norm

    lower, z = BASE - LOSS, norm.ppf(0.975) + norm.ppf(0.8)
    return z**2 * (BASE * (1 - BASE) + lower * (1 - lower)) / LOSS**2


def _rows_key() -> Key:
    variance = BASE * (1 - BASE)
    return Key(_rows_needed(), (
        Mistake(6 / LOSS, "With so many rows six are lost on average, but fewer nearly half the "
                          "time. Four times in five needs more."),
        Mistake(5 / LOSS, "Five flips give p = 0.06: six are needed, and not on average only."),
        Mistake(_unpaired_rows(), "That is for two independent samples. The same questions, "
                                  "paired, need far fewer."),
        Mistake(1.96**2 * variance / LOSS**2, "So many rows make one arm's 95 % interval ± 1 "
                                              "point. The arms are paired: count flips instead."),
        Mistake(variance / LOSS**2, "So many rows make one arm's standard error 1 point. The arms "
                                    "are paired: count flips instead.")))


_close = near(1e-4)

TASKS = (
    Task("standard_error", "06", "easy", 3, "code", "errors of means",
         ("The mean of n answers has the standard deviation of one, over √n.",
          "lm-eval takes the sample's standard deviation, which divides by n − 1.",
          "statistics.stdev(scores) / len(scores) ** 0.5."),
         _error_key, compared(each(number, results(_scores)), all_same(_close),
                              "Sample standard deviation, over the root of n.",
                              how_many(_close, ("90 of 100", "7 of 12", "1,200 of 1,319")),
                              "As scipy's sem.")),
    Task("mcnemar", "06", "hard", 8, "code", "paired tests",
         ("Count the questions that only the first arm has right, and those that only the second "
          "has. All others say nothing.",
          "If both arms were alike, each such flip would fall to either with probability 1/2: a "
          "binomial distribution. scipy.stats.binomtest knows it.",
          "binomtest(lost, lost + gained).pvalue, two-sided as it is; and 1.0 without any flip."),
         _mcnemar_key, compared(each(number, results(_pairs)), all_same(_close),
                                "The exact two-sided binomial test of lost among lost + gained.",
                                how_many(_close, PAIRS), "As statsmodels' exact test.")),
    Task("rows_for_one_point", "06", "hard", 8, "value", "planning an evaluation",
         ("How many questions must be lost, none gained, for p < 0.05? The cell above prints it.",
          "Of n rows the number lost is binomial, with probability 0.01 each.",
          "Find the smallest n with scipy.stats.binom.sf(5, n, 0.01) >= 0.8."),
         _rows_key, compared(number, near(0.01), "Six lost of n rows at 0.01 each, four times in "
                                                 "five.",
                             right_says="If FP8 also gains some, it takes more. The whole test set "
                                        "has 1,319 rows.")),
)
