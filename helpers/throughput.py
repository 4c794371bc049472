"""Decoding speed by vLLM's own serving benchmark, run and read.

The benchmark lives in the serving environment and takes several seconds to import. So one process
there (`helpers.serve_side.bench_worker`) imports it once and runs it as often
as it is asked to, with the arguments and the key it is sent over a pipe.
"""

import contextlib
import json
import math
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil

from helpers import WorkbookError, checkpoint, hardware, serving, workspace
from helpers.checkpoint import Checkpoint

if TYPE_CHECKING:
    import pandas as pd

# The benchmark sends the same prompts in every run: from a cached prefix no prefill would be timed.
NO_REUSE = ["--no-enable-prefix-caching"]

_SERVER_MEMORY = 4 * 2**30  # bytes that a server on a CPU takes beside its weights


@dataclass(frozen=True)
class BenchResult:
    """One run of the benchmark: no failed request, every request of the length asked for.

    Throughput in generated tokens per second, the prefill's time included; the latencies are
    medians and 99th percentiles in milliseconds: time to first token, time per output token after
    it, inter-token.
    """

    output_tok_s: float
    completed: int
    failed: int
    output_tokens: list[int]
    ttft_ms: float
    tpot_ms: float
    itl_ms: float
    ttft_p99_ms: float
    itl_p99_ms: float
    raw: dict


LATENCIES = ("ttft_ms", "tpot_ms", "itl_ms", "ttft_p99_ms", "itl_p99_ms")


def benchmark_flags(output_tokens: int = 500, concurrency: int = 1, prompts: int = 1,
                    input_tokens: int = 64) -> list[str]:
    """The flags of `vllm bench serve` that say what work is measured."""
    return ["--dataset-name", "random", "--random-input-len", str(input_tokens),
            "--random-output-len", str(output_tokens), "--ignore-eos", "--temperature", "0",
            "--num-prompts", str(prompts), "--max-concurrency", str(concurrency), "--seed", "0"]


def run(server: serving.VllmServer, flags: list[str]) -> BenchResult:
    """One run of the benchmark against a running server.

    Raises `WorkbookError` when it fails, when a request failed, or when one did not return exactly
    the number of tokens asked for.
    """
    with benchmark() as measure:
        return measure(server, flags)


def compare(arms: dict[str, Checkpoint], profile, mode, work: dict[int, list[str]],
            rounds: int) -> "pd.DataFrame":
    """Measure every arm `rounds` times, in turn, in an order that alternates.

    `work`: number of streams to the benchmark's flags. A table with one row per round, arm and
    number of streams: round, arm, streams, kernel, output_tok_s, joules_per_token (of the GPU, the
    prompt's included; NaN where none reports it) and `LATENCIES`. On a CPU all servers run at once
    where memory allows, else only the one that is measured: five rounds of two arms take six
    starts. After a server's start one run of each piece of work is thrown away.
    """
    import pandas as pd
    from tqdm.auto import tqdm

    server_flags = [*serving.default_flags(profile, mode), *NO_REUSE]
    together = mode.device == "cpu" and _fit_together(arms)
    rows = []
    with contextlib.ExitStack() as everything, benchmark() as measure:
        running: dict[str, serving.VllmServer] = {}
        for number, arm in tqdm(order(list(arms), rounds), desc="benchmark runs", leave=False):
            if arm not in running:
                for other in ([] if together else list(running)):
                    running.pop(other).stop()
                running[arm] = serving.VllmServer(arms[arm], server_flags).start()
                everything.callback(running[arm].stop)
                for flags in work.values():
                    measure(running[arm], flags)
            for streams, flags in work.items():
                before = hardware.energy_joules()
                result = measure(running[arm], flags)
                joules = math.nan if before is None else hardware.energy_joules() - before
                rows.append({"round": number, "arm": arm, "streams": streams,
                             "kernel": running[arm].kernel, "output_tok_s": result.output_tok_s,
                             "joules_per_token": joules / sum(result.output_tokens),
                             **{name: getattr(result, name) for name in LATENCIES}})
    return pd.DataFrame(rows)


def kernel(rounds: "pd.DataFrame", arm: str) -> str:
    """The linear kernel that served an arm of `compare`."""
    return rounds.loc[rounds["arm"] == arm, "kernel"].iloc[0]


def summary(rounds: "pd.DataFrame", arm: str, streams: int = 1) -> dict[str, float]:
    """An arm's medians over the rounds of `compare`, and the range of its throughput."""
    of_arm = rounds[(rounds["arm"] == arm) & (rounds["streams"] == streams)]
    medians = of_arm[["output_tok_s", *LATENCIES]].median()
    return {**{name: round(float(value), 3) for name, value in medians.items()},
            "output_tok_s_min": round(float(of_arm["output_tok_s"].min()), 3),
            "output_tok_s_max": round(float(of_arm["output_tok_s"].max()), 3)}


def order(arms: list[str], rounds: int) -> list[tuple[int, str]]:
    """Rounds 1, 2, 3 ...: every arm once, forwards in the odd ones, backwards in the even."""
    return [(number, arm) for number in range(1, rounds + 1)
            for arm in (arms if number % 2 else arms[::-1])]


def _fit_together(arms: dict[str, Checkpoint]) -> bool:
    weights = sum(checkpoint.total_bytes(model.tensors) for model in arms.values())
    return weights + len(arms) * _SERVER_MEMORY < psutil.virtual_memory().available


@contextlib.contextmanager
def benchmark() -> Iterator:
    """A function (server, flags) -> BenchResult, backed by one process of the serving environment.

    What the benchmark prints goes to logs/benchmark.log in the workspace.
    """
    logs = workspace.folder("logs")
    env = {**os.environ, **serving.ENVIRONMENT, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    env.pop("PYTHONPATH", None)
    with open(logs / "benchmark.log", "a") as log:
        worker = subprocess.Popen(
            [str(serving.serve_python()), "-m", "helpers.serve_side.bench_worker"], env=env,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        yield lambda server, flags: _measure(worker, server, flags)
    finally:
        worker.stdin.close()
        try:
            worker.wait(timeout=5)
        except subprocess.TimeoutExpired:
            worker.kill()


def _measure(worker: subprocess.Popen, server: serving.VllmServer, flags: list[str]) -> BenchResult:
    arguments = ["--backend", "openai", "--base-url", server.url, "--endpoint", "/v1/completions",
                 "--model", str(server.model), "--served-model-name", server.model_name,
                 "--disable-tqdm", "--save-detailed", "--ready-check-timeout-sec", "0", *flags]
    try:
        worker.stdin.write(json.dumps({"arguments": arguments, "key": server.api_key}) + "\n")
        worker.stdin.flush()
        answer = json.loads(worker.stdout.readline() or "{}")
    except OSError:
        answer = {}
    if "result" not in answer:
        raise WorkbookError(
            "vLLM's benchmark did not run.",
            f"It says: {answer.get('error', 'nothing; its process died')}.",
            "Correct the flags it names, or read logs/benchmark.log in the workspace.")
    return _checked(answer["result"], int(flags[flags.index("--num-prompts") + 1]),
                    int(flags[flags.index("--random-output-len") + 1]))


def _checked(raw: dict, prompts: int, output_tokens: int) -> BenchResult:
    """The benchmark's figures, or `WorkbookError` when they are of other work than asked for."""
    wrong = [n for n in raw["output_lens"] if n != output_tokens]
    if raw["failed"] or raw["completed"] != prompts or wrong:
        said = next((error for error in raw.get("errors", []) if error), "").strip()
        raise WorkbookError(
            f"{raw['failed']} of {prompts} requests failed, and {len(wrong)} returned another "
            f"number of tokens than {output_tokens}.",
            "The run measured other work than was asked for, so its figures are not used. "
            + (said.splitlines()[-1] if said else ""),
            "See that prompt and output fit --max-model-len, then run it again.")
    return BenchResult(
        output_tok_s=raw["output_throughput"], completed=raw["completed"], failed=raw["failed"],
        output_tokens=raw["output_lens"], ttft_ms=raw["median_ttft_ms"],
        tpot_ms=raw["median_tpot_ms"], itl_ms=raw["median_itl_ms"],
        ttft_p99_ms=raw["p99_ttft_ms"], itl_p99_ms=raw["p99_itl_ms"], raw=raw)
