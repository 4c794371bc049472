"""Tasks of notebook 05: the arithmetic of a GPU, the kernel in a log, inputs that prove it."""

import re

from helpers.check.answers import all_same, each, how_many, results
from helpers.check.task import Key, Mistake, Task, Unusable, Verdict, bounded, compared

CAPABILITIES = ((7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
FEATURES, CHANNELS = 256, 64
BF16_ROUNDING = 2.0**-9  # the most that rounding to bf16's 8 bits moves a number, relatively
PROVES = 5 * BF16_ROUNDING  # so far apart that no rounding of the output hides it


def _label(value) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise Unusable('Return "W8A8", "W8A16" or None.')
    return value.strip().upper()


def _mode_key() -> Key:
    from helpers import hardware

    said = {"gpu-w8a8": "W8A8", "gpu-w8a16": "W8A16", "none": None}

    def right(capability):
        return said[hardware.gpu_mode(hardware.Gpu(0, "", 0, tuple(capability), "")).key]

    def at(w8a8, w8a16):
        return lambda c: "W8A8" if c >= w8a8 else "W8A16" if c >= w8a16 else None

    return Key(right, (
        Mistake(at((9, 0), (7, 5)), "Ada, 8.9, has FP8 tensor cores already."),
        Mistake(at((8, 0), (7, 5)), "Ampere, 8.0 and 8.6, has no FP8 tensor cores: they came with "
                                    "Ada, 8.9."),
        Mistake(at((8, 9), (0, 0)), "Below 7.5 vLLM has no kernel for FP8 weights: None."),
        Mistake(at((8, 9), (8, 0)), "Turing, 7.5, is served too: Marlin unpacks its weights."),
        Mistake(lambda c: "W8A8" if c[0] >= 8 and c[1] >= 9 else
                "W8A16" if c[0] >= 7 and c[1] >= 5 else None,
                "You compare the two numbers one by one, so that 9.0 falls short of 8.9. Tuples "
                "compare in order: capability >= (8, 9).")))


MARLIN = "MarlinFP8ScaledMMLinearKernel"
_LINE = "(EngineCore pid=4242) {level} 11-25 10:00:00 [{place}] {text}\n"


def _log(*lines: tuple[str, str, str]) -> str:
    return "".join(_LINE.format(level=level, place=place, text=text)
                   for level, place, text in lines)


def logs() -> dict[str, str]:
    """By the kernel that it names: a piece of vLLM 0.32's log, its lines as they are written."""
    start = ("INFO", "core.py:133", "Initializing a V1 LLM engine (v0.32.0) with config: …")
    end = ("INFO", "kv_cache_utils.py:2327", "GPU KV cache size: 91,024 tokens")
    backend = ("INFO", "cuda.py:368", "Using FLASH_ATTN attention backend out of potential "
                                      "backends: ['FLASH_ATTN', 'FLASHINFER']")

    def selected(kernel):
        return ("INFO", "__init__.py:797", f"Selected {kernel} for CompressedTensorsW8A8Fp8")

    cpu, hopper = "CpuFp8W8A16LinearKernel", "CutlassFP8ScaledMMLinearKernel"
    return {
        cpu: _log(start, selected(cpu), end),
        hopper: _log(start, backend, selected(hopper), end),
        MARLIN: _log(start, backend, (
            "WARNING", "marlin_utils_fp8.py:107",
            "Your GPU does not have native support for FP8 computation but FP8 quantization is "
            "being used. Weight-only FP8 compression will be used leveraging the Marlin kernel. "
            "This may degrade performance for compute-heavy workloads."), end),
        "none": _log(start, backend, end)}


def _name(value) -> str:
    if value is None:
        return "none"
    if not isinstance(value, str):
        raise Unusable("Return the kernel's name, or None.")
    found = value.strip()
    return MARLIN if found.lower().startswith("marlin") else found


def _log_key() -> Key:
    right = {log: None if kernel == "none" else kernel for kernel, log in logs().items()}

    def after(log, word):
        found = re.search(rf"{word} (\w+)", log)
        return found[1] if found else None

    return Key(right.__getitem__, (
        Mistake(lambda log: after(log, r"Selected \w+ for") if "Selected" in log else
                ("Marlin" if "Marlin kernel" in log else None),
                "You took what stands after \"for\". That is the checkpoint's scheme, which asks "
                "for 8-bit activations everywhere; the kernel's name stands before it."),
        Mistake(lambda log: after(log, "Selected"),
                "One is missed: on Turing and Ampere the log has no \"Selected\", and names the "
                "Marlin kernel in a warning."),
        Mistake(lambda log: after(log, "Selected") or "Marlin",
                "Where nothing is selected it need not be Marlin: the last log is of a model that "
                "is not quantized. Look for its words."),
        Mistake(lambda log: after(log, "Selected") or after(log, "Using"),
                "\"Using …\" names the attention's backend, which is another kernel than the "
                "Linears'.")))


def _layer():
    """Codes and scales of a layer as the bundled model has them: random weights, per channel."""
    import torch

    weight = torch.randn(CHANNELS, FEATURES, generator=torch.Generator().manual_seed(0))
    scale = weight.abs().amax(dim=1) / 448
    return (weight / scale[:, None]).to(torch.float8_e4m3fn).float(), scale


def apart(x) -> float:
    """How far W8A8's output of inputs x [rows, 256] is from W8A16's, relatively."""
    import torch

    codes_w, s_w = _layer()
    exact = s_w * (x @ codes_w.T)
    s_x = x.abs().amax(dim=1, keepdim=True) / 448
    w8a8 = s_x * s_w * ((x / s_x).to(torch.float8_e4m3fn).float() @ codes_w.T)
    return float((w8a8 - exact).norm() / exact.norm())


def _inputs(answer):
    import torch

    try:
        x = torch.as_tensor(answer).detach()
        if x.is_complex():
            raise TypeError
        x = x.float()
    except (TypeError, ValueError, RuntimeError):
        raise Unusable(f"A tensor of inputs is wanted, [rows, {FEATURES}].") from None
    if x.dim() != 2 or x.shape[1] != FEATURES or not len(x):
        raise Unusable(f"Inputs are [rows, {FEATURES}], and yours are {list(x.shape)}.")
    if not x.isfinite().all():
        raise Unusable("Your inputs hold NaN or infinity, and so would every output.")
    return x.bfloat16().float()  # as the layer receives them


def _judge_inputs(answer, key: Key) -> Verdict:
    with bounded():
        x = _inputs(answer)
    if not x.any(dim=1).all():
        return Verdict(False, "A row of zeros gives zeros in any arithmetic, and its scale would "
                              "be 0 / 448.")
    found = apart(x)
    if found >= PROVES:
        return Verdict(True, f"W8A8 and W8A16 are {found:.1%} apart on them; the output's bf16 "
                             f"rounding moves it by {BF16_ROUNDING:.1%} at most.")
    if found >= 1e-6:
        return Verdict(False, f"Your inputs set them {found:.2%} apart. The output is rounded to "
                              f"bf16, by up to {BF16_ROUNDING:.1%}: more is needed. Most of your "
                              "values are still on the grid, or too few count.")
    if bool(((x != 0).sum(dim=1) == 1).all()):
        return Verdict(False, "A row with a single number proves nothing: that is its own amax, "
                              "lands on 448 and comes back exactly.")
    if bool((x.abs() == x.abs().amax(dim=1, keepdim=True)).all()):
        return Verdict(False, "Within a row your values are all of one size: each is the amax, "
                              "lands on 448 and comes back exactly.")
    return Verdict(False, "Each of your values divided by its row's scale is a number of E4M3's "
                          "grid, so rounding changes nothing. Take values between those numbers.")


def _inputs_key() -> Key:
    import torch

    steps = torch.tensor([448.0, 224, 112, 56]).repeat(2, FEATURES // 4)
    return Key(torch.randn(8, FEATURES, generator=torch.Generator().manual_seed(3)), (
        Mistake(torch.ones(4, FEATURES), "your values are all of one size"),
        Mistake(torch.eye(FEATURES), "A row with a single number proves nothing"),
        Mistake(torch.zeros(4, FEATURES), "A row of zeros gives zeros"),
        Mistake(steps, "is a number of E4M3's grid")))


def _equal(given, other) -> bool:
    return given == other


TASKS = (
    Task("mode_of_capability", "05", "easy", 3, "code", "what hardware computes",
         ("Two thresholds divide three cases.",
          "FP8 tensor cores came with Ada, capability 8.9; Marlin needs Turing, 7.5.",
          "Compare tuples: capability >= (8, 9), then capability >= (7, 5), else None."),
         _mode_key, compared(each(_label, results(lambda: [(c,) for c in CAPABILITIES])),
                             all_same(_equal), "FP8 tensor cores came with 8.9, Marlin needs "
                                                   "7.5.",
                             how_many(_equal, [str(c) for c in CAPABILITIES], str))),
    Task("kernel_from_log", "05", "medium", 6, "code", "reading a log",
         ("print the four logs. Which line speaks of the Linears?",
          "\"Selected KERNEL for SCHEME\": the kernel is the first name. Not every log has this "
          "line.",
          "Without \"Selected\", look for \"leveraging the Marlin kernel\", and return \"Marlin\"; "
          "without either, None."),
         _log_key, compared(each(_name, results(lambda: [(log,) for log in logs().values()])),
                            all_same(_equal), "The name after \"Selected\"; or Marlin, from its "
                                              "own sentence; or None.",
                            how_many(_equal, ("the first log", "the second log",
                                                  "the third log", "the last log"), str)),
         material=lambda: list(logs().values())),
    Task("telling_inputs", "05", "medium", 5, "code", "designing an experiment",
         ("W8A8 rounds the inputs and W8A16 does not. On which inputs does rounding change "
          "nothing?",
          "A value comes back exactly if, divided by amax / 448, it is a number of the grid: the "
          "amax itself, its halves, zero.",
          "Values of all sizes lie between those numbers: torch.randn(8, 256), for instance."),
         _inputs_key, _judge_inputs),
)
