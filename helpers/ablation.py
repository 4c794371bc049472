"""What each 8-bit format costs: weights and activations rounded inside the real model, measured.

Everything is computed in the model's own type (float32 gives the cleanest figures): a value is
rounded to the format's grid and scaled back, so the only error is the format's. The model is put
back as it was after each measurement.
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from helpers import checkpoint, fp8, stats
from helpers.checkpoint import Checkpoint

GROUP = 128  # of block scales: DeepSeek-V3, https://arxiv.org/abs/2412.19437, section 3.3
TINY = 1e-12  # a row of zeros has a scale too


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


def amax(x, scope: str):
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


def rounded(x, grid: str, scope: str = "row", scale=None):
    """x [rows, columns] rounded to a grid and scaled back; same shape and type.

    The scale is amax / largest of each scope in float32, unless a `scale` is given (a static one):
    then larger values saturate.
    """
    import torch

    values, largest = x.float(), LARGEST[grid]
    if scale is None:
        scale = amax(values, scope).clamp_min(TINY) / largest
    values = (values / scale).clamp(-largest, largest)
    if grid == "int8":
        values = values.round()
    else:  # bit for bit helpers.fp8's own, which a test holds it to; torch's is faster
        values = values.to(
            torch.float8_e4m3fn if grid == "e4m3" else torch.float8_e5m2).float()
    return (values * scale).to(x.dtype)


def sqnr(original, changed) -> float:
    """Signal over quantization noise in dB: 10 log10(sum x^2 / sum (x - q)^2); inf when equal."""
    import torch

    original, changed = original.double(), changed.double()
    return float(10 * torch.log10(original.square().sum() / (original - changed).square().sum()))


def load(source: Checkpoint):
    """A checkpoint's model in float32 on the CPU, for inference, and its tokenizer."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(source.path)


def targets(model) -> list[str]:
    """The names of the Linear layers that FP8_DYNAMIC quantizes: all but lm_head."""
    import torch

    return [name for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and name != "lm_head"]


def encoded(tokenizer, rows: list[dict]) -> list:
    """Problems with their answers as the task writes them: one [1, tokens] tensor of ids a row."""
    return [tokenizer(f"Question: {row['question']}\nAnswer: {row['answer']}",
                      return_tensors="pt").input_ids for row in rows]


@contextlib.contextmanager
def _threads(model) -> Iterator[None]:
    """Compute with a small model on one thread: a second is woken too late to help.

    100 answers of the bundled model on two cores, shared with other work: 2.9 s of processor time
    on one thread, 21 s on two, most of it spent waiting. Small is what serving takes for small.
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
def applied(model, modules: list[str], weight: Callable | None = None,
            activation: Callable | None = None) -> Iterator[None]:
    """Within the block, the named modules compute with other weights or other inputs.

    `weight(name, tensor)` and `activation(name, tensor)` return what takes the tensor's place:
    weights [out, in], activations [tokens, in].
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
        for name, tensor in kept.items():
            model.get_submodule(name).weight.data = tensor


def quantized(model, format: Format, weights: bool, activations: bool,
              modules: list[str] | None = None):
    """`applied` with one format, on weights, on activations or on both."""
    return applied(
        model, modules or targets(model),
        (lambda _, w: rounded(w, format.grid, format.weights)) if weights else None,
        (lambda _, x: rounded(x, format.grid, format.activations)) if activations else None)


def w8(model, fp8: Checkpoint, activations: bool):
    """`applied` with the stored weights of the checkpoint `fp8`: W8A8 or W8A16.

    With `activations`, every token's are rounded to E4M3 with a scale of its own.
    """
    def stored(name, _):
        codes = checkpoint.read_tensor(fp8, f"{name}.weight")
        return codes.float() * checkpoint.read_tensor(fp8, f"{name}.weight_scale").float()

    return applied(model, targets(model), stored,
                   (lambda _, x: rounded(x, "e4m3")) if activations else None)


def observe(model, ids, keep: Callable) -> dict:
    """What `keep(x)` makes of the input [tokens, in] of every quantized Linear, by module name.

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


def outputs(model, texts: list) -> tuple[list, object]:
    """The output of each decoder layer and the logits, tokens of all texts one after another.

    Returns a list of [tokens, hidden], one a layer, and [tokens, vocabulary]. The last layer's
    is taken before the final norm.
    """
    import torch

    seen = [[] for _ in model.model.layers]
    hooks = [layer.register_forward_hook(
        lambda _module, _args, out, place=place: place.append(
            (out[0] if isinstance(out, tuple) else out).flatten(0, -2)))
        for layer, place in zip(model.model.layers, seen, strict=True)]
    try:
        with torch.no_grad(), _threads(model):
            logits = torch.cat([model(ids).logits[0] for ids in texts])
    finally:
        for hook in hooks:
            hook.remove()
    return [torch.cat(place) for place in seen], logits


def kl(logits, other):
    """KL(p || q) in nats of each token, p from `logits` [tokens, vocabulary], q from `other`.

    KL = sum p ln(p / q), over the whole vocabulary; float64 [tokens].
    """
    p, q = logits.double().log_softmax(-1), other.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def compare(reference, model, texts: list) -> dict:
    """The model, as it is now, beside `reference`, what `outputs` returned before.

    "layer i, dB": SQNR of each decoder layer's output; "KL" and "KL s.e.": mean over tokens in
    nats and its standard error, the tokens taken as independent; "top-1": share of tokens whose
    likeliest successor is the reference's.
    """
    layers, logits = outputs(model, texts)
    each = kl(reference[1], logits)
    agree = reference[1].argmax(-1) == logits.argmax(-1)
    return {f"layer {i}, dB": sqnr(a, b)
            for i, (a, b) in enumerate(zip(reference[0], layers, strict=True))} | {
        "KL": float(each.mean()), "KL s.e.": float(each.std() / len(each)**0.5),
        "top-1": float(agree.double().mean())}


def run(model, texts: list, formats: tuple[Format, ...] = FORMATS):
    """Every format on weights, on activations and on both: a DataFrame of `compare`'s figures.

    Columns "format", "rounded", and those figures.
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


def left_alone(model, texts: list):
    """lm_head and the embedding rounded as well, E4M3 per row: KL and top-1 as `compare`'s.

    Each row adds to the Linears' FP8_DYNAMIC rounding; lm_head's input is rounded per token too,
    the embedding has no input to round.
    """
    import pandas as pd

    reference, rows = outputs(model, texts), {}
    for title, more in (("Linears only", []), ("and lm_head", ["lm_head"]),
                        ("and the embedding", ["model.embed_tokens"]),
                        ("and both", ["lm_head", "model.embed_tokens"])):
        with quantized(model, FORMATS[0], True, True, targets(model) + more):
            rows[title] = compare(reference, model, texts)
    return pd.DataFrame(rows).T[["KL", "KL s.e.", "top-1"]]


def solved(model, tokenizer, rows: list[dict], max_new_tokens: int = 140,
           batch: int = 50) -> list[bool]:
    """Whether the model's greedy answer to each problem ends in the right number.

    Zero-shot, in the chat form; right as GSM8K's strict-match has it: the first `#### number`.
    Problems with answers of like length share a batch, padded on the left.
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
        with torch.inference_mode(), _threads(model):
            made = model.generate(**given, max_new_tokens=max_new_tokens, do_sample=False)
        words = tokenizer.batch_decode(made[:, given["input_ids"].shape[1]:])
        for i, text in zip(part, words, strict=True):
            found, want = re.search(pattern, text), re.search(pattern, rows[i]["answer"])
            right[i] = found is not None and found[1] == want[1]
    return right


def accuracy(model, tokenizer, rows: list[dict], formats: tuple[Format, ...] = FORMATS):
    """Problems solved with weights and activations rounded, beside the unrounded model's.

    A DataFrame, index format: "right", "accuracy" with its 95 % interval "low" to "high"
    (Wilson), and against the unrounded model "lost", "gained" and McNemar's "p". A scale per
    tensor is one for all tokens that a step computes, so for the whole batch.
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
