"""What every notebook opens with: this machine, its serving mode, its model, and what they make.

`Course` makes what a notebook needs and does not find, so that any of them can be opened first.
"""

import contextlib
import functools
import json
import textwrap
from dataclasses import dataclass

from helpers import (
    WorkbookError,
    arm_names,
    check,
    evaluation,
    hardware,
    hub,
    ledger,
    ledger_row,
    models,
    phi4_slice,
    quantize,
    servers,
    serving,
    shared,
    throughput,
    workspace,
)
from helpers.checkpoint import Checkpoint
from helpers.endpoint import Endpoint
from helpers.hardware import Machine, ServingMode
from helpers.models import Profile

GSM8K_ROWS = 100  # of the test set, as on the model card
DECODING = throughput.Work()  # 500 tokens, as on the card; one stream and five rounds are ours


@dataclass(frozen=True)
class Course:
    machine: Machine
    mode: ServingMode
    profile: Profile

    def base(self) -> Checkpoint:
        """The base model's checkpoint, fetched and verified the first time it is asked for."""
        return self._base

    def fp8(self) -> Checkpoint:
        """The FP8 checkpoint, made if it is not there, verified the first time it is asked for."""
        return self._fp8

    @functools.cached_property
    def _base(self) -> Checkpoint:
        return hub.obtain(self.profile)

    @functools.cached_property
    def _fp8(self) -> Checkpoint:
        return quantize.fp8_checkpoint(self.profile, self._base)

    def arms(self) -> dict[str, Checkpoint]:
        """What is served and measured here: "bf16" and "fp8", or FP8 alone where bf16 is too large.
        """
        every = {"bf16": self.base(), "fp8": self.fp8()}
        return {arm: every[arm] for arm in models.arms(self.profile, self.machine)}

    def serve(self, flags: list[str]) -> contextlib.AbstractContextManager:
        """Servers of the arms for a `with` block, and in it a `for` loop over (arm, server).

        Both are up at once where memory allows, else each in its turn; none outlives the block.
        Shared servers, where some are named, are taken as they are, whatever the flags.
        """
        if self.shared:
            return contextlib.nullcontext(self.shared.items())
        return servers.running(self.arms(), flags, self.mode)

    @functools.cached_property
    def shared(self) -> dict[str, shared.SharedServer]:
        """The servers that PHI4_FP8_SERVERS names, by arm, each asked once what it serves."""
        found = shared.servers()
        for server in found.values():
            arm_names.served_in(server.mode.dtype)
        return found

    @property
    def served_mode(self) -> ServingMode:
        """The mode of the shared servers, where some are named, else ours."""
        return next((server.mode for server in self.shared.values()), self.mode)

    @property
    def served(self) -> Profile:
        """The profile that is served: of the shared servers, where some are named, else ours."""
        return next((server.profile for server in self.shared.values()), self.profile)

    @property
    def gpus(self) -> int:
        """How many GPUs share each served model; 1 on a CPU."""
        return models.gpus(self.profile, self.machine)

    def compares(self, experiment: str) -> bool:
        """Whether both arms are served here; if not, prints what was published of Phi-4 in bf16."""
        if "bf16" in (self.shared or models.arms(self.profile, self.machine)):
            return True
        figures = "; ".join(f"{row['claim']}: {row['value']} {row['unit']}"
                            for row in ledger.published()
                            if (row["experiment"], row["arm"]) == (experiment, "bf16"))
        print(f"This compares two arms, and {arm_names.TITLES['bf16']} does not fit this machine. "
              f"Published: {figures}.")
        return False

    def progress(self):
        """By notebook: which tasks are done, and with how many hints; a DataFrame."""
        return check.progress()

    def plan(self):
        """Disk and memory that each step needs in this mode, as a DataFrame of strings."""
        import pandas as pd

        def size(nbytes: int) -> str:
            return f"{nbytes / 1e9:.1f} GB" if nbytes > 1e9 else f"{nbytes / 1e6:.1f} MB"

        where = ("RAM" if self.mode.device == "cpu" else "GPU memory" if self.gpus == 1 else
                 f"memory of {self.gpus} GPUs")
        bf16, fp8 = size(self.profile.bf16_bytes), size(self.profile.fp8_bytes)
        both = "bf16" in models.arms(self.profile, self.machine)
        way = quantize.route_for(self.profile, self.machine)
        served = f"{bf16 if both else fp8} {where} and the KV cache"
        rows = [
            ("01 load", bf16 if self.profile.source == "hub" else "nothing",
             f"{bf16} {where if both else f'{where} and RAM together'}"),
            ("02 quantize", fp8, f"{size(way.ram)} RAM" + (", streamed" if way.streams else "")),
            ("03 inspect", "nothing", "one tensor at a time"),
            ("05 serve", "a log", f"{fp8} {where} and the KV cache"),
            ("06 gsm8k", "a few MB of answers", served),
            ("07 throughput", f"{size(phi4_slice.disk(self.mode))}, for the time it runs",
             f"{served}; before it a slice of Phi-4, up to "
             f"{size(phi4_slice.memory(phi4_slice.largest(self.mode), self.mode))} {where}"),
        ]
        return pd.DataFrame(rows, columns=["notebook", "writes to disk", "weights in memory"])

    def record(self, experiment: str, arm: str, checkpoint: Checkpoint, work: dict, metrics: dict,
               kernel: str = "") -> None:
        """Append a result to the ledger with this course's model, serving mode and checkpoint."""
        ledger.record(
            experiment, arm, work | (ledger_row.dtype(self.mode.dtype) if kernel else {}), metrics,
            model=models.model_info(self.profile), mode=self.mode.key, kernel=kernel,
            checkpoint=checkpoint.fingerprint,
        )

    def record_served(self, experiment: str, arm: str, server: Endpoint, work: dict,
                      metrics: dict) -> None:
        """Append what a server, ours or a shared one, was asked for.

        A shared server's result says so in its work, and has that server's model and mode.
        """
        mark = ledger_row.dtype(self.served_mode.dtype)
        if server.shared:
            mark["shared"] = server.shared
        ledger.record(experiment, arm, work | mark, metrics,
                      model=models.model_info(self.served), mode=self.served_mode.key,
                      kernel=server.kernel, checkpoint=server.checkpoint.fingerprint)

    def measure_what_is_missing(self) -> None:
        """Run the measurements of notebooks 06 and 07 that the ledger lacks for this model."""
        lacking = [e for e in ("gsm8k", "throughput")
                   if any(ledger.latest(e, arm, self.profile.name) is None
                          for arm in models.arms(self.profile, self.machine))]
        if not lacking:
            return
        print(f"Not in the ledger yet: {', '.join(lacking)}. Measuring now, a few minutes.")
        if "gsm8k" in lacking:
            self.measure_gsm8k(GSM8K_ROWS)
        if "throughput" in lacking:
            self._measure_throughput()

    def measure_gsm8k(self, limit: int | None) -> dict[str, evaluation.Evaluation]:
        """The arms on the first `limit` rows, or on all for None, into the ledger; by arm."""
        scores: dict[str, evaluation.Evaluation] = {}
        with self.serve(serving.default_flags(self.profile, self.mode)) as running:
            for arm, server in running:
                scores[arm] = evaluation.run(server, self.served, arm, limit=limit)
                self.record_served("gsm8k", arm, server,
                                   **evaluation.ledger_row(scores[arm], scores.get("bf16")))
        return scores

    def _measure_throughput(self) -> None:
        arms = self.arms()
        rounds = throughput.compare(arms, self.profile, self.mode, [DECODING])
        for arm, model in arms.items():
            self.record("throughput", arm, model, kernel=throughput.kernel(rounds, arm),
                        work=DECODING.in_ledger(),
                        metrics=throughput.summary(rounds, arm, DECODING))

    def __repr__(self) -> str:
        names = ", ".join(gpu.name for gpu in self.machine.gpus)
        count = self.profile.parameters
        size = f"{count / 1e9:.1f} billion" if count >= 1e9 else f"{count / 1e6:.1f} million"
        lines = {
            "machine": f"{self.machine.cpu_model}, {self.machine.cores} cores, "
                       f"{self.machine.ram_bytes / 2**30:.0f} GiB RAM, "
                       f"{f'GPU: {names}' if names else 'no NVIDIA GPU'}",
            "mode": f"{self.mode.title}: {self.mode.why}",
            "model": f"{self.profile.title}, {size} parameters, scored on the task "
                     f"{self.profile.task}"}
        if self.machine.note:
            lines["note"] = self.machine.note
        if self.gpus > 1:
            lines["GPUs"] = (f"{self.gpus} share each model (--tensor-parallel-size {self.gpus}), "
                             "since one is too small")
        if models.arms(self.profile, self.machine) == ("fp8",):
            lines["arms"] = (
                f"FP8 alone: {arm_names.sixteen_bits(self.mode.dtype)} takes "
                f"{self.profile.bf16_bytes / 1e9:.3g} GB of weights and does not fit; "
                "beside FP8 stand the figures published for bf16")
        if shared.named():
            lines["servers"] = (f"shared, in 05 and 06, for {' and '.join(shared.named())} "
                                f"({shared.SERVERS})")
        # JupyterLab breaks a longer line in the middle of a word.
        return "\n".join(textwrap.fill(line, 100, initial_indent=f"{name:9}",
                                       subsequent_indent=" " * 9)
                         for name, line in lines.items())


def open_course() -> Course:
    """Look at the machine, choose its serving mode and the best model that fits it.

    Raises `WorkbookError` when the machine has a GPU that vLLM cannot use for FP8, when
    PHI4_FP8_PROFILE names no profile, or when the profile does not fit.
    """
    import pandas as pd

    pd.set_option("display.max_colwidth", None)  # a table that hides its words helps nobody
    pd.set_option("display.html.use_mathjax", False)  # a dollar sign in a cell is a dollar sign
    machine = hardware.detect()
    mode = hardware.serving_mode(machine)
    if mode.key == "none":
        raise WorkbookError(
            "vLLM has no FP8 for this machine's GPU, so no notebook can serve on it.",
            f"{mode.why}.",
            "Run `export CUDA_VISIBLE_DEVICES=`, with nothing behind it, in the terminal that "
            "starts Jupyter, and start it again: then all runs on the CPU.")
    arm_names.served_in(mode.dtype)
    return Course(machine, mode, models.choose(machine))


def first_question(profile: Profile) -> str:
    """A question the model has not been trained on: the first test problem of its task.

    The bundled task's first test row; for real models, a problem of our own in GSM8K's manner.
    """
    if profile.task == "tiny_gsm8k":
        with open(workspace.data("tiny_gsm8k", "test.jsonl")) as lines:
            return json.loads(next(lines))["question"]
    return ("A bakery packs 12 rolls in a bag. Mia buys 4 bags and eats 6 rolls. She shares the "
            "rest equally with her two brothers. How many rolls does each of the three get?")
