"""The workbook's pictures: one function a picture, each with alt text, shown in place.

Colours are Okabe and Ito's, which readers with any common colour vision can tell apart
(https://jfly.uni-koeln.de/color/). Every function draws on white, so that the figure reads the
same in a light and in a dark theme.
"""

import base64
import html
import io

from helpers import checkpoint

BF16, FP8, THIRD, GREY = "#0072B2", "#D55E00", "#009E73", "#767676"
ARMS = {"bf16": BF16, "fp8": FP8}


def show(figure, alt: str) -> None:
    """Display `figure` as a PNG that carries `alt` for screen readers, and close it.

    As HTML, because JupyterLab and nbconvert leave an image output without its alt text.
    """
    import matplotlib.pyplot as plt
    from IPython.display import display

    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110, bbox_inches="tight", facecolor="white")
    plt.close(figure)
    data = base64.b64encode(png.getvalue()).decode()
    picture = f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'
    display({"text/html": picture, "text/plain": alt}, raw=True)


def ink(colour) -> str:
    """Black or white, whichever stands out more on `colour` (any that matplotlib knows).

    By the contrast ratio of WCAG 2.2, which is equal for both at a relative luminance of 0.179.
    """
    from matplotlib.colors import to_rgb

    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "black" if luminance > 0.179 else "white"


def _axes(width: float = 8, height: float = 3.6, columns: int = 1):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns)
    for axis in axes if columns > 1 else [axes]:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def decode_ceilings(table) -> None:
    """Phi-4's decoding ceilings in tokens/s by GPU, with the card's two A40 figures on them.

    `table`: `roofline.gpu_table`, one row a GPU. A bar is pale where the GPU cannot serve that arm.
    """
    figure, axis = _axes(height=0.36 * len(table) + 1.2)
    for row, (name, line) in enumerate(table.iterrows()):
        axis.barh(row + 0.2, line["bf16 ceiling"], 0.38, color=BF16,
                  alpha=1 if line["bf16 fits"] == "yes" else 0.25)
        axis.barh(row - 0.2, line["FP8 ceiling"], 0.38, color=FP8,
                  alpha=1 if line["FP8 fits"] == "yes" else 0.25)
        if name == "A40":
            axis.plot([17], [row + 0.2], "D", color="black", ms=6, label="published: 17 and 32")
            axis.plot([32], [row - 0.2], "D", color="black", ms=6)
    axis.set_yticks(range(len(table)), table.index)
    axis.invert_yaxis()
    axis.barh([0], [0], color=BF16, label="bf16")
    axis.barh([0], [0], color=FP8, label="FP8")
    axis.legend(loc="upper right", frameon=False)
    axis.set_xlabel("ceiling for one stream of Phi-4, tokens/s (bandwidth / bytes per token)")
    axis.set_title("The same 1.93x on every GPU (pale: cannot be served there)", loc="left")
    show(figure, f"Bars: the decoding ceiling of Phi-4 in bf16 and FP8 for {len(table)} GPUs; "
                 "the card's 17 and 32 tokens per second lie at two thirds of the A40's bars. Pale "
                 "bars: the weights do not fit, or vLLM has no FP8 kernel.")


def bytes_by_role(censuses: dict) -> None:
    """Share of a model's bytes by role; `censuses` maps a title to `checkpoint.by_role`."""
    import matplotlib
    from matplotlib.patches import Patch

    figure, axis = _axes(height=0.8 * len(censuses) + 1.3)
    # A model whose embedding is its output head too has no lm_head.
    roles = [role for role in checkpoint.ROLES
             if any(role in table.index for table in censuses.values())]
    colours = dict(zip(roles, matplotlib.colormaps["cividis"].resampled(len(roles)).colors,
                       strict=True))
    for row, table in enumerate(censuses.values()):
        left = 0.0
        for role, nbytes in table["bytes"].items():
            share = 100 * nbytes / table["bytes"].sum()
            axis.barh(row, share, left=left, color=colours[role], edgecolor="white")
            if share > 4:
                axis.text(left + share / 2, row, f"{share:.0f} %", ha="center", va="center",
                          color=ink(colours[role]), fontsize=9)
            left += share
    axis.set_yticks(range(len(censuses)), censuses)
    axis.invert_yaxis()
    axis.set_xlabel("share of the weights' bytes, %")
    axis.set_title("Nearly all of a model's bytes are in its Linear layers", loc="left")
    handles = [Patch(color=colours[role], label=role) for role in roles]
    axis.legend(handles=handles, ncols=len(roles), loc="upper left", bbox_to_anchor=(0, -0.3),
                frameon=False)
    show(figure, "Stacked bars: share of bytes by role, for " + " and ".join(censuses) + ".")


def number_lines(e4m3, e5m2) -> None:
    """Where INT8, E4M3 and E5M2 put their values when all are scaled to an amax of 1.

    `e4m3`, `e5m2`: float tensors [256], the decoded codes; NaN and infinities are left out.
    """
    import torch

    grids = [("INT8", torch.arange(-127, 128) / 127, BF16),
             ("E4M3", e4m3[e4m3.isfinite()].unique() / 448, FP8),
             ("E5M2", e5m2[e5m2.isfinite()].unique() / 57344, THIRD)]
    figure, (line, step) = _axes(width=10, height=3.6, columns=2)
    for row, (name, values, colour) in enumerate(grids):
        line.plot(values, [row] * len(values), "|", ms=22, color=colour, mew=0.8)
        positive = values[values > 0]
        step.loglog(positive[:-1], positive.diff() / positive[:-1] * 100, color=colour, label=name)
    line.set_yticks(range(3), [name for name, _, _ in grids])
    line.set_ylim(-0.6, 2.6)
    line.set_xlabel("value / amax")
    line.set_title("Floats crowd their values around zero", loc="left")
    step.set_xlabel("value / amax")
    step.set_ylabel("step to the next value, %")
    step.set_yticks([1, 10, 100], ["1", "10", "100"])
    step.legend(frameon=False)
    step.set_title("and keep their relative step far down", loc="left")
    show(figure, "Left: the values of INT8, evenly spaced, and of E4M3 and E5M2, dense around "
                 "zero. Right: the relative step over magnitude: E4M3's stays between 6.7 and "
                 "12.5 % over four decades, E5M2's is twice that over more, and INT8's grows as "
                 "values shrink.")


def channel_scales(name: str, scale) -> None:
    """One module's weight scales, in place and sorted; `scale`: float tensor [channels]."""
    figure, (place, order) = _axes(width=10, height=3.2, columns=2)
    place.plot(scale, ".", ms=3, color=FP8)
    place.set_xlabel("output channel")
    place.set_ylabel("scale (amax / 448)")
    place.set_title("in place", loc="left")
    order.plot(scale.sort().values, color=FP8)
    order.axhline(scale.max(), color=GREY, ls="--", lw=1)
    order.annotate("one scale for the tensor", (0, scale.max()), xytext=(2, -4),
                   textcoords="offset points", va="top", color=GREY)
    order.set_xlabel("channels, sorted")
    order.set_title(f"sorted: {scale.max() / scale.min():.1f}x from least to largest", loc="left")
    figure.suptitle(name, x=0.01, ha="left")
    show(figure, f"The {scale.numel()} channel scales of {name}, from {scale.min():.2e} to "
                 f"{scale.max():.2e}.")


def weight_error(name: str, original, rebuilt) -> None:
    """Relative error of every weight against its magnitude over its channel's amax.

    `original`, `rebuilt`: float tensors [out, in].
    """
    reach = (original.abs() / original.abs().amax(dim=1, keepdim=True)).flatten()
    error = ((rebuilt - original).abs() / original.abs().clamp_min(1e-12)).flatten()
    pick = slice(None, None, max(1, reach.numel() // 20_000))
    figure, axis = _axes()
    axis.loglog(reach[pick], error[pick].clamp_min(1e-5) * 100, ".", ms=1.5, alpha=0.4, color=FP8)
    most = 17 / 273 * 100  # 17/16 of half a step, at 1 + 17/256 rounded to 1
    axis.axhline(most, color="black", lw=1, ls="--")
    axis.text(1, most * 1.15, f"17/16 of half a step: {most:.1f} %", ha="right")
    axis.set_xlim(1e-5, 1.3)
    axis.set_ylim(1e-2, 200)
    axis.set_xlabel("|weight| / its channel's amax")
    axis.set_ylabel("relative error, %")
    axis.set_title("The step bounds the error until weights turn subnormal", loc="left")
    show(figure, f"Relative error of the weights of {name} against their magnitude: under 6.2 % "
                 "down to about 3e-5 of amax, larger below.")


def weights_on_grid(name: str, channel: int, original, codes, scale: float) -> None:
    """One channel's weights before and after, and the error that lies between.

    `original`, `codes` (decoded, not yet scaled): float tensors [in]; `scale`: the channel's.
    """
    order = original.argsort()
    pick = order[::max(1, len(order) // 4000)]
    before, after = original[pick] / scale, codes[pick]
    figure, (line, zoom) = _axes(width=10, height=3.4, columns=2)
    line.plot(before, after, ".", ms=3, color=FP8)
    line.set_xlabel("weight / scale, before")
    line.set_ylabel("stored E4M3 value")
    line.set_title("before and after", loc="left")
    zoom.plot(before, after - before, ".", ms=3, color=FP8)
    zoom.set_xlabel("weight / scale, before")
    zoom.set_ylabel("after - before")
    zoom.set_title("the error grows with the step", loc="left")
    figure.suptitle(f"{name}, channel {channel}", x=0.01, ha="left")
    show(figure, f"{len(pick)} weights of channel {channel} of {name} before and after rounding "
                 "to E4M3, and their difference, whose bound doubles at every power of two.")


def channel_error(name: str, error) -> None:
    """Relative error of each output channel, in place and sorted; `error`: tensor [channels]."""
    figure, (place, order) = _axes(width=10, height=3.2, columns=2)
    place.plot(error * 100, ".", ms=3, color=FP8)
    place.set_xlabel("output channel")
    place.set_ylabel("relative error, %")
    place.set_title("in place", loc="left")
    order.plot(error.sort().values * 100, color=FP8)
    order.set_xlabel("channels, sorted")
    order.set_title(f"sorted: median {error.median():.2%}", loc="left")
    figure.suptitle(name, x=0.01, ha="left")
    show(figure, f"Relative error of {error.numel()} output channels of {name}, median "
                 f"{error.median():.2%}.")


def module_map(table, unit: str, title: str) -> None:
    """A value for every layer and module; `table`: DataFrame, index layer, columns module.

    `unit` says what the values are.
    """
    figure, axis = _axes(height=max(2.6, 0.28 * len(table) + 1.4))
    image = axis.imshow(table, cmap="cividis", aspect="auto")
    axis.set_xticks(range(table.shape[1]), [name.replace(" ", "\n", 1) for name in table.columns])
    axis.set_yticks(range(len(table)), table.index)
    axis.spines[:].set_visible(False)
    axis.set_ylabel("layer")
    for (row, column), value in _cells(table):
        axis.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=9,
                  color=ink(image.cmap(image.norm(value))))
    figure.colorbar(image, ax=axis, label=unit)
    axis.set_title(title, loc="left")
    show(figure, f"Map of {len(table)} layers by {table.shape[1]} modules: {unit}, from "
                 f"{table.min().min():.1f} to {table.max().max():.1f}.")


def _cells(table):
    return (((row, column), value) for row, line in enumerate(table.to_numpy())
            for column, value in enumerate(line))


def _labels(names, most: int):
    """Places and names of the ticks: all names, or every so many that `most` of them fit."""
    step = -(-len(names) // most)
    return range(0, len(names), step), names[::step]


def token_amax(table, pieces: list[str]) -> None:
    """The amax of one text's activations by token and module.

    `table`: DataFrame, index module, a column a token; `pieces`: the tokens' texts.
    """
    from matplotlib.colors import LogNorm

    figure, axis = _axes(width=10, height=min(12, 0.22 * len(table) + 2.3))
    image = axis.imshow(table, cmap="cividis", aspect="auto", norm=LogNorm())
    axis.set_yticks(*_labels(table.index, 45), fontsize=8)
    axis.set_xticks(range(len(pieces)), [piece.replace("$", r"\$") for piece in pieces],
                    rotation=90, fontsize=8)
    axis.spines[:].set_visible(False)
    figure.colorbar(image, ax=axis, label="amax of the input", location="bottom", shrink=0.5,
                    aspect=50)  # below: beside the map it would take the tokens' room
    axis.set_title("Every token and every module has its own reach", loc="left")
    show(figure, f"Map of the largest magnitude in the input of {len(table)} modules for "
                 f"{len(pieces)} tokens, from {table.min().min():.2g} to {table.max().max():.2g}.")


def static_and_dynamic(table) -> None:
    """SQNR of the inputs by module: columns "static", "dynamic", in dB; index module."""
    figure, axis = _axes(width=10, height=3.8)
    places = range(len(table))
    axis.plot(places, table["dynamic"], "o", color=FP8, label="per token, dynamic")
    axis.plot(places, table["static"], "s", color=BF16, label="per tensor, static")
    axis.set_xticks(*_labels(table.index, 60), rotation=90, fontsize=8)
    axis.set_ylabel("SQNR of the input, dB")
    axis.grid(axis="x", color="#dddddd", lw=0.8)
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    gain = table["dynamic"] - table["static"]
    axis.set_title(f"Dynamic less static: median {gain.median():.1f} dB, largest "
                   f"{gain.max():.1f} dB", loc="left")
    show(figure, f"Signal to quantization noise of the inputs of {len(table)} modules, per token "
                 "and with one static scale.")


def outliers(tables: dict) -> None:
    """How far apart channels and tokens lie, over the depth, one point a module.

    `tables`: a model's name to `outliers.table` of it.
    """
    from matplotlib.ticker import LogLocator

    figure, axes = _axes(width=11, height=3.6, columns=3)
    columns = {"weight scales": "largest / smallest\nchannel scale of a weight",
               "tokens": "loudest / quietest token\nof an input",
               "features": "largest / median feature\nof an input"}
    for axis, (column, title) in zip(axes, columns.items(), strict=True):
        for (name, table), colour, mark in zip(tables.items(), (BF16, FP8, THIRD), "so^",
                                               strict=False):
            depth = [int(module.split(".")[0]) for module in table.index]
            axis.plot([100 * layer / max(depth) for layer in depth], table[column], mark, ms=4,
                      alpha=0.7, color=colour, label=name)
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("")
        axis.set_xlabel("depth, % of the layers")
        axis.set_title(title, loc="left")
    axes[0].set_ylabel("ratio")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    largest = {name: table.max().round(0).astype(int) for name, table in tables.items()}
    show(figure, "Ratios over depth: " + "; ".join(
        f"{name}, at most {of['weight scales']:,} between channel scales, {of['tokens']:,} between "
        f"tokens, {of['features']:,} between features" for name, of in largest.items()) + ".")


def detectable_loss(curve) -> None:
    """The smallest loss that n rows show at 80 % power, none gained; `curve`: columns n, loss."""
    figure, axis = _axes()
    axis.plot(curve["n"], curve["loss"] * 100, color=BF16)
    for n in (100, 1319):
        loss = curve.loc[curve["n"] == n, "loss"].item() * 100
        axis.plot([n], [loss], "o", color=FP8)
        axis.annotate(f"{n:,} rows: {loss:.1f} points", (n, loss), xytext=(8, 6),
                      textcoords="offset points")
    axis.set_xscale("log")
    axis.set_xticks([50, 100, 200, 500, 1000, 2000, 5000])
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.minorticks_off()
    axis.set_xlabel("rows evaluated")
    axis.set_ylabel("smallest detectable loss, points\n(no row gained)")
    axis.set_ylim(bottom=0)
    axis.set_title("A hundred rows show only large losses", loc="left")
    show(figure, "The smallest true loss of accuracy that n rows show at 80 % power when none is "
                 "gained, falling with n; 100 and 1,319 rows are marked.")


def concurrency(rounds) -> None:
    """Throughput and latency of the arms over the number of streams.

    `rounds`: as `throughput.compare` returns it.
    """
    figure, (speed, latency) = _axes(width=10, columns=2)
    for arm, of_arm in rounds.groupby("arm"):
        colour, medians = ARMS[arm], of_arm.groupby("streams").median(numeric_only=True)
        speed.plot(medians.index, medians["output_tok_s"], "o-", color=colour, label=arm)
        for column, style in (("ttft_ms", "s--"), ("tpot_ms", "o-")):
            latency.plot(medians.index, medians[column], style, color=colour,
                         label=f"{arm}, {column[:4].upper()}")
    for axis in (speed, latency):
        axis.set_xscale("log", base=2)
        axis.set_xticks(medians.index, medians.index)
        axis.set_xlabel("streams at once")
        axis.legend(frameon=False)
    speed.set_ylim(bottom=0)
    speed.set_ylabel("tokens/s, all streams together")
    speed.set_title("Throughput grows with the streams", loc="left")
    latency.set_yscale("log", base=2)
    latency.yaxis.set_major_formatter("{x:.0f}")
    latency.set_ylabel("median, ms")
    latency.set_title("and every stream waits longer", loc="left")
    show(figure, f"Left: tokens per second of {_names(rounds['arm'].unique())} for 1 to "
                 f"{medians.index.max()} streams. Right: time to first token and time per output "
                 "token.")


def throughput_rounds(speed) -> None:
    """Tokens/s of the arms, round by round; `speed`: index round, columns "bf16", "fp8", or one."""
    from helpers import stats

    figure, axis = _axes()
    for arm in speed:
        axis.plot(speed.index, speed[arm], "o-", color=ARMS[arm], label=arm)
        axis.axhline(speed[arm].median(), color=ARMS[arm], lw=1, ls=":")
    axis.set_xticks(speed.index)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("round")
    axis.set_ylabel("tokens/s, one stream")
    axis.legend(frameon=False, title="median dotted")
    title, words = "One stream, FP8 alone", f"Tokens per second of {_names(speed.columns)} over " \
        f"{len(speed)} rounds"
    if len(speed.columns) == 2:
        ratio = stats.in_words(stats.ratio_by_round(speed["fp8"], speed["bf16"]))
        title = f"One stream, FP8 over bf16: {ratio.split(',')[0].split(' (')[0]}"
        words += f"; FP8 over bf16 is {ratio}"
    axis.set_title(title, loc="left")
    show(figure, f"{words}.")


def _names(arms) -> str:
    return " and ".join({"bf16": "bf16", "fp8": "FP8"}[arm] for arm in arms)


def bench_cpu(table):
    """Every arm's speed over vLLM's bf16 by work, a panel a model; returns the figure.

    `table`: `scripts/bench_cpu.py`'s, with the columns model, work, arm and ratio, ratio_min,
    ratio_max.
    """
    names = list(table["model"].unique())
    colours = dict(zip(table["arm"].unique(), (GREY, BF16, FP8, THIRD, "black", "#56B4E9"),
                       strict=False))
    figure, axes = _axes(5 * len(names), 3.8, len(names))
    for axis, name in zip(axes if len(names) > 1 else [axes], names, strict=True):
        of_model = table[table["model"] == name]
        works = list(of_model["work"].unique())
        for place, (arm, lines) in enumerate(of_model.groupby("arm", sort=False)):
            at = [works.index(work) + 0.18 * (place - 1.5) for work in lines["work"]]
            reach = [lines["ratio"] - lines["ratio_min"], lines["ratio_max"] - lines["ratio"]]
            axis.bar(at, lines["ratio"], 0.17, label=arm, yerr=reach, capsize=2,
                     color=colours[arm])
        axis.axhline(1, color="black", lw=0.8)
        axis.set_xticks(range(len(works)), works)
        axis.set_ylabel("tokens/s over vLLM bf16's")
        axis.set_title(name, loc="left")
        axis.legend(frameon=False, fontsize=8)
    return figure
