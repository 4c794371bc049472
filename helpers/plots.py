"""Pictures of bytes, speed and scores, and what all of the workbook's pictures share.

One function draws one picture and shows it in place, with alt text. A title states a finding only
where the data shows it; else it asks the question. Colours are Okabe and Ito's, which readers with
any common colour vision can tell apart (https://jfly.uni-koeln.de/color/). All is drawn on white,
so that a figure reads the same in a light and in a dark theme.
"""

from __future__ import annotations

import base64
import html
import io
from typing import TYPE_CHECKING

from helpers import checkpoint
from helpers.arm_names import TITLES

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

BF16, FP8, THIRD, GREY = "#0072B2", "#D55E00", "#009E73", "#767676"
COLOURS = {"bf16": BF16, "fp8": FP8}
LATENCIES = {"ttft_ms": ("TTFT", "s--"), "tpot_ms": ("TPOT", "o-")}
PUBLISHED = {"bf16": 17, "fp8": 32}  # the card's tokens/s on an A40, as in data/published


def show(figure: Figure, alt: str) -> None:
    """Display `figure` as a PNG that carries `alt` for screen readers, and close it.

    As HTML, because JupyterLab and nbconvert leave an image output without its alt text.
    """
    import matplotlib.pyplot as plt
    from IPython.display import display

    picture = as_html(figure, alt)
    plt.close(figure)
    display({"text/html": picture, "text/plain": alt}, raw=True)


def as_html(figure: Figure, alt: str) -> str:
    """`figure` as an HTML image: a PNG in the text itself, with `alt` for screen readers."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110, bbox_inches="tight", facecolor="white")
    data = base64.b64encode(png.getvalue()).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'


def ink(colour) -> str:
    """Black or white, whichever stands out more on `colour` (any that matplotlib knows).

    By the contrast ratio of WCAG 2.2, which is equal for both at a relative luminance of 0.179.
    """
    from matplotlib.colors import to_rgb

    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "black" if luminance > 0.179 else "white"


def canvas(width: float = 8, height: float = 3.6, columns: int = 1):
    """A figure of this size in inches, and its axes side by side: one, or an array of them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns)
    for axis in axes if columns > 1 else [axes]:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def decode_ceilings(table: DataFrame) -> None:
    """Phi-4's decoding ceilings in tokens/s by GPU, with the card's two A40 figures on them.

    `table`: `roofline.gpu_table`, one row a GPU. A bar is pale where the GPU cannot serve that arm.
    """
    figure, axis = canvas(9, 0.36 * len(table) + 1.2)
    for row, (name, line) in enumerate(table.iterrows()):
        axis.barh(row - 0.2, line["bf16 ceiling"], 0.38, color=BF16,
                  alpha=1 if line["bf16 fits"] else 0.25)
        axis.barh(row + 0.2, line["FP8 ceiling"], 0.38, color=FP8,
                  alpha=1 if line["FP8 fits"] and line["FP8 kernel"] else 0.25)
        if name == "A40":
            axis.axhspan(row - 0.5, row + 0.5, color="#dddddd", zorder=0)
            axis.plot(PUBLISHED.values(), [row - 0.2, row + 0.2], "D", color="black", ms=5,
                      label=f"published: {PUBLISHED['bf16']} and {PUBLISHED['fp8']}")
    names = []
    for name, line in table.iterrows():
        arithmetic = line["mode"] if line["FP8 kernel"] else "no FP8"
        names.append(f"{name}, {line['memory, GiB']:.1f} GiB, {arithmetic}")
    axis.set_yticks(range(len(table)), names)
    for label, name in zip(axis.get_yticklabels(), table.index, strict=True):
        label.set_fontweight("bold" if name == "A40" else "normal")
    axis.set_ylim(len(table) - 0.5, -0.5)  # slowest memory on top
    axis.barh([0], [0], color=BF16, label="bf16")
    axis.barh([0], [0], color=FP8, label="FP8")
    axis.legend(loc="upper right", frameon=False)
    axis.set_xlabel("ceiling for one stream of Phi-4, tokens/s (bandwidth / bytes per token)")
    gain = table["FP8 ceiling"] / table["bf16 ceiling"]
    title = (f"The same {gain.mean():.2f}x on every GPU" if gain.max() - gain.min() < 0.005
             else "How much can FP8 gain on each GPU?")
    axis.set_title(f"{title} (pale: cannot be served there)", loc="left")
    alt = f"Bars: the decoding ceiling of Phi-4 in bf16 and FP8 for {len(table)} GPUs. "
    if "A40" in table.index:
        shares = [PUBLISHED[arm] / table.loc["A40", f"{TITLES[arm]} ceiling"] for arm in PUBLISHED]
        alt += (f"The card's {PUBLISHED['bf16']} and {PUBLISHED['fp8']} tokens per second lie at "
                f"{shares[0]:.0%} and {shares[1]:.0%} of the A40's bars. ")
    show(figure, alt + "Pale bars: the weights do not fit, or vLLM has no FP8 kernel.")


def bytes_by_role(censuses: dict[str, DataFrame]) -> None:
    """Share of a model's bytes by role; `censuses` maps a title to `checkpoint.by_role`."""
    import matplotlib
    from matplotlib.patches import Patch

    figure, axis = canvas(height=0.8 * len(censuses) + 1.3)
    # A model whose embedding is its output head too has no lm_head.
    roles = [role for role in checkpoint.ROLES
             if any(role in table.index for table in censuses.values())]
    colours = dict(zip(roles, matplotlib.colormaps["cividis"].resampled(len(roles)).colors,
                       strict=True))
    linear = []
    for row, table in enumerate(censuses.values()):
        left, shares = 0.0, 100 * table["bytes"] / table["bytes"].sum()
        linear.append(shares.reindex(["attention", "mlp"]).sum())
        for role, share in shares.items():
            axis.barh(row, share, left=left, color=colours[role], edgecolor="white")
            if share > 4:
                axis.text(left + share / 2, row, f"{share:.0f} %", ha="center", va="center",
                          color=ink(colours[role]), fontsize=9)
            left += share
    axis.set_yticks(range(len(censuses)), censuses)
    axis.invert_yaxis()
    axis.set_xlabel("share of the weights' bytes, %")
    axis.set_title(f"Attention and MLP hold at least {min(linear):.0f} % of the bytes"
                   if min(linear) >= 50 else "Where are a model's bytes?", loc="left")
    handles = [Patch(color=colours[role], label=role) for role in roles]
    axis.legend(handles=handles, ncols=len(roles), loc="upper left", bbox_to_anchor=(0, -0.3),
                frameon=False)
    show(figure, "Stacked bars: share of bytes by role. In attention and MLP: "
                 + ", ".join(f"{share:.0f} % of {name}'s"
                             for name, share in zip(censuses, linear, strict=True)) + ".")


def detectable_loss(curve: DataFrame) -> None:
    """The smallest loss that n rows show at 80 % power, none gained; `curve`: columns n, loss.

    n has to hold 100, the card's rows, and 1,319, GSM8K's whole test set.
    """
    figure, axis = canvas()
    axis.plot(curve["n"], curve["loss"] * 100, color=BF16)
    marked = {n: curve.loc[curve["n"] == n, "loss"].item() * 100 for n in (100, 1319)}
    for n, loss in marked.items():
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
    axis.set_title(f"A hundred rows show only losses of {marked[100]:.1f} points or more",
                   loc="left")
    show(figure, "The smallest true loss of accuracy that n rows show at 80 % power when none is "
                 f"gained, over n: {marked[100]:.1f} points at 100 rows, {marked[1319]:.1f} at "
                 "1,319.")


def concurrency(rounds: DataFrame) -> None:
    """Throughput and latency of the arms over the number of streams.

    `rounds`: as `throughput.compare` returns it.
    """
    figure, (speed, latency) = canvas(width=10, columns=2)
    grows = waits = rounds["streams"].nunique() > 1
    for arm, of_arm in rounds.groupby("arm"):
        colour, medians = COLOURS[arm], of_arm.groupby("streams").median(numeric_only=True)
        grows &= bool((medians["output_tok_s"].diff().iloc[1:] > 0).all())
        waits &= bool((medians["tpot_ms"].diff().iloc[1:] > 0).all())
        speed.plot(medians.index, medians["output_tok_s"], "o-", color=colour, label=TITLES[arm])
        for column, (short, style) in LATENCIES.items():
            latency.plot(medians.index, medians[column], style, color=colour,
                         label=f"{TITLES[arm]}, {short}")
    for axis in (speed, latency):
        axis.set_xscale("log", base=2)
        axis.set_xticks(medians.index, medians.index)
        axis.set_xlabel("streams at once")
        axis.legend(frameon=False)
    speed.set_ylim(bottom=0)
    speed.set_ylabel("tokens/s, all streams together")
    speed.set_title("Throughput grows with the streams" if grows
                    else "Does throughput grow with the streams?", loc="left")
    latency.set_yscale("log", base=2)
    latency.yaxis.set_major_formatter("{x:.0f}")
    latency.set_ylabel("median, ms")
    latency.set_title("Every stream waits longer for a token" if waits
                      else "Does a stream wait longer for a token?", loc="left")
    show(figure, f"Left: tokens per second of {_names(rounds['arm'].unique())} for 1 to "
                 f"{medians.index.max()} streams. Right: time to first token and time per output "
                 "token.")


def throughput_rounds(speed: DataFrame) -> None:
    """FP8's tokens/s over bf16's, round by round, with the median's interval.

    `speed`: index round, columns "bf16" and "fp8"; of one arm alone its tokens/s are shown.
    """
    from helpers import stats

    figure, axis = canvas(height=3.2)
    axis.set_xticks(speed.index)
    axis.set_xlabel("round")
    if len(speed.columns) < 2:
        (arm,) = speed
        axis.plot(speed.index, speed[arm], "o", color=COLOURS[arm])
        axis.set_ylabel("tokens/s, one stream")
        axis.set_title(f"One stream, {TITLES[arm]} alone", loc="left")
        show(figure, f"Tokens per second of {TITLES[arm]} over {len(speed)} rounds.")
        return
    ratio = stats.ratio_by_round(speed["fp8"], speed["bf16"])
    axis.axhspan(ratio.low, ratio.high, color=FP8, alpha=0.15, lw=0,
                 label="range of the rounds")
    axis.axhline(ratio.value, color=FP8, lw=1, ls=":", label="median")
    axis.plot(speed.index, speed["fp8"] / speed["bf16"], "o", color=FP8, label="one round")
    axis.axhline(1, color=BF16, lw=1)
    base = TITLES["bf16"]
    axis.annotate(f"as fast as {base}", (1, 1), xycoords=("axes fraction", "data"), xytext=(0, 3),
                  textcoords="offset points", ha="right", color=BF16)
    axis.margins(y=0.15)
    axis.set_ylabel(f"FP8's tokens/s over {base}'s")
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    axis.set_title(f"One stream, FP8 over {base}: {stats.brief(ratio)}", loc="left")
    show(figure, f"FP8's tokens per second over {base}'s in each of {len(speed)} rounds: "
                 f"{stats.in_words(ratio)}.")


def _names(arms) -> str:
    return " and ".join(TITLES[arm] for arm in arms)


def bench_cpu(table: DataFrame) -> Figure:
    """Every arm's speed over vLLM's bf16 by work, a panel a model; returns the figure.

    `table`: `scripts/bench_cpu.py`'s, with the columns model, work, arm and ratio, ratio_min,
    ratio_max.
    """
    names = list(table["model"].unique())
    colours = dict(zip(table["arm"].unique(), (GREY, BF16, FP8, THIRD, "black", "#56B4E9"),
                       strict=False))
    figure, axes = canvas(5 * len(names), 3.8, len(names))
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
