"""Pictures of what a scale does: numbers on the grid, what clips and drowns, who shares a scale."""

from helpers import fp8, plots
from helpers.plots import BF16, FP8, GREY, THIRD

FATES = {"rounded": FP8, "subnormal": BF16, "zero": "black", "clipped": THIRD}


def on_the_grid(values, scales: dict) -> None:
    """Numbers before and after rounding to E4M3, a panel for each scale; the grid is drawn below.

    `values`: float tensor [n]; `scales`: a panel's name to its scale.
    """
    reach = float(values.abs().max()) * 1.08
    figure, axes = plots.canvas(11, 3.2, len(scales))
    errors = []
    for axis, (name, scale) in zip(axes, scales.items(), strict=True):
        grid = _grid(scale)
        after = fp8.decode(fp8.encode(values / scale)) * scale
        axis.vlines(grid[grid.abs() <= reach], -0.32, -0.08, color=GREY, lw=0.8)
        for before, rounded in zip(values, after, strict=True):
            axis.plot([before, rounded], [1, 0], "-", lw=1, color=BF16)
        axis.plot(values, [1] * len(values), "o", ms=5, color=BF16)
        axis.plot(after, [0] * len(after), "o", ms=5, color=FP8)
        errors.append(float(((after - values) / values).abs().max()))
        axis.set_title(f"{name}: errors up to {100 * errors[-1]:.0f} %", loc="left")
        axis.set_yticks([1, 0, -0.2], ["before", "after", "grid"])
        axis.set_ylim(-0.5, 1.25)
        axis.set_xlim(-reach, reach)
        axis.set_xlabel("value of the number")
        axis.spines["left"].set_visible(False)
        axis.tick_params(axis="y", length=0)
    plots.show(figure, f"{len(values)} numbers before and after rounding to the E4M3 grid. " + " "
               .join(f"{name}, the largest relative error is {100 * error:.0f} %."
                     for name, error in zip(scales, errors, strict=True)))


def _grid(scale: float):
    """The distinct numbers that codes stand for with this scale, in order."""
    import torch

    every = fp8.decode(torch.arange(256, dtype=torch.uint8))
    return every[every.isfinite()].unique() * scale


def clips_and_drowns(values, scales) -> None:
    """What rounding with a scale does to each number, a panel for each of `scales`.

    `values`: float tensor [n]; a scale of amax / 448 is the one that FP8_DYNAMIC takes.
    """
    scales = list(scales)
    figure, axes = plots.canvas(3.4 * len(scales) + 2, 3.3, len(scales))
    axes = axes if len(scales) > 1 else [axes]
    best, said = float(values.abs().max()) / fp8.MAX, []
    for axis, scale in zip(axes, scales, strict=True):
        fates = fp8.fates(values, scale)
        said.append(f"scale {times(scale / best)} amax / 448, {in_words(values, scale)}")
        error = 100 * ((fates["rounded to"] - values) / values).abs()
        for fate, colour in FATES.items():
            axis.plot(values[fates[fate]].abs(), error[fates[fate]], ".", ms=3, color=colour,
                      label=fate)
        for edge, word, side in ((fp8.MAX * scale, "448 × scale ", "right"),
                                 (fp8.SMALLEST_NORMAL * scale, " 2⁻⁶ × scale", "left")):
            if _reach(values)[0] < edge < _reach(values)[1]:
                axis.axvline(edge, color=GREY, lw=1, ls="--")
                axis.text(edge, 109, word, ha=side, va="center", fontsize=9)
        axis.set_xscale("log")
        axis.set_xlim(*_reach(values))
        axis.set_ylim(-3, 115)
        axis.set_yticks([0, 25, 50, 75, 100])
        axis.set_xlabel("magnitude of the number")
        whole = float((fates["rounded to"] - values).norm() / values.norm())
        axis.set_title(f"scale {times(scale / best)} amax / 448: error {whole:.0%} in all",
                       loc="left", pad=12, fontsize=11)
    axes[0].set_ylabel("relative error, %")
    axes[-1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1.06, 1), markerscale=4)
    plots.show(figure, f"Relative error of {len(values)} numbers over their magnitude: "
               + "; ".join(said) + ".")


def in_words(values, scale: float) -> str:
    """What a scale does to numbers, in one line: the shares that clip and drown, and the error."""
    fates = fp8.fates(values, scale)
    share = {fate: 100 * float(fates[fate].float().mean()) for fate in FATES}
    error = float((fates["rounded to"] - values).norm() / values.norm())
    return (f"{share['clipped']:.1f} % clip, {share['subnormal']:.1f} % are subnormal, "
            f"{share['zero']:.1f} % become zero; error of all together {100 * error:.1f} %")


def times(ratio: float) -> str:
    """A power of two as a reader says it: "4 ×", "1/16 ×"."""
    return f"{ratio:,.0f} ×" if ratio > 0.9 else f"1/{1 / ratio:,.0f} ×"


def _reach(values) -> tuple[float, float]:
    size = values.abs()
    return float(size[size > 0].min()) / 2, float(size.max()) * 2


def loud_row(matrix, loudness, errors: dict) -> None:
    """A matrix with one loud row and who shares a scale; the quiet rows' error over the loudness.

    `matrix`: float tensor [rows, columns], the loud row first; `loudness`: how many times the first
    row is made louder, [n]; `errors`: a name to the relative errors [n] of the other rows.
    """
    from matplotlib.colors import LogNorm

    figure, (left, right) = plots.canvas(11, 3.6, 2)
    rows, columns = matrix.shape
    size = matrix.abs()
    image = left.imshow(size, cmap="cividis", norm=LogNorm())
    amax = size.amax(dim=1)
    for at, height, top, value in [(columns + 0.5, rows, -0.5, amax.max()),
                                   *((columns + 3, 1, row - 0.5, amax[row])
                                     for row in range(rows))]:
        left.add_patch(_box(at, top, 1, height, image.cmap(image.norm(float(value))), "white"))
    left.text(columns + 1, rows - 0.1, "one for\nthe tensor", ha="center", va="top", fontsize=8)
    left.text(columns + 3.6, rows - 0.1, "one a\nchannel", ha="center", va="top", fontsize=8)
    left.set_xlim(-0.5, columns + 4.8)
    left.set_xticks([])
    left.set_yticks(range(rows), ["loud"] + ["quiet"] * (rows - 1), fontsize=8)
    left.tick_params(length=0)
    left.spines[:].set_visible(False)
    left.set_xlabel("input features", loc="left")
    left.set_title("A weight, and what its scales are taken from", loc="left")
    figure.colorbar(image, ax=left, label="magnitude; of the scales, amax", shrink=0.8)
    for (name, error), (colour, style) in zip(
            errors.items(), ((BF16, "--"), (FP8, "--"), (FP8, "-")), strict=False):
        right.plot(loudness, [100 * value for value in error], style, color=colour)
        high = next((i for i, value in enumerate(error) if value > 0.5), None)
        if high is None:  # it stays low: its name stands above the line
            right.text(loudness[len(loudness) // 4], 100 * error[0] + 3, name, color=colour,
                       fontsize=9)
        else:
            right.text(loudness[high] / 2, 62, name.replace(", ", ",\n"), ha="right",
                       color=colour, fontsize=9)
    right.set_xscale("log")
    right.set_ylim(0, 105)
    right.set_xlabel("loud row, times the others")
    right.set_ylabel("error of the quiet rows, %")
    right.set_title("When do the quiet rows drown?", loc="left")
    plots.show(figure, f"Left: a matrix of {rows} rows, the first louder, with one scale for all "
               "and one for each row. Right: relative error of the quiet rows when the loud one is "
               + ", ".join(f"{loudness[i]:,.0f}" for i in _decades(loudness)) + " times as loud: "
               + "; ".join(f"{name}: " + ", ".join(f"{100 * error[i]:.0f} %"
                                                   for i in _decades(loudness))
                           for name, error in errors.items()) + ".")


def _decades(loudness) -> list[int]:
    """The places of the even powers of ten in `loudness`, as near as they come."""
    last = int(loudness[-1].log10().round())
    return [int((loudness.log10() - power).abs().argmin()) for power in range(0, last + 1, 2)]


def _box(x, y, width, height, colour, edge):
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), width, height, facecolor=colour, edgecolor=edge)


# One Linear in three ways: what lies in memory, what is done to weight and input on the way to the
# multiply unit, what it multiplies, what happens to the sums. The colour tells 8 bits from 16.
_STORED = "codes_w, FP8, 1 byte each\ns_w, 2 bytes a channel"
_FLOWS = {
    "bf16": ("weights, bf16\n2 bytes each", "", "", "bf16 × bf16", ""),
    "W8A16": (_STORED, "unpack\nto bf16", "", "bf16 × bf16", "× s_w"),
    "W8A8": (_STORED, "", "round: codes_x,\none s_x a token", "FP8 × FP8", "× s_w × s_x"),
}
_PLACES = {"memory": 0, "before": 2.9, "multiply": 5.8, "after": 8.55, "output": 11.3}


def dataflow() -> None:
    """What travels where when one Linear runs in bf16, in W8A16 and in W8A8: a row each."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.4), layout="constrained")
    axes = figure.subplots(3, 1)
    for axis, (name, (weight, unpack, quantize, unit, after)) in zip(axes, _FLOWS.items(),
                                                                     strict=True):
        eight = FP8 if "FP8" in weight else BF16
        _path(axis, 1, [("memory", weight, eight), ("before", unpack, "white")])
        _path(axis, 0, [("memory", "input x\nbf16", BF16), ("before", quantize, "white")])
        _node(axis, "multiply", 0.5, f"{unit}\nand sum", FP8 if "FP8" in unit else BF16)
        _path(axis, 0.5, [("multiply", "", ""), ("after", after, "white"),
                          ("output", "output y\nbf16", BF16)], start=False)
        axis.set_xlim(-1.4, 12.7)
        axis.set_ylim(-0.5, 1.5)
        axis.set_axis_off()
        axis.set_title(name, loc="left", y=0.97, fontweight="bold")
    for place, words in (("memory", "memory"), ("multiply", "multiply unit"),
                         ("output", "memory")):
        axes[0].text(_PLACES[place], 1.8, words, ha="center", color="black")
    plots.show(figure, "One Linear, from memory to output. bf16: weights of 2 bytes, bf16 times "
               "bf16. W8A16: codes of 1 byte, unpacked to bf16, bf16 times bf16, the sums times "
               "s_w. W8A8: codes of 1 byte; the input rounded to codes_x with a scale s_x per "
               "token; FP8 times FP8, the sums times s_w and s_x. Every output is bf16.")


def _node(axis, place: str, y: float, words: str, colour: str) -> None:
    from matplotlib.patches import FancyBboxPatch

    x = _PLACES[place]
    axis.add_patch(FancyBboxPatch((x - 1.15, y - 0.3), 2.3, 0.6, boxstyle="round,pad=0.05",
                                  facecolor=colour, edgecolor="black", lw=0.8, mutation_aspect=0.5))
    axis.text(x, y, words, ha="center", va="center", fontsize=8.5, color=plots.ink(colour))


def _path(axis, y: float, nodes, start: bool = True) -> None:
    """Boxes and the arrows between them; one without words is passed by.

    From a lane of its own (`start`) the last arrow leads to the multiply unit.
    """
    kept = [node for node in nodes if node[1] or node[0] == "multiply"]
    for place, words, colour in kept:
        if words:
            _node(axis, place, y, words, colour)
    stops = [(place, y) for place, _, _ in kept] + ([("multiply", 0.5)] if start else [])
    for (before, low), (after, high) in zip(stops, stops[1:], strict=False):
        axis.annotate("", (_PLACES[after] - 1.23, low + (high - low) * 0.6),
                      (_PLACES[before] + 1.23, low),
                      arrowprops={"arrowstyle": "-|>", "color": "black"})
