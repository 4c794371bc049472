"""Pictures of values: a format's numbers; a model's scales, weights, inputs and their errors.

A title states a finding only where the data shows it; else it asks the question.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from helpers import plots
from helpers.plots import BF16, FP8, GREY, THIRD

if TYPE_CHECKING:
    from pandas import DataFrame
    from torch import Tensor

# The largest relative error of a normal weight. LLM Compressor divides by the scale in bf16 and
# then rounds to E4M3: together 17/16 of half a step, most at 1 + 17/256, which becomes 1.
MOST_ERROR = 17 / 273
LEAST_NORMAL = 2.0**-6 / 448  # E4M3's smallest normal number over its largest
STEP = 1 / 8  # the largest relative step of E4M3 among normal numbers


def number_lines(e4m3: Tensor, e5m2: Tensor) -> None:
    """Where INT8, E4M3 and E5M2 put their values when all are scaled to an amax of 1.

    `e4m3`, `e5m2`: float tensors [256], the decoded codes; NaN and infinities are left out.
    """
    import torch

    grids = {"INT8": torch.arange(-127, 128) / 127,
             "E4M3": e4m3[e4m3.isfinite()].unique() / 448,
             "E5M2": e5m2[e5m2.isfinite()].unique() / 57344}
    figure, (line, step) = plots.canvas(width=10, height=3.6, columns=2)
    median, widest = {}, {}
    for row, ((name, values), colour) in enumerate(
            zip(grids.items(), (BF16, FP8, THIRD), strict=True)):
        positive = values[values > 0]
        steps = positive.diff() / positive[:-1]
        median[name], widest[name] = positive.median(), steps[positive[:-1] >= 1e-4].max()
        line.plot(values, [row] * len(values), "|", ms=22, color=colour, mew=0.8)
        step.loglog(positive[:-1], steps * 100, color=colour, label=name)
    floats = ("E4M3", "E5M2")
    crowded = all(median[name] < median["INT8"] / 2 for name in floats)
    steady = all(widest[name] < widest["INT8"] / 2 for name in floats)
    line.set_yticks(range(3), list(grids))
    line.set_ylim(-0.6, 2.6)
    line.set_xlabel("value / amax")
    line.set_title("Floats crowd their values around zero" if crowded
                   else "Where does each format put its values?", loc="left")
    step.set_xlabel("value / amax")
    step.set_ylabel("step to the next value, %")
    step.set_yticks([1, 10, 100], ["1", "10", "100"])
    step.legend(frameon=False)
    step.set_title("and keep their relative step far down" if steady
                   else "How far down does the step stay small?", loc="left")
    plots.show(figure, "Left: the values of INT8, E4M3 and E5M2 on a line from -amax to amax. "
                       "Right: the relative step to the next value over magnitude; above a "
                       "ten-thousandth of amax it is at most " + ", ".join(
                           f"{100 * widest[name]:.1f} % in {name}" for name in grids) + ".")


def channel_scales(name: str, scale: Tensor) -> None:
    """One module's weight scales, in place and sorted; `scale`: float tensor [channels].

    Of a fused gate_up_proj, whose first half is gate, the halves are told apart.
    """
    half = len(scale) // 2
    parts = ({"gate": slice(0, half), "up": slice(half, None)} if name.endswith("gate_up_proj")
             else {"": slice(None)})
    figure, (place, order) = plots.canvas(width=10, height=3.2, columns=2)
    for (part, channels), colour in zip(parts.items(), (FP8, BF16), strict=False):
        place.plot(range(len(scale))[channels], scale[channels], ".", ms=3, color=colour)
        order.plot(scale[channels].sort().values, color=colour, label=part)
    place.set_xlabel("output channel")
    place.set_ylabel("scale (amax / 448)")
    place.set_title("in place", loc="left")
    order.axhline(scale.max(), color=GREY, ls="--", lw=1)
    order.annotate("one scale for the tensor", (0, scale.max()), xytext=(2, -4),
                   textcoords="offset points", va="top", color=GREY)
    order.set_xlabel("channels, sorted")
    order.set_title(f"sorted: {scale.max() / scale.min():.1f}x from least to largest", loc="left")
    if len(parts) > 1:
        order.legend(frameon=False, loc="lower right")
    figure.suptitle(name, x=0.01, ha="left")
    plots.show(figure, f"The {scale.numel()} channel scales of {name}, from {scale.min():.2e} to "
                       f"{scale.max():.2e}" + "".join(
        f"; of {part} {scale[channels].min():.2e} to {scale[channels].max():.2e}"
        for part, channels in parts.items() if part) + ".")


def weight_error(name: str, original: Tensor, rebuilt: Tensor) -> None:
    """Relative error of every weight against its magnitude over its channel's amax.

    `original`, `rebuilt`: float tensors [out, in].
    """
    size = original.abs()
    reach = (size / size.amax(dim=1, keepdim=True).clamp_min(1e-12)).flatten()
    error = ((rebuilt - original).abs() / size.clamp_min(1e-12)).flatten()
    normal = reach >= LEAST_NORMAL * (1 + 2**-7)  # the stored scale may be that much too large
    # The product of code and scale is rounded once more, in float32.
    bounded = bool((error[normal] <= MOST_ERROR * (1 + 2**-20)).all()) and not error.isnan().any()
    pick = slice(None, None, max(1, reach.numel() // 20_000))
    figure, axis = plots.canvas()
    axis.loglog(reach[pick], error[pick].clamp_min(1e-5) * 100, ".", ms=1.5, alpha=0.4, color=FP8)
    axis.axhline(100 * MOST_ERROR, color="black", lw=1, ls="--")
    axis.text(1, 115 * MOST_ERROR, f"17/16 of half a step: {MOST_ERROR:.1%}", ha="right")
    axis.set_xlim(1e-5, 1.3)
    axis.set_ylim(1e-2, 200)
    axis.set_xlabel("|weight| / its channel's amax")
    axis.set_ylabel("relative error, %")
    axis.set_title("The grid's step bounds a normal weight's relative error" if bounded
                   else "Does the grid's step bound a weight's relative error?", loc="left")
    largest = f"{error[normal].max():.1%}" if normal.any() else "unknown"
    plots.show(figure, f"Relative error of the weights of {name} against their magnitude: at most "
                       f"{largest} down to 1/28,672 of amax, where codes turn subnormal; the bound "
                       f"is {MOST_ERROR:.1%}.")


def weights_on_grid(name: str, channel: int, original: Tensor, codes: Tensor,
                    scale: float) -> None:
    """One channel's weights before and after, and the error that lies between.

    `original`, `codes` (decoded, not yet scaled): float tensors [in]; `scale`: the channel's.
    """
    order = original.argsort()
    pick = order[::max(1, len(order) // 4000)]
    before, after = original[pick] / scale, codes[pick]
    error, small = (after - before).abs(), before.abs() <= before.abs().median()
    grows = bool((~small).any()) and bool(error[~small].max() > 1.5 * error[small].max())
    figure, (line, zoom) = plots.canvas(width=10, height=3.4, columns=2)
    line.plot(before, after, ".", ms=3, color=FP8)
    line.set_xlabel("weight / scale, before")
    line.set_ylabel("stored E4M3 value")
    line.set_title("before and after", loc="left")
    zoom.plot(before, after - before, ".", ms=3, color=FP8)
    zoom.set_xlabel("weight / scale, before")
    zoom.set_ylabel("after - before")
    zoom.set_title("the error grows with the step" if grows
                   else "does the error grow with the step?", loc="left")
    figure.suptitle(f"{name}, channel {channel}", x=0.01, ha="left")
    plots.show(figure, f"{len(pick)} weights of channel {channel} of {name} before and after "
                       f"rounding to E4M3, and their difference, at most {error.max():.3g} in "
                       "units of the scale.")


def channel_error(name: str, error: Tensor) -> None:
    """Relative error of each output channel, in place and sorted; `error`: tensor [channels]."""
    figure, (place, order) = plots.canvas(width=10, height=3.2, columns=2)
    place.plot(error * 100, ".", ms=3, color=FP8)
    place.set_xlabel("output channel")
    place.set_ylabel("relative error, %")
    place.set_title("in place", loc="left")
    order.plot(error.sort().values * 100, color=FP8)
    order.set_xlabel("channels, sorted")
    order.set_title(f"sorted: median {error.median():.2%}", loc="left")
    figure.suptitle(name, x=0.01, ha="left")
    plots.show(figure, f"Relative error of {error.numel()} output channels of {name}, median "
                       f"{error.median():.2%}.")


def module_map(table: DataFrame, unit: str, title: str) -> None:
    """A value for every layer and module; `table`: index layer, columns module, NaN where none is.

    `unit` says what the values are.
    """
    figure, axis = plots.canvas(height=max(2.6, 0.28 * len(table) + 1.4))
    image = axis.imshow(table, cmap="cividis", aspect="auto")
    axis.set_xticks(range(table.shape[1]), [name.replace(" ", "\n", 1) for name in table.columns])
    axis.set_yticks(range(len(table)), table.index)
    axis.spines[:].set_visible(False)
    axis.set_ylabel("layer")
    for row, line in enumerate(table.to_numpy()):
        for column, value in enumerate(line):
            if value == value:  # NaN is not
                axis.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=9,
                          color=plots.ink(image.cmap(image.norm(value))))
    figure.colorbar(image, ax=axis, label=unit)
    axis.set_title(title, loc="left")
    plots.show(figure, f"Map of {len(table)} layers by {table.shape[1]} modules: {unit}, from "
                       f"{table.min().min():.1f} to {table.max().max():.1f}.")


def _labels(names, most: int):
    """Places and names of the ticks: all names, or every so many that `most` of them fit."""
    step = -(-len(names) // most)
    return range(0, len(names), step), names[::step]


def token_amax(table: DataFrame, pieces: list[str]) -> None:
    """The amax of one text's activations by token and module.

    `table`: index module, a column a token; `pieces`: the tokens' texts.
    """
    from matplotlib.colors import LogNorm

    figure, axis = plots.canvas(width=10, height=min(12, 0.22 * len(table) + 2.3))
    image = axis.imshow(table, cmap="cividis", aspect="auto", norm=LogNorm())
    axis.set_yticks(*_labels(table.index, 45), fontsize=8)
    axis.set_xticks(range(len(pieces)), [piece.replace("$", r"\$") for piece in pieces],
                    rotation=90, fontsize=8)
    axis.spines[:].set_visible(False)
    figure.colorbar(image, ax=axis, label="amax of the input", location="bottom", shrink=0.5,
                    aspect=50)  # below: beside the map it would take the tokens' room
    loudest, quietest, middle = table.max(axis=1), table.min(axis=1), table.median(axis=1)
    differ = (loudest > (1 + STEP) * quietest).all() and middle.max() > (1 + STEP) * middle.min()
    axis.set_title("Every token and every module has its own reach" if differ
                   else "Does every token and every module have its own reach?", loc="left")
    plots.show(figure, f"Map of the largest magnitude in the input of {len(table)} modules for "
                       f"{len(pieces)} tokens, from {quietest.min():.2g} to {loudest.max():.2g}.")


def outliers(tables: dict[str, DataFrame]) -> None:
    """How far apart channels and tokens lie, over the depth, one point a module.

    `tables`: a model's name to `outliers.table` of it.
    """
    from matplotlib.ticker import LogLocator

    figure, axes = plots.canvas(width=11, height=3.6, columns=3)
    columns = {"weight scales": "largest / smallest\nchannel scale of a weight",
               "tokens": "loudest / quietest token\nof an input",
               "features": "largest / median feature\nof an input, in its median token"}
    for axis, (column, title) in zip(axes, columns.items(), strict=True):
        for (name, table), colour, mark in zip(tables.items(), (BF16, FP8, THIRD), "so^",
                                               strict=False):
            layers = [int(module.split(".")[0]) for module in table.index]
            last = max(layers) or 1  # a model of one layer has no depth
            axis.plot([100 * layer / last for layer in layers], table[column], mark, ms=4,
                      alpha=0.7, color=colour, label=name)
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("")
        axis.set_xlabel("depth, % of the layers")
        axis.set_title(title, loc="left")
    axes[0].set_ylabel("ratio")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    largest = {name: table.max() for name, table in tables.items()}
    plots.show(figure, "Ratios over depth: " + "; ".join(
        f"{name}, at most {of['weight scales']:,.0f} between channel scales, {of['tokens']:,.0f} "
        f"between tokens, {of['features']:,.0f} between features"
        for name, of in largest.items()) + ".")
