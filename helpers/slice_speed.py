"""The slice of Phi-4 served and measured: one stream, eight streams and a prompt, arm beside arm.

The reader predicts the ratios first, and finds them beside the measured ones.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from helpers import (
    arm_names,
    capacity,
    hardware,
    ledger,
    ledger_row,
    models,
    phi4_slice,
    predictions,
    serving,
    throughput,
)
from helpers.checkpoint import Checkpoint
from helpers.hardware import Machine, ServingMode
from helpers.phi4_slice import Slice
from helpers.throughput import Work

if TYPE_CHECKING:
    import pandas as pd

# From prompts of one token, so that every step is one of decoding. Few tokens are enough: a token
# of two layers takes some 30 ms on a CPU.
WORK = (Work(1, 1, 16), Work(8, 1, 8), Work(1, 512, 1))
# A random model may say nothing but special tokens; the benchmark takes hidden ones for failures.
SHOWN = ("--extra-body", '{"skip_special_tokens": false}')
PREDICTED = "slice"  # the name that the reader's ratios are kept under


def predict(answer: object) -> None:
    """Keep the reader's three ratios, one for each of `WORK`; `...` is no answer yet.

    Whatever cannot be used is said, and stops nothing.
    """
    if answer is ...:
        print("Not predicted yet: put three ratios in place of the three dots.")
        return
    try:
        numbers = [float(each) for each in answer]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != len(WORK) or not all(0 < each < 100 for each in numbers):
        print("Not kept: put three positive numbers in brackets, such as [1.5, 1, 1].")
        return
    predictions.keep(PREDICTED, numbers)
    print("Kept: " + ", ".join(f"{work} {ratio:g}x" for work, ratio in predicted().items()))


def predicted() -> dict[str, float]:
    """The reader's ratios by work's title; empty where none are kept."""
    numbers = predictions.kept().get(PREDICTED, [])
    return dict(zip((work.title for work in WORK), numbers, strict=False))


def servers(part: Slice, copies: Mapping[str, Checkpoint], machine: Machine,
            mode: ServingMode) -> dict[str, serving.VllmServer]:
    """A server for each arm of the mode, not started.

    `copies`: by format. On a GPU where all are up at once each is given its part of the memory.
    """
    flags = ["--dtype", mode.dtype, "--max-model-len", str(phi4_slice.MAX_MODEL_LEN),
             "--max-num-seqs", "8", "--kv-cache-memory-bytes", str(part.kv_bytes),
             *throughput.NO_REUSE]
    if mode.device == "cpu":
        flags += ["--enforce-eager", "--distributed-executor-backend", "uni"]
    found = {}
    for name, arm in phi4_slice.arms(mode).items():
        model, share = copies[arm.format], []
        if mode.device == "cuda":
            gpu, served = hardware.best_gpu(machine), part.served_bytes(arm.format, "cuda")
            of_all = (served / gpu.memory_bytes if part.together else
                      capacity.share(served - phi4_slice.SERVER["cuda"], [gpu]))
            share = ["--gpu-memory-utilization", f"{of_all:.3f}", *serving.attention(machine)]
        found[name] = serving.VllmServer(model, [*flags, *share, *arm.flags],
                                         name=f"slice-{arm.format}")
    return found


def measure(part: Slice, copies: Mapping[str, Checkpoint], machine: Machine,
            mode: ServingMode) -> "pd.DataFrame":
    """`throughput.in_turn` of the slice's arms on `WORK`.

    The benchmark's process comes after the servers: while they load, memory is fullest.
    """
    of_arm = servers(part, copies, machine, mode)
    try:
        if part.together:
            serving.start_together(list(of_arm.values()))
        with throughput.benchmark(*SHOWN) as bench:
            return throughput.in_turn(bench, of_arm, WORK, part.together)
    finally:
        serving.stop_together(of_arm.values())


def table(ratios: "pd.DataFrame", expected: Mapping[str, float] | None = None) -> "pd.DataFrame":
    """Speed over the 16-bit arm's by arm and work, as texts with intervals, and what was expected.

    `ratios`: as `throughput.ratios` returns it; `expected`: the reader's ratio by work, of the
    card's arm.
    """
    import pandas as pd

    base, lines = arm_names.base(ratios["arm"]), {}
    for row in ratios.to_dict("records"):
        lines.setdefault(row["arm"], {})[row["work"]] = (
            f"{row['tok_s']:,.1f} tokens/s" if row["arm"] == base else
            f"{row['ratio']:.2f}x ({row['low']:.2f} to {row['high']:.2f})")
    found: dict[str, dict[str, str]] = {}
    for arm, cells in lines.items():
        found[arm] = cells
        if expected and arm == phi4_slice.CARDS:
            found[f"your prediction for {arm}"] = {
                work: f"{value:.2f}x" for work, value in expected.items()}
    return pd.DataFrame(found).T.fillna("").rename_axis(f"over {base}, in the same round")


def record(part: Slice, mode: ServingMode, rounds: "pd.DataFrame",
           copies: Mapping[str, Checkpoint]) -> None:
    """Append a row for each arm and work to the ledger, as experiment "slice".

    `rounds`: as `measure` returns them; `copies`: the checkpoints, which may be gone by now.
    """
    works = {each.title: each for each in WORK}
    for line in throughput.ratios(rounds).to_dict("records"):
        arm, work = phi4_slice.arms(mode)[line["arm"]], works[line["work"]]
        ledger.record(
            "slice", arm.format, mode=mode.key, kernel=throughput.kernel(rounds, line["arm"]),
            work=work.in_ledger() | {"engine": "vLLM", "numerics": arm.numerics,
                                     "layers": part.layers} | ledger_row.dtype(mode.dtype),
            metrics={"tok_s": round(line["tok_s"], 6), "ratio": round(line["ratio"], 6),
                     "ratio_low": round(line["low"], 6), "ratio_high": round(line["high"], 6)},
            checkpoint=copies[arm.format].fingerprint,
            model={"profile": part.title, "repo": "config.json of microsoft/phi-4",
                   "revision": models.PHI4.revision})
