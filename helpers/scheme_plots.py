"""Pictures of schemes: what they lose against what they read, and against how fast they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from helpers import plots, schemes
from helpers.plots import BF16, FP8, GREY, THIRD

if TYPE_CHECKING:
    from pandas import DataFrame

MARKERS = "osD"


def _colour(title: str) -> str:
    return FP8 if title.startswith("FP8") else THIRD if title.startswith("INT8") else GREY


def kl_against_bytes(table: DataFrame, model: str) -> None:
    """What each scheme loses against what it reads; `table`: `schemes.beside`, on `model`."""
    figure, axis = plots.canvas(width=9, height=4.4)
    of_schemes = table.drop(index="bf16")
    for title, line in of_schemes.iterrows():
        axis.errorbar(line["GB read per token"], line["KL"], fmt="o", color=_colour(title),
                      yerr=[[line["KL"] - line["low"]], [line["high"] - line["KL"]]], capsize=3)
    read = table.loc["bf16", "GB read per token"]
    axis.axvline(read, color=BF16, lw=1, ls="--")
    axis.annotate("bf16: loses nothing", (read, 0.5), xycoords=("data", "axes fraction"),
                  xytext=(-4, 0), textcoords="offset points", rotation=90, ha="right", va="center",
                  color=BF16)
    _logarithmic(axis)
    axis.set_xlim(0, 1.05 * read)
    for _, group in of_schemes.groupby(of_schemes["bits per weight"] >= 8):
        _label(axis, dict(zip(group.index, zip(group["GB read per token"], group["KL"],
                                               strict=True), strict=True)))
    axis.set_xlabel("GB read per token of Phi-4")
    axis.set_ylabel(f"KL from the unquantized model,\nnats per token ({model})")
    four, eight = (of_schemes.loc[mask, "KL"] for mask in (
        of_schemes["bits per weight"] < 8, of_schemes["bits per weight"] >= 8))
    axis.set_title("The second halving of the bytes costs more than the first"
                   if four.min() > eight.max() else "What does a scheme lose, what does it read?",
                   loc="left")
    plots.show(figure, f"KL on {model} over GB read per token of Phi-4: " + "; ".join(
        f"{title} {line['GB read per token']:.1f} GB, {line['KL']:.5f} nats "
        f"({line['low']:.5f} to {line['high']:.5f})" for title, line in of_schemes.iterrows())
        + f"; bf16 {read:.1f} GB, 0.")


def _logarithmic(axis) -> None:
    from matplotlib.ticker import LogLocator

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()


def _label(axis, places: dict[str, tuple[float, float]]) -> None:
    """Write the names of schemes at their places, each clear of the one below it."""
    axis.figure.draw_without_rendering()  # so that heights on the page are known
    lowest = -float("inf")
    for title, place in sorted(places.items(), key=lambda each: each[1][1]):
        height = axis.transData.transform(place)[1] * 72 / axis.figure.dpi  # in points
        lowest = max(height - 4, lowest + 14)
        axis.annotate(title, place, xytext=(9, lowest - height), textcoords="offset points",
                      color=_colour(title),
                      bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})


def kl_against_speed(table: DataFrame, speed: DataFrame, model: str) -> None:
    """What each scheme that was timed loses against its speed over bf16's, by kind of work.

    `table`: `schemes.beside`; `speed`: `scheme_choice.measured`.
    """
    figure, axis = plots.canvas(width=9, height=4)
    works = [column for column in speed.columns if column != "measured on"]
    shown = {recipe: speed.loc[schemes.titled(recipe), works].dropna().astype(float)
             for recipe in schemes.RECIPES if schemes.titled(recipe) in speed.index}
    for title, found in shown.items():
        kl, colour = table.loc[title, "KL"], _colour(title)
        axis.plot([found.min(), found.max()], [kl, kl], color=colour, lw=1, alpha=0.5)
        for work, ratio in found.items():
            axis.plot(ratio, kl, MARKERS[works.index(work)], color=colour)
    axis.axvline(1, color=BF16, lw=1, ls="--")
    axis.annotate("as fast as bf16", (1, 0.6), xycoords=("data", "axes fraction"), xytext=(-4, 0),
                  textcoords="offset points", rotation=90, ha="right", va="center", color=BF16)
    for work, marker in zip(works, MARKERS, strict=True):
        axis.plot([], [], marker, color="black", label=work)
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    _logarithmic(axis)
    axis.set_xlim(0, 1.25 * speed[works].max().max())
    _label(axis, {title: (found.max(), table.loc[title, "KL"]) for title, found in shown.items()})
    axis.set_xlabel("speed over bf16's at Phi-4's shapes")
    axis.set_ylabel(f"KL, nats per token ({model})")
    all_ahead = [title for title, line in speed.iterrows() if (line[works] > 1).all()]
    axis.set_title(f"{' and '.join(all_ahead)} gains at every kind of work" if len(all_ahead) == 1
                   else "What is a scheme's speed, and what does it lose?", loc="left")
    plots.show(figure, f"KL on {model} over speed relative to bf16: " + "; ".join(
        f"{title} {table.loc[title, 'KL']:.5f} nats, " + ", ".join(
            f"{work} {ratio:.2f}x" for work, ratio in found.items())
        for title, found in shown.items()) + ".")
