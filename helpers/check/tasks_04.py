"""Tasks of notebook 04: SQNR, KL divergence, a Linear as W8A8 computes it."""

import math

from helpers.check.answers import (
    all_same,
    each,
    how_many,
    near,
    number,
    results,
    tensor,
)
from helpers.check.task import Key, Mistake, Task, compared

TOKENS, FEATURES, CHANNELS = 16, 64, 32


def _signals() -> list[tuple]:
    import torch

    random = torch.Generator().manual_seed(0)
    signal = torch.randn(8, 50, generator=random)
    return [(signal, signal + share * torch.randn(8, 50, generator=random))
            for share in (0.1, 0.03, 0.5)]


def _sqnr_key() -> Key:
    import torch

    def ratio(x, q):
        return float(torch.linalg.vector_norm(x.double()) / torch.linalg.vector_norm(
            x.double() - q.double()))

    return Key(lambda x, q: 20 * math.log10(ratio(x, q)), (
        Mistake(lambda x, q: 10 * math.log10(ratio(x, q)),
                "That is of the norms, which are amplitudes. Power is the square: sum x² over sum "
                "of squared errors, or 20 in place of 10."),
        Mistake(lambda x, q: 40 * math.log10(ratio(x, q)),
                "20 goes with amplitudes, 10 with powers: yours is squared twice."),
        Mistake(lambda x, q: -20 * math.log10(ratio(x, q)),
                "The noise stands on top: signal over noise, so that more is better."),
        Mistake(lambda x, q: 20 * math.log(ratio(x, q)), "Decibels are of log10, not of ln."),
        Mistake(lambda x, q: ratio(x, q) ** 2, "That is the ratio of the powers; in dB it is "
                                               "10 log10 of it.")))


def _logits() -> list[tuple]:
    import torch

    random = torch.Generator().manual_seed(0)
    first = 3 * torch.randn(6, 40, generator=random)
    return [(first, first + share * torch.randn(6, 40, generator=random))
            for share in (0.1, 0.5, 1.5)]


def _kl(p, q, base: float = math.e, total: bool = False, over: int = 1) -> float:
    """scipy's relative entropy of each token's softmax."""
    from scipy.special import rel_entr, softmax

    p, q = (softmax(each.double().numpy(), axis=1) for each in (p, q))
    tokens = rel_entr(p, q).sum(axis=1) / math.log(base)
    return float(tokens.sum() if total else tokens.mean()) / over


def _kl_key() -> Key:
    return Key(_kl, (
        Mistake(lambda p, q: _kl(q, p),
                "That is KL(q‖p). The unrounded model is p: its probabilities weigh the "
                "differences."),
        Mistake(lambda p, q: _kl(p, q, base=2), "That is in bits; with the natural logarithm it is "
                                                "in nats."),
        Mistake(lambda p, q: _kl(p, q, total=True), "That is the sum over all tokens. Per token: "
                                                    "their mean."),
        Mistake(lambda p, q: _kl(p, q, over=p.shape[1]),
                "That is the mean over tokens and candidates. Sum over the candidates, then take "
                "the mean over tokens (kl_div's reduction \"batchmean\").")))


def _inputs() -> list[tuple]:
    """Tokens, and channels, far apart: one scale for all of them would not do."""
    import torch

    random = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, FEATURES, generator=random)
    w = torch.randn(CHANNELS, FEATURES, generator=random)
    return [(x * torch.logspace(-2, 2, TOKENS)[:, None],
             w * torch.logspace(-2, 1, CHANNELS)[:, None])]


def _fake(x, dim: int | None = 1, narrow: bool = False):
    """Rounded to E4M3 and back; `dim` None is one scale for all, `narrow` a scale in bf16."""
    import torch

    amax = x.abs().amax() if dim is None else x.abs().amax(dim=dim, keepdim=True)
    scale = amax / 448
    scale = scale.bfloat16().float() if narrow else scale
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


def _by_compressed_tensors(x, w):
    """What LLM Compressor computes when it runs a quantized model: fake quantization."""
    from compressed_tensors.quantization import preset_name_to_scheme
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    scheme = preset_name_to_scheme("FP8_DYNAMIC", ["Linear"])

    def rounded(values, arguments):
        bounds = (values.amin(dim=1, keepdim=True), values.amax(dim=1, keepdim=True))
        return fake_quantize(values, *calculate_qparams(*bounds, arguments), arguments)

    return rounded(x, scheme.input_activations) @ rounded(w, scheme.weights).T


def _linear_key() -> Key:
    cost = ("That moves a scale by up to 0.4 %, so a token's largest value can come to lie beyond "
            "448 and clip. vLLM keeps tokens' scales in float32.")
    return Key(
        _by_compressed_tensors,
        (Mistake(lambda x, w: x @ _fake(w).T, "This is W8A16: the weight is rounded, the "
                                              "activations are not."),
         Mistake(lambda x, w: _fake(x) @ w.T, "The activations are right. W8A8 rounds the weight "
                                              "too, with a scale for each channel."),
         Mistake(lambda x, w: _fake(x, None) @ _fake(w).T,
                 "The weight is right. All tokens share one scale here, and the quiet ones drown: "
                 "take the amax of each row of x."),
         Mistake(lambda x, w: _fake(x, 0) @ _fake(w).T,
                 "The weight is right. Your scales of x are one for each feature; a token is a row "
                 "of x: dim=1."),
         Mistake(lambda x, w: _fake(x) @ _fake(w, None).T,
                 "The activations are right. The weight has one scale for the tensor here: take "
                 "the amax of each of its rows."),
         Mistake(lambda x, w: x @ w.T, "Nothing is rounded here.")),
        (Mistake(lambda x, w: _fake(x, narrow=True) @ _fake(w).T,
                 f"Your tokens' scales are rounded to bf16. {cost}"),
         Mistake(lambda x, w: _fake(x, narrow=True) @ _fake(w, narrow=True).T,
                 "Your scales are rounded to bf16, the weight's as in the file, and the tokens' "
                 f"too. {cost}"),
         Mistake(lambda x, w: _fake(x) @ _fake(w, narrow=True).T,
                 "The weight's scale is rounded to bf16, as in the file.")))


def _same_rows(given, other) -> bool:
    """Each token's outputs, to a thousandth: a value rounded otherwise costs more."""
    return bool(((given - other).norm(dim=1) <= 1e-3 * other.norm(dim=1)).all())


TASKS = (
    Task("sqnr", "04", "easy", 3, "code", "errors in dB",
         ("The noise is what rounding changed: original − changed.",
          "Power is the sum of squares, of the signal and of the noise.",
          "10 × log10 of signal's power over noise's; math.log10 takes a float."),
         _sqnr_key, compared(each(number, results(_signals)), all_same(near(1e-3)),
                             "10 log10(sum of x² / sum of (x − q)²).",
                             how_many(near(1e-3), ("signal", "signal", "signal")))),
    Task("fake_linear", "04", "hard", 8, "code", "dynamic W8A8",
         ("Two things are rounded: the weight, with a scale per row, and x, with a scale per row.",
          "For either: scale = t.abs().amax(dim=1, keepdim=True) / 448; divide, cast to "
          "torch.float8_e4m3fn, back to float, multiply by the scale.",
          "Do that in a function of one tensor, use it for both, and return "
          "rounded(x) @ rounded(w).T."),
         _linear_key, compared(each(tensor((TOKENS, CHANNELS), "the outputs"), results(_inputs)),
                               all_same(_same_rows),
                               "Round w with a scale per row, x with a scale per row, multiply.",
                               right_says="As compressed-tensors computes it. \"Dynamic\" is no "
                                          "more than x's scales being made here, from x.")),
    Task("kl_divergence", "04", "medium", 5, "code", "comparing distributions",
         ("Logits become probabilities by softmax over the candidates, the last dimension.",
          "For one token: the sum over candidates of p × (log p − log q), p being the unrounded "
          "model's.",
          "log_softmax(dim=-1) of both gives log p and log q; p is exp(log p). Sum over the last "
          "dimension, then take the mean over tokens."),
         _kl_key, compared(each(number, results(_logits)), all_same(near(1e-3)),
                           "mean over tokens of the sum over candidates of p (log p − log q).",
                           how_many(near(1e-3), ("logits", "logits", "logits")),
                           "As scipy's relative entropy.")),
)
