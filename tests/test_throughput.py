"""vLLM's benchmark against what the server itself counted, and the runs that must not count."""

import re
import urllib.request
from pathlib import Path

import pandas as pd
import pytest

from helpers import WorkbookError, throughput


@pytest.fixture(autouse=True)
def own_logs(tmp_workspace):
    """The benchmark's log goes to a workspace of the test's own."""


def counted(server, name: str) -> float:
    """What the server's own counter of that name says, over all engines."""
    request = urllib.request.Request(server.url + "/metrics",
                                     headers={"Authorization": f"Bearer {server.api_key}"})
    text = urllib.request.urlopen(request).read().decode()
    return sum(float(n) for n in re.findall(rf"^vllm:{name}\{{.*\}} (\S+)$", text, re.M))


def test_the_tokens_that_were_asked_for_were_generated(fp8_server):
    counters = ("generation_tokens_total", "e2e_request_latency_seconds_sum")
    before = [counted(fp8_server, name) for name in counters]
    flags = throughput.benchmark_flags(output_tokens=40, prompts=3, input_tokens=16)
    result = throughput.run(fp8_server, flags)
    assert result.output_tokens == [40, 40, 40]
    assert (result.completed, result.failed) == (3, 0)
    tokens, seconds = (counted(fp8_server, name) - was
                       for name, was in zip(counters, before, strict=True))
    assert tokens == 120
    assert result.output_tok_s == pytest.approx(120 / result.raw["duration"])
    # One stream: from sending a request to its last token passes no less than the server needs for
    # it, and one request follows the other.
    spent = sum(result.raw["ttfts"]) + sum(map(sum, result.raw["itls"]))
    assert 0 < seconds <= spent <= result.raw["duration"]
    assert result.ttft_ms == pytest.approx(1000 * sorted(result.raw["ttfts"])[1])


def test_a_request_that_cannot_be_answered_does_not_count(fp8_server):
    flags = throughput.benchmark_flags(output_tokens=5000, prompts=1)
    with pytest.raises(WorkbookError, match="requests failed|another number of tokens"):
        throughput.run(fp8_server, flags)


def test_a_flag_that_the_benchmark_does_not_know(fp8_server):
    with pytest.raises(WorkbookError, match="did not run"):
        throughput.run(fp8_server, [*throughput.benchmark_flags(prompts=1), "--no-such-flag"])


@pytest.mark.parametrize("change", [{"failed": 1}, {"completed": 1}, {"output_lens": [500, 499]}])
def test_other_work_than_asked_for_is_refused(change):
    raw = {"failed": 0, "completed": 2, "output_lens": [500, 500], "errors": ["", ""],
           "output_throughput": 100.0, "median_ttft_ms": 5.0, "median_tpot_ms": 9.0,
           "median_itl_ms": 9.0, "p99_ttft_ms": 6.0, "p99_itl_ms": 12.0}
    assert throughput._checked(raw, 2, 500).output_tok_s == 100.0
    with pytest.raises(WorkbookError, match="measured other work"):
        throughput._checked({**raw, **change}, 2, 500)


def test_the_arms_take_turns_in_going_first():
    order = throughput.order(["bf16", "fp8"], 4)
    assert [number for number, _ in order] == [1, 1, 2, 2, 3, 3, 4, 4]
    firsts = [arm for _, arm in order[::2]]
    assert firsts == ["bf16", "fp8", "bf16", "fp8"]
    assert all({a, b} == {"bf16", "fp8"} for (_, a), (_, b) in zip(order[::2], order[1::2],
                                                                 strict=True))


def test_the_summary_holds_medians_and_the_range():
    rounds = pd.DataFrame({"round": [1, 2, 3] * 2, "arm": ["fp8"] * 3 + ["bf16"] * 3,
                           "streams": [1] * 6, "kernel": ["K"] * 3 + ["unquantized"] * 3,
                           "output_tok_s": [10.0, 30.0, 20.0, 1.0, 2.0, 3.0],
                           "ttft_ms": [1.0] * 6, "tpot_ms": [5.0, 4.0, 9.0] * 2,
                           "itl_ms": [2.0] * 6, "ttft_p99_ms": [3.0] * 6,
                           "itl_p99_ms": [4.0] * 6})
    busier = rounds.assign(streams=8, output_tok_s=99.0)
    rounds = pd.concat([rounds, busier])
    figures = throughput.summary(rounds, "fp8")
    assert figures["output_tok_s"] == 20 and figures["tpot_ms"] == 5
    assert (figures["output_tok_s_min"], figures["output_tok_s_max"]) == (10, 30)
    assert throughput.kernel(rounds, "bf16") == "unquantized"


def test_two_models_too_large_for_memory_are_not_served_together(tmp_path):
    big = tmp_path / "model.safetensors"
    big.touch()
    assert throughput._fit_together({"bf16": Path(tmp_path)})
    with open(big, "wb") as file:
        file.truncate(2**43)  # sparse: 9 TB that take no disk
    assert not throughput._fit_together({"bf16": Path(tmp_path)})
