"""Decoding speed by vLLM's own serving benchmark, run and read.

`Work` says what is measured; `compare` measures it on the arms in turn. The benchmark lives in the
serving environment and takes several seconds to import, so one process there
(`helpers.serve_side.bench_worker`) imports it once. It is sent each run's arguments and the
server's key over a pipe, and runs the benchmark as often as it is asked to.
"""

import contextlib
import itertools
import json
import math
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TextIO

from helpers import WorkbookError, arm_names, hardware, servers, serving, stats, workspace
from helpers.checkpoint import Checkpoint
from helpers.hardware import ServingMode
from helpers.models import Profile

if TYPE_CHECKING:
    import pandas as pd

# The benchmark sends the same prompts in every run: from a cached prefix no prefill would be timed.
NO_REUSE = ["--no-enable-prefix-caching"]


@dataclass(frozen=True)
class Work:
    """What is measured: `streams` requests at once, each of so many tokens, `rounds` times.

    `prompt_tokens` and `generated_tokens` are those of each request.
    """

    streams: int = 1
    prompt_tokens: int = 64
    generated_tokens: int = 500
    rounds: int = 5

    def __post_init__(self):
        if min(vars(self).values()) < 1:
            raise WorkbookError(
                f"{self} is no work.",
                "A measurement needs at least one stream, one token each way, and one round.",
                "Give numbers of 1 or more.")

    @property
    def title(self) -> str:
        """What a table or a plot calls it: "prompt of N" where one token alone is generated."""
        if self.generated_tokens == 1:
            return f"prompt of {self.prompt_tokens}"
        return "1 stream" if self.streams == 1 else f"{self.streams} streams"

    @property
    def counted_tokens(self) -> int:
        """The tokens that its time is spent on: the generated ones, or those of a prompt."""
        each = self.prompt_tokens if self.generated_tokens == 1 else self.generated_tokens
        return self.streams * each

    def shorter(self) -> "Work":
        """The same for a warm-up: as many streams, and few tokens."""
        return replace(self, prompt_tokens=min(self.prompt_tokens, 64),
                       generated_tokens=min(self.generated_tokens, 4))

    def flags(self) -> list[str]:
        """The flags of `vllm bench serve` for one round: every request once, greedy."""
        return ["--dataset-name", "random", "--random-input-len", str(self.prompt_tokens),
                "--random-output-len", str(self.generated_tokens), "--ignore-eos",
                "--temperature", "0", "--num-prompts", str(self.streams),
                "--max-concurrency", str(self.streams), "--seed", "0"]

    def in_ledger(self) -> dict[str, int]:
        """The same under the names that the ledger and the published figures have for it."""
        return {"input_tokens": self.prompt_tokens, "output_tokens": self.generated_tokens,
                "concurrency": self.streams, "rounds": self.rounds}

    @classmethod
    def from_ledger(cls, row: dict) -> "Work":
        """What `in_ledger` wrote, from the `work` of a row."""
        return cls(row["concurrency"], row["input_tokens"], row["output_tokens"], row["rounds"])


@dataclass(frozen=True)
class BenchResult:
    """One round of the benchmark: no failed request, every request of the length asked for.

    Throughput in generated tokens per second, the prefill's time included. The latencies are
    medians and 99th percentiles in milliseconds: time to first token (TTFT), time per output token
    after the first (TPOT), time between two tokens (ITL). `raw` is all that the benchmark returned.
    """

    output_tok_s: float
    output_tokens: list[int]
    ttft_ms: float
    tpot_ms: float
    itl_ms: float
    ttft_p99_ms: float
    itl_p99_ms: float
    raw: dict


Measure = Callable[[serving.VllmServer, Work], BenchResult]
LATENCIES = ("ttft_ms", "tpot_ms", "itl_ms", "ttft_p99_ms", "itl_p99_ms")


def tokens_per_second(work: Work, result: BenchResult) -> float:
    """The speed of decoding, all streams together, or of a prompt: what each spends its time on.

    Decoding is timed by TPOT, which leaves out the first token and each request's own costs: spread
    over a few tokens these would hide the speed. A prompt is timed by TTFT. NaN where all tokens
    arrived at once, because the client was slower than the server.
    """
    if work.generated_tokens == 1:
        return 1000 * work.counted_tokens / result.ttft_ms
    return 1000 * work.streams / result.tpot_ms if result.tpot_ms else math.nan


def compare(arms: dict[str, Checkpoint], profile: Profile, mode: ServingMode,
            work: list[Work]) -> "pd.DataFrame":
    """Measure a profile's arms `in_turn`; on a CPU all servers run at once where memory allows.

    Where only one fits, five rounds of two arms take six starts. The speeds that it is compared by
    are `output_tok_s`, what a user of the server gets, the prompt's time included.
    """
    flags = [*serving.default_flags(profile, mode), *NO_REUSE]
    with benchmark() as measure:
        return in_turn(measure, {arm: serving.VllmServer(model, flags)
                                 for arm, model in arms.items()}, work,
                       together=servers.fit_together(arms.values(), mode))


def in_turn(measure: Measure, of_arm: dict[str, serving.VllmServer], work: Sequence[Work],
            together: bool) -> "pd.DataFrame":
    """Measure every server on all work, in an order that alternates from round to round.

    `measure`: a `benchmark`. `of_arm`: the servers; they are started where they are not up, and
    stopped at the end. `together`: whether all of them run at once. If so, the arms take turns at
    each piece of work, so that what is compared lies seconds apart. If not, only the server that is
    measured is up, and it does all the work of a round. After a server's start each piece of work
    is run once, with fewer tokens, and the result thrown away. Raises `WorkbookError` for two
    pieces of work with one title: a table could not tell them apart.

    A table with one row per round, arm and work: round, arm, work (its title), streams,
    prompt_tokens, generated_tokens, kernel, tok_s (`tokens_per_second`), output_tok_s,
    joules_per_token (of the GPU, the prompt's included; NaN where none reports it) and `LATENCIES`.
    """
    import pandas as pd
    from tqdm.auto import tqdm

    if len({each.title for each in work}) < len(work):
        raise WorkbookError(
            f"Two pieces of work have one title: {', '.join(each.title for each in work)}.",
            "Tables and ratios are made by title, so their figures would be mixed.",
            "Measure them one after the other, or leave one out.")
    rows, up = [], ()
    try:
        for number, arm, each in tqdm(turns(list(of_arm), work, together),
                                      desc="benchmark runs", leave=False):
            if arm not in up:
                serving.stop_together(of_arm[other] for other in up)
                up = tuple(of_arm) if together else (arm,)
                if idle := [of_arm[name] for name in up if not of_arm[name].is_running]:
                    serving.start_together(idle)
                for server in (of_arm[name] for name in up):
                    for warm_up in work:
                        measure(server, warm_up.shorter())
            gpus = of_arm[arm].gpus
            before = hardware.energy_joules(gpus)
            result = measure(of_arm[arm], each)
            after = hardware.energy_joules(gpus)
            joules = math.nan if before is None or after is None else after - before
            rows.append({"round": number, "arm": arm, "work": each.title,
                         "streams": each.streams, "prompt_tokens": each.prompt_tokens,
                         "generated_tokens": each.generated_tokens,
                         "kernel": of_arm[arm].kernel, "tok_s": tokens_per_second(each, result),
                         "output_tok_s": result.output_tok_s,
                         "joules_per_token": joules / sum(result.output_tokens),
                         **{name: getattr(result, name) for name in LATENCIES}})
    finally:
        serving.stop_together(of_arm.values())
    return pd.DataFrame(rows)


def turns(arms: list[str], work: Sequence[Work], together: bool) -> list[tuple[int, str, Work]]:
    """Who does what when: (round, arm, work), forwards through the arms, then backwards.

    `together`: the arms alternate at each piece of work, else each does all of a round's.
    """
    every = [(number, arm, each) for number, arm in order(arms, max(w.rounds for w in work))
             for each in work if number <= each.rounds]
    if together:  # a stable sort: the order of the arms in a round stays
        every.sort(key=lambda turn: (turn[0], work.index(turn[2])))
    return every


def ratios(rounds: "pd.DataFrame", base: str | None = None) -> "pd.DataFrame":
    """The speed of each arm over that of `base`, by default the 16-bit one, taken round by round.

    `rounds`: as `in_turn` returns them. A table with one row per arm and work, arm by arm: arm,
    work (its title), tok_s (the median), and ratio, low and high, the median of the rounds' ratios
    with its interval (`stats.ratio_by_round`). Raises `WorkbookError` where a speed is NaN.
    """
    import pandas as pd

    if len(lost := rounds[rounds["tok_s"].isna()]):
        raise WorkbookError(
            f"All tokens of {lost['arm'].iloc[0]}, {lost['work'].iloc[0]}, arrived at once, so no "
            "time lies between them.",
            "The client was slower than the server: their speed was not measured.",
            "Measure again when the machine has less to do, or with more tokens.")
    base = base or arm_names.base(rounds["arm"])
    rows, every = [], {key: group.set_index("round")["tok_s"].sort_index()
                       for key, group in rounds.groupby(["arm", "work"])}
    for arm, work in itertools.product(rounds["arm"].unique(), rounds["work"].unique()):
        speed = every[arm, work]
        found = stats.ratio_by_round(speed, every[base, work])
        rows.append({"arm": arm, "work": work, "tok_s": float(speed.median()),
                     "ratio": found.value, "low": found.low, "high": found.high})
    return pd.DataFrame(rows)


def kernel(rounds: "pd.DataFrame", arm: str) -> str:
    """The linear kernel that served an arm of `compare`."""
    return rounds.loc[rounds["arm"] == arm, "kernel"].iloc[0]


def summary(rounds: "pd.DataFrame", arm: str, work: Work) -> dict[str, float]:
    """An arm's medians over the rounds of `compare`, and the range of its throughput.

    Where bf16 ran beside another arm, that one's also holds the ratio of the two, round by round
    (`stats.ratio_by_round`): ratio, ratio_low, ratio_high.
    """
    same = {"streams": work.streams, "prompt_tokens": work.prompt_tokens,
            "generated_tokens": work.generated_tokens}
    of_work = rounds[(rounds[list(same)] == list(same.values())).all(axis="columns")]
    of_arm = of_work[of_work["arm"] == arm]
    medians = of_arm[["output_tok_s", *LATENCIES]].median()
    figures = {**{name: float(value) for name, value in medians.items()},
               "output_tok_s_min": float(of_arm["output_tok_s"].min()),
               "output_tok_s_max": float(of_arm["output_tok_s"].max())}
    speed = of_work.pivot(index="round", columns="arm", values="output_tok_s")
    if arm != "bf16" and "bf16" in speed:
        ratio = stats.ratio_by_round(speed[arm], speed["bf16"])
        figures |= {"ratio": ratio.value, "ratio_low": ratio.low, "ratio_high": ratio.high}
    return {name: round(value, 6) for name, value in figures.items()}


def order(arms: list[str], rounds: int) -> list[tuple[int, str]]:
    """Rounds 1, 2, 3 ...: every arm once, forwards in the odd ones, backwards in the even."""
    return [(number, arm) for number in range(1, rounds + 1)
            for arm in (arms if number % 2 else arms[::-1])]


@contextlib.contextmanager
def benchmark(*extra: str) -> Iterator[Measure]:
    """A function (server, work) -> BenchResult, backed by one process of the serving environment.

    `extra`: flags of `vllm bench serve` for every run. What the benchmark prints goes to
    logs/benchmark.log in the workspace. The process knows no proxy and no ~/.netrc: the first would
    be sent the server's key, and an entry of the second would replace it.
    """
    env = serving.environment() | {"NETRC": os.devnull}
    env.pop("PYTHONPATH", None)
    with _log() as log:
        worker = subprocess.Popen(
            [str(serving.serve_python()), "-m", "helpers.serve_side.bench_worker"], env=env,
            cwd=workspace.repo(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
            text=True)
    try:
        yield lambda server, work: _measure(worker, server, work, extra)
    finally:
        with contextlib.suppress(BrokenPipeError):  # what a dead process was not sent any more
            worker.stdin.close()
        try:
            worker.wait(timeout=5)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
        worker.stdout.close()


def _log() -> TextIO:
    place = workspace.folder("logs") / "benchmark.log"
    with workspace.writing(place, "Nothing was measured."):
        return open(place, "a")


def _measure(worker: subprocess.Popen, server: serving.VllmServer, work: Work,
             extra: tuple[str, ...]) -> BenchResult:
    arguments = ["--backend", "openai", "--base-url", server.url, "--endpoint", "/v1/completions",
                 "--model", str(server.model), "--served-model-name", server.model_name,
                 "--disable-tqdm", "--save-detailed", "--ready-check-timeout-sec", "0",
                 *work.flags(), *extra]
    try:
        worker.stdin.write(json.dumps({"arguments": arguments, "key": server.api_key}) + "\n")
        worker.stdin.flush()
        answer = json.loads(worker.stdout.readline() or "{}")
    except (OSError, ValueError):  # it is gone, or went in the middle of its answer
        answer = {}
    if "result" not in answer:
        raise WorkbookError(
            "vLLM's benchmark did not run.",
            f"It says: {answer.get('error', 'nothing; its process died')}.",
            "Correct the flags it names, or read logs/benchmark.log in the workspace.")
    return _checked(answer["result"], work)


def _checked(raw: dict, work: Work) -> BenchResult:
    """The benchmark's figures, or `WorkbookError` when they are of other work than asked for."""
    wrong = [n for n in raw["output_lens"] if n != work.generated_tokens]
    if raw["failed"] or raw["completed"] != work.streams or wrong:
        said = next((error for error in raw.get("errors", []) if error), "").strip()
        raise WorkbookError(
            f"{raw['failed']} of {work.streams} requests failed, and {len(wrong)} returned another "
            f"number of tokens than {work.generated_tokens}.",
            "The run measured other work than was asked for, so its figures are not used. "
            + (said.splitlines()[-1] if said else ""),
            "See that the server is still up, and that prompt and output together fit its "
            "--max-model-len; then run it again.")
    return BenchResult(
        output_tok_s=raw["output_throughput"], output_tokens=raw["output_lens"],
        ttft_ms=raw["median_ttft_ms"], tpot_ms=raw["median_tpot_ms"], itl_ms=raw["median_itl_ms"],
        ttft_p99_ms=raw["p99_ttft_ms"], itl_p99_ms=raw["p99_itl_ms"], raw=raw)
