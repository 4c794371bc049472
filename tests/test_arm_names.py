"""On a GPU without bf16 that arm is called fp16, in tables, pictures, the ledger and the card."""

import pandas as pd
import pytest
from conftest import REPO
from test_capacity import machine

from helpers import (
    arm_names,
    card,
    course,
    hardware,
    ledger,
    ledger_row,
    models,
    phi4_slice,
    plots,
    report,
    roofline,
    slice_speed,
    speed_plots,
    throughput,
    widgets,
)

T4, A40 = (machine(roofline.listed(roofline.named(name))) for name in ("T4", "A40"))


@pytest.fixture(autouse=True)
def as_before():
    yield
    arm_names.served_in("bfloat16")


@pytest.fixture
def on_a_t4(monkeypatch):
    monkeypatch.setattr(hardware, "detect", lambda *_: T4)
    monkeypatch.delenv(models.VARIABLE, raising=False)
    return course.open_course()


@pytest.fixture
def drawn(monkeypatch):
    shown = []
    monkeypatch.setattr(plots, "show", lambda figure, alt: shown.append((figure, alt)))
    return shown


def test_the_first_output_says_fp16_and_pictures_follow(on_a_t4, drawn, capsys):
    assert on_a_t4.profile.name == "phi-4-mini" and "in fp16, because bf16" in repr(on_a_t4)
    plots.throughput_rounds(pd.DataFrame({"bf16": [2.0, 2.1], "fp8": [3.0, 3.2]}, index=[1, 2]))
    (figure, alt), = drawn
    assert "FP8 over fp16" in figure.axes[0].get_title(loc="left") and "fp16's in each" in alt
    assert arm_names.titled("bf16, with BOS") == "fp16, with BOS"
    assert arm_names.titled("fp8") == "fp8"
    course.Course(A40, hardware.serving_mode(A40), models.PHI4)
    arm_names.served_in(hardware.serving_mode(A40).dtype)
    assert arm_names.titled("bf16, with BOS") == "bf16, with BOS"


def test_the_ledger_keeps_its_arm_and_says_the_type(on_a_t4, tmp_workspace, tiny_fp8):
    on_a_t4.record("throughput", "bf16", tiny_fp8, {"output_tokens": 500, "concurrency": 1,
                                                    "rounds": 5},
                   {"output_tok_s": 20.0, "output_tok_s_min": 19.0, "output_tok_s_max": 21.0},
                   kernel="unquantized")
    (row,) = ledger.read()
    assert (row["arm"], row["work"]["dtype"], ledger_row.validate(row)) == ("bf16", "float16", "")
    assert ledger.table([row])["arm"].tolist() == ["fp16"]
    text = card.model_card(models.PHI4_MINI, [row]).text
    assert "| fp16 (base) | 500, 1, 5 | 20.0" in text
    shown = report.measured_beside_published([row], profile="phi-4-mini")
    assert shown["mode"].str.contains("float16").any()


def test_elsewhere_a_row_says_nothing_of_it(tmp_workspace, tiny_fp8):
    opened = course.Course(A40, hardware.serving_mode(A40), models.PHI4)
    opened.record("throughput", "bf16", tiny_fp8, {}, {}, kernel="unquantized")
    (row,) = ledger.read()
    assert "dtype" not in row["work"] and ledger_row.arm_title(row) == "bf16"


def test_the_slices_arm_is_fp16_and_the_ratios_are_over_it(drawn):
    mode = hardware.serving_mode(T4)
    assert list(phi4_slice.arms(mode)) == ["fp16", phi4_slice.CARDS]
    rounds = pd.DataFrame([
        {"round": number, "arm": arm, "work": work.title, "tok_s": speed}
        for number in range(1, 6) for work in slice_speed.WORK
        for arm, speed in (("fp16", 10.0), (phi4_slice.CARDS, 15.0))])
    ratios = throughput.ratios(rounds)
    assert set(ratios.set_index("arm").loc[phi4_slice.CARDS, "ratio"]) == {1.5}
    table = slice_speed.table(ratios)
    assert "over fp16" in table.index.name
    assert table.loc["fp16"].tolist() == ["10.0 tokens/s"] * 3
    assert table.loc[phi4_slice.CARDS].str.startswith("1.50x").all()
    speed_plots.ratios(ratios, 1.9)
    (figure, alt), = drawn
    assert "faster than fp16" in figure.axes[0].get_title(loc="left") and "over fp16's" in alt
    assert "bf16" not in alt


def test_a_gpu_of_the_menu_has_its_own_name_for_the_arm():
    config = roofline.load_config(REPO / "data" / "phi4")
    assert list(widgets.budget_table(config, "T4")) == ["fp16", "FP8"]
    assert list(widgets.budget_table(config, "A40")) == ["bf16", "FP8"]
    assert "Neither fp16" in roofline.explain(config, "T4")
