"""FP8 on this CPU beside everything else that could run the same model: `make bench-cpu`.

Three models: the bundled one, SmolLM2-135M, and a slice of Phi-4 (`helpers.phi4_slice`). Three
kinds of work: one stream, eight streams, a prompt of 512 tokens. All arms of a model are up at once
and are measured in turn, in alternating order, so that a machine that slows down slows all of them.
Decoding starts from prompts of one token, so that every step is one of decoding; a prompt is
counted by the time to its first token.

Where llama-cpp-python is installed in `.venv`, llama.cpp runs SmolLM2 in Q8_0, made of the same
GGUF file. Its Python package decodes one stream at a time.

The table is printed and, with a plot and every round, written to build/bench-cpu; the medians go
to the workspace's ledger as experiment "bench-cpu".
"""

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
import transformers

from helpers import (
    cpu_bench,
    hardware,
    hub,
    ledger,
    models,
    phi4_slice,
    plots,
    roofline,
    serving,
    slice_speed,
    smollm2,
    throughput,
    workspace,
)
from helpers.checkpoint import Checkpoint
from helpers.cpu_bench import Arm
from helpers.serve_side import cpu_kernels
from helpers.throughput import Work

OUT = workspace.repo() / "build" / "bench-cpu"
MAX_MODEL_LEN = phi4_slice.MAX_MODEL_LEN


@dataclass(frozen=True)
class Subject:
    """A model to measure.

    `make`: the checkpoint of its 16-bit weights, written into a folder where there is none yet.
    `generated`: tokens that each stream generates. `formats`: those that LLM Compressor makes of it
    (W4A16's groups of 128 have to divide the layers' widths). `stock`, `llama_cpp`: whether vLLM's
    own FP8 kernel and llama.cpp are measured on it too.
    """

    name: str
    make: Callable[[Path], Checkpoint]
    generated: int
    formats: tuple[str, ...] = ("fp8", "int8")
    stock: bool = False
    llama_cpp: bool = False


def slice_of_phi4(place: Path) -> Checkpoint:
    whole = roofline.load_config(workspace.data("phi4"))
    return phi4_slice.random_checkpoint(
        phi4_slice.sliced(whole, phi4_slice.LAYERS["cpu"]), place)


def asked_of(arm: Arm, generated: int, rounds: int) -> list[Work]:
    """What an arm is measured on."""
    if arm == cpu_bench.STOCK:  # its loop is slow: one stream of four tokens is all it is asked
        return [Work(1, 1, 4, rounds)]
    work = [Work(1, 1, generated, rounds), Work(8, 1, generated, rounds), Work(1, 512, 1, rounds)]
    # llama.cpp's Python package decodes one stream at a time.
    return [each for each in work if each.streams == 1 or arm != cpu_bench.LLAMA_CPP]


def by_format(base: Checkpoint, formats: Sequence[str], scratch: Path) -> dict[str, Checkpoint]:
    """The bf16 checkpoint, and what LLM Compressor makes of it in each format."""
    from llmcompressor.modifiers.quantization import QuantizationModifier

    return {"bf16": base} | {
        format: phi4_slice.quantized(base, QuantizationModifier(
            targets="Linear", scheme=phi4_slice.PRESETS[format], ignore=["lm_head"]),
            scratch / f"model-{format}")
        for format in formats}


def vllm_arms(made: dict[str, Checkpoint],
              stock: bool) -> dict[Arm, tuple[Checkpoint, dict[str, str]]]:
    """Of each arm that is a vLLM server: the checkpoint, and what is added to its environment."""
    arms = {cpu_bench.BF16: (made["bf16"], {})}
    for numerics in cpu_kernels.NUMERICS:
        arms[Arm("vLLM", "fp8", numerics)] = (made["fp8"], {cpu_kernels.VARIABLE: numerics})
    if stock:
        arms[cpu_bench.STOCK] = (made["fp8"], {"VLLM_PLUGINS": ""})
    arms[cpu_bench.INT8] = (made["int8"], {})
    if "int4" in made:  # with AMX vLLM would round the activations to INT8
        arms[cpu_bench.INT4] = (made["int4"], {"VLLM_CPU_INT4_W4A8": "0"})
    return arms


def server_arm(server: serving.VllmServer, measure: throughput.Measure) -> Callable[[Work], float]:
    """Tokens/s of a running server, by vLLM's benchmark; a prompt's by the time to its first token.
    """
    def run(work: Work) -> float:
        result = measure(server, work)
        if work.generated_tokens == 1:
            return throughput.tokens_per_second(work, result)
        return result.output_tok_s
    return run


def transformers_arm(base: Checkpoint) -> Callable[[Work], float]:
    """Transformers in this process, bf16, on a server's threads, greedy, with its KV cache."""
    torch.set_num_threads(serving.threads(base))
    model = transformers.AutoModelForCausalLM.from_pretrained(base.path,
                                                              dtype=torch.bfloat16).eval()

    @torch.inference_mode()
    def run(work: Work) -> float:
        ids = torch.randint(3, 400, (work.streams, work.prompt_tokens))
        begun, cache = time.perf_counter(), None
        for _ in range(work.generated_tokens):
            said = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            ids, cache = said.logits[:, -1:].argmax(-1), said.past_key_values
        return work.counted_tokens / (time.perf_counter() - begun)
    return run


def llama_cpp_arm(gguf: Path, threads: int) -> Callable[[Work], float]:
    """llama.cpp in this process, greedy, with its KV cache."""
    import llama_cpp

    llama = llama_cpp.Llama(str(gguf), n_ctx=MAX_MODEL_LEN, n_batch=MAX_MODEL_LEN,
                            n_ubatch=MAX_MODEL_LEN, n_threads=threads, n_threads_batch=threads,
                            verbose=False)

    def run(work: Work) -> float:
        llama.reset()
        ids = torch.randint(3, 400, (work.prompt_tokens,)).tolist()
        begun = time.perf_counter()
        for _ in range(work.generated_tokens):
            llama.eval(ids)
            ids = [llama.sample(temp=0.0)]
        return work.counted_tokens / (time.perf_counter() - begun)
    return run


def smollm2_in_q8_0(into: Path) -> Path | None:
    """The package's GGUF with every matrix in Q8_0; None where llama-cpp-python is not there."""
    try:
        import llama_cpp
    except ImportError:
        return None
    made = into / "smollm2-q8_0.gguf"
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.allow_requantize = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, True
    with tempfile.TemporaryDirectory(dir=into) as folder:
        (gguf,) = smollm2.fetch(Path(folder)).rglob("*.gguf")
        if llama_cpp.llama_model_quantize(os.fsencode(gguf), os.fsencode(made), options):
            raise RuntimeError(f"llama.cpp could not make {made.name} of {gguf.name}")
    return made


def bench(subject: Subject, made: dict[str, Checkpoint], rounds: int,
          gguf: Path | None = None) -> pd.DataFrame:
    """Every round of every arm on one model, as `measured` returns them."""
    flags = serving.default_flags(models.tiny(), hardware.serving_mode(hardware.detect()))
    flags += ["--max-model-len", str(MAX_MODEL_LEN), *throughput.NO_REUSE]  # vLLM takes the last
    with contextlib.ExitStack() as everything:
        measure = everything.enter_context(throughput.benchmark(*slice_speed.SHOWN))
        arms, kernels = {cpu_bench.TRANSFORMERS: transformers_arm(made["bf16"])}, {}
        if gguf:
            arms[cpu_bench.LLAMA_CPP] = llama_cpp_arm(gguf, serving.threads(made["bf16"]))
            kernels[cpu_bench.LLAMA_CPP] = "llama.cpp"
        servers = {arm: serving.VllmServer(model, flags, env=env)
                   for arm, (model, env) in vllm_arms(made, subject.stock).items()}
        everything.callback(serving.stop_together, servers.values())
        serving.start_together(list(servers.values()))
        for arm, server in servers.items():
            arms[arm], kernels[arm] = server_arm(server, measure), server.kernel
        work = {arm: asked_of(arm, subject.generated, rounds) for arm in arms}
        table = measured(arms, work)
    return table.assign(model=subject.name, kernel=table["arm"].map(kernels).fillna("unquantized"))


def measured(arms: dict[Arm, Callable[[Work], float]], work: dict[Arm, list[Work]]) -> pd.DataFrame:
    """Each arm on its work, in turn and in alternating order, after a round that is not counted.

    The arms alternate at each kind of work, so that what is compared lies seconds apart. One row
    per round, arm and work: round, arm, work, streams, prompt_tokens and tok_s.
    """
    rounds = max(each.rounds for some in work.values() for each in some)
    turns = [(number, arm, each) for number, arm in throughput.order(list(arms), rounds + 1)
             for each in work[arm]]
    turns.sort(key=lambda turn: (turn[0], turn[2].prompt_tokens, turn[2].streams))
    rows = []
    for number, arm, each in turns:
        tok_s = arms[arm](each)
        if number > 1:  # the first round warms up
            rows.append({"round": number - 1, "arm": arm, "work": each, "streams": each.streams,
                         "prompt_tokens": each.prompt_tokens, "tok_s": tok_s})
    return pd.DataFrame(rows)


def summary(rounds: pd.DataFrame) -> pd.DataFrame:
    """By model, work and arm: median and range of tokens/s, and of the ratio to vLLM's bf16.

    The ratio is taken round by round, between runs that lie next to each other in time. Works are
    the same to it that have as many streams and prompt tokens, however long they decode.
    """
    key = ["model", "streams", "prompt_tokens", "round"]
    bf16 = rounds[rounds["arm"] == cpu_bench.BF16].set_index(key)["tok_s"]
    rounds = rounds.assign(ratio=rounds["tok_s"] / rounds.set_index(key).index.map(bf16))
    table = rounds.groupby(["model", "streams", "prompt_tokens", "arm"], sort=False).agg(
        work=("work", "first"), kernel=("kernel", "first"),
        tok_s=("tok_s", "median"), tok_s_min=("tok_s", "min"), tok_s_max=("tok_s", "max"),
        ratio=("ratio", "median"), ratio_min=("ratio", "min"), ratio_max=("ratio", "max"))
    in_order = table.reset_index().sort_values("arm", key=lambda arms: arms.map(
        cpu_bench.ARMS.index))
    return in_order.sort_values(["model", "prompt_tokens", "streams"], kind="stable",
                                ignore_index=True).drop(columns=["streams", "prompt_tokens"])


def in_words(table: pd.DataFrame) -> pd.DataFrame:
    """`summary`'s table with the names of arms and works, as it is printed and plotted."""
    return table.assign(arm=[arm.title for arm in table["arm"]],
                        work=[work.title for work in table["work"]])


def record(table: pd.DataFrame, profile: models.Profile) -> None:
    """Append `summary`'s lines of one model to the workspace's ledger."""
    mode = hardware.serving_mode(hardware.detect())
    for line in table.to_dict("records"):
        ledger.record(
            "bench-cpu", line["arm"].format,
            work=line["arm"].in_ledger() | line["work"].in_ledger(),
            metrics={name: round(line[name], 4) for name in line if name.startswith(
                ("tok_s", "ratio"))},
            model={"profile": line["model"], "repo": profile.repo, "revision": profile.revision},
            mode=mode.key, kernel=line["kernel"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", help="the model whose name holds this")
    asked = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    subjects = [
        Subject("tiny-phi4", lambda _: models.tiny().checkpoint, 96, stock=True),
        Subject("SmolLM2-135M", lambda _: hub.obtain(models.SMOLLM2), 48, llama_cpp=True),
        Subject(cpu_bench.PHI4, slice_of_phi4, 20, tuple(phi4_slice.PRESETS))]
    every = []
    for number, subject in enumerate(subjects):
        if asked.only and asked.only not in subject.name:
            continue
        scratch = workspace.root() / "bench-cpu" / str(number)
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        try:
            base = subject.make(scratch / "model")
            made = by_format(base, subject.formats, scratch)
            every.append(bench(subject, made, asked.rounds,
                               smollm2_in_q8_0(scratch) if subject.llama_cpp else None))
            record(summary(every[-1]), models.directory_profile(base))
        finally:
            shutil.rmtree(scratch)
        print(in_words(summary(every[-1])).round(2).to_string(index=False), flush=True)
    rounds = pd.concat(every)
    table = in_words(summary(rounds))
    bandwidth = roofline.read_bandwidth(hardware.detect())
    (OUT / "rounds.json").write_text(json.dumps(
        rounds.to_dict("records"), default=dataclasses.asdict))
    (OUT / "table.md").write_text(table.round(3).to_markdown(index=False) + "\n\n"
                                  f"Memory read at {bandwidth.bytes_per_s / 1e9:.1f} GB/s.\n")
    plots.bench_cpu(table).savefig(OUT / "ratios.png", dpi=110)
    print((OUT / "table.md").read_text())


if __name__ == "__main__":
    main()
