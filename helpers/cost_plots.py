"""Pictures of what FP8 costs: arms beside one another, an outlier's price, a tensor core's sums."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from helpers import plots
from helpers.plots import BF16, FP8, GREY, THIRD

if TYPE_CHECKING:
    from pandas import DataFrame

WIDE = 20  # the largest difference over the median one from which a linear axis hides the others


def differences(tables: dict[str, DataFrame], against: str) -> None:
    """Each arm's KL minus one arm's, with its interval; a panel a model, with that one's own KL.

    `tables`: a model's name to `formats.table`. A hollow mark's interval holds zero.
    """
    figure, axes = plots.canvas(width=11, height=0.42 * max(map(len, tables.values())) + 1.6,
                                columns=len(tables))
    axes = axes if len(tables) > 1 else [axes]
    for axis, (name, table) in zip(axes, tables.items(), strict=True):
        for row, (_, line) in enumerate(table.iterrows()):
            colour = {"less": THIRD, "more": FP8}.get(line["told apart"], GREY)
            axis.plot([line["low"], line["high"]], [row, row], color=colour, lw=2)
            axis.plot([line["difference"]], [row], "o", color=colour, ms=7,
                      mfc="white" if line["told apart"] == "no" else colour)
        axis.axvline(0, color="black", lw=0.8)
        bent = _logarithmic_beyond(axis, table)
        axis.set_yticks(range(len(table)), table.index)
        axis.invert_yaxis()
        axis.set_xlabel(f"KL minus that of {against}, nats per token{bent}")
        axis.set_title(f"{name}: at 0 is a KL of {table.loc[against, 'KL']:.2g} nats", loc="left")
    said = [f"{name}, {table.loc[against, 'KL']:.2g} nats: " + ", ".join(
        f"{arm} {line['told apart']}" for arm, line in table.iterrows() if arm != against)
        for name, table in tables.items()]
    plots.show(figure, f"KL of each arm minus that of {against}, with 95 % intervals: "
                       f"{'; '.join(said)}.")


def _logarithmic_beyond(axis, table: DataFrame) -> str:
    """Make the axis logarithmic away from zero where one arm is far beyond all others; say so.

    Returns what the axis' label has to add, "" for an axis that is linear throughout.
    """
    sizes = table["difference"].abs().sort_values()
    if len(sizes) < 3 or sizes.iloc[-1] < WIDE * sizes[sizes > 0].median():
        axis.margins(x=0.08)
        axis.locator_params(axis="x", nbins=5)
        axis.xaxis.set_major_formatter("{x:g}")
        return ""
    near = 10.0 ** round(math.log10(sizes[sizes > 0].median()))
    axis.set_xscale("symlog", linthresh=near)
    low, high = min(-near, 1.5 * table["low"].min()), max(2 * near, 1.5 * table["high"].max())
    axis.set_xlim(low, high)
    ticks = [tick for tick in [0.0] + [sign * near * 10**power for sign in (-1, 1)
                                       for power in range(5)] if low <= tick <= high]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_xticks([], minor=True)
    return f"\n(logarithmic beyond ±{near:g})"


def outlier_sweep(tables: dict[str, DataFrame]) -> None:
    """The median token's SQNR against an outlier's size; a panel each of `reach.sweep`'s tables."""
    figure, axes = plots.canvas(width=11, height=3.8, columns=len(tables))
    marks = {"INT8, per token": (BF16, "o-"), "INT8, per tensor": (BF16, "s--"),
             "E4M3, per token": (FP8, "o-"), "E4M3, per tensor": (FP8, "s--")}
    for axis, (where, table) in zip(axes, tables.items(), strict=True):
        for column, (colour, style) in marks.items():
            axis.plot(table.index, table[column], style, color=colour, ms=4, label=column)
        axis.set_xscale("log", base=2)
        axis.set_xticks(table.index[::2], [f"{size:,}" for size in table.index[::2]])
        axis.set_xlabel("the raised feature, times its size as trained")
        axis.set_ylabel("SQNR of the median token's output, dB")
        axis.set_title(f"One feature raised {where}", loc="left")
    axes[-1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    last = {where: table.iloc[-1].round(0).astype(int) for where, table in tables.items()}
    plots.show(figure, "Signal to quantization noise of a Linear's output while one input feature "
                       "is raised; at the largest size: " + "; ".join(
        f"{where}, " + ", ".join(f"{column} {value} dB" for column, value in line.items())
        for where, line in last.items()) + ".")


def outlier_modules(tables: dict[str, DataFrame]) -> None:
    """E4M3's SQNR minus INT8's, one point a module, against its largest feature over its median.

    `tables`: a model's name to `reach.modules`. A panel for scales per token, one per tensor.
    """
    figure, axes = plots.canvas(width=11, height=3.8, columns=2)
    ahead = []
    for axis, scope in zip(axes, ("per token", "per tensor"), strict=True):
        for (name, table), colour, mark in zip(tables.items(), (BF16, FP8), "s^", strict=False):
            lead = table[f"E4M3, {scope}"] - table[f"INT8, {scope}"]
            axis.plot(table["features"], lead, mark, ms=4, alpha=0.7, color=colour, label=name)
            ahead.append(f"{name} {scope} in {(lead > 0).sum()} of {len(lead)} modules")
        axis.axhline(0, color="black", lw=0.8)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_xlabel("largest / median feature of the module's input, in its median token")
        axis.set_ylabel("E4M3's SQNR minus INT8's, dB")
        axis.set_title(f"Scales {scope}: above the line E4M3 is better", loc="left", fontsize=11)
    axes[-1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    plots.show(figure, "E4M3's signal to quantization noise minus INT8's, over how far a module's "
                       "largest input feature stands out. E4M3 is ahead: " + "; ".join(ahead) + ".")


def accumulated(table: DataFrame) -> None:
    """Relative error of a sum over its length, beside quantization's; `accumulation.errors`."""
    figure, axis = plots.canvas(width=9, height=3.8)
    for column, label, colour, style in (
            ("quantization", "rounding to E4M3 itself", GREY, "D-"),
            ("fast", "H100, fast: what vLLM runs", FP8, "o-"),
            ("slow", "H100, slow", THIRD, "^-"), ("float32", "this CPU, float32", BF16, "s-")):
        axis.loglog(table.index, table[column], style, color=colour, ms=5, label=label)
    axis.set_xticks(table.index, [f"{length:,}" for length in table.index])
    axis.set_xticks([], minor=True)
    axis.set_xlabel("K, the number of products in a sum")
    axis.set_ylabel("relative error")
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    share = table["fast"].iloc[-1] / table["quantization"].iloc[-1]
    axis.set_title(f"At K = {table.index[-1]:,} fast sums err {share:.0%} as much as rounding does",
                   loc="left")
    plots.show(figure, "Relative error over K from " + "; ".join(
        f"{column} {table[column].iloc[0]:.1e} to {table[column].iloc[-1]:.1e}"
        for column in ("quantization", "fast", "slow", "float32")) + ".")
