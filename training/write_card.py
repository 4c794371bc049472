"""The bundled model's card, written from training_log.json and evaluation.json beside it."""

import json
from pathlib import Path

CARD = """---
license: mit
language: en
library_name: transformers
pipeline_tag: text-generation
---

# tiny-phi4

Phi-4's architecture in small, so that the whole workbook runs with no GPU and no download: a
Phi3ForCausalLM with {parameters:,} parameters, trained from scratch on grade-school word problems
in GSM8K's own form. It is no small Phi-4: it knows nothing of Phi-4's training data and can do
nothing but these problems.

| | tiny-phi4 | Phi-4 |
|---|---:|---:|
{architecture}

The projections `qkv_proj` and `gate_up_proj` are fused, there are no biases, the head is not tied
to the embedding, and every Linear dimension is a multiple of 128. The tokenizer is a byte-level
BPE with every digit a token of its own, and with Phi-4's chat markers and chat template.

## Training

`python -m training.train_tiny_phi4`, from a seed, on two CPU cores. The problems come fresh from
the generator ({forms}); a problem whose question is in `data/tiny_gsm8k/test.jsonl` is
rejected. The optimizers are Muon for the matrices of the decoder layers and AdamW for the rest.

| | |
|---|---:|
| tokens | {tokens:,} |
| steps | {steps:,} of {tokens_per_step:,} tokens |
| tokens per sequence | {short}, in one step of {long_every} {long} |
| minutes | {minutes} |
| tokens per second | {tokens_per_second:,} |
| torch, Python | {torch}, {python} |

Mean loss of an answer's token, in nats, on the batch of that step (nothing in it was seen before):

| step | tokens | minutes | loss |
|---:|---:|---:|---:|
{log}
{evaluation}
## Limits

It answers problems like those of `data/tiny_gsm8k`, in the few-shot form and in the chat form.
Anything else it answers with nonsense, and it often gives the person in a problem another name.
Made for teaching and testing; MIT licence, as the problems.
"""

EVALUATION = """
## Evaluation

`python -m training.score`: vLLM serves the bf16 weights, lm-eval {lm_eval} asks the task `{task}`,
{num_fewshot}-shot, greedy, {max_new_tokens} new tokens, on {cpu}, {time}.

| exact_match | first 100 rows | all {rows:,} rows |
|---|---:|---:|
{scores}

The first 100 rows are those of the run over all rows. lm-eval's own table:

{table}
"""

ARCHITECTURE = {
    "hidden size": "hidden_size",
    "layers": "num_hidden_layers",
    "attention heads": "num_attention_heads",
    "KV heads": "num_key_value_heads",
    "FFN size": "intermediate_size",
    "vocabulary": "vocab_size",
    "context": "max_position_embeddings",
}


def write_card(target: Path) -> None:
    """Write README.md in `target`; the evaluation's section only where there is one."""
    training = json.loads((target / "training_log.json").read_text())
    run, log = training["run"], training.pop("log")
    config = json.loads((target / "config.json").read_text())
    phi4 = json.loads((target.parent / "phi4" / "config.json").read_text())
    every = max(1, len(log) // 12)
    rows = [row for row in log if row is log[-1] or (log.index(row) + 1) % every == 0]
    text = CARD.format(
        **{**run, **training},
        architecture="\n".join(
            f"| {title} | {config[key]:,} | {phi4[key]:,} |" for title, key in ARCHITECTURE.items()
        ),
        forms=f"{round(100 * run['chat_share'])} % of the sequences in chat form, the others "
        "in the few-shot form",
        log="\n".join(
            f"| {r['step']:,} | {r['tokens']:,} | {r['seconds'] / 60:.1f} "
            f"| {r['answer_loss']:.4f} |"
            for r in rows
        ),
        evaluation=evaluation_section(target),
    )
    (target / "README.md").write_text(text)


def evaluation_section(target: Path) -> str:
    """The scores with where they come from, or nothing before the first evaluation."""
    path = target / "evaluation.json"
    if not path.exists():
        return ""
    scored = json.loads(path.read_text())
    return EVALUATION.format(
        **{**scored["config"], **scored},
        scores="\n".join(
            f"| {name} | {value['first_100']:.4f} | {value['all']:.4f} |"
            for name, value in scored["exact_match"].items()
        ),
    )
