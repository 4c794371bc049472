"""Train data/tiny_phi4: `python -m training.train_tiny_phi4` (about half an hour on two cores).

It is a small Phi3ForCausalLM with Phi-4's proportions, trained on fresh problems from the
generator. The run depends on `Run` alone: step k draws its problems from the seed and k, so a run
that is interrupted and goes on from its checkpoint ends in the same weights.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from helpers import workspace
from training.make_problems import TARGET as PROBLEMS
from training.problems import Problem, stream
from training.tokenizer import (
    BOS,
    EOS,
    PAD,
    VOCABULARY,
    chat_form,
    few_shot_form,
    train_tokenizer,
)
from training.write_card import write_card

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer
    from transformers import Phi3ForCausalLM, PreTrainedTokenizerFast

REPO = Path(__file__).resolve().parent.parent
TARGET = REPO / "data" / "tiny_phi4"
CORES = 2


@dataclass(frozen=True)
class Run:
    """Everything a training run depends on."""

    seed: str = "tiny phi-4"
    steps: int = 3000
    tokens_per_step: int = 4096
    short: int = 256  # tokens per sequence in most steps, where attention costs little
    long: int = 1024  # tokens per sequence in the others, where a 5-shot prompt and answer fit
    long_every: int = 4  # steps; a model that sees only 256 tokens cannot use longer distances
    muon_lr: float = 0.02  # the matrices of the decoder layers
    adam_lr: float = 0.003  # embedding, head, norms
    warmup: int = 50
    flat: int = 1000  # the step at which the learning rate begins to fall
    question_weight: float = 0.1  # of the loss of a question's tokens; an answer's have 1
    chat_share: float = 0.2  # share of the sequences in chat form; the others are few-shot

    @property
    def tokens(self) -> int:
        return self.steps * self.tokens_per_step

    def length(self, step: int) -> int:
        """Tokens per sequence at a step."""
        return self.short if (step + 1) % self.long_every else self.long


def test_questions() -> frozenset[str]:
    """The questions that training must never see."""
    lines = (PROBLEMS / "test.jsonl").read_text().splitlines()
    return frozenset(json.loads(line)["question"] for line in lines)


def step_problems(
    run: Run, step: int, forbidden: frozenset[str]
) -> list[tuple[bool, list[Problem]]]:
    """The problems of each sequence of a step, and whether the sequence is in chat form.

    A problem takes more than 50 tokens, so length // 50 + 1 of them fill a sequence.
    """
    rng = random.Random(f"{run.seed} {step}")
    length = run.length(step)
    return [
        (
            rng.random() < run.chat_share,
            list(islice(stream(f"{run.seed} {step} {row}", forbidden), length // 50 + 1)),
        )
        for row in range(run.tokens_per_step // length)
    ]


def build_tokenizer(run: Run) -> PreTrainedTokenizerFast:
    """The tokenizer, trained on a sample of the problems in both forms."""
    sample = islice(stream(f"{run.seed} tokenizer", test_questions()), 20_000)
    texts = [few_shot_form(p.question, p.answer) for p in sample]
    roles = ["system\nuser\nassistant\n"] * len(texts)  # as often as the chat form has them
    return train_tokenizer([*texts, *roles])


def build_model(run: Run, tokenizer: PreTrainedTokenizerFast) -> Phi3ForCausalLM:
    """A small model of Phi-4's architecture: its ratios and rope, four layers of width 256."""
    import torch
    from transformers import Phi3Config, Phi3ForCausalLM

    torch.manual_seed(random.Random(run.seed).getrandbits(32))
    return Phi3ForCausalLM(
        Phi3Config(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=1,
            max_position_embeddings=2048,
            original_max_position_embeddings=2048,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 250000},
            sliding_window=None,
            tie_word_embeddings=False,
            bos_token_id=tokenizer.convert_tokens_to_ids(BOS),
            eos_token_id=tokenizer.convert_tokens_to_ids(EOS),
            pad_token_id=tokenizer.convert_tokens_to_ids(PAD),
        )
    )


def batch(run: Run, step: int, tokenizer: PreTrainedTokenizerFast,
          forbidden: frozenset[str]) -> tuple[Tensor, Tensor]:
    """The step's token ids (int64) and their loss weights (float32), both [rows, length + 1]."""
    import torch

    # An answer starts after "Answer" or "assistant" and ends with "Question" or <|im_end|>. The
    # last is learnt as part of the answer, because it makes the model stop.
    opens = set(tokenizer.convert_tokens_to_ids(["Answer", "assistant"]))
    closes = set(tokenizer.convert_tokens_to_ids(["Question", EOS]))
    ids, weights = [], []
    for chat, problems in step_problems(run, step, forbidden):
        form = chat_form if chat else few_shot_form
        text = "".join(form(p.question, p.answer) for p in problems)
        row = tokenizer(text, add_special_tokens=False).input_ids[: run.length(step) + 1]
        inside, weight = False, []
        for token in row:
            weight.append(1.0 if inside else run.question_weight)
            inside = token in opens or (inside and token not in closes)
        ids.append(row)
        weights.append(weight)
    return torch.tensor(ids), torch.tensor(weights)


def learning_rate(run: Run, step: int) -> float:
    """The factor on both learning rates: it rises linearly, stays at 1, and falls as a square to 0.
    """
    left = (run.steps - step) / (run.steps - run.flat)
    return min(1.0, (step + 1) / run.warmup, left**2)


def optimizers(run: Run, model: Phi3ForCausalLM) -> list[Optimizer]:
    """Muon for the matrices inside the decoder layers, in `CORES` parts; AdamW for the rest."""
    import torch

    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n]
    inside = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in inside]
    muons = [
        torch.optim.Muon(matrices[core::CORES], lr=run.muon_lr, weight_decay=0.01)
        for core in range(CORES)
    ]
    return [
        *muons,
        torch.optim.AdamW(rest, lr=run.adam_lr, betas=(0.9, 0.95), weight_decay=0.01),
    ]


def backward(model: Phi3ForCausalLM, copy: Phi3ForCausalLM, ids: Tensor,
             weights: Tensor) -> float:
    """Compute the gradients of some sequences on a bf16 copy of the model.

    `ids` and `weights`: [rows, length + 1]. The gradients are left in the copy; returned is the
    mean loss of an answer's token.
    """
    import torch
    from torch.nn.functional import cross_entropy

    with torch.no_grad():
        for low, high in zip(copy.parameters(), model.parameters(), strict=True):
            low.copy_(high)
            low.grad = None
    logits = copy(input_ids=ids[:, :-1], use_cache=False).logits
    losses = cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    weight = weights[:, 1:].flatten()
    (losses @ weight / weight.sum()).backward()
    return losses[weight == 1].mean().item()


def train(run: Run, tokenizer: PreTrainedTokenizerFast, work: Path,
          stop_after: int | None = None) -> tuple[Phi3ForCausalLM, list[dict]]:
    """Train, or go on from the checkpoint in `work`; return the model and the log's rows.

    checkpoint.pt is written to `work` every 100 steps and at the end. `stop_after` ends the run
    early as an interruption would, for the test of resuming.
    """
    import torch
    from tqdm import tqdm

    work.mkdir(parents=True, exist_ok=True)
    checkpoint = work / "checkpoint.pt"
    forbidden = test_questions()
    # The optimizers update float32 weights. Forward and backward run on bf16 copies of them, which
    # on a CPU with AVX512-BF16 or AMX is twice as fast as float32 or autocast. Each core has its
    # own copy and half of the sequences, because the operations are too small to be shared.
    model = build_model(run, tokenizer)
    opts = optimizers(run, model)
    copies = [build_model(run, tokenizer) for _ in range(CORES)]
    for parameter in (p for copy in copies for p in copy.parameters()):
        parameter.data = parameter.data.bfloat16()  # the rope's frequencies stay float32
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(CORES, initializer=torch.set_num_threads, initargs=(1,))
    start, log, seconds = 0, [], 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if state["run"] != asdict(run):
            sys.exit(f"{checkpoint} is of another run: remove it, or give the run's own options.")
        model.load_state_dict(state["model"])
        for opt, saved in zip(opts, state["optimizers"], strict=True):
            opt.load_state_dict(saved)
        start, log, seconds = state["step"], state["log"], state["seconds"]

    def save(step: int) -> None:
        partial = checkpoint.with_suffix(".partial")
        torch.save(
            {
                "run": asdict(run),
                "model": model.state_dict(),
                "optimizers": [opt.state_dict() for opt in opts],
                "step": step,
                "log": log,
                "seconds": seconds,
            },
            partial,
        )
        partial.rename(checkpoint)

    upcoming = batch(run, start, tokenizer, forbidden)
    end = run.steps if stop_after is None else min(run.steps, stop_after)
    bar = tqdm(range(start, end), initial=start, total=run.steps, unit="step", mininterval=5)
    for step in bar:
        began = time.monotonic()
        for opt in opts:
            peak = run.adam_lr if isinstance(opt, torch.optim.AdamW) else run.muon_lr
            opt.param_groups[0]["lr"] = peak * learning_rate(run, step)
        ids, weights = upcoming
        parts = zip(copies, ids.chunk(CORES), weights.chunk(CORES), strict=True)
        losses = pool.map(lambda part: backward(model, *part), parts)
        upcoming = batch(run, step + 1, tokenizer, forbidden)  # while the cores are at work
        answer_loss = sum(losses) / CORES
        if not math.isfinite(answer_loss):
            sys.exit(f"The loss is {answer_loss} at step {step}: the last checkpoint is kept.")
        for high, *low in zip(model.parameters(), *(c.parameters() for c in copies), strict=True):
            high.grad = sum(p.grad.float() for p in low) / CORES
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        list(pool.map(lambda opt: opt.step(), opts))
        seconds += time.monotonic() - began
        if (step + 1) % 50 == 0 or step + 1 == end:
            row = {
                "step": step + 1,
                "tokens": (step + 1) * run.tokens_per_step,
                "seconds": round(seconds, 1),
                "answer_loss": round(answer_loss, 5),
            }
            log.append(row)
            bar.set_postfix(loss=row["answer_loss"], tok_s=round(row["tokens"] / seconds))
        if (step + 1) % 100 == 0 or step + 1 == end:
            save(step + 1)
    return model, log


def save_model(run: Run, model: Phi3ForCausalLM, tokenizer: PreTrainedTokenizerFast,
               log: list[dict], target: Path) -> None:
    """Write bf16 safetensors, config, tokenizer, chat template and the training log."""
    import torch
    from transformers import GenerationConfig

    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model = model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    )
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    record = {
        "run": asdict(run),
        "tokens": run.tokens,
        "parameters": sum(p.numel() for p in model.parameters()),
        "minutes": round(log[-1]["seconds"] / 60, 1),
        "tokens_per_second": round(log[-1]["tokens"] / log[-1]["seconds"]),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "log": log,
    }
    (partial / "training_log.json").write_text(json.dumps(record, indent=1) + "\n")
    target.mkdir(exist_ok=True)
    for file in partial.iterdir():
        file.replace(target / file.name)
    partial.rmdir()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=Path, default=TARGET)
    parser.add_argument("--work", type=Path, default=REPO / "build" / "tiny_phi4")
    options = parser.parse_args()
    run = Run()
    print(f"{run.tokens:,} tokens in {run.steps:,} steps; interrupt and run again to go on.")
    tokenizer = build_tokenizer(run)
    model, log = train(run, tokenizer, options.work)
    save_model(run, model, tokenizer, log, options.target)
    if options.target == TARGET:
        # Scores of the former weights are not those of these.
        (TARGET / "evaluation.json").unlink(missing_ok=True)
        write_card(TARGET)
        workspace.write_manifest(TARGET)


if __name__ == "__main__":
    main()
