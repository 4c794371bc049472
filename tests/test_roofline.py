"""Bytes and ceilings, against real headers, Transformers' own model, and the published figures."""

import itertools
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import REPO

from helpers import WorkbookError, checkpoint, hardware, ledger, models, plots, roofline, widgets

PHI4 = roofline.load_config(REPO / "data" / "phi4")


def test_phi4s_bytes_follow_from_its_config():
    planned = roofline.tensors(PHI4)
    assert checkpoint.total_bytes(planned) == models.PHI4.bf16_bytes == 29_319_014_400
    fp8 = checkpoint.total_bytes(checkpoint.predict_fp8(planned))
    assert fp8 == models.PHI4.fp8_bytes == 15_691_827_200
    assert sum(t.nbytes // 2 for t in planned) == models.PHI4.parameters
    assert len(checkpoint.linears(planned)) == 160


def test_the_plan_of_a_config_is_the_model_transformers_builds():
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(REPO / "data/phi4"))
    built = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert built == {t.name: t.shape for t in roofline.tensors(PHI4)}


def test_the_plan_is_the_real_header_of_the_bundled_model(tiny_base):
    real = {(t.name, t.dtype, t.shape, t.nbytes) for t in tiny_base.tensors}
    planned = roofline.tensors(roofline.load_config(tiny_base.path))
    assert real == {(t.name, t.dtype, t.shape, t.nbytes) for t in planned}


def test_phi4_mini_is_tied_and_its_bytes_follow_too():
    config = PHI4 | {"hidden_size": 3072, "intermediate_size": 8192, "vocab_size": 200064,
                     "num_attention_heads": 24, "num_key_value_heads": 8, "num_hidden_layers": 32,
                     "tie_word_embeddings": True}
    planned = roofline.tensors(config)
    assert checkpoint.total_bytes(planned) == models.PHI4_MINI.bf16_bytes
    assert checkpoint.total_bytes(checkpoint.predict_fp8(planned)) == models.PHI4_MINI.fp8_bytes
    assert sum(t.nbytes // 2 for t in planned) == models.PHI4_MINI.parameters
    assert roofline.bytes_per_token(planned) == checkpoint.total_bytes(planned)


def test_bytes_per_token_leave_out_the_embedding_alone():
    planned = roofline.tensors(PHI4)
    assert checkpoint.total_bytes(planned) - roofline.bytes_per_token(planned) == 2 * 100352 * 5120
    bf16, fp8 = (roofline.decode_bytes(PHI4, arm) for arm in ("bf16", "fp8"))
    assert (round(bf16 / 1e9, 2), round(fp8 / 1e9, 2), round(bf16 / fp8, 2)) == (28.29, 14.66, 1.93)
    assert roofline.kv_bytes_per_token(PHI4) == 204_800


def test_the_published_a40_figures_are_two_thirds_of_their_ceilings():
    ceilings = roofline.gpu_table(PHI4).loc["A40"]
    value = {row["arm"]: row["value"] for row in ledger.published()
             if row["experiment"] == "throughput"}
    assert round(100 * value["bf16"] / ceilings["bf16 ceiling"]) == 69
    assert round(100 * value["fp8"] / ceilings["FP8 ceiling"]) == 67


def test_every_gpu_has_a_source_and_a_mode_by_its_capability():
    table = roofline.gpu_table(PHI4)
    assert all(gpu["source"] and gpu["memory_source"] for gpu in roofline.gpus())
    modes = table["mode"].to_dict()
    assert (modes["A40"], modes["L40S"], modes["V100 SXM2 32 GB"]) == ("W8A16", "W8A8", "none")


@pytest.mark.parametrize("name, bf16, fp8, kernel", [
    ("A40", True, True, True), ("L4", False, True, True), ("T4", False, False, True),
    ("V100 SXM2 32 GB", False, True, False)])
def test_what_a_gpu_can_serve_of_phi4(name, bf16, fp8, kernel):
    line = roofline.gpu_table(PHI4).loc[name]
    assert (line["bf16 fits"], line["FP8 fits"], line["FP8 kernel"]) == (bf16, fp8, kernel)
    assert (line["mode"] != "none") == kernel


def test_the_picture_of_the_gpus_names_memory_and_mode_once(monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "show", lambda figure, alt: figures.append(figure))
    plots.decode_ceilings(roofline.gpu_table(PHI4))
    ticks = {tick.get_text(): tick for tick in figures[0].axes[0].get_yticklabels()}
    assert len(ticks) == len(roofline.gpus())
    assert {"A40, 45.0 GiB, W8A16", "V100 SXM2 32 GB, 32.0 GiB, no FP8",
            "H100 SXM, 79.6 GiB, W8A8"} <= set(ticks)
    bold = [text for text, tick in ticks.items() if tick.get_fontweight() == "bold"]
    assert bold == ["A40, 45.0 GiB, W8A16"]  # the GPU of the published figures is found at a glance


def test_a_gpus_bandwidth_is_its_data_sheets():
    gpu = hardware.Gpu(0, "NVIDIA A40", 48 * 10**9, (8, 6), "")
    found = roofline.read_bandwidth(SimpleNamespace(gpus=(gpu,)))
    assert (found.bytes_per_s, found.source) == (696e9, "NVIDIA A40 data sheet")


def test_of_several_gpus_the_bandwidth_is_that_of_the_one_that_serves():
    """The mode, the memory and the ceiling are of one GPU."""
    two = (hardware.Gpu(0, "Tesla T4", 16 * 10**9, (7, 5), ""),
           hardware.Gpu(1, "NVIDIA L4", 24 * 10**9, (8, 9), ""))
    assert roofline.read_bandwidth(SimpleNamespace(gpus=two)).bytes_per_s == 300e9


def test_the_bandwidth_of_a_cpu_is_a_gib_over_the_fastest_of_seven_reads(monkeypatch):
    """On a clock by which the first read, a warm-up, takes 1 s, and the others 2 s or more."""
    spans = iter([1, 7, 6, 5, 4, 3, 2, 9])
    ticks = itertools.chain.from_iterable((0, span) for span in spans)
    monkeypatch.setattr(roofline.time, "perf_counter", lambda: next(ticks))
    found = roofline.read_bandwidth(SimpleNamespace(gpus=()))
    assert found.bytes_per_s == 2**30 / 2
    assert found.source.startswith("measured")
    with pytest.raises(AttributeError, match="NO_SUCH_NAME"):
        models.NO_SUCH_NAME  # noqa: B018


def test_what_a_gpu_of_24_gb_has_left_after_fp8():
    found = roofline.budget(PHI4, "fp8", 24 * 10**9, 300e9)
    assert found.weights == 15_691_827_200
    assert found.left == 21_600_000_000 - 15_691_827_200 - 1_500_000_000
    assert found.tokens == found.left // 204_800 == 21_524 and found.fits
    assert (found.context, found.concurrency) == (16_384, 1)
    none = roofline.budget(PHI4, "bf16", 24 * 10**9, 300e9)
    assert none.left < 0 and (none.tokens, none.ceiling, none.fits) == (0, 0.0, False)
    # room for 4,000 tokens is none: a server with --max-model-len 4096 does not start
    small = roofline.budget(PHI4, "fp8", int((17_191_827_200 + 4000 * 204_800) / 0.9) + 1, 300e9)
    assert small.left >= 4000 * 204_800 and (small.tokens, small.fits) == (0, False)


def test_a_gpu_is_explained_and_an_unknown_one_is_told():
    assert "FP8 fits and bf16 does not" in roofline.explain(PHI4, "L4")
    assert "Both fit" in roofline.explain(PHI4, "A40")
    assert "Neither" in roofline.explain(PHI4, "T4")
    assert "needs 7.5 or newer" in roofline.explain(PHI4, "V100 SXM2 32 GB")
    with pytest.raises(WorkbookError, match="'A4' is not in data/gpus.json"):
        roofline.explain(PHI4, "A4")


def test_the_widget_follows_its_menu():
    menu, words, _ = widgets.gpu_menu().children
    assert len(menu.options) == len(roofline.gpus())
    menu.value = "L4"
    assert "FP8 fits and bf16 does not" in words.value


def test_kv_tokens_are_those_that_vllm_reports(fp8_server, tiny_base):
    """vLLM's own line at start-up, for the KV cache that the server's flags give it."""
    reported = re.search(r"KV cache size: ([\d,]+) tokens", fp8_server.log())[1]
    given = int(fp8_server.flags[fp8_server.flags.index("--kv-cache-memory-bytes") + 1])
    ours = roofline.kv_tokens(roofline.load_config(tiny_base.path), given)
    assert ours == pytest.approx(int(reported.replace(",", "")), rel=0.05)
