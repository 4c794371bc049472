"""Which scheme for which machine: speeds, measured or the most there can be, and a small rule.

The rule's figures are the reader's own where there are some: the slice of Phi-4 that notebook 07
timed on this machine, the losses that notebook 08 measures.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from helpers import capacity, cpu_bench, ledger, models, roofline, schemes
from helpers.formats import Losses
from helpers.hardware import Machine, ServingMode
from helpers.throughput import Work

if TYPE_CHECKING:
    from pandas import DataFrame

WORKS = ("1 stream", "8 streams", "prompt of 512")  # `Work.title`s
ARMS = {("fp8", "w8a16"): "FP8_DYNAMIC", ("fp8", "w8a8"): "FP8_DYNAMIC",
        ("int8", "w8a8"): "INT8 W8A8", ("int4", "w4a16"): "W4A16"}  # in the ledger
REFERENCE = "FP8_DYNAMIC"
ALLOWED = 2.0  # times the KL of `REFERENCE`
NO_GAIN = 1.1  # a scheme that is ahead of another by less is not worth another's risk
OTHERS = ("T4", "A40", "L4", "RTX 5090")


def measured(machine: Machine, mode: ServingMode) -> DataFrame:
    """Speed over bf16's at Phi-4's shapes: index scheme, columns `WORKS` and "measured on".

    From the ledger's newest rows of the experiment "slice" (notebook 07) that this machine made.
    A scheme that has none, on a machine without a GPU, is shown as `cpu_bench.RECORDED` has it, of
    this CPU or else of the newest one there. NaN where a kind of work was not measured.
    """
    here = ", ".join(gpu.name for gpu in machine.gpus) or machine.cpu_model
    found = _by_scheme([row for row in ledger.read() if row["experiment"] == "slice"
                        and _device(row) == here], mode, "this machine")
    if mode.device == "cpu":
        kept = [row for row in ledger.read(cpu_bench.RECORDED)
                if row["model"]["profile"] == cpu_bench.PHI4]
        devices = [_device(row) for row in kept]
        device = here if here in devices else devices[-1]
        bench = [row for row in kept if _device(row) == device]
        cores = bench[-1]["hardware"]["cores"]
        found = _by_scheme(bench, mode, f"{device}, {cores} cores, kept") | found
    return _table(found)


def _device(row: dict) -> str:
    return ", ".join(row["hardware"]["gpus"]) or row["hardware"]["cpu"]


def _by_scheme(rows: list[dict], mode: ServingMode, where: str) -> dict[str, dict]:
    """The newest ratios by scheme; FP8's are those of this machine's own arithmetic."""
    own = "w8a8" if mode.key == "gpu-w8a8" else "w8a16"
    found: dict[str, dict] = {}
    for row in rows:
        arm = row["arm"], row["work"].get("numerics", "")
        title = Work.from_ledger(row["work"]).title
        if arm in ARMS and title in WORKS and (arm[0] != "fp8" or arm[1] == own):
            line = found.setdefault(ARMS[arm], {"measured on": where})
            line[title] = row["metrics"]["ratio"]
    return found


def _table(found: Mapping[str, dict]) -> DataFrame:
    import pandas as pd

    order = [title for title in schemes.PRESETS if title in found]
    return pd.DataFrame([found[title] for title in order], index=order,
                        columns=[*WORKS, "measured on"]).rename_axis("scheme")


def ceilings(sizes: DataFrame, capability: int,
             known: Mapping[str, float] | None = None) -> DataFrame:
    """The most a GPU can gain over bf16: index scheme, of those vLLM has a kernel for; `WORKS`.

    `sizes`: `schemes.table`; `capability`: 89 for 8.9. Streams wait for memory: bf16's bytes per
    token over the scheme's. A prompt waits for arithmetic: tensor cores take 8-bit numbers twice as
    fast as 16-bit ones, 4-bit ones four times (NVIDIA's data sheets, dense), if the activations are
    as small. `known`: what FP8_DYNAMIC reached on it, by kind of work; then every scheme is taken
    to reach the same share of its ceiling.
    """
    column = max((least, number) for number, least in enumerate(schemes.MACHINES.values())
                 if least <= capability)[1]
    found = {}
    for title, arithmetic in schemes.ARITHMETIC.items():
        if arithmetic[column] != "none":
            bits = int(arithmetic[column].split()[0].split("A")[1])
            gain = float(sizes.loc[title, "most it can gain"])
            found[title] = dict(zip(WORKS, (gain, gain, 16 / bits), strict=True))
    table = _table(found)[list(WORKS)]
    if known:
        table *= [known[work] / table.loc[REFERENCE, work] for work in WORKS]
    return table


def multiples(*measured: Losses) -> dict[str, float]:
    """KL by recipe in multiples of FP8_DYNAMIC's on the same model: the larger of the models'."""
    import numpy as np

    found = {"bf16": 0.0}
    for losses in measured:
        kl = {title: np.average(each, weights=losses.tokens) for title, each in losses.kl.items()}
        for title in kl:
            found[title] = max(found.get(title, 0.0), float(kl[title] / kl[REFERENCE]))
    return found


def recommend(gigabytes: Mapping[str, float], loss: Mapping[str, float],
              speed: Mapping[str, float], memory: int,
              allowed: float = ALLOWED) -> tuple[str, str]:
    """The scheme to take for one kind of work on one machine, and why.

    By scheme: `gigabytes` of weights; `loss`, as `multiples` gives it; `speed` over bf16's, of
    those only that the machine can compute with. `memory`: the bytes that weights may take
    (`models.for_weights`). The rule:

    1. What does not fit is out.
    2. What loses more than `allowed` times FP8_DYNAMIC's KL is out. If nothing is left, what fits
       and loses least is taken.
    3. The fastest is taken. Of those less than `NO_GAIN` behind it, bf16 goes first, which loses
       nothing, then FP8_DYNAMIC, whose loss on Phi-4 itself is published, then what loses least.

    The scheme is "" where nothing fits.
    """
    speed = {"bf16": 1.0, **speed}
    fits = [title for title in speed if gigabytes[title] * 1e9 <= memory]
    if not fits:
        return "", f"nothing fits in the {memory / 1e9:.1f} GB that weights may take"
    within = [title for title in fits if loss[title] <= allowed]
    if not within:
        chosen = min(fits, key=lambda title: loss[title])
        return chosen, (f"of what fits it loses least, {loss[chosen]:.0f} times what FP8 does: "
                        f"more than the {allowed:g} times allowed")
    fastest = max(speed[title] for title in within)
    close = [title for title in within if speed[title] * NO_GAIN > fastest]
    chosen = min(close, key=lambda title: (title != "bf16", title != REFERENCE, loss[title]))
    reason = f"{speed[chosen]:.2f}x bf16's speed, {loss[chosen]:.1f} times FP8's loss"
    others = [title for title in close if title != chosen]
    return chosen, reason + (f"; {' and '.join(others)} about as fast" if others else "")


def _with_gptq(by_scheme: Mapping[str, float]) -> dict[str, float]:
    """Figures by scheme, GPTQ's beside W4A16's: the same bytes, the same kernel."""
    gptq = {schemes.GPTQ: by_scheme["W4A16"]} if "W4A16" in by_scheme else {}
    return {**by_scheme, **gptq}


def answers(sizes: DataFrame, loss: Mapping[str, float], speed: DataFrame, memory: int,
            allowed: float = ALLOWED) -> dict[str, tuple[str, str]]:
    """`recommend` for each kind of work; `speed`: `measured` or `ceilings`."""
    gigabytes = _with_gptq(sizes["GB on disk"])
    return {work: recommend(gigabytes, loss, _with_gptq(speed[work].dropna()), memory, allowed)
            for work in WORKS}


def by_machine(sizes: DataFrame, loss: Mapping[str, float], machine: Machine, mode: ServingMode,
               speed: DataFrame, allowed: float = ALLOWED) -> DataFrame:
    """What the rule says: index machine, this one first, columns `WORKS`.

    `speed`: `measured`; the other machines', GPUs of `OTHERS`, are `ceilings`.
    """
    import pandas as pd

    if mode.device == "cuda":
        gpu = max(gpu.compute_capability for gpu in machine.gpus)
        known = speed.loc[REFERENCE, list(WORKS)] if REFERENCE in speed.index else None
        speed = ceilings(sizes, 10 * gpu[0] + gpu[1], None if known is None else dict(known))
    found = {"this machine": answers(sizes, loss, speed, models.for_weights(machine), allowed)}
    for name in OTHERS:
        gpu = roofline.named(name)
        major, minor = gpu["compute_capability"]
        found[f"{name}, {gpu['memory_mib'] / 1024:.1f} GiB"] = answers(
            sizes, loss, ceilings(sizes, 10 * major + minor),
            capacity.room(models.PHI4.kv_bytes, roofline.memory_bytes(gpu)), allowed)
    return pd.DataFrame({name: {work: chosen or why for work, (chosen, why) in by_work.items()}
                         for name, by_work in found.items()}).T.rename_axis("machine")
