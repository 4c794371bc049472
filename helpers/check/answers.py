"""Answers in a form that can be compared: numbers, tensors, what a function returns."""

import math
from collections.abc import Callable, Sequence

from helpers.check.task import Unusable, in_words


class Raised:
    """What stands in place of a result where the function raised."""

    def __init__(self, error: BaseException):
        self.error = error


def number(answer) -> float:
    """A number of whatever type; raises `Unusable` for anything else, NaN included."""
    if isinstance(answer, bool):
        raise Unusable("A number is wanted, and not True or False.")
    try:
        value = float(answer)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise Unusable(f"A number is wanted, and not {_a(answer)}.") from None
    if math.isnan(value):
        raise Unusable("Your number is NaN: was zero divided by zero?")
    return value


def near(relative: float = 0.0, absolute: float = 0.0) -> Callable[[float, float], bool]:
    """Whether a number is another, to a tolerance of the other's size."""
    return lambda given, other: math.isclose(given, other, rel_tol=0,
                                             abs_tol=absolute + relative * abs(other)
                                             if math.isfinite(other) else 0.0)


def letters(answer) -> frozenset[str]:
    """A set of letters, given as a set, a list or a string such as "a, c"."""
    if not isinstance(answer, str | set | frozenset | list | tuple):
        raise Unusable(f"A set of letters such as {{'a', 'b'}} is wanted, and not {_a(answer)}.")
    found = frozenset(str(each).strip().lower() for each in answer) - {"", ",", " "}
    if not found or not all(len(each) == 1 and each.isalpha() for each in found):
        raise Unusable("A set of letters such as {'a', 'b'} is wanted.")
    return found


def results(cases: Callable[[], list[tuple]]) -> Callable[[object], list]:
    """A reader that calls a function with each case's arguments and lists its results.

    `cases()` makes the arguments anew, so that no function finds what another has changed.
    Where a call raises, the exception stands in the list. Raises `Unusable` for what is no
    function, and for a function that returns nothing or raises every time.
    """
    def read(answer) -> list:
        if not callable(answer):
            raise Unusable(f"A function is wanted, def answer(...): …, and not {_a(answer)}.")
        found = []
        for case in cases():
            try:
                found.append(answer(*case))
            except Exception as error:
                found.append(Raised(error))
        if all(isinstance(each, Raised) for each in found):
            raise Unusable(f"Your function raises an error ({in_words(found[0].error)}).")
        if all(each is None for each in found):
            raise Unusable("Your function returns nothing: is a `return` missing?")
        return found

    return read


def each(convert: Callable[[object], object], reader: Callable[[object], list]
         ) -> Callable[[object], list]:
    """`reader`, with each result converted; `Unusable` results become what was raised."""
    def read(answer) -> list:
        found = []
        for result in reader(answer):
            try:
                found.append(result if isinstance(result, Raised) else convert(result))
            except Unusable as error:
                found.append(Raised(error))
        faults = [one.error for one in found if isinstance(one, Raised)]
        if len(faults) == len(found) and isinstance(faults[0], Unusable):
            raise faults[0]
        return found

    return read


def all_same(same: Callable[[object, object], bool]) -> Callable[[list, list], bool]:
    """Whether two lists of results are the same, one by one."""
    return lambda given, other: all(
        not isinstance(a, Raised) and not isinstance(b, Raised) and same(a, b)
        for a, b in zip(given, other, strict=True))


def how_many(same: Callable[[object, object], bool], names: Sequence[str],
             write: Callable[[object], str] = "{:.6g}".format) -> Callable[[list, list], str]:
    """A sentence on how many results are right, and on the first that is not; "" where none is."""
    def say(given: list, right: list) -> str:
        good = [not isinstance(a, Raised) and same(a, b)
                for a, b in zip(given, right, strict=True)]
        if not any(good) or all(good):
            return ""
        first = good.index(False)
        gives = (f"raises {in_words(given[first].error)}" if isinstance(given[first], Raised)
                 else f"gives {write(given[first])}")
        return (f"{sum(good)} of {len(good)} cases are right; the first that is not, "
                f"answer({names[first]}), {gives}, and {write(right[first])} is right.")

    return say


def tensor(shape: tuple[int, ...], what: str) -> Callable[[object], object]:
    """A converter to float64 tensors of a shape; raises `Unusable` for anything else."""
    def convert(value):
        import torch

        try:
            found = torch.as_tensor(value).detach().double()
        except (TypeError, ValueError, RuntimeError):
            raise Unusable(f"A tensor of {what} is wanted, and not {_a(value)}.") from None
        if tuple(found.shape) != shape:
            raise Unusable(f"{what[0].upper()}{what[1:]} have the shape {list(shape)}, and your "
                           f"answer has {list(found.shape)}.")
        return found

    return convert


def tensors_near(relative: float) -> Callable[[object, object], bool]:
    """Whether two tensors differ by no more than a share of the other's largest magnitude."""
    def same(given, other) -> bool:
        bound = relative * float(other.abs().max())
        return bool(given.isfinite().all()) and float((given - other).abs().max()) <= bound

    return same


def _a(value) -> str:
    """What kind of thing a value is, in words that no value can spoil."""
    if value is None:
        return "None"
    name = "function" if callable(value) else type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"
