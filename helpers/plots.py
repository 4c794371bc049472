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
COLOURS = {"bf16": BF16, "fp8": FP8}
TITLES = {"bf16": "bf16", "fp8": "FP8"}


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


def canvas(width: float = 8, height: float = 3.6, columns: int = 1):
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
    figure, axis = canvas(9, 0.36 * len(table) + 1.2)
    for row, (name, line) in enumerate(table.iterrows()):
        axis.barh(row - 0.2, line["bf16 ceiling"], 0.38, color=BF16,
                  alpha=1 if line["bf16 fits"] else 0.25)
        axis.barh(row + 0.2, line["FP8 ceiling"], 0.38, color=FP8,
                  alpha=1 if line["FP8 fits"] and line["FP8 kernel"] else 0.25)
        if name == "A40":
            axis.axhspan(row - 0.5, row + 0.5, color="#dddddd", zorder=0)
            axis.plot([17], [row - 0.2], "D", color="black", ms=5, label="published: 17 and 32")
            axis.plot([32], [row + 0.2], "D", color="black", ms=5)
    names = []
    for name, line in table.iterrows():
        memory = f"{line['memory, GB']} GB"
        arithmetic = line["mode"] if line["FP8 kernel"] else "no FP8"
        names.append(f"{name.removesuffix(memory).strip()}, {memory}, {arithmetic}")
    axis.set_yticks(range(len(table)), names)
    for label, name in zip(axis.get_yticklabels(), table.index, strict=True):
        label.set_fontweight("bold" if name == "A40" else "normal")
    axis.set_ylim(len(table) - 0.5, -0.5)  # slowest memory on top
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

    figure, axis = canvas(height=0.8 * len(censuses) + 1.3)
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


def detectable_loss(curve) -> None:
    """The smallest loss that n rows show at 80 % power, none gained; `curve`: columns n, loss."""
    figure, axis = canvas()
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
    figure, (speed, latency) = canvas(width=10, columns=2)
    for arm, of_arm in rounds.groupby("arm"):
        colour, medians = COLOURS[arm], of_arm.groupby("streams").median(numeric_only=True)
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

    figure, axis = canvas()
    for arm in speed:
        axis.plot(speed.index, speed[arm], "o-", color=COLOURS[arm], label=arm)
        axis.axhline(speed[arm].median(), color=COLOURS[arm], lw=1, ls=":")
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
    return " and ".join(TITLES[arm] for arm in arms)


def bench_cpu(table):
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
