"""Tasks of notebook 08: bits with their scales, 4-bit groups, a scheme for six GPUs."""

from helpers import capacity
from helpers.check.answers import all_same, each, near, number, results, tensor
from helpers.check.task import Key, Mistake, Task, Unusable, compared
from helpers.check.tasks_00 import _phi4

ROWS, WIDTH, GROUP = 8, 384, 128
GPUS = ("V100 SXM2 32 GB", "RTX 3090", "RTX 5090", "A40", "RTX 6000 Ada", "A100 SXM 80 GB")
SCHEMES = ("bf16", "FP8_DYNAMIC", "W4A16")  # most bits first
TOKENS, SPEED, SHARE = 70_000, 30.0, 2 / 3


def _bits_key() -> Key:
    from compressed_tensors.quantization import preset_name_to_scheme

    bits = preset_name_to_scheme("W4A16", ["Linear"]).weights.num_bits
    return Key(bits + 16 / 256, (
        Mistake(bits + 16 / 128, "Twice the scale's share: that is for groups of 128, or for a "
                                 "scale in float32."),
        Mistake(bits + 8 / 256, "A scale in bf16 has 16 bits."),
        Mistake(float(bits), "The weight's own bits; its share of the scale is missing."),
        Mistake(bits + 16.0, "256 weights share the scale's 16 bits.")))


def _weights() -> list[tuple]:
    """Groups of different loudness in each row."""
    import torch

    weight = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))
    return [(weight * torch.tensor([1.0, 0.1, 3.0]).repeat_interleave(GROUP),)]


def _by_compressed_tensors(weight):
    from compressed_tensors.quantization import preset_name_to_scheme
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    arguments = preset_name_to_scheme("W4A16", ["Linear"]).weights
    groups = weight.unflatten(1, (-1, arguments.group_size))
    scale, zero = calculate_qparams(groups.amin(dim=2), groups.amax(dim=2), arguments)
    return fake_quantize(weight, scale, zero, arguments)


def _int4(weight, group: int = GROUP, half: float = 7.5, low: int = -8, high: int = 7,
          round_: bool = True):
    groups = weight.unflatten(1, (-1, group))
    scale = groups.abs().amax(dim=2, keepdim=True) / half
    codes = groups / scale
    codes = (codes.round() if round_ else codes.trunc()).clamp(low, high)
    return (codes * scale).flatten(1)


def _int4_key() -> Key:
    return Key(_by_compressed_tensors, (
        Mistake(lambda w: _int4(w, group=WIDTH),
                "This is one scale for each row: cut the rows into groups of 128 first, "
                "w.unflatten(1, (-1, 128))."),
        Mistake(lambda w: _int4(w, half=7.0), "Your scale is amax / 7, a usual choice elsewhere; "
                                              "compressed-tensors divides by 7.5, half of the "
                                              "range from −8 to 7."),
        Mistake(lambda w: _int4(w, low=0, high=15), "Codes from 0 to 15 need a zero point. W4A16 "
                                                    "is symmetric: −8 to 7."),
        Mistake(lambda w: _int4(w, round_=False), "You cut the codes off. Round them."),
        Mistake(lambda w: _int4(w, low=-8, high=8), "4 bits hold 16 codes, −8 to 7: there is no 8.")
    ))


def gpus():
    """The GPUs of the task, from data/gpus.json: GB, GB/s, compute capability."""
    import pandas as pd

    from helpers import roofline

    found = {name: roofline.named(name) for name in GPUS}
    return pd.DataFrame({name: {
        "memory, GB": round(roofline.memory_bytes(gpu) / 1e9, 1),
        "bandwidth, GB/s": gpu["bandwidth_gb_s"],
        "compute capability": "{}.{}".format(*gpu["compute_capability"])}
        for name, gpu in found.items()}).T


def _choice(cache: bool = True, taken: float = capacity.SHARE, rest: bool = True,
            share: float = SHARE, kernels: bool = True,
            order: tuple = SCHEMES) -> dict[str, str | None]:
    """The first scheme that meets the need on each GPU; with everything, the right choice.

    vLLM 0.32 computes FP8 and W4A16 from capability 7.5 on, and bf16 from 8.0 on.
    """
    from helpers import checkpoint, roofline, schemes

    phi4 = _phi4()
    base = roofline.tensors(phi4)
    kept = roofline.kv_bytes_per_token(phi4) * TOKENS if cache else 0
    tensors = {name: base if name == "bf16" else schemes.predict(base, name) for name in SCHEMES}

    def meets(gpu, name):
        oldest = [8, 0] if name == "bf16" else [7, 5]
        left = capacity.room(checkpoint.total_bytes(tensors[name]), roofline.memory_bytes(gpu),
                             share=taken) + (0 if rest else capacity.REST)
        fits = left >= kept
        reached = share * gpu["bandwidth_gb_s"] * 1e9 / roofline.bytes_per_token(tensors[name])
        return (fits and reached >= SPEED
                and (gpu["compute_capability"] >= oldest or not kernels))

    return {gpu: next((name for name in order if meets(roofline.named(gpu), name)), None)
            for gpu in GPUS}


def _schemes(answer) -> dict[str, str | None]:
    if not isinstance(answer, dict):
        raise Unusable('A dictionary is wanted, {"A40": "FP8_DYNAMIC", …}.')
    missing = [name for name in GPUS if name not in answer]
    if missing:
        raise Unusable(f"Your dictionary lacks {', '.join(missing)}.")
    found = {}
    for gpu in GPUS:
        said = str(answer[gpu] or "none").strip().lower()
        found[gpu] = next((name for name in SCHEMES if said in (name.lower(), name[:3].lower())),
                          None)
        if found[gpu] is None and said != "none":
            raise Unusable(f'For {gpu} say "bf16", "FP8_DYNAMIC", "W4A16" or None.')
    return found


def _which_right(given: dict, right: dict) -> str:
    wrong = [gpu for gpu in GPUS if given[gpu] != right[gpu]]
    return (f"{len(GPUS) - len(wrong)} of {len(GPUS)} are right; look at {', '.join(wrong)} again."
            if len(wrong) < len(GPUS) else "")


def _scheme_key() -> Key:
    return Key(_choice(), (
        Mistake(_choice(kernels=False), "vLLM has no kernel for 8- or 4-bit weights below "
                                        "capability 7.5, and no bf16 below 8.0."),
        Mistake(_choice(cache=False), "The weights fit, and the KV cache is forgotten: 70,000 "
                                      "tokens of it."),
        Mistake(_choice(rest=False), "The weights and the cache are not all: activations and the "
                                     "rest take 1.5 GB."),
        Mistake(_choice(taken=1.0), "vLLM takes 90 % of a GPU's memory, and not all of it."),
        Mistake(_choice(share=1.0), "Everything fits, but at two thirds of its ceiling not every "
                                    "GPU reaches 30 tokens/s."),
        Mistake(_choice(order=SCHEMES[::-1]), "Where more bits do as well, take them: 4 bits lose "
                                              "more.")))


def _near_each(given, other) -> bool:
    """Weight by weight, to a small share of the largest; a code more or less is far beyond it."""
    return bool(((given - other).abs() <= 1e-4 * other.abs().max()).all())


TASKS = (
    Task("int4_rounded", "08", "medium", 6, "code", "scales by group",
         ("Cut each row into groups: w.unflatten(1, (-1, 128)) is [rows, groups, 128].",
          "amax over the last dimension with keepdim=True, over 7.5, is the scale.",
          "Divide, round, clamp to −8 and 7, multiply back, and .flatten(1) to the old shape."),
         _int4_key, compared(each(tensor((ROWS, WIDTH), "the weights"), results(_weights)),
                             all_same(_near_each), "Groups of 128, amax / 7.5, round, clamp to −8 "
                                                   "and 7, multiply back.",
                             right_says="As compressed-tensors' W4A16.")),
    Task("bits_in_groups_of_256", "08", "easy", 2, "value", "what scales add",
         ("A weight's own bits, and its share of the group's scale.",
          "256 weights share one bf16 scale, of 16 bits.",
          "4 + 16 / 256."),
         _bits_key, compared(number, near(0.001), "4 bits of its own, and its share of a 16-bit "
                                                  "scale.",
                             right_says="1.5 % less than in groups of 128: larger groups save next "
                                        "to nothing.")),
    Task("scheme_chosen", "08", "hard", 10, "code", "choosing a scheme",
         ("Three questions for each GPU and scheme: is there a kernel, does it fit, is it fast "
          "enough?",
          "Fits: GB on disk + 70,000 × 204,800 bytes ≤ 0.9 × memory − 1.5 GB. Fast enough: 2/3 × "
          "bandwidth / GB read per token ≥ 30.",
          "Kernels: bf16 from capability 8.0 on, FP8_DYNAMIC and W4A16 from 7.5 on. Go through "
          "bf16, FP8_DYNAMIC, W4A16 in that order and stop at the first that passes."),
         _scheme_key, compared(_schemes, lambda a, b: a == b, "Kernel, memory, speed: the first "
                                                              "scheme that passes all three.",
                               _which_right), material=gpus),
)
