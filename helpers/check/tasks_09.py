"""Tasks of notebook 09: a verdict's rule, the same work, limits of serving, a flawed card."""

from collections.abc import Callable
from dataclasses import dataclass

from helpers.check.answers import all_same, each, how_many, letters, results
from helpers.check.task import Key, Mistake, Task, Unusable, compared
from helpers.check.tasks_00 import _phi4

COUNTS = ((6, 0), (5, 0), (0, 6), (40, 21), (21, 40), (30, 21), (0, 0), (3, 3), (9, 1))
LOWER, HIGHER, APART = "lower", "higher", "not told apart"


def _verdict_key() -> Key:
    from scipy.stats import binomtest

    def rule(alpha: float = 0.05, sides: str = "two-sided"):
        def verdict(lost, gained):
            flips, fewer = lost + gained, min(lost, gained)
            p = binomtest(fewer, flips, alternative=sides).pvalue if flips else 1.0
            return APART if p >= alpha else LOWER if lost > gained else HIGHER
        return verdict

    return Key(rule(), (
        Mistake(lambda lost, gained: LOWER if lost > gained else HIGHER if gained > lost else APART,
                "This compares the counts alone; chance makes them differ nearly always. Ask "
                "McNemar's p first."),
        Mistake(rule(sides="less"), "One tail alone is half of p: either arm might have been "
                                    "better, so take both."),
        Mistake(rule(alpha=0.01), "The rule was p < 0.05. It stands before the figures, so it is "
                                  "not for us to tighten now."),
        Mistake(lambda lost, gained: LOWER if rule()(lost, gained) == HIGHER else
                HIGHER if rule()(lost, gained) == LOWER else APART,
                "The directions are exchanged: a question that is lost makes the accuracy lower."),
        Mistake(lambda lost, gained: APART if rule()(lost, gained) == APART else LOWER,
                "A significant difference may be a gain too: say which.")))


def _word(value) -> str:
    if not isinstance(value, str):
        raise Unusable(f'Return "{LOWER}", "{HIGHER}" or "{APART}".')
    return value.strip().lower()


def _same_key() -> Key:
    """Of the four works of the question, those whose every part is the published one's."""
    from helpers import ledger

    row = next(r for r in ledger.published() if r["experiment"] == "gsm8k" and r["arm"] == "fp8"
               and r["work"].get("limit") == 100)
    work = row["work"]
    published = (work["task"], work["num_fewshot"], work["limit"])
    asked = {"a": ("gsm8k", 5, 100), "b": ("tiny_gsm8k", 5, 100), "c": ("gsm8k", 0, 100),
             "d": ("gsm8k", 5, 1319)}
    return Key(frozenset(letter for letter, found in asked.items() if found == published), (
        Mistake({"a", "d"}, "d asks all 1,319 rows: a better measurement, and another one."),
        Mistake({"a", "c"}, "c is asked without examples and in chat form: another protocol, which "
                            "moves the score by itself."),
        Mistake({"a", "b"}, "b is another model on other problems."),
        Mistake({"d"}, "More rows are better, and not the same. Which has the published ones?"),
        Mistake({"a", "c", "d"}, "Same model and data are not enough: examples and rows have to be "
                                 "the same too.")))


def _pair(answer) -> tuple[int, int]:
    try:
        gpus, tokens = answer
        return int(gpus), int(tokens)
    except (TypeError, ValueError):
        raise Unusable("A pair is wanted: (GPUs, tokens).") from None


def _limits_key() -> Key:
    from helpers import roofline

    phi4 = _phi4()
    tokens = min(phi4["max_position_embeddings"], 32768)
    gpus = max(n for n in roofline.tensor_parallel_sizes(phi4) if n <= 8)
    return Key((gpus, tokens), (
        Mistake((8, 32768), "That is the advice itself. 8 does not divide Phi-4's 10 KV heads, nor "
                            "10 it."),
        Mistake((8, tokens), "8 divides the 40 heads and not the 10 KV heads."),
        Mistake((4, tokens), "4 divides the 40 heads and not the 10 KV heads."),
        Mistake((5, tokens), "5 divides 40 and 10; the 100,352 rows of the embedding it does not."),
        Mistake((gpus, 32768), "The config's max_position_embeddings bounds the context.")))


def _limits_so_far(given: tuple, right: tuple) -> str:
    good = [name for name, a, b in zip(("the GPUs", "the tokens"), given, right, strict=True)
            if a == b]
    return f"Right so far: {good[0]}." if len(good) == 1 else ""


@dataclass(frozen=True)
class Line:
    """A line of the flawed card: what it says, whether that holds, and why or why not."""

    says: str
    holds: Callable[[], bool]
    why: str


def _sizes() -> tuple[float, float]:
    from helpers import checkpoint, roofline

    base = roofline.tensors(_phi4())
    return (checkpoint.total_bytes(checkpoint.predict_fp8(base)) / 1e9,
            checkpoint.total_bytes(base) / 1e9)


def _most() -> float:
    from helpers import roofline

    return roofline.decode_bytes(_phi4(), "bf16") / roofline.decode_bytes(_phi4(), "fp8")


def _inputs_are_dynamic() -> bool:
    from compressed_tensors.quantization import preset_name_to_scheme

    return preset_name_to_scheme("FP8_DYNAMIC", ["Linear"]).input_activations.dynamic is True


def _ampere() -> str:
    from helpers import hardware

    return hardware.gpu_mode(hardware.Gpu(0, "", 0, (8, 6), "")).key


def _shown_by_100() -> float:
    from helpers import stats

    return stats.detectable_loss_paired(100)


def _can_share(n: int) -> bool:
    from helpers import roofline

    return n in roofline.tensor_parallel_sizes(_phi4())


def _licence() -> str:
    from helpers import models

    return models.PHI4.licence


CARD = {
    "a": Line("Made from microsoft/phi-4 at a pinned revision; licence: MIT.",
              lambda: "MIT" in _licence(), "Microsoft's own copy is under MIT"),
    "b": Line("The Linears' weights are E4M3 codes with a scale for each channel; lm_head is bf16.",
              lambda: True, "so does FP8_DYNAMIC with lm_head ignored"),
    "c": Line("The activations' scales are stored beside the weights', one for each token.",
              lambda: not _inputs_are_dynamic(), "dynamic scales are made while the model runs"),
    "d": Line("15.7 GB on disk; the bf16 checkpoint has 29.3 GB.",
              lambda: [round(size, 1) for size in _sizes()] == [15.7, 29.3],
              "so the headers say"),
    "e": Line("gsm8k, 100 rows, 5-shot: 0.93 before, 0.93 after. Nothing was lost.",
              lambda: _shown_by_100() < 0.01, "100 rows rarely show a loss of under 8 points"),
    "f": Line("On an A40 vLLM computes W8A16: weights of 8 bits, activations of 16.",
              lambda: _ampere() == "gpu-w8a16", "Ampere has no FP8 tensor cores"),
    "g": Line("For low latency on eight GPUs: --tensor-parallel-size 8.",
              lambda: _can_share(8), "8 does not divide the 10 KV heads"),
    "h": Line("Long documents: --max-model-len 32768.",
              lambda: _phi4()["max_position_embeddings"] >= 32768, "Phi-4's context is 16,384"),
    "i": Line("One stream decodes at most 1.93 times as fast as in bf16.",
              lambda: abs(_most() - 1.93) < 0.005, "that is the ratio of the bytes read"),
    "j": Line("No calibration data was used.", _inputs_are_dynamic,
              "weights need none, and dynamic scales neither"),
    "k": Line("FP8 weights halve the KV cache too, to 102,400 bytes a token.",
              lambda: False, "the cache has a type of its own, and stays in 16 bits")}


def card() -> str:
    """The flawed model card, a line for each letter."""
    return "\n".join(f"{letter}  {line.says}" for letter, line in CARD.items())


def _card_key() -> Key:
    faults = frozenset(letter for letter, line in CARD.items() if not line.holds())
    return Key(faults, (
        Mistake({"e", "g", "h"}, "Two more are left: one line is about what is stored, one about "
                                 "what FP8 weights leave as it is."),
        Mistake(faults | {"i"}, "1.93 is what the bytes allow at most; the line claims no more."),
        Mistake(faults | {"j"}, "A recipe with dynamic scales indeed needs no calibration."),
        Mistake(set(CARD), "Not every line is wrong: five are.")))


def _found(given: frozenset, right: frozenset) -> str:
    hits, sound = given & right, sorted(given & CARD.keys() - right)
    said = f"{len(hits)} of the {len(right)} faults are found." if hits else ""
    if sound and len(sound) < 4:
        said += " Sound is " + "; ".join(f"{x} ({CARD[x].why})" for x in sound) + "."
    return said.strip()


def _equal(given, other) -> bool:
    return given == other


TASKS = (
    Task("verdict", "09", "medium", 4, "code", "a rule beforehand",
         ("Without McNemar's p nothing is said of the direction.",
          "scipy.stats.binomtest(lost, lost + gained).pvalue; without any flip there is no test "
          "and p is 1.",
          "p >= 0.05: \"not told apart\". Else \"lower\" if more were lost than gained, else "
          "\"higher\"."),
         _verdict_key, compared(each(_word, results(lambda: list(COUNTS))), all_same(_equal),
                                "p < 0.05 first, then the direction.",
                                how_many(_equal, [f"{a}, {b}" for a, b in COUNTS], str))),
    Task("same_work", "09", "easy", 2, "value", "comparable figures",
         ("What makes a measurement of accuracy the same: model, data, protocol, rows.",
          "Does a GPU's speed change an accuracy?",
          "Only one of the four has the same model, task, number of examples and rows."),
         _same_key, compared(letters, _equal, "Model, dataset, examples in the prompt, rows: which "
                                              "has all four?",
                             right_says="Hardware does not change what is asked, though W8A8 and "
                                        "W8A16 may answer a little differently.")),
    Task("card_faults", "09", "hard", 8, "value", "reading critically",
         ("Check each line against a notebook: what is stored (02), what computes (05), what 100 "
          "rows show (06).",
          "Two faults are in flags, one in a conclusion, one in what the file holds, one in the KV "
          "cache.",
          "10 KV heads; 16,384 positions; \"dynamic\"; six flips; the cache's own type."),
         _card_key, compared(letters, _equal, "Five lines do not hold.", _found,
                             "Two of them stand in a published card."), material=card),
    Task("red_hats_advice", "09", "medium", 5, "value", "a config's limits",
         ("The context's limit is in config.json, max_position_embeddings.",
          "A layer is dealt out by heads: the 40 query heads and the 10 KV heads have to divide "
          "(or the GPUs be a multiple of the KV heads).",
          "The embedding's 100,352 rows have to divide too: 5 does not."),
         _limits_key, compared(_pair, _equal, "40 heads, 10 KV heads and 100,352 rows have to "
                                              "divide; the context is in the config.",
                               _limits_so_far)),
)
