"""In every plot: colours that readers with any common colour vision tell apart, and alt text."""

import ast
import re

import nbformat
import pandas as pd
import pytest
from conftest import REPO
from matplotlib.figure import Figure

from helpers import checkpoint, plots, roofline

# Okabe and Ito, https://jfly.uni-koeln.de/color/
OKABE_ITO = {"#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"}
MAPS = {"cividis", "viridis"}  # even in lightness, so they order values without hue too
DRAWS = {"plot", "loglog", "semilogx", "semilogy", "bar", "barh", "scatter", "hist", "step",
         "axhline", "axvline", "fill_between", "errorbar"}
SOURCES = [path.read_text() for path in sorted((REPO / "helpers").glob("*.py"))] + [
    cell.source for path in sorted((REPO / "notebooks").glob("*.ipynb"))
    for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def calls():
    """Every call in helpers and notebooks: (its last name, the call)."""
    for source in SOURCES:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call):
                yield getattr(node.func, "attr", getattr(node.func, "id", "")), node


def test_every_colour_is_okabe_and_itos_or_a_grey():
    colours = {colour.upper() for source in SOURCES
               for colour in re.findall(r"#[0-9a-fA-F]{6}\b", source)}
    greys = {colour for colour in colours if colour[1:3] == colour[3:5] == colour[5:7]}
    assert colours - greys and colours - greys <= OKABE_ITO


def test_every_colour_map_is_one_of_even_lightness():
    named = re.findall(r"colormaps\[([^\]]+)\]", "\n".join(SOURCES))
    named += [ast.unparse(keyword.value) for _, call in calls() for keyword in call.keywords
              if keyword.arg == "cmap"]
    assert len(named) > 2 and {ast.literal_eval(name) for name in named} <= MAPS
    for name, call in calls():
        if name in ("imshow", "pcolormesh"):  # without one they take matplotlib's own
            assert "cmap" in {keyword.arg for keyword in call.keywords}, ast.unparse(call)


def test_every_line_names_its_colour_and_so_never_takes_matplotlibs_red_and_green():
    drawn = [call for name, call in calls() if name in DRAWS]
    assert len(drawn) > 10
    for call in drawn:
        assert "color" in {keyword.arg for keyword in call.keywords}, ast.unparse(call)
    plain = {keyword.value.value for call in drawn for keyword in call.keywords
             if keyword.arg == "color" and isinstance(keyword.value, ast.Constant)}
    assert {colour for colour in plain if not colour.startswith("#")} <= {"black", "white"}


@pytest.mark.parametrize("colour, expected", [
    ("#000000", "white"), ("#FFFFFF", "black"), ("#777777", "black"), ("#6B6B6B", "white")])
def test_ink_is_what_stands_out_more(colour, expected):
    """The turn lies at relative luminance 0.179: #767676 has 0.181, #757575 has 0.178."""
    assert plots.ink(colour) == expected


def test_a_picture_carries_its_alt_text_where_html_could_break(monkeypatch):
    import IPython.display

    shown = []
    monkeypatch.setattr(IPython.display, "display", lambda data, raw: shown.append(data))
    plots.show(Figure(), 'amax < 448 & "scale" > 0')
    assert 'alt="amax &lt; 448 &amp; &quot;scale&quot; &gt; 0"' in shown[0]["text/html"]
    assert shown[0]["text/plain"] == 'amax < 448 & "scale" > 0'


@pytest.fixture
def drawn(monkeypatch):
    """What was drawn: the titles of its axes, and the alt text."""
    seen = []
    monkeypatch.setattr(plots, "show", lambda figure, alt: seen.append(
        ([axis.get_title(loc="left") for axis in figure.axes], alt)))
    return seen


def test_the_gain_is_one_figure_only_where_it_is_the_same(drawn):
    config = roofline.load_config(REPO / "data" / "phi4")
    table = roofline.gpu_table(config)
    plots.decode_ceilings(table)
    plots.decode_ceilings(table.assign(**{"FP8 ceiling": range(1, len(table) + 1)}).drop("A40"))
    assert drawn[0][0][0].startswith("The same 1.93x on every GPU")
    assert "lie at 69% and 67% of the A40's bars" in drawn[0][1]
    assert drawn[1][0][0].startswith("How much can FP8 gain on each GPU?")
    assert "A40" not in drawn[1][1]


def test_a_bar_is_pale_where_the_gpu_cannot_serve_that_arm(monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "show", lambda figure, alt: figures.append(figure))
    table = roofline.gpu_table(roofline.load_config(REPO / "data" / "phi4"))
    plots.decode_ceilings(table.loc[["A40", "L4", "V100 SXM2 32 GB"]])
    alphas = [bar.get_alpha() for bars in figures[0].axes[0].containers for bar in bars][:6]
    assert alphas == [1, 1, 0.25, 1, 0.25, 0.25]  # bf16 and FP8 of each; the V100 has no kernel


def test_most_bytes_are_in_linears_only_where_they_are(drawn):
    phi4 = roofline.load_config(REPO / "data" / "phi4")
    wide = phi4 | {"vocab_size": 4_000_000}
    for config in (phi4, wide):
        plots.bytes_by_role({"m": checkpoint.by_role(roofline.tensors(config))})
    assert drawn[0][0] == ["Attention and MLP hold at least 93 % of the bytes"]
    assert drawn[1][0] == ["Where are a model's bytes?"]
    assert "93 % of m's" in drawn[0][1]


def test_the_detectable_loss_is_the_curves_own(drawn):
    plots.detectable_loss(pd.DataFrame({"n": [100, 1319], "loss": [0.078, 0.006]}))
    assert drawn[0][0] == ["A hundred rows show only losses of 7.8 points or more"]


@pytest.mark.parametrize("speed, wait, titles", [
    ([10, 30], [5, 6], ["Throughput grows with the streams",
                        "Every stream waits longer for a token"]),
    ([10, 9], [5, 5], ["Does throughput grow with the streams?",
                       "Does a stream wait longer for a token?"])])
def test_more_streams_are_faster_and_slower_only_where_they_are(drawn, speed, wait, titles):
    rounds = pd.DataFrame([
        {"arm": arm, "streams": streams, "output_tok_s": s, "tpot_ms": w, "ttft_ms": 3.0}
        for arm, (first, second) in {"fp8": (speed, wait), "bf16": ([1, 2], [1, 2])}.items()
        for streams, s, w in zip((1, 8), first, second, strict=True)])
    plots.concurrency(rounds)
    assert drawn[0][0] == titles


def test_one_number_of_streams_shows_no_growth(drawn):
    plots.concurrency(pd.DataFrame([{"arm": "fp8", "streams": 1, "output_tok_s": 9.0,
                                     "tpot_ms": 1.0, "ttft_ms": 3.0}]))
    assert all(title.endswith("?") for title in drawn[0][0])


@pytest.mark.parametrize("fp8, title", [
    ([190, 192, 188, 191, 189], "1.90x"), ([150, 250, 190, 120, 300], "about 1.9x")])
def test_the_ratio_in_the_title_has_the_decimals_that_the_rounds_bear(drawn, fp8, title):
    plots.throughput_rounds(pd.DataFrame({"bf16": [100.0] * 5, "fp8": fp8}))
    plots.throughput_rounds(pd.DataFrame({"fp8": fp8}))
    assert [titles for titles, _ in drawn] == [[f"One stream, FP8 over bf16: {title}"],
                                               ["One stream, FP8 alone"]]
