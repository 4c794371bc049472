"""`make bench-cpu`: who is asked what, in which order, and what is made of the figures."""

import json

import bench_cpu
import pandas as pd
import pytest

from helpers import cpu_bench, hardware, ledger, models, slice_speed, throughput
from helpers.cpu_bench import BF16, LLAMA_CPP, STOCK, TRANSFORMERS, Arm
from helpers.throughput import Work

W8A16 = Arm("vLLM", "fp8", "w8a16")


def test_arms_take_turns_after_a_round_that_is_not_counted():
    asked = []

    def arm(which: Arm):
        return lambda work: asked.append((which, work)) or float(len(asked))

    one, eight = Work(1, 1, 6, 2), Work(8, 1, 6, 2)
    found = bench_cpu.measured({BF16: arm(BF16), W8A16: arm(W8A16)},
                               {BF16: [one, eight], W8A16: [one]})
    assert asked == [(BF16, one), (W8A16, one), (BF16, eight),  # the round that warms up
                     (W8A16, one), (BF16, one), (BF16, eight),
                     (BF16, one), (W8A16, one), (BF16, eight)]
    assert list(zip(found["round"], found["arm"], found["streams"], found["tok_s"], strict=True)) \
        == [(1, W8A16, 1, 4), (1, BF16, 1, 5), (1, BF16, 8, 6),
            (2, BF16, 1, 7), (2, W8A16, 1, 8), (2, BF16, 8, 9)]


def test_the_slow_arms_are_asked_for_less():
    usual = bench_cpu.asked_of(W8A16, generated=48, rounds=5)
    assert usual == [Work(1, 1, 48, 5), Work(8, 1, 48, 5), Work(1, 512, 1, 5)]
    assert bench_cpu.asked_of(STOCK, 48, 5) == [Work(1, 1, 4, 5)]
    assert bench_cpu.asked_of(LLAMA_CPP, 48, 5) == [usual[0], usual[2]]


def rounds_of(model: str, speeds: dict[tuple[Arm, Work], list[float]]) -> pd.DataFrame:
    return pd.DataFrame([
        {"model": model, "round": number, "arm": arm, "work": work, "streams": work.streams,
         "prompt_tokens": work.prompt_tokens, "kernel": "K", "tok_s": tok_s}
        for (arm, work), each in speeds.items() for number, tok_s in enumerate(each, 1)])


ONE, PROMPT = Work(1, 1, 96, 3), Work(1, 512, 1, 3)
ROUNDS = rounds_of("tiny", {
    (W8A16, ONE): [30, 10, 44], (BF16, ONE): [10, 20, 20], (STOCK, Work(1, 1, 4, 3)): [1, 1, 1],
    (BF16, PROMPT): [500, 500, 500], (TRANSFORMERS, PROMPT): [250, 1000, 500]})


def test_a_ratio_is_taken_round_by_round_and_to_the_same_work():
    table = bench_cpu.summary(ROUNDS).set_index(["work", "arm"])
    fp8 = table.loc[(ONE, W8A16)]
    assert (fp8["tok_s"], fp8["tok_s_min"], fp8["tok_s_max"]) == (30, 10, 44)
    # 3, 0.5 and 2.2; the ratio of the medians would be 1.5
    assert (fp8["ratio"], fp8["ratio_min"], fp8["ratio_max"]) == pytest.approx((2.2, 0.5, 3))
    # four tokens or ninety-six: one stream's decoding, set against one stream's decoding
    assert table.loc[(Work(1, 1, 4, 3), STOCK)]["ratio"] == pytest.approx(0.05)
    assert table.loc[(PROMPT, TRANSFORMERS)]["ratio"] == pytest.approx(1)
    assert [arm for _, arm in table.index] == [BF16, W8A16, STOCK, BF16, TRANSFORMERS]


def test_what_is_recorded_is_read_back_as_it_was(tmp_workspace):
    bench_cpu.record(bench_cpu.summary(ROUNDS), models.tiny())
    rows = ledger.read()
    assert [row["arm"] for row in rows] == ["bf16", "fp8", "fp8", "bf16", "bf16"]
    found = {(record.arm, record.work): record.metrics for record in cpu_bench.records(rows)}
    assert set(found) == set(zip(ROUNDS["arm"], ROUNDS["work"], strict=True))
    assert found[W8A16, ONE]["ratio_max"] == 3 and found[BF16, PROMPT]["tok_s"] == 500
    assert cpu_bench.records(rows, model="another") == []
    shown = cpu_bench.table(cpu_bench.records(rows)).set_index("tokens/s")
    assert shown.loc["vLLM FP8, W8A16", "1 stream"] == "30.0 (2.20x, 0.50 to 3.00)"
    assert shown.loc["vLLM bf16", "prompt of 512"] == "500"
    assert shown.loc["vLLM FP8, stock", "prompt of 512"] == ""


def test_the_committed_rows_have_every_arm_and_their_model():
    records = cpu_bench.records()
    assert {record.arm for record in records} == set(cpu_bench.ARMS)
    of_phi4 = cpu_bench.records(model=cpu_bench.PHI4)
    assert {record.work.title for record in of_phi4} == {"1 stream", "8 streams", "prompt of 512"}
    arms = {arm for arm in cpu_bench.ARMS if arm not in (STOCK, LLAMA_CPP)}
    for cpu in {record.cpu for record in of_phi4}:
        assert {record.arm for record in of_phi4 if record.cpu == cpu} == arms


def test_transformers_speed_is_its_tokens_over_its_time(tiny_base, monkeypatch):
    clock = iter([100.0, 104.0, 200.0, 202.0])
    monkeypatch.setattr(bench_cpu.time, "perf_counter", lambda: next(clock))
    run = bench_cpu.transformers_arm(tiny_base)
    assert run(Work(2, 1, 6, 1)) == 2 * 6 / 4
    assert run(Work(1, 32, 1, 1)) == 32 / 2


def test_a_servers_speed_is_the_benchmarks(fp8_server, tmp_workspace):
    with throughput.benchmark(*slice_speed.SHOWN) as measure:
        seen = []
        run = bench_cpu.server_arm(
            fp8_server, lambda server, work: seen.append(measure(server, work)) or seen[-1])
        decoding, prompt = run(Work(2, 1, 5, 1)), run(Work(1, 64, 1, 1))
    assert decoding == pytest.approx(10 / seen[0].raw["duration"])
    assert prompt == pytest.approx(64 / seen[1].raw["ttfts"][0])


def test_every_server_has_its_own_checkpoint_and_numerics():
    arms = bench_cpu.vllm_arms({each: each for each in ("bf16", "fp8", "int8", "int4")}, stock=True)
    assert list(arms) == [arm for arm in cpu_bench.ARMS if arm.engine == "vLLM"]
    assert [model for model, _ in arms.values()] == [arm.format for arm in arms]
    assert [env.get(bench_cpu.cpu_kernels.VARIABLE) for _, env in arms.values()] == [
        None, "w8a16", "w8a8", None, None, None]
    assert arms[STOCK][1] == {"VLLM_PLUGINS": ""}  # without the workbook's plugin
    fewer = bench_cpu.vllm_arms({each: each for each in ("bf16", "fp8", "int8")}, stock=False)
    assert not {STOCK, cpu_bench.INT4} & set(fewer)


def test_the_whole_run_on_the_bundled_model(tmp_workspace, tmp_path, monkeypatch):
    """`make bench-cpu --only tiny`, one round; only what is slow about it is made small."""
    if hardware.serving_mode(hardware.detect()).device != "cpu":
        pytest.skip("these are a CPU's kernels")
    monkeypatch.setattr(bench_cpu, "OUT", tmp_path / "out")
    monkeypatch.setattr(bench_cpu, "asked_of", lambda arm, generated, rounds: [
        Work(1, 1, 3, rounds)])
    monkeypatch.setattr(bench_cpu.cpu_kernels, "NUMERICS", ())  # three servers instead of five
    monkeypatch.setattr("sys.argv", ["bench_cpu.py", "--rounds", "1", "--only", "tiny"])
    bench_cpu.main()
    assert "vLLM FP8, stock" in (tmp_path / "out" / "table.md").read_text()
    arms = {BF16, STOCK, cpu_bench.INT8, TRANSFORMERS}
    rounds = json.loads((tmp_path / "out" / "rounds.json").read_text())
    assert {Arm(**each["arm"]) for each in rounds} == arms
    assert {Work(**each["work"]) for each in rounds} == {Work(1, 1, 3, 1)}
    assert {record.arm for record in cpu_bench.records(ledger.read())} == arms
    kernels = {(row["work"]["engine"], row["work"]["numerics"]): row["kernel"]
               for row in ledger.read()}
    assert kernels["vLLM", ""] == kernels["Transformers", ""] == "unquantized"
    assert kernels["vLLM", "stock"] == "ChannelWiseTorchFP8ScaledMMLinearKernel"
    assert (tmp_path / "out" / "ratios.png").stat().st_size > 0
    assert not list((tmp_workspace / "bench-cpu").iterdir())  # the scratch is gone
