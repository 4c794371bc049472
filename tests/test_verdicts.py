"""The verdicts on this machine: each rule, at both sides of its border."""

import pytest

from helpers import ledger, models, verdicts

TINY = models.tiny()
GSM8K = {"task": "tiny_gsm8k", "limit": 100}
ONE = {"output_tokens": 500, "concurrency": 1}


@pytest.fixture
def add(tmp_path):
    def add(experiment, arm="fp8", work=None, metrics=None, kernel="", mode="cpu-w8a16",
            profile=TINY):
        ledger.record(experiment, arm, work or {}, metrics or {}, mode=mode, kernel=kernel,
                      model=models.model_info(profile), ledger=tmp_path / "ledger.jsonl")
    return add


@pytest.fixture
def verdict(tmp_path):
    def verdict(what):
        table = verdicts.of_this_machine(TINY, ledger.read(tmp_path / "ledger.jsonl"))
        (row,) = table[table["what"].str.contains(what, regex=False)].to_dict("records")
        return row["verdict"]
    return verdict


def test_an_empty_ledger_names_the_notebooks_that_measure():
    table = verdicts.of_this_machine(TINY, [])
    assert set(table["verdict"]) == {"not measured yet"}
    assert [text.split()[1] for text in table["measured"]] == ["02", "03", "05", "06", "07",
                                                                      "07"]


@pytest.mark.parametrize("made, said", [(0, "as predicted"), (1, "differs")])
def test_the_size_is_held_to_the_byte(add, verdict, made, said):
    add("quantize", metrics={"bytes_after": 3_956_224 + made})  # 16 Linears in 8 bits, and scales
    assert verdict("size") == said


@pytest.mark.parametrize("identical, modules, said", [
    (16, 16, "as predicted"), (15, 16, "differs"), (0, 0, "differs")])
def test_every_module_must_be_identical(add, verdict, identical, modules, said):
    add("scales", metrics={"identical": identical, "modules": modules})
    assert verdict("codes and scales") == said


@pytest.mark.parametrize("mode, kernel, said", [
    ("cpu-w8a16", "CpuFp8W8A16LinearKernel", "as predicted"),
    ("cpu-w8a16", "ChannelWiseTorchFP8ScaledMMLinearKernel", "differs"),
    ("gpu-w8a8", "CutlassFP8ScaledMMLinearKernel", "as predicted"),
    ("gpu-w8a8", "MarlinFP8ScaledMMLinearKernel", "differs"),
    ("gpu-w8a16", "MarlinFP8ScaledMMLinearKernel", "as predicted")])
def test_the_kernel_must_be_the_modes(add, verdict, mode, kernel, said):
    add("gsm8k", "bf16", kernel="unquantized", mode=mode)
    add("serve", kernel=kernel, mode=mode)
    assert verdict("kernel") == said


@pytest.mark.parametrize("mode, kernel, far, said", [
    ("cpu-w8a16", "CpuFp8W8A16LinearKernel", (0.002, 0.03), "as predicted"),
    ("cpu-w8a16", "CpuFp8W8A16LinearKernel", (0.03, 0.002), "differs"),
    ("gpu-w8a8", "CutlassFP8ScaledMMLinearKernel", (0.03, 0.002), "as predicted"),
    ("gpu-w8a8", "CutlassFP8ScaledMMLinearKernel", (0.002, 0.03), "differs"),
    ("gpu-w8a8", "MarlinFP8ScaledMMLinearKernel", (0.03, 0.002), "differs")])
def test_a_kernels_output_must_be_the_modes_arithmetic(add, verdict, mode, kernel, far, said):
    add("serve", kernel=kernel, mode=mode,
        metrics=dict(zip(("from_w8a16", "from_w8a8"), far, strict=True)))
    add("throughput", work=ONE, kernel=kernel, mode=mode)  # newer, and proves nothing
    assert verdict("kernel") == said


def test_the_arithmetic_is_told_with_its_distances(add, tmp_path):
    add("serve", kernel="CpuFp8W8A16LinearKernel",
        metrics={"from_w8a16": 0.0018, "from_w8a8": 0.0264})
    table = verdicts.of_this_machine(TINY, ledger.read(tmp_path / "ledger.jsonl"))
    (told,) = table.loc[table["what"].str.contains("kernel"), "measured"]
    assert told == "CpuFp8W8A16LinearKernel; output 0.2 % from W8A16, 2.6 % from W8A8"


# 2 x 0.5^6 = 0.031 and 2 x 0.5^5 = 0.063: six is the fewest that p < 0.05 takes, all one way.
@pytest.mark.parametrize("lost, gained, noise, said", [
    (5, 0, None, "not told apart"), (6, 0, None, "lower"), (0, 6, None, "higher"),
    (3, 2, 5, "within the noise"), (3, 3, 5, "not told apart"), (6, 0, 6, "lower"),
    (0, 0, 0, "within the noise"), (0, 0, None, "not told apart")])
def test_accuracy_against_mcnemar_and_the_noise_floor(add, verdict, lost, gained, noise, said):
    add("gsm8k", work=GSM8K, metrics={"lost": lost, "gained": gained})
    if noise is not None:
        add("noise-floor", "bf16", work=GSM8K | {"concurrency": 8}, metrics={"flips": noise})
        add("noise-floor", "bf16", work=GSM8K | {"concurrency": 16}, metrics={"flips": 0})
    assert verdict("right answers of 100") == said


def test_the_noise_of_other_work_is_not_this_ones(add, verdict):
    add("gsm8k", work=GSM8K | {"limit": 1319}, metrics={"lost": 1, "gained": 0})
    add("noise-floor", "bf16", work=GSM8K, metrics={"flips": 9})
    assert verdict("right answers of 1,319") == "not told apart"


@pytest.mark.parametrize("ratio, said", [
    ((1.9, 1.8, 2.0), "faster"), ((1.1, 1.001, 1.2), "faster"), ((1.1, 1.0, 1.2), "not told apart"),
    ((0.9, 0.8, 1.0), "not told apart"), ((0.9, 0.8, 0.999), "slower"),
    ((0.8, 0.56, 1.2955), "too spread to say")])
def test_a_speed_is_judged_by_the_interval_of_its_ratio(add, verdict, ratio, said):
    names = ("ratio", "ratio_low", "ratio_high")
    add("throughput", work=ONE | {"concurrency": 8}, metrics=dict.fromkeys(names, 9.0))
    add("throughput", work=ONE, metrics=dict(zip(names, ratio, strict=True)))
    add("throughput", work=ONE, metrics={"output_tok_s": 30.0})  # bf16 did not run beside it
    assert verdict("tokens/s") == said


def test_another_profiles_rows_are_not_this_ones(add, verdict):
    add("quantize", metrics={"bytes_after": 1}, profile=models.PHI4)
    assert verdict("size") == "not measured yet"


@pytest.mark.parametrize("lost, gained", [(70, 70), (-1, 0), (float("nan"), 0)])
def test_counts_that_cannot_be_get_no_verdict(add, verdict, lost, gained):
    add("gsm8k", work=GSM8K, metrics={"lost": lost, "gained": gained})
    assert verdict("right answers") == "not measured yet"


def test_the_published_ratio_has_the_range_that_two_whole_numbers_leave():
    ratio = verdicts.published_ratio()
    assert ratio.value == pytest.approx(32 / 17)
    assert (ratio.low, ratio.high) == pytest.approx((31.5 / 17.5, 32.5 / 16.5))


# The card's ratio lies between 1.80 and 1.9697; an interval over a quarter of its ratio says little
@pytest.mark.parametrize("ratio, low, high, said", [
    (1.95, 1.90, 1.99, "consistent with 1.88x"),
    (1.70, 1.60, 1.7999, "not consistent: lower"), (1.70, 1.60, 1.8001, "consistent with 1.88x"),
    (2.05, 1.9698, 2.1, "not consistent: higher"), (2.05, 1.9696, 2.1, "consistent with 1.88x"),
    (1.88, 1.66, 2.12, "consistent with 1.88x"), (1.88, 1.65, 2.13, "too spread to say"),
    (1.00, 0.50, 1.50, "not consistent: lower"), (0.9, 0.0, 0.95, "not measured yet"),
    (1.9, 2.0, 1.8, "not measured yet")])
def test_the_slices_ratio_against_the_cards(add, verdict, ratio, low, high, said):
    work = {"concurrency": 1, "input_tokens": 1, "output_tokens": 12, "numerics": "w8a16"}
    add("slice", work=work, profile=models.PHI4,  # of whichever model: the slice is its own
        metrics={"ratio": ratio, "ratio_low": low, "ratio_high": high})
    assert verdict("shapes of Phi-4") == said


@pytest.mark.parametrize("other", [
    {"numerics": "w8a8"}, {"concurrency": 8}, {"input_tokens": 512, "output_tokens": 1}])
def test_only_one_stream_of_the_cards_arithmetic_is_set_beside_it(add, verdict, other):
    work = {"concurrency": 1, "input_tokens": 1, "output_tokens": 12, "numerics": "w8a16"}
    add("slice", work=work | other, metrics={"ratio": 1.9, "ratio_low": 1.9, "ratio_high": 1.9})
    assert verdict("shapes of Phi-4") == "not measured yet"
