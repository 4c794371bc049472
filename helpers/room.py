"""What the participants of a workshop handed in, read as data and set side by side.

A file handed in is a ledger (`helpers.ledger`), before whose rows may stand one line of its own:
the name that the participant chose, the tasks done, the predictions. `hand_in` writes such a file;
a bare ledger will do. Files come from others: each row is held to the ledger's form, and a figure
that no machine reaches is left out and counted.
"""

import json
import os
import stat
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from helpers import WorkbookError, ledger, ledger_row, stats, workspace

HEADER = "phi4-fp8-hand-in"  # the key of the line of its own; its value is the form's number
LARGEST_FILE = 20_000_000  # bytes; a whole course leaves some 50 kB
LONGEST_NAME = 40
NO_NAME = "no name"
RATIOS = (0.01, 100.0)  # between which an FP8 arm's speed beside bf16 can be believed
SLICE = ("ratio", "ratio_low", "ratio_high")
SPEED = ("output_tok_s", "output_tok_s_min", "output_tok_s_max")


@dataclass(frozen=True)
class Handed:
    """One participant's file: the name to show, rows, tasks by name, predictions by question."""

    file: str
    name: str
    rows: list[dict]
    tasks: dict[str, dict] = field(default_factory=dict)
    predictions: dict[str, list[float]] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()  # what of the file is left out, and why


class Refused(Exception):
    """Why a file is left out, in a few words."""


def hand_in(name: str, into: Path) -> Path:
    """Write this workspace's ledger, tasks and predictions, and a name ("" for none), to one file.

    Raises `WorkbookError` where there is nothing yet, or the file cannot be written.
    """
    rows = ledger.read()
    if not rows:
        raise WorkbookError(f"The ledger {ledger.default()} has no result yet.",
                            "There is nothing to hand in.",
                            "Run a notebook that measures, such as 02, and then this again.")
    header = {HEADER: 1, "name": name[:LONGEST_NAME], "tasks": _own("tasks.json"),
              "predictions": _own("predictions.json")}
    with workspace.writing(into, "Nothing was handed in."):
        into.parent.mkdir(parents=True, exist_ok=True)
        into.write_text("".join(json.dumps(line) + "\n" for line in (header, *rows)))
    return into


def _own(file: str) -> dict:
    """The workspace's JSON of that name; nothing where it is not there or not whole."""
    try:
        return workspace.read_json(workspace.root() / file)
    except WorkbookError:
        return {}


def read_all(folder: Path) -> tuple[list[Handed], list[tuple[str, str]]]:
    """Every file of a folder, by file name, and (file, why) of those that are left out.

    A row that stands in two files counts for the first. Raises `WorkbookError` for a folder that
    is not there or cannot be read.
    """
    try:
        files = sorted(file for file in folder.iterdir() if not file.name.startswith("."))
    except OSError as error:
        raise WorkbookError(f"The folder {folder} cannot be read: {error.strerror}.",
                            "It should hold the files that the participants handed in.",
                            "Name it: make room LEDGERS=FOLDER") from None
    handed, refused, known = [], [], set()
    for file in files:
        try:
            found = _read(file, known, sum(each.name.startswith(NO_NAME) for each in handed))
        except (Refused, WorkbookError) as error:
            why = error.what if isinstance(error, WorkbookError) else str(error)
            refused.append((words(file.name), words(why, 300)))
            continue
        known |= {row["id"] for row in found.rows}
        handed.append(found)
    return handed, refused


def _read(file: Path, known: set[str], nameless: int) -> Handed:
    """One file; `known`: the ids of rows that others handed in. Raises `Refused`."""
    state = os.lstat(file)
    if not stat.S_ISREG(state.st_mode):
        raise Refused("not a plain file")
    if state.st_size > LARGEST_FILE:
        raise Refused(f"{state.st_size / 1e6:,.0f} MB, and a ledger has less than "
                      f"{LARGEST_FILE / 1e6:.0f}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rows = ledger.read(file)
    header = _header(file)
    faults = [str(each.message).removeprefix(f"{file.name}, ") for each in caught]
    faults = [fault for fault in faults if not (header and fault.startswith("line 1 "))]
    if not rows:
        raise Refused("no row of a ledger in it" + (f" ({faults[0]})" if faults else ""))
    new = [row for row in rows if row["id"] not in known]
    if not new:
        raise Refused("every row of it is in another file, too")
    if len(new) < len(rows):
        faults.append(f"{len(rows) - len(new)} rows are in another file, too")
    name = words(header.get("name")) or f"{NO_NAME} {nameless + 1}"
    return Handed(words(file.name), name, new, _tasks(header.get("tasks")),
                  _predictions(header.get("predictions")),
                  tuple(words(fault, 200) for fault in faults))


def _header(file: Path) -> dict:
    with open(file, "rb") as lines:
        first = lines.readline()
    try:
        found = json.loads(first)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) and found.get(HEADER) == 1 else {}


def words(text: object, longest: int = LONGEST_NAME) -> str:
    """A text of somebody else's on one line, without control characters, cut to a length."""
    if not isinstance(text, str):
        return ""
    line = " ".join(ledger_row.plain(text).split())
    return line if len(line) <= longest else line[:longest - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _tasks(found: object) -> dict[str, dict]:
    """By task of this workbook, whether it was done and how many hints were taken."""
    from helpers import check

    return {name: {"done": entry["done"], "hints": min(max(entry["hints"], 0), 99)}
            for name, entry in (found if isinstance(found, dict) else {}).items()
            if name in check.TASKS and isinstance(entry, dict)
            and type(entry.get("done")) is bool and type(entry.get("hints")) is int}


def _predictions(found: object) -> dict[str, list[float]]:
    """By question, the numbers predicted; a question with anything else in it is left out."""
    return {words(question): [float(number) for number in numbers]
            for question, numbers in (found if isinstance(found, dict) else {}).items()
            if isinstance(numbers, list) and all(
                type(number) in (int, float) and 0 < number < 1000 for number in numbers)}


# --- figures by machine -------------------------------------------------------------------------

@dataclass(frozen=True)
class Point:
    """A figure of one machine with the interval that is drawn with it."""

    who: str  # the participant's name
    machine: str
    mode: str
    work: str  # only points of the same work may be set side by side
    arm: str  # "" of a ratio
    estimate: stats.Interval


def accuracies(handed: list[Handed]) -> list[Point]:
    """The newest gsm8k score of every machine, work and arm, with Wilson's 95 % interval."""
    newest = {}
    for each in handed:
        for row in each.rows:
            if row["experiment"] == "gsm8k" and ledger_row.holds(row, ("task", "limit"),
                                                                 ("strict-match",)):
                newest[each.file, *where(row), _gsm8k(row), row["arm"]] = each, row
    return [Point(each.name, machine, mode, work, arm, stats.wilson(
                round(row["metrics"]["strict-match"] * row["work"]["limit"]),
                row["work"]["limit"]))
            for (_, machine, mode, work, arm), (each, row) in newest.items()]


def _gsm8k(row: dict) -> str:
    work = row["work"]
    return (f"{work['limit']:,} questions of {work['task']}, {work.get('num_fewshot', 0)} "
            f"examples, {row['model']['profile']}")


def where(row: dict) -> tuple[str, str]:
    """What a row was measured on, and in which serving mode. A shared server is nobody's machine.
    """
    machine = "a shared server" if row["work"].get("shared") else ledger_row.device(row)
    return words(machine, 60), words(row["mode"], 20)


def speeds_of_shared(handed: list[Handed]) -> int:
    """How many speeds are a shared server's: they say nothing of the participant's machine."""
    return sum(row["experiment"] in ("slice", "throughput") and bool(row["work"].get("shared"))
               for each in handed for row in each.rows)


def _own_speeds(each: Handed, experiment: str) -> list[dict]:
    return [row for row in each.rows
            if row["experiment"] == experiment and not row["work"].get("shared")]


def ratios(handed: list[Handed]) -> tuple[list[Point], int]:
    """The newest speed over bf16's of every machine and work, and how many are unbelievable.

    Of the slice of Phi-4 (notebook 07) the ledger has the ratio with its interval over the rounds.
    Of a whole model it has each arm's median and range: there the interval is the widest that the
    rounds allow, one arm's slowest over the other's fastest, and back.
    """
    found = [(each, *where(row), *work_and_ratio) for each in handed
             for row, work_and_ratio in [*_of_slices(each), *_of_models(each)]]
    newest = {(each.file, machine, mode, work): Point(each.name, machine, mode, work, "", ratio)
              for each, machine, mode, work, ratio in found}
    points = [point for point in newest.values() if _believable(point.estimate)]
    return points, len(newest) - len(points)


def _believable(ratio: stats.Interval) -> bool:
    return RATIOS[0] < ratio.low <= ratio.value <= ratio.high < RATIOS[1]


def _of_slices(each: Handed):
    for row in _own_speeds(each, "slice"):
        if row["arm"] != "bf16" and ledger_row.holds(
                row, ("input_tokens", "output_tokens", "concurrency"), SLICE):
            work = row["work"]
            what = (f"{row['arm'].upper()} {work.get('numerics', '').upper()}, {_streams(work)}, "
                    f"{work.get('layers', '?')} layers of Phi-4's shapes")
            yield row, (what, stats.Interval(*(row["metrics"][name] for name in SLICE)))


def _of_models(each: Handed):
    newest: dict[tuple, dict[str, dict]] = {}
    for row in _own_speeds(each, "throughput"):
        if ledger_row.holds(row, ("concurrency",), SPEED):
            work, profile = row["work"], row["model"]["profile"]
            key = where(row), f"FP8, {_streams(work)}, {profile}"
            newest.setdefault(key, {})[row["arm"]] = row
    for (_, what), arms in newest.items():
        if {"bf16", "fp8"} <= arms.keys():
            (value, low, high), (base, least, most) = (
                [arms[arm]["metrics"][name] for name in SPEED] for arm in ("fp8", "bf16"))
            ratio = (stats.Interval(value / base, low / most, high / least)
                     if min(base, least, most) > 0 else stats.Interval(0, 0, 0))
            yield arms["fp8"], (what, ratio)


def _streams(work: dict) -> str:
    given, made, streams = (work.get(name, "?") for name in (
        "input_tokens", "output_tokens", "concurrency"))
    if made == 1:
        return f"prompt of {given}"
    return f"{streams} stream{'s' if streams != 1 else ''} of {given} + {made} tokens"


def predicted(handed: list[Handed]) -> list[tuple[str, float, float]]:
    """What was predicted of the slice of Phi-4 and then measured: (work, predicted, measured).

    For each participant who did both, of the arm and the works that notebook 07 asks for.
    """
    from helpers import slice_speed

    pairs = []
    for each in handed:
        numbers = each.predictions.get(slice_speed.PREDICTED, [])
        for work, number in zip(slice_speed.WORK, numbers, strict=False):
            asked = {name: value for name, value in work.in_ledger().items() if name != "rounds"}
            measured = [row["metrics"]["ratio"] for row in _own_speeds(each, "slice")
                        if (row["arm"], row["work"].get("numerics")) == ("fp8", "w8a16")
                        and ledger_row.holds(row, (), SLICE)
                        and _believable(stats.Interval(*(row["metrics"][n] for n in SLICE)))
                        and all(row["work"].get(name) == value for name, value in asked.items())]
            if measured and RATIOS[0] < number < RATIOS[1]:
                pairs.append((work.title, number, measured[-1]))
    return pairs


def by_work(points: list[Point]) -> list[tuple[str, list[Point]]]:
    """The points of each work, that of most machines first; each sorted by its estimate.

    Works of as many machines keep their order.
    """
    found: dict[str, list[Point]] = {}
    for point in points:
        found.setdefault(point.work, []).append(point)
    return [(work, sorted(each, key=lambda point: point.estimate.value))
            for work, each in sorted(found.items(), key=lambda item: -len(item[1]))]
