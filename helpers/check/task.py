"""What a task is, and how an answer to it is judged: never an error, whatever was answered.

A judge compares an answer with the truth, then with the usual mistakes, each of which is an answer
as it is commonly given. So a mistake is found by what it does, however it was written.
"""

import contextlib
import dis
import signal
import textwrap
import threading
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from helpers import WorkbookError
from helpers.check import record

NOT_TRIED = "Not tried yet: put your answer in place of the three dots."
LEVELS = ("easy", "medium", "hard")
KINDS = ("code", "value")
WIDTH = 100  # characters of a line
SECONDS = 30.0  # that an answer may compute


@dataclass(frozen=True)
class Mistake:
    """An answer as it is given, and the sentence that goes with it."""

    answer: object
    says: str


@dataclass(frozen=True)
class Key:
    """The right answer, the usual wrong ones, and ways that are right at a cost."""

    right: object
    mistakes: tuple[Mistake, ...]
    accepted: tuple[Mistake, ...] = ()


@dataclass(frozen=True)
class Verdict:
    right: bool
    says: str = ""


class Unusable(Exception):
    """The answer is of a kind that cannot be judged; its one argument is a sentence."""


class _TooLong(BaseException):
    """Not an Exception, so that an answer's `except Exception` does not catch it."""


@dataclass(frozen=True)
class Task:
    """A question of a notebook; calling it with an answer prints what there is to say of it.

    `trains` completes "This trains ..."; `key` works the truth out of its source; `judge` is given
    an answer and the key. `material` makes what the question is about, where it is about something.
    """

    name: str
    notebook: str
    level: str
    minutes: int
    kind: str
    trains: str
    hints: tuple[str, str, str]
    key: Callable[[], Key] = field(repr=False)
    judge: Callable[[object, Key], Verdict] = field(repr=False)
    material: Callable[[], object] | None = field(default=None, repr=False)

    def __call__(self, answer) -> None:
        """Print "Not tried yet", "Right" or what is wrong; count the try in the workspace."""
        if _untouched(answer):
            print(NOT_TRIED)
            return
        try:
            key = self.key()
        except WorkbookError as error:
            say(f"This could not be checked, for the right answer is not to be had. {error.what}")
            return
        found = verdict(self, answer, key)
        say(f"{'Right' if found.right else 'Not yet'}. {found.says}".strip())
        record.tried(self.name, found.right)


def say(text: str) -> None:
    """Print a paragraph in lines that JupyterLab need not break, which it does within words."""
    print(textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False))


def verdict(task: Task, answer, key: Key) -> Verdict:
    """A task's judgement of an answer, whatever it is and does."""
    try:
        return task.judge(answer, key)
    except KeyboardInterrupt:
        raise
    except Unusable as error:
        return Verdict(False, str(error))
    except _TooLong:
        return Verdict(False, f"Your answer was still computing after {SECONDS:.0f} s, and was "
                              "stopped. Does a loop never end?")
    except BaseException as error:  # SystemExit too: an answer must not end the notebook
        return Verdict(False, f"Your answer could not be used ({in_words(error)}).")


def in_words(error: BaseException) -> str:
    """An exception's type and message, also where the message cannot be made."""
    try:
        text = " ".join(str(error).split())[:200]
    except Exception:
        text = ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def compared(read: Callable[[object], object], same: Callable[[object, object], bool],
             otherwise: str, partly: Callable[[object, object], str] | None = None,
             right_says: str = "") -> Callable[[object, Key], Verdict]:
    """A judge that compares an answer with the key's, in the form that `read` gives to both.

    `same(given, other)` decides; `partly(given, right)` says what is right already, or nothing;
    `otherwise` is said of a wrong answer that is none of the usual ones.
    """
    def judge(answer, key: Key) -> Verdict:
        right = read(key.right)
        with bounded():
            given = read(answer)
        if same(given, right):
            return Verdict(True, right_says)
        for way in key.accepted:
            if same(given, read(way.answer)):
                return Verdict(True, way.says)
        found = partly(given, right) if partly else ""
        for mistake in key.mistakes:
            if same(given, read(mistake.answer)):
                return Verdict(False, " ".join(filter(None, (found, mistake.says))))
        return Verdict(False, " ".join(filter(None, (found, otherwise))))

    return judge


def _untouched(answer) -> bool:
    """Whether the answer is still `...`, or a function of which only the stub is there."""
    if type(answer) is not types.FunctionType:
        return answer is ...
    steps = [step for step in dis.get_instructions(answer) if step.opname != "RESUME"]
    return len(steps) <= 2 and steps[0].opname in ("LOAD_CONST", "RETURN_CONST") and (
        steps[0].argval is None)  # it does nothing but return None


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Stop what an answer does within the block after `SECONDS`, in a thread that can be stopped.

    A truth is worked out outside of it: a library may take its time to load.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum, frame):
        raise _TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS, 1.0)  # again, where the first is swallowed
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
