"""In every plot: colours that readers with any common colour vision tell apart, and alt text."""

import ast
import re

import nbformat
import pytest
from conftest import REPO
from matplotlib.figure import Figure

from helpers import plots

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
