"""Pictures of speed at Phi-4's shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from helpers import arm_names, phi4_slice, plots
from helpers.plots import BF16, FP8, GREY, THIRD

if TYPE_CHECKING:
    from pandas import DataFrame


def ratios(found: DataFrame, ceiling: float, expected: Mapping[str, float] | None = None) -> None:
    """Each arm's speed over bf16's by kind of work, with its interval, 1 and the ceiling as lines.

    `found`: as `throughput.ratios` returns it; `ceiling`: bf16's bytes per token over the others';
    `expected`: the reader's ratio by work, of the card's arm.
    """
    figure, axis = plots.canvas(height=4)
    works, base = list(found["work"].unique()), arm_names.base(found["arm"])
    arms = [arm for arm in found["arm"].unique() if arm != base]
    for place, arm in enumerate(arms):
        colour = FP8 if arm == phi4_slice.CARDS else THIRD
        of_arm = found[found["arm"] == arm]
        at = [works.index(work) + 0.16 * (2 * place - len(arms) + 1) for work in of_arm["work"]]
        axis.errorbar(at, of_arm["ratio"], fmt="os"[place], color=colour, capsize=4, label=arm,
                      yerr=[of_arm["ratio"] - of_arm["low"], of_arm["high"] - of_arm["ratio"]])
        for x, value in zip(at, of_arm["ratio"], strict=True):
            axis.annotate(f"{value:.2f}", (x, value), xytext=(8, 0), va="center",
                          textcoords="offset points", color=colour)
        if expected and arm == phi4_slice.CARDS:
            axis.plot([at[works.index(work)] - 0.1 for work in expected], expected.values(), "D",
                      mfc="none", color=GREY, label=f"your prediction for {arm}")
    for height, colour, said in ((1, BF16, f"as fast as {base}"),
                                 (ceiling, GREY, "ceiling: bytes per token")):
        axis.axhline(height, color=colour, lw=1, ls="--" if height == ceiling else "-", zorder=0)
        axis.annotate(said, (1, height), xycoords=("axes fraction", "data"), xytext=(0, 3),
                      textcoords="offset points", ha="right", color=colour)
    axis.set_xticks(range(len(works)), works)
    axis.set_xlim(-0.5, len(works) - 0.25)
    axis.set_ylim(bottom=0)
    axis.set_ylabel(f"tokens/s over {base}'s, same round")
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    axis.set_title(_finding(found, works, base), loc="left")
    plots.show(figure, f"Speed over {base}'s, median and range of the rounds. " + "; ".join(
        f"{row['arm']}, {row['work']}: {row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
        for row in found.to_dict("records") if row["arm"] != base)
        + f". The ceiling is {ceiling:.2f}.")


def _finding(found: DataFrame, works: list[str], base: str) -> str:
    """What the intervals bear: where the card's arm is faster for sure."""
    arm = phi4_slice.CARDS
    low = found[found["arm"] == arm].set_index("work")["low"]
    faster = [work for work in works if low[work] > 1]
    if not faster:
        return f"Where is {arm} faster than {base}?"
    if len(faster) == len(works):
        return f"{arm} is faster than {base} at all of it"
    return f"{arm} is faster than {base} with {' and '.join(faster)} only"
