"""Tasks of notebook 07: a ratio round by round, the crossing point, what an H100 should reach."""

from statistics import mean, median

from helpers.check.answers import all_same, each, how_many, near, number, results
from helpers.check.task import Key, Mistake, Task, compared
from helpers.check.tasks_00 import _phi4


def _rounds() -> list[tuple]:
    """FP8's and bf16's tokens/s by round; the machine slows down, once between the two arms."""
    return [([19.0, 19.6, 11.0, 11.4, 11.1], [10.0, 10.2, 9.8, 6.0, 5.9]),
            ([31.0, 30.4, 16.9, 17.2, 17.1], [17.0, 16.9, 16.8, 9.3, 9.4])]


def _ratio_key() -> Key:
    import numpy as np

    return Key(lambda fp8, bf16: float(np.median(np.divide(fp8, bf16))), (
        Mistake(lambda fp8, bf16: median(fp8) / median(bf16),
                "This sets one round's FP8 beside another round's bf16, and the machine slowed "
                "down in between. Divide within each round first."),
        Mistake(lambda fp8, bf16: mean(fp8) / mean(bf16),
                "This is the ratio of the means, in which the round that slowed half-way counts in "
                "full. Divide within each round, then take the median."),
        Mistake(lambda fp8, bf16: mean(a / b for a, b in zip(fp8, bf16, strict=True)),
                "Dividing round by round is right. The mean follows the one round that slowed "
                "half-way; the median does not."),
        Mistake(lambda fp8, bf16: median(b / a for a, b in zip(fp8, bf16, strict=True)),
                "Upside down: FP8 over bf16."),
        Mistake(lambda fp8, bf16: max(fp8) / max(bf16),
                "This takes each arm's best round, which chance picks.")))


def _machines() -> list[tuple]:
    """Bytes read a step, weights multiplied, bytes/s, FLOP/s: Phi-4 on an A40 and on an H100.

    FLOP/s: the data sheets' dense figures, 149.7 TFLOP/s in bf16 (A40), 1,979 in FP8 (H100 SXM).
    """
    from helpers import roofline

    phi4 = _phi4()
    fp8, bf16 = (roofline.decode_bytes(phi4, arm) for arm in ("fp8", "bf16"))
    speed = {name: roofline.named(name)["bandwidth_gb_s"] * 1e9 for name in ("A40", "H100 SXM")}
    return [(fp8, bf16 // 2, speed["A40"], 149.7e12), (bf16, bf16 // 2, speed["A40"], 149.7e12),
            (fp8, bf16 // 2, speed["H100 SXM"], 1979e12)]


MACHINES = ("FP8 on an A40", "bf16 on an A40", "FP8 on an H100")


def _first_bound(nbytes, weights, bandwidth, flops) -> int:
    """By trying: the fewest streams whose products take as long as one reading of the weights."""
    n = 1
    while n * 2 * weights / flops < nbytes / bandwidth:
        n += 1
    return n


def _crossing_key() -> Key:
    return Key(_first_bound, (
        Mistake(lambda b, w, s, f: b / s * f / w,
                "Each weight costs a stream two operations, a multiplication and an addition."),
        Mistake(lambda b, w, s, f: 2 * w / f / (b / s), "Upside down: that is the share of a "
                                                        "reading that one stream's products take."),
        Mistake(lambda b, w, s, f: f / s, "That is operations per byte, the machine's. Each weight "
                                          "takes two operations per stream, and its bytes: put "
                                          "them in."),
        Mistake(lambda b, w, s, f: b / s * f / 2 / b, "You took a byte for a weight.")))


def _h100_key() -> Key:
    from helpers import roofline

    fp8, bf16 = (roofline.decode_bytes(_phi4(), arm) for arm in ("fp8", "bf16"))
    speed = roofline.named("H100 SXM")["bandwidth_gb_s"] * 1e9
    return Key(0.67 * speed / fp8, (
        Mistake(speed / fp8, "That is the ceiling. The A40 came to 67 % of its own."),
        Mistake(0.67 * speed / bf16, "That is bf16's: FP8 reads 14.66 GB."),
        Mistake(speed / fp8 / 0.67, "Divided instead of multiplied: 67 % of the ceiling is less "
                                    "than it.")))


def _about(given: float, other: float) -> bool:
    """Streams are whole, and an answer may be the crossing itself or the next whole number."""
    return abs(given - other) <= max(1.0, 0.005 * other) if other > 10 else near(0.005)(
        given, other)


TASKS = (
    Task("ratio_by_round", "07", "easy", 4, "code", "comparing arms",
         ("What do the two figures of one round have in common that two rounds have not?",
          "Divide FP8 by bf16 within each round: five ratios.",
          "One ratio is off, because the machine slowed down between the arms: take the median, "
          "statistics.median."),
         _ratio_key, compared(each(number, results(_rounds)), all_same(near(0.003)),
                              "The median of the five ratios.",
                              how_many(near(0.003), ("the first machine", "the second"), "{:.2f}"
                                       .format))),
    Task("h100_expected", "07", "easy", 2, "value", "scaling by bandwidth",
         ("First the ceiling: bandwidth over bytes per token.",
          "3350 / 14.66 tokens/s is the ceiling.",
          "67 % of it."),
         _h100_key, compared(number, near(0.02), "The ceiling is 3350 / 14.66 tokens/s; take 67 % "
                                                 "of it.",
                             right_says="Rather too high: what each token costs however fast the "
                                        "memory is weighs more on a faster GPU.")),
    Task("crossing_streams", "07", "hard", 8, "code", "memory against arithmetic",
         ("Two times per step: that of reading the weights once, and that of computing with them "
          "for n streams.",
          "Reading takes nbytes / bandwidth. A stream multiplies each weight and adds the product: "
          "2 × weights operations.",
          "They are equal at n = nbytes / bandwidth × flops / (2 × weights)."),
         _crossing_key, compared(each(number, results(_machines)), all_same(_about),
                                 "Set the time of reading equal to n times the time of computing.",
                                 how_many(_about, MACHINES, "{:.0f}".format),
                                 "On an A40 about 112 streams for FP8 and 215 for bf16: between "
                                 "them FP8's gain falls to nothing.")),
)
