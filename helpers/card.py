"""The model card of one's own checkpoint, from the ledger and nothing else.

Every figure on the card is a row of the ledger. What the ledger lacks, the card calls
"not measured". A row's texts are data: they pass through `ledger_row.as_markdown`.
"""

import shlex
from typing import TYPE_CHECKING

from helpers import ledger, ledger_row, serving, stats
from helpers.ledger_row import as_markdown
from helpers.models import Profile

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

NOT_MEASURED = "not measured"
FILTERS = ("strict-match", "flexible-extract")
SPEED = ("output_tok_s", "output_tok_s_min", "output_tok_s_max")
TITLES = {"bf16": "bf16 (base)", "fp8": "FP8"}
RECIPE = '''from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier

recipe = QuantizationModifier(targets="Linear", scheme="FP8_DYNAMIC", ignore=["lm_head"])
oneshot(model=model, recipe=recipe)
model.save_pretrained(directory, save_compressed=True)'''
ARITHMETIC = """| hardware | what vLLM computes |
|---|---|
| compute capability 8.9 and newer (Ada, Hopper, Blackwell) | FP8 weights and activations (W8A8) |
| 7.5 to 8.8 (Turing, Ampere) | FP8 weights, 16-bit activations (W8A16) |

On Turing and Ampere `--linear-backend marlin` asks for Marlin's kernels by name; without it vLLM
0.32 takes those of another package, Humming, which is part of its stock environment for GPUs. On
newer GPUs leave it out: Marlin would keep the activations in 16 bits there, too."""
LIMITS = """Quantization changes how weights are stored, and not what the base model was made for.
Read the base model's own card: {link}. Phi-4's says: mainly English text (other languages are
about 8 % of its training data), reasoning and question answering where memory or latency is short.
It can be wrong, biased or offensive with confidence, in spite of its safety training. It is no
source of facts: ground its answers in documents (retrieval). Its code is mostly Python with common
packages: verify any other by hand. It is no basis for decisions about people, or in law or health,
without a further assessment. Tell users that they are talking to an AI system, and filter what it
writes for the use at hand. FP8 may change rare behaviours that the benchmarks above do not touch:
test the checkpoint that you deploy, not its base."""


def model_card(profile: Profile, rows: list[dict] | None = None) -> "ModelCard":
    """A `huggingface_hub.ModelCard` for the profile's FP8 checkpoint.

    `rows`: ledger rows, the workspace's by default; only those of this profile are used, the
    newest of each experiment and arm. The metadata holds licence, base model and its relation,
    library, and the measured gsm8k scores as a model index.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    rows = [row for row in (ledger.read() if rows is None else rows)
            if row["model"]["profile"] == profile.name]
    name = f"{profile.name}-fp8-dynamic"
    results = []
    score = _score(rows, "fp8")
    if score:
        task = score["work"]["task"]
        results = [EvalResult(
            task_type="text-generation", dataset_type=task, dataset_name=task,
            metric_type="exact_match", metric_name=f"exact_match, {kind}",
            metric_value=score["metrics"][kind]) for kind in FILTERS]
    hub = profile.source == "hub"
    data = ModelCardData(
        model_name=name, language="en", pipeline_tag="text-generation", library_name="transformers",
        license="mit" if profile.licence == "MIT" else "other",
        license_name=None if profile.licence == "MIT" else "base-model-licence",
        base_model=profile.repo if hub else None,
        base_model_relation="quantized" if hub else None,
        tags=["fp8", "compressed-tensors", "llm-compressor", "vllm"], eval_results=results or None)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_text(profile, name, rows)}")


def _newest(rows: list[dict], experiment: str, arm: str, work: tuple[str, ...],
            metrics: tuple[str, ...]) -> dict | None:
    """The newest row of an experiment and arm that has these fields and figures."""
    found = [r for r in rows if (r["experiment"], r["arm"]) == (experiment, arm)
             and r["work"].get("concurrency", 1) == 1  # the card's speed is one stream's
             and ledger_row.holds(r, work, metrics)]
    return found[-1] if found else None


def _score(rows: list[dict], arm: str) -> dict | None:
    return _newest(rows, "gsm8k", arm, ("task", "limit", "num_fewshot"), FILTERS)


def _text(profile: Profile, name: str, rows: list[dict]) -> str:
    hub = profile.source == "hub"
    link = f"https://huggingface.co/{profile.repo}" if hub else "in its own directory"
    base = f"[{profile.repo}]({link})" if hub else as_markdown(
        profile.title[0].upper() + profile.title[1:])
    made = _newest(rows, "quantize", "fp8", (), ("modules", "bytes_before", "bytes_after"))
    size = (f"{made['metrics']['modules']} Linear layers in F8_E4M3; "
            f"{made['metrics']['bytes_before']:,} bytes of weights became "
            f"{made['metrics']['bytes_after']:,}." if made else f"Size: {NOT_MEASURED}.")
    return f"""# {as_markdown(name)}

{base} at revision `{profile.revision}`, quantized to dynamic FP8 with LLM Compressor: weights with
one scale per output channel, activations with one scale per token, found at run time; `lm_head`
and the embeddings stay in bf16. {size}

## Recipe

```python
{RECIPE}
```

## Serving

```
vllm serve {shlex.quote(name)} --max-model-len {profile.max_model_len}
vllm serve {shlex.quote(name)} --max-model-len {profile.max_model_len} {shlex.join(serving.MARLIN)}
```

No FP8 flag is needed; the scheme is in `config.json`, and the hardware decides the arithmetic. The
second line is for Turing and Ampere:

{ARITHMETIC}

## Accuracy

{_accuracy(rows)}

## Decoding speed

{_speed(rows)}

## Limits and intended use

{LIMITS.format(link=link)}

## Licence

{profile.licence}, that of the base model this checkpoint was made from. A licence follows the copy
that was quantized: the same weights have also been mirrored under Microsoft's older research
licence.
"""


def _accuracy(rows: list[dict]) -> str:
    lines = [
        "| | task, rows, shots | filter | exact_match ± stderr | 95 % interval | mode, kernel |",
        "|---|---|---|---|---|---|"]
    for arm, title in TITLES.items():
        row = _score(rows, arm)
        if row is None:
            lines.append(f"| {title} | | | {NOT_MEASURED} | | |")
            continue
        title = title.replace(arm, ledger_row.arm_title(row))
        work, metrics = row["work"], row["metrics"]
        for kind in FILTERS:
            interval = stats.wilson(round(metrics[kind] * work["limit"]), work["limit"])
            stderr = metrics.get(f"{kind}_stderr")
            lines.append(
                f"| {title} | {as_markdown(work['task'])}, {work['limit']:,}, "
                f"{work['num_fewshot']} | {kind} | {metrics[kind]:.4f}"
                + (f" ± {stderr:.4f}" if stderr is not None else "")
                + f" | {interval.low:.3f} to {interval.high:.3f} | "
                f"{as_markdown(row['mode'])}, {as_markdown(row['kernel'])} |")
    return "\n".join(lines)


def _speed(rows: list[dict]) -> str:
    lines = [
        "| | generated tokens, streams, rounds | tokens/s, median (range) | hardware | kernel |",
        "|---|---|---|---|---|"]
    for arm, title in TITLES.items():
        row = _newest(rows, "throughput", arm, ("output_tokens", "concurrency", "rounds"), SPEED)
        if row is None:
            lines.append(f"| {title} | | {NOT_MEASURED} | | |")
            continue
        title = title.replace(arm, ledger_row.arm_title(row))
        work, metrics = row["work"], row["metrics"]
        median, low, high = (metrics[name] for name in SPEED)
        lines.append(
            f"| {title} | {work['output_tokens']}, {work['concurrency']}, {work['rounds']} | "
            f"{median:.1f} ({low:.1f} to {high:.1f}) | {as_markdown(ledger_row.device(row))} | "
            f"{as_markdown(row['kernel'])} |")
    return "\n".join(lines)
