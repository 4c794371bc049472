"""Tasks of notebook 00: scales, the product, the ceiling of a GPU."""

from helpers.check.answers import each, near, number, results, tensor, tensors_near
from helpers.check.task import Key, Mistake, Task, Unusable, compared

LARGEST = 448


def _weights() -> list[tuple]:
    """Square, so that a scale for each column has the shape of one for each row."""
    import torch

    weights = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    weights[2] = -weights[2].abs()  # its largest magnitude is negative
    return [(weights * torch.logspace(-2, 1, 6)[:, None],)]


def _as_scales(value):
    """[channels], from [channels], [channels, 1] or one number for all."""
    import torch

    try:
        found = torch.as_tensor(value).detach().double()
    except (TypeError, ValueError, RuntimeError):
        raise Unusable("A tensor of scales is wanted.") from None
    if found.numel() == 1:
        return found.reshape(()).expand(6)
    if tuple(found.shape) not in ((6,), (6, 1)):
        raise Unusable("One scale for each channel is wanted: for weights [6, 6] a tensor [6] or "
                       f"[6, 1], and yours is {list(found.shape)}.")
    return found.reshape(6)


def _scales_key() -> Key:
    import numpy as np
    import torch

    largest = torch.finfo(torch.float8_e4m3fn).max
    return Key(
        lambda w: np.abs(w.double().numpy()).max(axis=1) / largest,
        (Mistake(lambda w: w.abs().amax() / LARGEST,
                 "This is one scale for the whole tensor. Take the amax of each row alone: dim=1."),
         Mistake(lambda w: w.abs().amax(dim=0) / LARGEST,
                 "This is a scale for each column. A channel is a row, so the maximum runs along "
                 "dim=1, over the row's features."),
         Mistake(lambda w: w.amax(dim=1) / LARGEST,
                 "Some rows have their largest magnitude at a negative weight: take abs() before "
                 "the maximum."),
         Mistake(lambda w: w.abs().amax(dim=1) / 127,
                 "127 is INT8's largest number. E4M3's is 448."),
         Mistake(lambda w: w.abs().amax(dim=1),
                 "This is each row's amax. The scale maps it onto 448, so divide by that."),
         Mistake(lambda w: LARGEST / w.abs().amax(dim=1),
                 "This is 1 / scale: weights are divided by the scale, so it is amax / 448.")))


def _product() -> list[tuple]:
    """As many tokens as channels, so that scales on the wrong side have the right shape."""
    import torch

    random = torch.Generator().manual_seed(1)
    codes = (300 * torch.randn(5, 64, generator=random)).clamp(-448, 448)
    return [(torch.randn(5, 64, generator=random), codes.to(torch.float8_e4m3fn),
             torch.tensor([0.001, 0.01, 0.002, 0.03, 0.004]))]


def _w8a8(x, codes_w, s_w):
    import torch

    s_x = x.abs().amax(dim=1, keepdim=True) / LARGEST
    return s_x * s_w * ((x / s_x).to(torch.float8_e4m3fn).float() @ codes_w.float().T)


def _product_key() -> Key:
    return Key(
        lambda x, codes_w, s_w: x.double() @ (codes_w.double() * s_w.double()[:, None]).T,
        (Mistake(_w8a8, "This is W8A8: you rounded the activations. In W8A16 x goes into the "
                        "product as it is."),
         Mistake(lambda x, codes_w, s_w: s_w[:, None] * (x @ codes_w.float().T),
                 "You multiplied row i of y, a token, by the scale of channel i. Channels are the "
                 "columns of y: s_w as it is, without [:, None]."),
         Mistake(lambda x, codes_w, s_w: x @ codes_w.float().T,
                 "The product of x and the codes is right; each column still wants its channel's "
                 "scale."),
         Mistake(lambda x, codes_w, s_w: (x @ codes_w.float().T) / s_w,
                 "The codes are the weights divided by the scale, so the way back multiplies.")))


def _phi4() -> dict:
    from helpers import roofline, workspace

    return roofline.load_config(workspace.data("phi4"))


def _ceiling_key() -> Key:
    from helpers import checkpoint, roofline

    phi4, speed = _phi4(), 768e9
    fp8, bf16 = (roofline.decode_bytes(phi4, arm) for arm in ("fp8", "bf16"))
    file = checkpoint.total_bytes(checkpoint.predict_fp8(roofline.tensors(phi4)))
    return Key(speed / fp8, (
        Mistake(speed / bf16, "That is bf16's ceiling: FP8 reads the smaller number of bytes."),
        Mistake(speed / file, "You divided by the whole file. Of the embedding one row is read per "
                              "token, so its gigabyte does not count."),
        Mistake(speed / (fp8 / 2**30 * 1e9), "That mixes GB, 10⁹, and GiB, 2³⁰: take bytes."),
        Mistake(fp8 / speed, "That is the seconds that one token takes at least; the ceiling is "
                             "its inverse.")))


TASKS = (
    Task("scale_per_channel", "00", "easy", 4, "code", "scales by row",
         ("The scale maps a row's amax, its largest magnitude, onto 448.",
          "weights.abs() has the magnitudes; amax(dim=...) is the maximum along a dimension.",
          "Rows are dimension 0; the maximum of each row runs along dimension 1."),
         _scales_key, compared(each(_as_scales, results(_weights)),
                               lambda a, b: tensors_near(1e-5)(a[0], b[0]),
                               "A row's scale is its amax / 448.",
                               right_says="448 is torch.finfo(torch.float8_e4m3fn).max.")),
    Task("w8a16_product", "00", "medium", 5, "code", "where scales go",
         ("Start from the formula: which of its factors come from rounding x?",
          "W8A16 has no s_x and no codes_x; x itself stands in the product.",
          "codes_w.float() makes numbers of the codes; x @ codes.T is [tokens, channels], so "
          "s_w, [channels], multiplies its columns."),
         _product_key, compared(each(tensor((5, 5), "the outputs"), results(_product)),
                                lambda a, b: tensors_near(0.005)(a[0], b[0]),
                                "y = s_w * (x @ codes_w.T), with the codes as float.",
                                right_says="Activations untouched, one scale for each column.")),
    Task("rtx_a6000_ceiling", "00", "easy", 2, "value", "the roofline",
         ("What takes the time is reading the weights: how often per second can they be read?",
          "The cell above prints how many GB FP8 reads per token.",
          "Divide bytes per second by bytes per token: 768 over FP8's GB."),
         _ceiling_key, compared(number, near(0.01), "Bandwidth in bytes/s, over FP8's bytes per "
                                                    "token.",
                                right_says="Ampere computes W8A16, and one stream does not mind: "
                                           "it waits for the memory.")),
)
