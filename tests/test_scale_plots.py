"""What a scale does, against torch's own cast; the pictures and the slider that show it."""

import pytest
import torch

from helpers import fp8, plots, scale_plots, widgets

VALUES = 0.02 * torch.randn(500, generator=torch.Generator().manual_seed(1))
BEST = float(VALUES.abs().max()) / 448


@pytest.fixture
def pictures(monkeypatch):
    """The alt texts of what was drawn, in order; each figure is drawn to its end."""
    drawn = []

    def show(figure, alt):
        figure.canvas.draw()
        drawn.append(alt)

    monkeypatch.setattr(plots, "show", show)
    return drawn


@pytest.mark.parametrize("times", [2.0**-6, 1.0, 2.0**13, 2.0**16])
def test_every_number_has_one_fate_and_it_is_torchs(times):
    scale = BEST * times
    fates = fp8.fates(VALUES, scale)
    stored = (VALUES / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float()
    assert torch.equal(fates["rounded to"], stored * scale)
    masks = torch.stack([fates[fate] for fate in scale_plots.FATES])
    assert masks.sum(0).eq(1).all()
    assert torch.equal(fates["zero"], stored == 0)
    assert torch.equal(fates["subnormal"], (stored != 0) & (stored.abs() < 2**-6))


def test_the_edges_of_clipping_and_drowning():
    x = torch.tensor([448.0, 448.1, -1000, 2**-6, 2**-6 * 0.9, 2**-10, 2**-10 * 1.01, 0])
    names = [next(fate for fate in scale_plots.FATES if fp8.fates(x, 1.0)[fate][i])
             for i in range(len(x))]
    assert names == ["rounded", "clipped", "clipped", "rounded", "subnormal", "zero", "subnormal",
                     "zero"]


def test_amax_over_448_clips_nothing_whatever_amax_is():
    for amax in torch.rand(2000, generator=torch.Generator().manual_seed(2)):
        assert not fp8.fates(amax[None], float(amax / 448))["clipped"].any()


def test_the_sentence_is_what_the_numbers_say():
    x = torch.tensor([448.0, 896, 2**-8, 2**-11])
    error = ((448**2 + 2**-22) / (448**2 + 896**2)) ** 0.5
    assert scale_plots.in_words(x, 1.0) == (
        "25.0 % clip, 25.0 % are subnormal, 25.0 % become zero; error of all together "
        f"{100 * error:.1f} %")
    assert [scale_plots.times(ratio) for ratio in (1 / 64, 1.0, 8192.0)] == [
        "1/64 ×", "1 ×", "8,192 ×"]


def test_a_panel_names_the_largest_error_of_its_scale(pictures):
    """0.1 on the grid of scale 1 becomes 0.1015625, 1.6 % more; scaled to 448, nothing is lost."""
    scale_plots.on_the_grid(torch.tensor([0.1]), {"bare": 1.0, "scaled": 0.1 / 448})
    said = "the largest relative error is"
    assert f"bare, {said} 2 %. scaled, {said} 0 %." in pictures[0]


def test_each_panel_of_clipping_says_its_scale(pictures):
    scale_plots.clips_and_drowns(VALUES, [BEST / 16, BEST, BEST * 8192])
    for words in ("1/16 × amax / 448", "1 × amax / 448", "8,192 × amax / 448"):
        assert words in pictures[0]


def test_the_quiet_rows_errors_are_the_ones_handed_in(pictures):
    loudness = torch.tensor([1.0, 10, 100])
    scale_plots.loud_row(torch.rand(4, 5) + 0.1, loudness,
                         {"INT8": [0.01, 0.05, 0.69], "E4M3": [0.02, 0.02, 0.03]})
    assert "is 1, 100 times as loud: INT8: 1 %, 69 %; E4M3: 2 %, 3 %." in pictures[0]


def test_the_three_ways_of_a_linear_are_told_in_words_too(pictures):
    scale_plots.dataflow()
    assert all(way in pictures[0] for way in ("bf16:", "W8A16:", "W8A8:"))


def test_the_slider_moves_the_scale_and_the_picture(pictures):
    slider, words, _ = widgets.scale_slider(VALUES).children
    assert words.value.startswith("scale = 1 × amax / 448") and "0.0 % clip" in words.value
    slider.value = 2.0**-6
    assert words.value.startswith("scale = 1/64 × amax / 448") and "0.0 % clip" not in words.value
    assert len(pictures) == 2 and "1/64 × amax / 448" in pictures[1]
