"""The steps of `make accept-gpu`, in the order in which things would fail; `accept_gpu` runs them.

A step returns what it found in a sentence, and raises `Failed` or `NotHere` with one. What it
measured is in the ledger of the workspace, which `accept_gpu` makes one of its own.
"""

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from rehearsal import stand_in
from run_notebooks import NOTEBOOKS, REPO, NotebookStopped, execute, notebooks

from helpers import (
    checkpoint,
    course,
    gpu_memory,
    hardware,
    ledger,
    models,
    preflight,
    quantize,
    roofline,
    server_log,
    serving,
    workspace,
)
from helpers.checkpoint import Checkpoint
from helpers.hardware import Machine, ServingMode
from helpers.serving_env import IN_ONE_PROCESS

MARLIN = "MarlinFP8ScaledMMLinearKernel"
# A server with weights made up, and no text: Phi-4's size without Phi-4.
RANDOM = ["--load-format", "dummy", "--skip-tokenizer-init", "--no-enable-prefix-caching"]
# Tokens of prompt, tokens to generate, streams. 500 tokens as the card says; the rest is ours.
DECODE = (64, 500, 1)
ROUNDS = 3
GIVEN_BACK = 64 * 2**20  # bytes that the driver may keep of a server that has ended
CONTEXT = 2**30  # bytes that a notebook may hold that has freed its model: torch's CUDA context


class Failed(Exception):
    """Why a step failed: one sentence or two."""


class NotHere(Exception):
    """Why a step does not apply to this machine."""


@dataclass
class Here:
    """The machine that is accepted, and where its files go; the tests walk the steps on a CPU.

    `large`: a folder with the config of Phi-4's size; `shapes`: of the layers, "phi4" or "bundled";
    `asked`: the notebooks that are run.
    """

    machine: Machine
    mode: ServingMode
    place: Path
    large: Path = field(default_factory=lambda: workspace.data("phi4"))
    shapes: str = "phi4"
    asked: tuple[str, ...] = ("05", "07")

    def fp8(self) -> Checkpoint:
        """The bundled model's FP8 checkpoint, made here by LLM Compressor."""
        return quantize.fp8_checkpoint(models.tiny(), models.tiny().checkpoint)


@dataclass(frozen=True)
class Step:
    name: str
    proves: str
    run: Callable[[Here], str]  # what it found; raises `Failed` or `NotHere`
    first: bool = False  # without it nothing else can be well


def ask(script: str, *arguments: str, asked: str = "",
        environment: dict[str, str] | None = None) -> tuple[dict, str]:
    """What a script of tests/serve_side answers in the serving environment, and its log."""
    done = subprocess.run(
        [serving.serve_python(), REPO / "tests" / "serve_side" / script, *arguments], cwd=REPO,
        input=asked, capture_output=True, text=True,
        env={**serving.environment(), **(environment or {}), "PYTHONPATH": str(REPO)})
    log = done.stdout + done.stderr
    answers = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    if done.returncode or len(answers) != 1:
        said, remedy = server_log.explain(log, done.returncode)
        raise Failed(f"{script} did not end well. {said} {remedy}")
    return json.loads(answers[0].removeprefix("ANSWER ")), log


# The steps


def check_machine(here: Here) -> str:
    checks = preflight.preflight()
    if wrong := [f"{check.name}: {check.detail}" for check in checks if not check.ok]:
        raise Failed("; ".join(wrong))
    return "; ".join(check.detail for check in checks
                     if check.name in ("GPU", "mode") or "environment" in check.name)


def compare_layers(here: Here) -> str:
    """W8A8 where there are FP8 tensor cores, W8A16 by Marlin's kernel on every GPU."""
    w8a8 = here.mode.key == "gpu-w8a8"
    backends = [*(["auto"] if w8a8 or here.mode.device == "cpu" else []),
                *(["marlin"] if here.mode.device == "cuda" else [])]
    measured, _ = ask("gpu_layers.py", here.shapes, *backends)
    kernels = {}
    for backend, layers in measured.items():
        for layer, found in layers.items():
            kernels[backend] = found["kernel"]
            if backend == "auto" and w8a8:
                # What the tensor cores' own sums are off is little beside the rounding asked for.
                right = found["kernel"] != MARLIN and found["w8a8"] <= found["rounding"] / 2
            else:
                right = found["w8a16"] <= 2 * found["plain"]
            if not right or (backend == "marlin") != (found["kernel"] == MARLIN):
                raise Failed(f"{found['kernel']} is further from float64 than its arithmetic "
                             f"allows, or another kernel than was asked for, at {layer}: {found}")
    return ", ".join(f"{kernel} ({len(measured[backend])} products)"
                     for backend, kernel in kernels.items())


def serve_bundled(here: Here) -> str:
    return serve(here, {})


def serve_without_toolkit(here: Here) -> str:
    """As on a machine with a driver and no CUDA toolkit, and with nothing compiled before."""
    with without_toolkit(here.place) as environment:
        return serve(here, environment)


def serve(here: Here, environment: dict[str, str]) -> str:
    """The bundled model in FP8, with the flags and the environment that a notebook gives it."""
    model = here.fp8()  # first: LLM Compressor leaves a CUDA context in this process
    flags, before = serving.default_flags(models.tiny(), here.mode), used(here)
    nvcc = shutil.which("nvcc", path=environment.get("PATH")) is not None
    with serving.VllmServer(model, flags, env=environment) as server:
        answer = server.chat([{"role": "user", "content": course.first_question(models.tiny())}],
                             max_tokens=200)
        log = server.log()
        held = used(here) - before
    if server.kernel == "not named in the log" or (
            (server.kernel == MARLIN) != (here.mode.key == "gpu-w8a16")):
        raise Failed(f"{here.mode.title} was to be served; the kernel: {server.kernel}.")
    if "####" not in answer:
        raise Failed(f"The server answers, but not as the bundled model does: {answer!r}.")
    if here.mode.device == "cuda":
        if "Graph capturing finished" not in log:
            raise Failed(f"vLLM has captured no CUDA graph: {server.log_path}.")
        if "Dynamo bytecode transform" not in log and "Directly load" not in log:  # from its cache
            raise Failed(f"vLLM has compiled nothing: {server.log_path}.")
        began = time.monotonic()
        while (left := used(here) - before) > GIVEN_BACK and time.monotonic() - began < 10:
            time.sleep(0.2)  # the driver takes a moment
        if left > GIVEN_BACK:
            raise Failed(f"The server has ended, and {left / 1e9:.1f} GB of GPU memory have not "
                         f"come back. {gpu_memory.in_the_way(here.machine.gpus)}")
    ledger.record("serve", "fp8", {"flags": flags, "toolkit": nvcc},
                  {"startup_seconds": round(server.startup_seconds, 1), "bytes_held": held},
                  model=models.model_info(models.tiny()), mode=here.mode.key, kernel=server.kernel,
                  checkpoint=server.checkpoint.fingerprint)
    return f"{server.kernel}, ready after {server.startup_seconds:.0f} s"


def run_the_notebooks(here: Here) -> str:
    rows = len(ledger.read())
    for number in here.asked:
        run_notebook(here, number)
    return f"notebooks {' and '.join(here.asked)}, {len(ledger.read()) - rows} rows in the ledger"


def run_notebook(here: Here, number: str) -> None:
    (source,) = notebooks(number)
    try:
        nb = execute(source, here.place / "notebooks" / source.name, f"      {source.name}")
    except NotebookStopped as stopped:
        raise Failed(" ".join(str(stopped).split())) from None
    for cell in nb.cells:
        said = "".join(output.get("text", "") for output in cell.get("outputs", ()))
        if "DIFFERS" in said:
            raise Failed(f"{source.name} finds a difference: {' '.join(said.split())}")


def decode_at_full_size(here: Here) -> str:
    """500 tokens of one stream, against what the memory's bandwidth allows at most."""
    config = roofline.load_config(here.large)
    on_gpu = here.mode.device == "cuda"
    arms = models.arms(models.PHI4, here.machine) if on_gpu else ("bf16", "fp8")
    if not arms:
        raise NotHere("Phi-4's weights do not fit this GPU, not even in FP8.")
    shared = models.gpus(models.PHI4, here.machine) if on_gpu else 1  # each reads its part
    limit = shared * roofline.read_bandwidth(here.machine).bytes_per_s
    copies = shared * roofline.measured_copy() if on_gpu else limit
    said, rates = [], {}
    for arm in arms:
        rates[arm], kernel = one_stream(here, arm)
        read = roofline.decode_bytes(config, arm) * rates[arm]
        reached, of_copies = read / limit, read / copies
        if on_gpu and of_copies > 1.1:  # a copy comes within a tenth of what a memory gives
            raise Failed(f"{arm}: {rates[arm]:.1f} tokens/s would read faster than the memory can: "
                         f"{of_copies:.0%} of {copies / 1e9:.0f} GB/s.")
        ledger.record(
            "throughput", arm,
            {"input_tokens": DECODE[0], "output_tokens": DECODE[1], "concurrency": DECODE[2],
             "rounds": ROUNDS},
            {"output_tok_s": rates[arm], "share_of_roofline": reached,
             "copy_bytes_s": copies, "share_of_copy_bandwidth": of_copies},
            model={"profile": "phi-4-random", "repo": "random weights", "revision": ""},
            mode=here.mode.key, kernel=kernel)
        said.append(f"{arm}: {rates[arm]:.1f} tokens/s, {reached:.0%} of the roofline ({kernel})")
    if on_gpu and len(rates) == 2:
        ratio, most = rates["fp8"] / rates["bf16"], (
            roofline.decode_bytes(config, "bf16") / roofline.decode_bytes(config, "fp8"))
        said.append(f"FP8 over bf16: {ratio:.2f}x of at most {most:.2f}x")
        if not 1 < ratio < 1.05 * most:
            raise Failed("; ".join(said))
    return "; ".join(said)


def one_stream(here: Here, arm: str) -> tuple[float, str]:
    """Tokens/s of one stream, median of the rounds, and vLLM's kernel; the weights are random."""
    model = here.place / f"random-{arm}"
    config = json.loads((here.large / "config.json").read_text())
    if arm == "fp8":  # the scheme as LLM Compressor has just written it
        config["quantization_config"] = here.fp8().config["quantization_config"]
    model.mkdir(parents=True, exist_ok=True)
    workspace.write_json(model / "config.json", config)
    profile = models.PHI4 if here.mode.device == "cuda" else models.tiny()
    flags = serving.default_flags(profile, here.mode)
    seconds, log = ask("speed.py", asked=json.dumps({
        "flags": ["--model", str(model), *flags, *RANDOM], "work": {"decode": DECODE},
        "rounds": ROUNDS}), environment=IN_ONE_PROCESS if "uni" in flags else {})
    median = sorted(seconds["decode"])[ROUNDS // 2]
    return DECODE[1] / median, server_log.selected_kernel(checkpoint.read_config(model), log)


def open_beside(here: Here) -> str:
    """Notebook 01 stays open, its kernel alive, as in JupyterLab; 05 starts its server."""
    (source,) = notebooks("01")
    nb = nbformat.read(source, as_version=4)
    client = NotebookClient(nb, timeout=None, kernel_name="python3",
                            resources={"metadata": {"path": str(NOTEBOOKS)}},
                            extra_arguments=["--log-level=CRITICAL"])
    before = used(here)
    with client.setup_kernel():
        try:
            for index, cell in enumerate(nb.cells):
                client.execute_cell(cell, index)
        except (CellExecutionError, DeadKernelError) as error:
            raise Failed(f"{source.name} did not run to its end: {error}") from None
        held = max(0, used(here) - before)  # NVML names no process within a container
        if held > CONTEXT:
            raise Failed(f"{source.name} has freed its model, and its kernel still holds "
                         f"{held / 1e9:.1f} GB of GPU memory.")
        run_notebook(here, "05")
    return f"05 has served beside 01's kernel, which holds {held / 1e9:.1f} GB of GPU memory"


STEPS = (
    Step("preflight", "driver, compiler and environments are what vLLM needs", check_machine,
         first=True),
    Step("layers", "vLLM's kernels compute at Phi-4's shapes what float64 does", compare_layers),
    Step("bundled model", "it is quantized, compiled, captured in CUDA graphs and served in FP8",
         serve_bundled),
    Step("no toolkit", "it is served where there is neither nvcc nor ninja, from empty caches",
         serve_without_toolkit),
    Step("notebooks", "05 proves the arithmetic, 07 measures it on a slice of Phi-4",
         run_the_notebooks),
    Step("full size", "Phi-4's size, random weights: 500 tokens of one stream against the roofline",
         decode_at_full_size),
    Step("beside 01", "a notebook that stays open leaves the GPU to the next", open_beside),
)


# What they stand on


def used(here: Here) -> int:
    """Bytes of the GPU's memory that anybody uses; 0 on a CPU."""
    if here.mode.device != "cuda":
        return 0
    import pynvml

    pynvml.nvmlInit()
    try:
        device = pynvml.nvmlDeviceGetHandleByIndex(hardware.best_gpu(here.machine).index)
        return pynvml.nvmlDeviceGetMemoryInfo(device).used
    finally:
        pynvml.nvmlShutdown()


@contextmanager
def without_toolkit(place: Path) -> Iterator[dict[str, str]]:
    """The variables of a process that finds no program of a CUDA toolkit, and empty caches."""
    bare = place / "bare"
    shutil.rmtree(bare, ignore_errors=True)
    try:
        programs = stand_in.programs(bare / "bin")
        caches = {name: str(bare / name.lower()) for name in (
            "VLLM_CACHE_ROOT", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR",
            "FLASHINFER_WORKSPACE_BASE")}
        yield {"PATH": str(programs), "CUDA_HOME": "/nonexistent", "CUDA_PATH": "/nonexistent",
               **caches}
    finally:
        shutil.rmtree(bare, ignore_errors=True)
