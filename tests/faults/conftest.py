"""Faults that a reader can meet, provoked on the real parts, and how the workbook meets each.

A fault is a test with `@pytest.mark.fault("its name, as a reader would call it")`. It takes the
fixture `happened` and says with it what the reader saw. `make test-faults` runs all of them and
prints the table; `make test` leaves out those that are marked `slow` as well.
"""

import pytest
from tabulate import tabulate

VERDICTS = {"passed": "as it should be", "failed": "WRONG", "error": "WRONG", "skipped": "not run"}


def pytest_addoption(parser):
    parser.addoption("--all-faults", action="store_true",
                     help="the slow faults too, and a table of all of them")


def pytest_collection_modifyitems(config, items):
    faults = [item for item in items if item.get_closest_marker("fault")]
    for item in faults:
        name, = item.get_closest_marker("fault").args
        case = f" ({item.callspec.id})" if hasattr(item, "callspec") else ""
        item.user_properties.append(("fault", name + case))
    slow = [item for item in faults if item.get_closest_marker("slow")]
    if slow and not config.getoption("--all-faults", default=False):
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


@pytest.fixture
def happened(request):
    """A function that notes what the reader saw, a text or an error, for the table.

    It fails the test where that is a traceback, and not a sentence.
    """
    def note(what) -> None:
        text = str(what).strip()
        assert text and "Traceback (most recent call last)" not in text, text
        request.node.user_properties.append(("happened", text.splitlines()[0]))

    return note


def pytest_terminal_summary(terminalreporter, config):
    if not config.getoption("--all-faults", default=False):
        return
    rows = []
    for outcome, verdict in VERDICTS.items():
        for report in terminalreporter.stats.get(outcome, []):
            noted = dict(getattr(report, "user_properties", []))
            if "fault" in noted and (report.when == "call" or outcome != "passed"):
                why = report.longrepr[2] if outcome == "skipped" else noted.get("happened", "")
                section = report.nodeid.partition("test_")[2].partition(".py")[0]
                rows.append([section.replace("_", " "), noted["fault"], why, verdict])
    terminalreporter.write_line(tabulate(
        sorted(rows), headers=["section", "fault", "what happened", "verdict"],
        tablefmt="simple_grid", maxcolwidths=[14, 34, 60, 10]))
    wrong = sum(row[-1] == "WRONG" for row in rows)
    terminalreporter.write_line(f"{len(rows)} faults, {wrong} of them met wrongly")
