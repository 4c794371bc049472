"""`make room LEDGERS=folder`: what a room handed in, as one HTML page; `make hand-in NAME=...`.

The page is build/room.html, whole in one file, and runs no script. What participants wrote is
escaped by Jinja, and drawn by matplotlib as plain text.
"""

import os
import sys
from datetime import date
from pathlib import Path

from helpers import WorkbookError, plots, room, workspace
from helpers.room import Handed, Point

REPO = Path(__file__).resolve().parent.parent
PAGE, HAND_IN = REPO / "build" / "room.html", REPO / "build" / "hand-in.jsonl"
PICTURES = 4  # of a kind, of the works that most machines did
MOST = 200  # machines in one picture
LONGEST = 90  # characters of a picture's title that are a work's


def accuracy_picture(work: str, points: list[Point]) -> str:
    """Scores of both arms by machine, as an HTML image; `points`: of one work."""
    work = room.words(work, LONGEST)
    whos = list(dict.fromkeys((p.who, p.machine) for p in points))[-MOST:]
    places = {who: place for place, who in enumerate(whos)}
    figure, axis = _by_machine(whos, f"Right answers\n{work}")
    for arm, shift in (("bf16", 0.13), ("fp8", -0.13)):
        of_arm = [p for p in points if p.arm == arm and (p.who, p.machine) in places]
        _draw(axis, of_arm, [places[p.who, p.machine] + shift for p in of_arm],
              plots.COLOURS[arm], plots.TITLES[arm])
    axis.set_xlabel("share of right answers (strict-match), Wilson's 95 % interval")
    figure.legend(loc="outside lower right", ncols=2, frameon=False)
    return plots.as_html(figure, f"Share of right answers of bf16 and FP8 on {len(whos)} machines, "
                                 f"with 95 % intervals: {work}")


def ratio_picture(work: str, points: list[Point]) -> str:
    """Speed over bf16's by machine, as an HTML image; `points`: of one work."""
    points, work = points[-MOST:], room.words(work, LONGEST)
    figure, axis = _by_machine([(p.who, p.machine) for p in points], f"{_spread(points)}\n{work}")
    axis.axvline(1, color=plots.GREY, linewidth=1, zorder=0)
    _draw(axis, points, range(len(points)), plots.FP8, "")
    axis.set_xlabel("tokens per second over bf16's, on the same machine")
    return plots.as_html(figure, f"{_spread(points)}; a point and a range for each of "
                                 f"{len(points)} machines: {work}")


def _spread(points: list[Point]) -> str:
    low, high = points[0].estimate.value, points[-1].estimate.value
    if len(points) == 1:
        return f"{low:.2f} times bf16's speed on one machine"
    return f"{low:.2f} to {high:.2f} times bf16's speed on {len(points)} machines"


def prediction_picture(pairs: list[tuple[str, float, float]]) -> str:
    """Predicted against measured ratios, as an HTML image; `pairs`: as `room.predicted` has them.
    """
    figure, axis = plots.canvas(6, 5)
    colours = (plots.BF16, plots.FP8, plots.THIRD)
    for (work, colour), marker in zip(
            dict(zip(dict.fromkeys(work for work, _, _ in pairs), colours, strict=False)).items(),
            "os^", strict=False):
        of_work = [(measured, guess) for title, guess, measured in pairs if title == work]
        axis.plot(*zip(*of_work, strict=True), marker, color=colour, label=work, alpha=0.8)
    ends = [min(min(pair[1:]) for pair in pairs) / 1.2, max(max(pair[1:]) for pair in pairs) * 1.2]
    axis.plot(ends, ends, color=plots.GREY, linewidth=1, zorder=0)
    axis.set(xscale="log", yscale="log", xlabel="measured: FP8 W8A16's speed over bf16's",
             ylabel="predicted")
    for ticks in (axis.xaxis, axis.yaxis):
        ticks.set_major_formatter("{x:g}")
        ticks.set_minor_formatter("{x:g}")
    axis.set_title(f"{len(pairs)} predictions beside their measurements", loc="left", fontsize=11)
    axis.legend(frameon=False)
    return plots.as_html(figure, f"Predicted ratios against measured ones: {len(pairs)} points")


def _by_machine(whos: list[tuple[str, str]], title: str):
    """A canvas with a line for each (name, machine), the first one lowest."""
    figure, axis = plots.canvas(9, 1.6 + 0.42 * len(whos))
    axis.set_yticks(range(len(whos)), [f"{who}\n{machine}" for who, machine in whos],
                    parse_math=False, fontsize=8)
    axis.set_ylim(-0.6, len(whos) - 0.4)
    axis.set_title(title, loc="left", fontsize=11, pad=10, parse_math=False)
    return figure, axis


def _draw(axis, points: list[Point], places, colour: str, label: str) -> None:
    values = [p.estimate.value for p in points]
    axis.errorbar(values, places, fmt="o", color=colour, label=label or None, capsize=3,
                  xerr=([p.estimate.value - p.estimate.low for p in points],
                        [p.estimate.high - p.estimate.value for p in points]))


def tasks(handed: list[Handed]) -> tuple[list[str], list[tuple], list[int]]:
    """The notebooks, each participant's (name, [(done, of)], hints), the room's percent done."""
    from helpers import check

    names: dict[str, list[str]] = {}
    for task in check.TASKS.values():
        names.setdefault(task.notebook, []).append(task.name)
    told = [each for each in handed if each.tasks]
    lines = [(each.name,
              [(sum(each.tasks.get(name, {}).get("done", False) for name in of), len(of))
               for of in names.values()],
              sum(entry["hints"] for entry in each.tasks.values())) for each in told]
    shares = [round(100 * sum(cells[column][0] for _, cells, _ in lines) / (len(lines) * len(of)))
              for column, of in enumerate(names.values())] if lines else []
    return list(names), lines, shares


def page(handed: list[Handed], refused: list[tuple[str, str]]) -> str:
    """The page of what was handed in; `refused`: files that are left out, and why."""
    import jinja2
    from markupsafe import Markup

    ratios, unbelievable = room.ratios(handed)
    predicted = room.predicted(handed)
    notebooks, lines, shares = tasks(handed)
    machines = [(each.name, *where, sum(room.where(row) == where for row in each.rows))
                for each in handed for where in dict.fromkeys(map(room.where, each.rows))]
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        (REPO / "workshop" / "room.html").read_text())
    return template.render(
        handed=handed, refused=refused, date=date.today().isoformat(),
        skipped=[(each.file, fault) for each in handed for fault in each.skipped],
        accuracies=[Markup(accuracy_picture(*found)) for found in
                    room.by_work(room.accuracies(handed))[:PICTURES]],
        ratios=[Markup(ratio_picture(*found)) for found in room.by_work(ratios)[:PICTURES]],
        unbelievable=unbelievable, shared=room.speeds_of_shared(handed), notebooks=notebooks,
        tasks=lines, shares=shares,
        predictions=Markup(prediction_picture(predicted)) if predicted else "",
        machines=machines)


def main(words: list[str]) -> int:
    try:
        if words[0] == "hand-in":
            file = room.hand_in(" ".join(words[1:]), HAND_IN)
            print(f"Written: {os.path.relpath(file, REPO)}. It holds your results with the kind of "
                  "machine, the tasks done, your predictions and the name you gave, if any. "
                  "Send it to your instructor.")
            return 0
        if not " ".join(words[1:]).strip():
            raise WorkbookError("No folder of ledgers was named.", "There is nothing to show.",
                                "Name the folder with what was handed in: "
                                "make room LEDGERS=folder.")
        folder = workspace.resolved(" ".join(words[1:]))
        handed, refused = room.read_all(folder)
        for file, why in refused:
            print(f"Left out: {file}: {why}")
        for each in handed:
            for fault in each.skipped:
                print(f"Left out of {each.file}: {fault}")
        if not handed:
            raise WorkbookError(f"No file in {folder} is a ledger.", "There is nothing to show.",
                                "Collect what `make hand-in` writes, a file for each participant.")
        with workspace.writing(PAGE, "No page was written."):
            PAGE.parent.mkdir(exist_ok=True)
            PAGE.write_text(page(handed, refused))
    except WorkbookError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{len(handed)} ledgers: {os.path.relpath(PAGE, REPO)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
