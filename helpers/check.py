"""The exercises' checks: "not tried yet", "right", or a hint; never an error.

Each check works out the right answer from its source (Phi-4's config, torch's own cast, the
thresholds of the serving modes), so that no solution is written down here.
"""

import math
from collections.abc import Callable

NOT_TRIED = "Not tried yet: put your answer in place of the three dots."


def _say(answer, right: Callable[[object], bool], hint: str) -> None:
    if answer is ...:
        print(NOT_TRIED)
        return
    try:
        good = bool(right(answer))
    except Exception as error:  # an exercise must not stop the notebook, whatever was answered
        print(f"Not yet: your answer could not be used ({type(error).__name__}: {error}). {hint}")
        return
    print("Right." if good else f"Not yet. {hint}")


def _near(value: float, tolerance: float) -> Callable[[object], bool]:
    return lambda answer: abs(float(answer) - value) <= tolerance * abs(value)


def _phi4() -> dict:
    from helpers import roofline, workspace

    return roofline.load_config(workspace.data("phi4"))


def rtx_a6000_ceiling(answer) -> None:
    """Notebook 00: tokens/s of one FP8 stream at an RTX A6000's 768 GB/s, to 1 %."""
    from helpers import roofline

    value = 768e9 / roofline.decode_bytes(_phi4(), "fp8")
    _say(answer, _near(value, 0.01), "Bandwidth in bytes/s, over FP8 bytes per token.")


def kv_cache_bytes(answer) -> None:
    """Notebook 01: bytes of KV cache of one Phi-4 sequence at full context."""
    from helpers import roofline

    config = _phi4()
    value = roofline.kv_bytes_per_token(config) * config["max_position_embeddings"]
    _say(answer, _near(value, 0), "K and V, KV heads, head dimension, layers, 2 bytes, tokens.")


def bytes_saved_on_lm_head(answer) -> None:
    """Notebook 02: bytes fewer if FP8_DYNAMIC took Phi-4's lm_head too."""
    from helpers import checkpoint, roofline

    base = roofline.tensors(_phi4())
    value = checkpoint.total_bytes(checkpoint.predict_fp8(base)) - checkpoint.total_bytes(
        checkpoint.predict_fp8(base, ignore=()))
    _say(answer, _near(value, 0), "One byte saved per weight, two bytes spent per output channel.")


def nearest_e4m3_to_0_3(answer) -> None:
    """Notebook 03: torch's own cast of 0.3."""
    import torch

    value = torch.tensor(0.3).to(torch.float8_e4m3fn).item()
    _say(answer, _near(value, 0), "0.3 = 1.2 x 2^-2; which eighth is nearest to 1.2?")


def rounded_per_token(answer) -> None:
    """Notebook 04: a function that rounds activations to E4M3 with a scale for each token."""
    import torch

    from helpers import ablation

    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    x = x * torch.logspace(-2, 2, 16)[:, None]  # tokens far apart: one scale would not do
    expected = ablation.rounded(x, "e4m3")

    def right(function) -> bool:
        error = (function(x.clone()) - expected).norm(dim=1) / expected.norm(dim=1)
        return bool((error < 1e-2).all())  # a wrong scale costs 2 %; a tie the other way, less

    _say(answer, right, "A scale is amax / 448 along the features; divide, cast, multiply back.")


def mode_of_capability(answer) -> None:
    """Notebook 05: a function from compute capability to the arithmetic of this checkpoint."""
    from helpers import hardware

    expected = {"gpu-w8a8": "W8A8", "gpu-w8a16": "W8A16", "none": None}
    cases = [(7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]
    truth = {c: expected[hardware.gpu_mode(hardware.Gpu(0, "", 0, c, "")).key] for c in cases}

    def right(function) -> bool:
        return all(function(capability) == truth[capability] for capability in cases)

    _say(answer, right, "FP8 tensor cores came with 8.9, Marlin needs 7.5; compare tuples.")


def stderr_of_93(answer) -> None:
    """Notebook 06: the sample standard error of 93 right in 100."""
    right, n = 93, 100
    value = math.sqrt(right * (n - right) / n**2 / (n - 1))
    _say(answer, _near(value, 0.002), "Variance p(1 - p) n / (n - 1), over n; then its root.")


def h100_expected(answer) -> None:
    """Notebook 07: tokens/s of FP8 Phi-4 on an H100 SXM at the A40's share of the ceiling."""
    from helpers import roofline

    value = 0.67 * 3350e9 / roofline.decode_bytes(_phi4(), "fp8")
    _say(answer, _near(value, 0.02), "The ceiling is 3350 / 14.66 tokens/s; take 67 % of it.")


def bits_in_groups_of_256(answer) -> None:
    """Notebook 08: bits per weight of W4A16 with a bf16 scale for every 256 weights."""
    _say(answer, _near(4 + 16 / 256, 0.001), "4 bits of its own, and its share of a 16-bit scale.")


def red_hats_advice(answer) -> None:
    """Notebook 09: the most GPUs for one layer, up to 8, and the longest context, up to 32,768."""
    from helpers import deployment

    phi4 = _phi4()
    value = (max(n for n in deployment.tensor_parallel_sizes(phi4) if n <= 8),
             min(phi4["max_position_embeddings"], 32768))
    _say(answer, lambda pair: tuple(pair) == value,
         "What must divide over the GPUs: 40 heads, 10 KV heads, 100,352 rows of lm_head. The "
         "context's limit is in the table of notebook 01.")


def same_work(answer) -> None:
    """Notebook 09: which measurements may stand beside the published one."""
    _say(answer, lambda letters: set(letters) == {"a"},
         "The same model, dataset, protocol and rows; which of the four has all of them?")
