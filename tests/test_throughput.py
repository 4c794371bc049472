"""vLLM's benchmark against what the server itself counted, and the runs that must not count."""

import contextlib
import math
import re
from dataclasses import fields, replace

import pandas as pd
import pytest

from helpers import WorkbookError, client, hardware, models, throughput
from helpers.throughput import Work


@pytest.fixture(autouse=True)
def own_logs(tmp_workspace):
    """The benchmark's log goes to a workspace of the test's own."""


@pytest.fixture(scope="module")
def measure(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PHI4_FP8_WORKSPACE", str(tmp_path_factory.mktemp("benchmark")))
        with throughput.benchmark() as measure:
            yield measure


def counted(server, name: str) -> float:
    """What the server's own counter of that name says, over all engines."""
    text = client.session(server.api_key).get(server.url + "/metrics").text
    return sum(float(n) for n in re.findall(rf"^vllm:{name}\{{.*\}} (\S+)$", text, re.M))


def test_the_flags_say_what_the_work_is():
    flags = Work(streams=4, prompt_tokens=16, generated_tokens=40).flags()
    asked = dict(zip(flags, flags[1:], strict=False))
    assert (asked["--num-prompts"], asked["--max-concurrency"]) == ("4", "4")
    assert (asked["--random-input-len"], asked["--random-output-len"]) == ("16", "40")
    assert "--ignore-eos" in flags
    assert flags == Work(4, 16, 40, rounds=9).flags()  # the rounds are not the benchmark's affair


def test_the_ledger_has_every_number_of_the_work():
    assert Work(4, 16, 40, 3).in_ledger() == {
        "concurrency": 4, "input_tokens": 16, "output_tokens": 40, "rounds": 3}


@pytest.mark.parametrize("work, title, tokens", [
    (Work(), "1 stream", 500), (Work(8, 1, 12), "8 streams", 96),
    (Work(1, 512, 1), "prompt of 512", 512)])
def test_a_work_has_a_name_and_the_tokens_that_its_speed_counts(work, title, tokens):
    assert (work.title, work.counted_tokens) == (title, tokens)


def test_the_tokens_that_were_asked_for_were_generated(fp8_server, measure):
    before = counted(fp8_server, "generation_tokens_total")
    result = measure(fp8_server, Work(streams=3, prompt_tokens=16, generated_tokens=40))
    assert result.output_tokens == [40, 40, 40]
    assert counted(fp8_server, "generation_tokens_total") - before == 120
    assert result.output_tok_s == pytest.approx(120 / result.raw["duration"])
    assert result.ttft_ms == pytest.approx(1000 * sorted(result.raw["ttfts"])[1])


def test_one_streams_times_to_its_tokens_fill_the_run(fp8_server, measure):
    before = counted(fp8_server, "e2e_request_latency_seconds_sum")
    raw = measure(fp8_server, Work(prompt_tokens=16, generated_tokens=120)).raw
    served = counted(fp8_server, "e2e_request_latency_seconds_sum") - before
    # From sending the request to its last token passes no less than the server needs for it.
    spent = sum(raw["ttfts"]) + sum(map(sum, raw["itls"]))
    assert 0 < served <= spent <= raw["duration"]


def test_a_request_that_cannot_be_answered_does_not_count(fp8_server, measure):
    with pytest.raises(WorkbookError, match="requests failed|another number of tokens"):
        measure(fp8_server, Work(generated_tokens=5000))


def test_a_flag_that_the_benchmark_does_not_know(fp8_server):
    with (throughput.benchmark("--no-such-flag") as measure,
          pytest.raises(WorkbookError, match="did not run")):
        measure(fp8_server, Work())


@pytest.mark.parametrize("change", [{"failed": 1}, {"completed": 1}, {"output_lens": [500, 499]}])
def test_other_work_than_asked_for_is_refused(change):
    raw = {"failed": 0, "completed": 2, "output_lens": [500, 500], "errors": ["", ""],
           "output_throughput": 100.0, "median_ttft_ms": 5.0, "median_tpot_ms": 9.0,
           "median_itl_ms": 9.0, "p99_ttft_ms": 6.0, "p99_itl_ms": 12.0}
    assert throughput._checked(raw, Work(streams=2)).output_tok_s == 100.0
    with pytest.raises(WorkbookError, match="measured other work"):
        throughput._checked({**raw, **change}, Work(streams=2))


# Comparing arms

ONE, BUSY = Work(generated_tokens=500, rounds=3), Work(streams=8, generated_tokens=128, rounds=2)
CPU = hardware.ServingMode("cpu-w8a16", "cpu", "", "")
GPU = hardware.ServingMode("gpu-w8a8", "cuda", "", "")


def shorter(work):
    return replace(work, generated_tokens=4)


@pytest.fixture
def happenings(monkeypatch):
    """`compare` with servers and a benchmark that do nothing but note, in order, what is asked.

    The energy counter adds up 7 J a run.
    """
    noted, energy, up = [], [0], []

    class Server:
        def __init__(self, model, flags):
            self.model, self.flags, self.kernel = model, flags, f"kernel of {model}"
            self.gpus = 1

        @property
        def is_running(self):
            return self in up

    def start(servers):
        for server in servers:
            assert throughput.NO_REUSE[0] in server.flags and server not in up
            noted.append(("start", server.model))
            up.append(server)

    def stop(servers):
        for server in servers:
            if server in up:
                noted.append(("stop", server.model))
                up.remove(server)

    @contextlib.contextmanager
    def benchmark():
        def measure(server, work):
            noted.append((server.model, work))
            energy[0] += 7
            speed = float(len(noted))
            return throughput.BenchResult(
                speed, [work.generated_tokens] * work.streams, 1, 2, 3, 4, 5, {})
        yield measure

    monkeypatch.setattr(throughput.serving, "VllmServer", Server)
    monkeypatch.setattr(throughput.serving, "start_together", start)
    monkeypatch.setattr(throughput.serving, "stop_together", stop)
    monkeypatch.setattr(throughput, "benchmark", benchmark)
    monkeypatch.setattr(hardware, "energy_joules", lambda gpus: energy[0])
    return noted


def test_every_round_measures_every_arm_after_a_warm_up_that_is_not_counted(
        happenings, monkeypatch):
    monkeypatch.setattr(throughput.servers, "fit_together", lambda *_: True)
    rounds = throughput.compare({"bf16": "B", "fp8": "F"}, models.tiny(), CPU, [ONE, BUSY])
    assert happenings == [
        ("start", "B"), ("start", "F"),  # side by side, then the warm-up of each
        ("B", shorter(ONE)), ("B", shorter(BUSY)), ("F", shorter(ONE)), ("F", shorter(BUSY)),
        ("B", ONE), ("F", ONE), ("B", BUSY), ("F", BUSY),
        ("F", ONE), ("B", ONE), ("F", BUSY), ("B", BUSY),
        ("B", ONE), ("F", ONE),  # the busy work has two rounds
        ("stop", "B"), ("stop", "F")]
    assert list(zip(rounds["round"], rounds["arm"], rounds["streams"], strict=True)) == [
        (1, "bf16", 1), (1, "fp8", 1), (1, "bf16", 8), (1, "fp8", 8),
        (2, "fp8", 1), (2, "bf16", 1), (2, "fp8", 8), (2, "bf16", 8),
        (3, "bf16", 1), (3, "fp8", 1)]
    # What each run returned stands in its own row: the seventh thing noted is round 1's first run.
    assert rounds["output_tok_s"].tolist() == [*range(7, 17)]
    assert rounds["kernel"].tolist()[:3] == ["kernel of B", "kernel of F", "kernel of B"]
    assert rounds["joules_per_token"].tolist()[1:3] == [7 / 500, 7 / (8 * 128)]


def test_where_not_all_fit_only_the_server_that_is_measured_is_up(happenings, monkeypatch):
    monkeypatch.setattr(throughput.servers, "fit_together", lambda *_: False)
    monkeypatch.setattr(hardware, "energy_joules", lambda gpus: None)
    rounds = throughput.compare({"bf16": "B", "fp8": "F"}, models.tiny(), GPU, [ONE])
    up = set()
    for what, which in happenings:
        if what == "start":
            assert not up
            up.add(which)
        elif what == "stop":
            up.discard(which)
        else:
            assert up == {what}
    assert [model for what, model in happenings if what == "start"] == ["B", "F", "B", "F"]
    assert len(rounds) == 6 and math.isnan(rounds["joules_per_token"][0])


def test_two_pieces_of_work_with_one_title_are_refused():
    """A table by title would mix their figures."""
    work = [Work(1, 64, 20), Work(1, 64, 500)]
    with pytest.raises(WorkbookError, match="one title: 1 stream, 1 stream"):
        throughput.in_turn(None, {}, work, together=True)


def test_the_arms_take_turns_in_going_first():
    order = throughput.order(["bf16", "fp8"], 4)
    assert [number for number, _ in order] == [1, 1, 2, 2, 3, 3, 4, 4]
    firsts = [arm for _, arm in order[::2]]
    assert firsts == ["bf16", "fp8", "bf16", "fp8"]
    assert all({a, b} == {"bf16", "fp8"} for (_, a), (_, b) in zip(order[::2], order[1::2],
                                                                 strict=True))


def test_a_server_that_runs_already_is_not_started_again(happenings):
    with throughput.benchmark() as measure:
        of_arm = {name: throughput.serving.VllmServer(name, throughput.NO_REUSE) for name in "BF"}
        throughput.serving.start_together([of_arm["F"]])
        throughput.in_turn(measure, of_arm, [BUSY], together=True)
    assert [each for each in happenings if each[0] in ("start", "stop")] == [
        ("start", "F"), ("start", "B"), ("stop", "B"), ("stop", "F")]


def test_servers_are_stopped_when_a_measurement_is_interrupted(happenings, monkeypatch):
    monkeypatch.setattr(throughput.servers, "fit_together", lambda *_: True)
    monkeypatch.setattr(throughput, "tokens_per_second", lambda work, result: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        throughput.compare({"bf16": "B", "fp8": "F"}, models.tiny(), CPU, [ONE])
    assert happenings[-2:] == [("stop", "B"), ("stop", "F")]


def test_a_warm_up_has_as_many_streams_and_fewer_tokens():
    assert Work(8, 512, 500).shorter() == Work(8, 64, 4)
    assert Work(1, 32, 1).shorter() == Work(1, 32, 1)


def test_the_speed_of_decoding_is_without_the_prompt_and_a_prompts_is_to_its_first_token():
    result = throughput.BenchResult(4.0, [1], 250.0, 50.0, 0.0, 0.0, 0.0, {})
    assert throughput.tokens_per_second(Work(1, 512, 1), result) == 2048
    assert throughput.tokens_per_second(Work(1, 1, 12), result) == 20
    assert throughput.tokens_per_second(Work(8, 64, 12), result) == 160


def test_ratios_are_taken_round_by_round():
    speeds = {("bf16", "1 stream"): [10, 20, 30, 40, 50], ("bf16", "8 streams"): [7] * 5,
              ("fp8", "1 stream"): [20, 30, 90, 80, 110], ("fp8", "8 streams"): [14] * 5}
    rounds = pd.DataFrame([
        {"round": number, "arm": arm, "work": work, "tok_s": tok_s}
        for (arm, work), each in speeds.items() for number, tok_s in enumerate(each, 1)])
    found = throughput.ratios(rounds.sample(frac=1, random_state=0).sort_values(
        ["arm", "work"], kind="stable")).set_index(["arm", "work"])
    one = found.loc["fp8", "1 stream"]
    # 2, 1.5, 3, 2, 2.2: five rounds' interval is their range; the medians' ratio would be 2.67
    assert (one["tok_s"], one["ratio"], one["low"], one["high"]) == pytest.approx((80, 2, 1.5, 3))
    assert tuple(found.loc["fp8", "8 streams"][["ratio", "low", "high"]]) == (2, 2, 2)
    assert (found.loc["bf16"]["ratio"] == 1).all()


def test_the_summary_holds_medians_and_the_range():
    rounds = pd.DataFrame({"round": [1, 2, 3] * 2, "arm": ["fp8"] * 3 + ["bf16"] * 3,
                           "streams": [1] * 6, "prompt_tokens": [64] * 6,
                           "generated_tokens": [500] * 6, "kernel": ["K"] * 3 + ["unquantized"] * 3,
                           "output_tok_s": [10.0, 30.0, 20.0, 1.0, 2.0, 3.0],
                           "ttft_ms": [1.0] * 6, "tpot_ms": [5.0, 4.0, 9.0] * 2,
                           "itl_ms": [2.0] * 6, "ttft_p99_ms": [3.0] * 6,
                           "itl_p99_ms": [4.0] * 6})
    others = [rounds.assign(**{what: 8}, output_tok_s=99.0)
              for what in ("streams", "prompt_tokens", "generated_tokens")]
    rounds = pd.concat([rounds, *others])
    figures = throughput.summary(rounds, "fp8", Work())
    assert figures["output_tok_s"] == 20 and figures["tpot_ms"] == 5
    assert (figures["output_tok_s_min"], figures["output_tok_s_max"]) == (10, 30)
    # Round by round 10, 15 and 6.667 times, not the ratio of the medians, 20 / 2.
    assert (figures["ratio"], figures["ratio_low"], figures["ratio_high"]) == (10, 6.666667, 15)
    alone = rounds[rounds["arm"] == "fp8"]
    assert "ratio" not in throughput.summary(alone, "fp8", Work())
    assert "ratio" not in throughput.summary(rounds, "bf16", Work())
    assert throughput.kernel(rounds, "bf16") == "unquantized"


def test_tokens_that_arrive_at_once_have_no_speed_and_no_ratio():
    """The whole model is compared by output_tok_s, and goes on; a ratio of speeds does not."""
    result = throughput.BenchResult(*(1.0,) * len(fields(throughput.BenchResult)))
    work = throughput.Work(streams=8, generated_tokens=64)
    assert throughput.tokens_per_second(work, replace(result, tpot_ms=4.0)) == 2000
    assert math.isnan(throughput.tokens_per_second(work, replace(result, tpot_ms=0.0)))
    rounds = pd.DataFrame({"round": [1, 2] * 2, "arm": ["bf16"] * 2 + ["fp8"] * 2,
                           "work": "8 streams", "tok_s": [1.0, 1.0, 2.0, math.nan]})
    with pytest.raises(WorkbookError, match="All tokens of fp8, 8 streams, arrived at once"):
        throughput.ratios(rounds)
    assert throughput.ratios(rounds.fillna(2.0))["ratio"].tolist() == [1.0, 2.0]
