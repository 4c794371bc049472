"""What each 8-bit format costs when weights and activations are rounded inside the real model.

A value is rounded to the format's grid and scaled back, and everything is computed in the model's
own type (float32 gives the cleanest figures), so the only error is the format's. After each
measurement the model is put back as it was.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from helpers import checkpoint, fp8, stats
from helpers.checkpoint import Checkpoint

if TYPE_CHECKING:
    from pandas import DataFrame
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GROUP = 128  # of block scales: DeepSeek-V3, https://arxiv.org/abs/2412.19437, section 3.3
TINY = 1e-12  # the least amax, so that a row of zeros is not divided by zero


@dataclass(frozen=True)
class Format:
    """A grid ("e4m3", "e5m2", "int8"), and what shares a scale in weights and in activations.

    Scopes: "row" (an output channel, a token), "tensor", "block" (128x128), "group" (128 of a row).
    """

    name: str
    grid: str
    weights: str = "row"
    activations: str = "row"


FORMATS = (
    Format("E4M3 per channel", "e4m3"),
    Format("E4M3 per tensor", "e4m3", "tensor", "tensor"),
    Format("E4M3 128x128 blocks", "e4m3", "block", "group"),
    Format("E5M2 per channel", "e5m2"),
    Format("INT8 per channel", "int8"),
)
LARGEST = {"e4m3": fp8.E4M3.max, "e5m2": fp8.E5M2.max, "int8": 127.0}


def amax(x: Tensor, scope: str) -> Tensor:
    """The largest magnitude of each scope of x [rows, columns], repeated to a shape that fits x."""
    import torch

    size = x.abs()
    if scope == "tensor":
        return size.max()
    if scope == "row":
        return size.amax(dim=1, keepdim=True)
    rows, columns = x.shape
    high = GROUP if scope == "block" else 1
    padded = torch.nn.functional.pad(size, (0, -columns % GROUP, 0, -rows % high))
    blocks = padded.unfold(0, high, high).unfold(1, GROUP, GROUP).amax(dim=(2, 3))
    return blocks.repeat_interleave(high, 0).repeat_interleave(GROUP, 1)[:rows, :columns]


def rounded(x: Tensor, grid: str, scope: str = "row",
            scale: Tensor | float | None = None) -> Tensor:
    """x [rows, columns] rounded to a grid and scaled back; same shape and type.

    The scale is amax / largest of each scope, in float32. With a static `scale` instead, values
    beyond the grid saturate.
    """
    import torch

    values, largest = x.float(), LARGEST[grid]
    if scale is None:
        scale = amax(values, scope).clamp_min(TINY) / largest
    values = (values / scale).clamp(-largest, largest)
    if grid == "int8":
        values = values.round()
    else:  # torch's cast, which is faster than helpers.fp8's; a test holds it to the same bits
        values = values.to(
            torch.float8_e4m3fn if grid == "e4m3" else torch.float8_e5m2).float()
    return (values * scale).to(x.dtype)


def sqnr(original: Tensor, changed: Tensor) -> float:
    """Signal over quantization noise in dB: 10 log10(sum x^2 / sum (x - q)^2); inf when equal."""
    import torch

    original, changed = original.double(), changed.double()
    return float(10 * torch.log10(original.square().sum() / (original - changed).square().sum()))


def load(source: Checkpoint) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A checkpoint's model in float32 on the CPU, for inference, and its tokenizer."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(source.path)


def targets(model: PreTrainedModel) -> list[str]:
    """The names of the Linear layers that FP8_DYNAMIC quantizes: all but lm_head."""
    import torch

    return [name for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and name != "lm_head"]


def encoded(tokenizer: PreTrainedTokenizerBase, rows: list[dict]) -> list[Tensor]:
    """Problems with their answers, as the task writes them: ids int64 [1, tokens] for each row."""
    return [tokenizer(f"Question: {row['question']}\nAnswer: {row['answer']}",
                      return_tensors="pt").input_ids for row in rows]


@contextlib.contextmanager
def threads(model: PreTrainedModel) -> Iterator[None]:
    """Compute with a small model on one thread, because a second one is woken too late to help.

    On two cores shared with other work, 100 answers of the bundled model took 2.9 s of processor
    time on one thread and 21 s on two, most of it spent waiting. A model is small below 64 MiB.
    """
    import torch

    before = torch.get_num_threads()
    if sum(tensor.nbytes for tensor in model.parameters()) < 64 * 2**20:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def applied(model: PreTrainedModel, modules: list[str], weight: Callable | None = None,
            activation: Callable | None = None) -> Iterator[None]:
    """Within the block, the named modules compute with other weights or other inputs.

    `weight(name, tensor)` and `activation(name, tensor)` return the tensor to take instead; weights
    are [out, in], activations [tokens, in].
    """
    import torch

    kept, hooks = {}, []

    def hook_for(name: str):
        def hook(module, args):
            return (activation(name, args[0].flatten(0, -2)).view(args[0].shape), *args[1:])
        return hook

    try:
        for name in modules:
            module = model.get_submodule(name)
            if weight is not None:
                kept[name] = module.weight.data
                module.weight.data = weight(name, kept[name]).to(kept[name].dtype)
            if activation is not None and isinstance(module, torch.nn.Linear):
                hooks.append(module.register_forward_pre_hook(hook_for(name)))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for name, tensor in reversed(kept.items()):  # tied weights share one Parameter
            model.get_submodule(name).weight.data = tensor


def quantized(model: PreTrainedModel, format: Format, weights: bool, activations: bool,
              modules: list[str] | None = None):
    """`applied` with one format, on weights, on activations or on both."""
    return applied(
        model, modules or targets(model),
        (lambda _, w: rounded(w, format.grid, format.weights)) if weights else None,
        (lambda _, x: rounded(x, format.grid, format.activations)) if activations else None)


def w8(model: PreTrainedModel, fp8: Checkpoint, activations: bool):
    """`applied` with the stored weights of the checkpoint `fp8`: W8A8 or W8A16.

    With `activations`, every token's are rounded to E4M3 with a scale of its own.
    """
    def stored(name, _):
        codes = checkpoint.read_tensor(fp8, f"{name}.weight")
        return codes.float() * checkpoint.read_tensor(fp8, f"{name}.weight_scale").float()

    return applied(model, targets(model), stored,
                   (lambda _, x: rounded(x, "e4m3")) if activations else None)


def observe(model: PreTrainedModel, ids: Tensor, keep: Callable[[Tensor], object]) -> dict:
    """`keep(x)` of the input x [tokens, in] of every quantized Linear, by the module's name.

    `ids`: int64 [1, tokens].
    """
    import torch

    found = {}

    def look(name, x):
        found[name] = keep(x.detach())
        return x

    with applied(model, targets(model), activation=look), torch.no_grad():
        model(ids)
    return found


def outputs(model: PreTrainedModel, texts: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """The output of each decoder layer and the logits, for the tokens of all texts in a row.

    `texts`: int64 [1, tokens] each. Returns [tokens, hidden] for each layer, the last one's before
    the final norm, and [tokens, vocabulary].
    """
    import torch

    seen = [[] for _ in model.model.layers]
    hooks = [layer.register_forward_hook(
        lambda _module, _args, out, place=place: place.append(
            (out[0] if isinstance(out, tuple) else out).flatten(0, -2)))
        for layer, place in zip(model.model.layers, seen, strict=True)]
    try:
        with torch.no_grad(), threads(model):
            logits = torch.cat([model(ids).logits[0] for ids in texts])
    finally:
        for hook in hooks:
            hook.remove()
    return [torch.cat(place) for place in seen], logits


def kl(logits: Tensor, other: Tensor) -> Tensor:
    """KL(p || q) of each token in nats, float64 [tokens].

    p comes from `logits`, q from `other`, both [tokens, vocabulary]; KL = sum p ln(p / q) over the
    whole vocabulary.
    """
    p, q = logits.double().log_softmax(-1), other.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def compare(reference: tuple[list[Tensor], Tensor], model: PreTrainedModel,
            texts: list[Tensor]) -> dict[str, float]:
    """Compare the model as it is now with `reference`, what `outputs` returned before.

    "layer i, dB" is the SQNR of a decoder layer's output. "KL" and "KL s.e." are the mean over the
    tokens, in nats, and its standard error if the tokens are independent. "top-1" is the share of
    tokens after which both find the same one likeliest.
    """
    layers, logits = outputs(model, texts)
    each = kl(reference[1], logits)
    agree = reference[1].argmax(-1) == logits.argmax(-1)
    return {f"layer {i}, dB": sqnr(a, b)
            for i, (a, b) in enumerate(zip(reference[0], layers, strict=True))} | {
        "KL": float(each.mean()), "KL s.e.": float(each.std() / len(each)**0.5),
        "top-1": float(agree.double().mean())}


def run(model: PreTrainedModel, texts: list[Tensor],
        formats: tuple[Format, ...] = FORMATS) -> DataFrame:
    """`compare`'s figures for every format on weights, on activations and on both.

    The columns are "format", "rounded", and those figures.
    """
    import pandas as pd

    reference, rows = outputs(model, texts), []
    for format in formats:
        for title, weights, activations in (
                ("weights", True, False), ("activations", False, True), ("both", True, True)):
            with quantized(model, format, weights, activations):
                found = compare(reference, model, texts)
            rows.append({"format": format.name, "rounded": title} | found)
    return pd.DataFrame(rows)


def left_alone(model: PreTrainedModel, texts: list[Tensor]) -> DataFrame:
    """`compare`'s KL and top-1 when lm_head and the embedding are rounded as well, E4M3 per row.

    Each line of the table adds to the Linears' FP8_DYNAMIC rounding. The input of lm_head is
    rounded per token too; the embedding has no input to round.
    """
    import pandas as pd

    reference, rows = outputs(model, texts), {}
    for title, more in (("Linears only", []), ("and lm_head", ["lm_head"]),
                        ("and the embedding", ["model.embed_tokens"]),
                        ("and both", ["lm_head", "model.embed_tokens"])):
        with quantized(model, FORMATS[0], True, True, targets(model) + more):
            rows[title] = compare(reference, model, texts)
    return pd.DataFrame(rows).T[["KL", "KL s.e.", "top-1"]]


def solved(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[dict],
           max_new_tokens: int = 140, batch: int = 50) -> list[bool]:
    """Whether the model's greedy answer to each problem ends in the right number.

    It is asked in the chat form, with no example before it. An answer is right as in GSM8K's
    strict-match: by its first `#### number`. Problems whose answers are about as long share a
    batch, padded on the left.
    """
    import torch

    pattern = r"#### (\-?[0-9\.\,]+)"
    right = [False] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["answer"]))
    for start in range(0, len(rows), batch):
        part = order[start:start + batch]
        given = tokenizer.apply_chat_template(
            [[{"role": "user", "content": rows[i]["question"]}] for i in part], padding=True,
            tokenizer_kwargs={"padding_side": "left"}, add_generation_prompt=True,
            return_tensors="pt", return_dict=True)
        with torch.inference_mode(), threads(model):
            made = model.generate(**given, max_new_tokens=max_new_tokens, do_sample=False)
        words = tokenizer.batch_decode(made[:, given["input_ids"].shape[1]:])
        for i, text in zip(part, words, strict=True):
            found, want = re.search(pattern, text), re.search(pattern, rows[i]["answer"])
            right[i] = found is not None and found[1] == want[1]
    return right


def accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[dict],
             formats: tuple[Format, ...] = FORMATS) -> DataFrame:
    """Problems solved with weights and activations rounded, beside those of the unrounded model.

    The index is the format. The columns are "right", "accuracy" with its 95 % interval from "low"
    to "high" (Wilson), and, against the unrounded model, "lost", "gained" and McNemar's "p". A
    scale per tensor is one for all tokens that a step computes, and so for the whole batch.
    """
    import pandas as pd

    base = solved(model, tokenizer, rows)
    arms = {"unrounded": base}
    for format in formats:
        with quantized(model, format, True, True):
            arms[format.name] = solved(model, tokenizer, rows)
    found = {}
    for name, right in arms.items():
        interval = stats.wilson(sum(right), len(right))
        lost, gained = stats.lost_and_gained(base, right)
        found[name] = {
            "right": sum(right), "accuracy": interval.value, "low": interval.low,
            "high": interval.high, "lost": lost, "gained": gained,
            "p": stats.mcnemar(lost, gained)}
    return pd.DataFrame(found).T.rename_axis("format").astype(
        {"right": int, "lost": int, "gained": int})
