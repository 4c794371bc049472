"""Ten questions before the course and the same ten after it: `quiz.begin`, `quiz.NAME(answer)`.

Of the first time it is kept whether an answer was right, and nothing is told; the second time the
answer is judged as a task's is. Each right letter is worked out: it is the option whose value is
the truth, which comes from where a task's would.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from helpers import WorkbookError, workspace
from helpers.check.answers import letters
from helpers.check.task import NOT_TRIED, Key, Mistake, compared, verdict

FILE = "quiz.json"
TIMES = ("before", "after")


@dataclass(frozen=True)
class Option:
    """An answer to choose: its words, its value, and what to say of it where it is wrong."""

    words: str
    value: object
    says: str = ""


@dataclass(frozen=True)
class Question:
    """A question with four options; calling it with a letter judges it, or keeps it."""

    name: str
    notebook: str
    asks: str
    options: tuple[Option, Option, Option, Option]
    truth: Callable[[], object] = field(repr=False)

    def lettered(self) -> dict[str, Option]:
        return dict(zip("abcd", self.options, strict=True))

    def key(self) -> Key:
        """The right letter, and the sentences of the three others."""
        true = self.truth()
        (right,) = (letter for letter, option in self.lettered().items() if option.value == true)
        return Key(right, tuple(Mistake(letter, option.says)
                                for letter, option in self.lettered().items() if letter != right))

    def judge(self, answer, key: Key):
        return compared(letters, lambda given, other: given == other,
                        "One letter is wanted: \"a\", \"b\", \"c\" or \"d\".")(answer, key)

    def __call__(self, answer) -> None:
        """Print "Not tried yet", "Kept" or the judgement; keep whether it was right."""
        if answer is ...:
            print(NOT_TRIED)
            return
        found = verdict(self, answer, self.key())
        _keep(self.name, found.right)
        if _now == "before":
            print("Kept. You will hear of it after the course.")
        else:
            words = ("Right." if found.right else "Not yet.", found.says,
                     f"(Notebook {self.notebook})")
            print(" ".join(filter(None, words)))


_now = "before"


def begin(when: str) -> None:
    """Say which time it is, "before" or "after" the course, and forget that time's answers."""
    global _now
    if when not in TIMES:
        raise WorkbookError(f"{when!r} is no time of the quiz.",
                            "Answers are kept for before the course and for after it.",
                            'Call quiz.begin("before") or quiz.begin("after").')
    _now = when
    workspace.write_json(workspace.root() / FILE, {**read(), when: {}})


def read() -> dict[str, dict[str, bool]]:
    """By time, which questions were answered right; raises `WorkbookError` for a damaged file."""
    file = workspace.root() / FILE
    found = workspace.read_json(file) if file.exists() else {}
    if any(time not in TIMES or not isinstance(answers, dict) or any(
            type(right) is not bool for right in answers.values())
            for time, answers in found.items()):
        raise workspace.damaged_json(file, "it holds what is no answer")
    return found


def result() -> None:
    """Print how many of the ten were right, each time that the quiz was taken."""
    found = read()
    for time in TIMES:
        if answers := found.get(time):
            right = sum(answers.get(each.name, False) for each in QUESTIONS)
            told = f"{right} right" if time == "after" or "after" in found else "all kept"
            print(f"{time} the course: {len(answers)} of {len(QUESTIONS)} answered, {told}")


def _keep(name: str, right: bool) -> None:
    found = read()
    workspace.write_json(workspace.root() / FILE,
                         {**found, _now: {**found.get(_now, {}), name: right}})


def _phi4() -> dict:
    from helpers import roofline, workspace

    return roofline.load_config(workspace.data("phi4"))


def _scale() -> str:
    import torch

    return f"{0.9 / torch.finfo(torch.float8_e4m3fn).max:.4f}"


def _bytes() -> str:
    from helpers import checkpoint, roofline

    return f"{checkpoint.total_bytes(checkpoint.predict_fp8(roofline.tensors(_phi4()))) / 1e9:.2f}"


def _dynamic() -> tuple:
    from helpers import schemes

    scheme = schemes.preset("FP8_DYNAMIC")
    weights, inputs = scheme.weights, scheme.input_activations
    return bool(weights.dynamic), bool(inputs.dynamic), str(inputs.strategy).rpartition(".")[2]


def _on_an_a40() -> str:
    from helpers import hardware, roofline

    return hardware.gpu_mode(roofline.listed(roofline.named("A40"))).title.split()[0]


def _most() -> str:
    from helpers import roofline

    config = _phi4()
    return f"{roofline.decode_bytes(config, 'bf16') / roofline.decode_bytes(config, 'fp8'):.2f}"


def _error() -> str:
    from helpers import ledger

    found = {row["stderr"] for row in ledger.published() if row.get("stderr")}
    (error,) = found
    return f"{100 * error:.1f}"


def _detectable() -> int:
    from helpers import stats

    return round(100 * float(stats.detectable_loss_paired([100])[0]))


def _prompt() -> str:
    from helpers import cpu_bench

    (faster,) = {record.metrics["ratio"] > 1  # on every CPU that was kept
                 for record in cpu_bench.records(model=cpu_bench.PHI4)
                 if record.arm.title == "vLLM FP8, W8A16" and record.work.generated_tokens == 1}
    return "faster" if faster else "not faster"


def _split() -> int:
    from helpers import roofline

    return max(n for n in roofline.tensor_parallel_sizes(_phi4()) if n <= 8)


QUESTIONS = (
    Question("scale", "00", "A channel's largest magnitude is 0.9. Which scale does it get in "
             "E4M3?", (
                 Option("498", "498", "That is its inverse: a number is code times scale."),
                 Option("0.0071", "0.0071", "That divides by 127, the largest code of INT8."),
                 Option("0.0020", "0.0020"),
                 Option("0.9", "0.9", "Then the codes would end at 1, and most of the grid, which "
                                      "goes on to 448, would be empty.")), _scale),
    Question("bytes", "02", "Phi-4 takes 29.32 GB in bf16. How many does its FP8_DYNAMIC "
             "checkpoint take?", (
                 Option("14.66 GB, half", "14.66", "The embedding and lm_head stay in bf16, and "
                        "the scales come on top."),
                 Option("15.69 GB", "15.69"),
                 Option("7.33 GB, a quarter", "7.33", "That would be 4 bits; FP8 has 8 of bf16's "
                                                      "16."),
                 Option("29.32 GB: it is quantized while it runs", "29.32",
                        "Only the activations are quantized while it runs; weights are stored as "
                        "codes.")), _bytes),
    Question("dynamic", "00", "What is dynamic about FP8_DYNAMIC?", (
        Option("The weights' scales are found when the model is loaded", (True, False, "token"),
               "The weights' scales are in the file."),
        Option("Layers are chosen while the model runs", (False, False, "layer"),
               "Which layers are quantized is written in the config."),
        Option("Each token's activations get a scale of their own while the model runs",
               (False, True, "token")),
        Option("Sample texts set the activations' scales", (False, False, "tensor"),
               "That is static: it needs calibration, and dynamic needs none.")), _dynamic),
    Question("mode", "05", "An A40 has no FP8 tensor cores. How does vLLM serve the checkpoint "
             "there?", (
                 Option("Not at all", "none", "Marlin's kernels unpack FP8 weights on every GPU "
                                              "from 7.5 on."),
                 Option("8-bit weights, unpacked to 16 bits for the product (W8A16)", "W8A16"),
                 Option("8-bit weights and activations (W8A8)", "W8A8",
                        "That needs FP8 tensor cores, from 8.9 on."),
                 Option("As bf16: the weights are unpacked when they are loaded", "W16A16",
                        "They stay packed in memory, which is where the speed comes from.")),
             _on_an_a40),
    Question("most", "00", "One stream is decoded. How many times as fast can FP8 be at most?", (
        Option("1.87, the ratio of the files", "1.87", "Of the embedding one row is read per "
               "token, so the file's ratio is not the one of the bytes read."),
        Option("2.00", "2.00", "lm_head is read in bf16 for every token."),
        Option("1.93, the ratio of the bytes read per token", "1.93"),
        Option("It depends on the GPU", "depends", "The bandwidth is in both arms, and falls out "
                                                   "of their ratio.")), _most),
    Question("kernel", "05", "What shows which arithmetic a server really computes?", (
        Option("The checkpoint's config.json", "config", "It says how the weights are stored; the "
               "server chooses the kernel."),
        Option("The kernel in its log, and an output compared with both arithmetics", "log"),
        Option("Its speed", "speed", "Many things make a server fast."),
        Option("The model card", "card", "The card is what is to be checked.")), lambda: "log"),
    Question("error", "06", "93 of 100 answers are right. What is the standard error?", (
        Option("0.3 points", "0.3", "The spread of one answer is divided by the root of n, and "
                                    "not by n."),
        Option("25.6 points", "25.6", "That is the spread of one answer, and not of the mean of "
                                      "a hundred."),
        Option("2.6 points", "2.6"),
        Option("None: all 100 were asked", "0.0", "The hundred are a sample of the questions that "
                                                  "might have been asked.")), _error),
    Question("detectable", "06", "Both arms get the same 100 questions. Which is the smallest true "
             "loss that is found 4 times in 5, when FP8 gains none?", (
                 Option("8 points", 8),
                 Option("1 point", 1, "One question of a hundred is one point, and one question "
                                      "proves nothing."),
                 Option("0.1 points", 0.1, "A hundred questions cannot even show it once."),
                 Option("30 points", 30, "So weak the paired test is not: it looks only at the "
                                         "questions that changed.")), _detectable),
    Question("prompt", "07", "A prompt of 512 tokens is read in W8A16 on a CPU. Is it faster than "
             "in bf16?", (
                 Option("Yes, by the ratio of the bytes", "faster", "The bytes are read once for "
                        "all 512 tokens; the products take the time, and they are bf16's."),
                 Option("No: the products are bf16's, and unpacking comes on top", "not faster"),
                 Option("Yes, twice: 8-bit products", "twice", "W8A16 multiplies in 16 bits."),
                 Option("No: FP8 is never faster on a CPU", "never",
                        "One stream is: it waits for the memory.")), _prompt),
    Question("split", "09", "Phi-4 has 40 heads and 10 KV heads. Over how many of 8 GPUs can vLLM "
             "divide each layer?", (
                 Option("8", 8, "10 KV heads can neither be dealt out to 8 GPUs nor copied to "
                                "them evenly."),
                 Option("4", 4, "4 divides 40 and not 10."),
                 Option("5", 5, "The rows of lm_head, 100,352, do not divide by 5."),
                 Option("2", 2)), _split),
)
_BY_NAME = {question.name: question for question in QUESTIONS}


def __getattr__(name: str) -> Question:
    if name in _BY_NAME:
        return _BY_NAME[name]
    raise AttributeError(f"There is no question {name!r}.")
