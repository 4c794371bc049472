"""Grade-school word problems in GSM8K's own form, from a seed.

A template is a function that draws its numbers from a `Story`, writes the worked answer with
`Story.step` and returns the question. Each step is one arithmetic operation on two positive
integers with a positive integer result, written as GSM8K writes it: `3*4=<<3*4=12>>12`.
"""

import operator
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}

SHE = [
    "Anna",
    "Bella",
    "Carla",
    "Dina",
    "Emma",
    "Fiona",
    "Grace",
    "Hanna",
    "Ivy",
    "Julia",
    "Kara",
    "Lily",
    "Mia",
    "Nora",
    "Olga",
    "Rosa",
]
HE = [
    "Adam",
    "Ben",
    "Carl",
    "David",
    "Eric",
    "Felix",
    "George",
    "Henry",
    "Ivan",
    "Jack",
    "Kevin",
    "Leo",
    "Max",
    "Noah",
    "Oscar",
    "Paul",
]

# The thing in a story has to suit the verb: people pick lemons and make candles.
ITEMS = {
    "picked": ["apple", "pear", "lemon", "orange", "carrot", "onion", "flower"],
    "made": ["cookie", "muffin", "pancake", "candle", "badge", "ribbon", "card"],
    "colourful": ["marble", "bead", "button", "balloon", "pencil", "pen", "eraser"],
    "kept": ["sticker", "stamp", "coin", "shell", "book", "rock", "puzzle"],
}


@dataclass(frozen=True)
class Problem:
    """One word problem; `answer` ends in GSM8K's `#### n`."""

    pattern: str
    template: str
    question: str
    answer: str


@dataclass(frozen=True)
class Noun:
    """A countable noun; `noun(3)` is "3 apples"."""

    one: str
    many: str

    def __call__(self, n: int) -> str:
        return f"{n} {self.of(n)}"

    def of(self, n: int) -> str:
        """The form that goes with n, without the number."""
        return self.one if n == 1 else self.many


@dataclass(frozen=True)
class Person:
    """A name with the pronouns that agree with it."""

    name: str
    he: str
    his: str

    @property
    def He(self) -> str:
        return self.he.capitalize()

    @property
    def His(self) -> str:
        return self.his.capitalize()

    def __str__(self) -> str:
        return self.name


class Story:
    """The random draws of one problem, and its worked answer as it grows."""

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.lines: list[str] = []
        self.result = 0

    def people(self) -> tuple[Person, Person]:
        """Two people with different names."""
        names = self.rng.sample(SHE + HE, 2)
        first, second = (Person(n, *(("she", "her") if n in SHE else ("he", "his"))) for n in names)
        return first, second

    def person(self) -> Person:
        return self.people()[0]

    def item(self, *kinds: str) -> Noun:
        """Something countable of one of these kinds, or of any kind."""
        one = self.rng.choice([word for kind in kinds or ITEMS for word in ITEMS[kind]])
        return Noun(one, one + "s")

    def n(self, low: int, high: int) -> int:
        return self.rng.randint(low, high)

    def pick(self, *choices):
        return self.rng.choice(choices)

    def step(
        self, lead: str, a: int, op: str, b: int, unit: Noun | str = "", tail: str = ""
    ) -> int:
        """Write one operation as a sentence of the answer and return its result.

        `unit` "$" goes before the number, a noun after it.
        """
        result = OPERATIONS[op](a, b)
        if result < 1 or (op == "/" and a % b):
            raise ValueError(f"{a}{op}{b} is no positive integer")
        dollar = "$" if unit == "$" else ""
        noun = " " + unit.of(result) if isinstance(unit, Noun) else ""
        tail = " " + tail if tail else ""
        self.lines.append(f"{lead} {a}{op}{b}={dollar}<<{a}{op}{b}={result}>>{result}{noun}{tail}.")
        self.result = result
        return result

    def answer(self) -> str:
        return "\n".join([*self.lines, f"#### {self.result}"])


Template = Callable[[Story], str]
TEMPLATES: list[tuple[str, Template]] = []


def template(pattern: str) -> Callable[[Template], Template]:
    """Register a function as a template of an operation pattern."""

    def register(function: Template) -> Template:
        TEMPLATES.append((pattern, function))
        return function

    return register


def problem(rng: random.Random) -> Problem:
    """Draw one problem."""
    from . import templates  # noqa: F401  (importing it fills TEMPLATES)

    pattern, function = rng.choice(TEMPLATES)
    story = Story(rng)
    question = function(story)
    return Problem(pattern, function.__name__, question, story.answer())


def stream(seed: str, forbidden: frozenset[str] | set[str] = frozenset()) -> Iterator[Problem]:
    """Endless problems for a seed, without those whose question is in `forbidden`."""
    rng = random.Random(seed)
    while True:
        drawn = problem(rng)
        if drawn.question not in forbidden:
            yield drawn
