"""`make help`: three groups, every target once, each line short."""

import re
import subprocess

from conftest import REPO


def test_help_lists_every_target_once_in_three_groups():
    printed = subprocess.check_output(["make", "--no-print-directory", "help"], cwd=REPO, text=True)
    lines = [line for line in printed.splitlines() if line]
    assert [line for line in lines if not line.startswith(" ")] == [
        "For a reader", "For an instructor", "For a maintainer"]
    told = [line.split()[0] for line in lines if line.startswith(" ")]
    makefile = (REPO / "Makefile").read_text()
    phony = re.search(r"\.PHONY: (.*?)\n\n", makefile.replace("\\\n", ""), re.S)[1].split()
    assert sorted([*told, "help"]) == sorted(phony)
    assert all(re.match(r"  [a-z0-9-]+ +(?<=^.{18})\S", line) for line in lines
               if line.startswith(" ")), printed
    assert all(len(line) <= 100 for line in lines)


def test_no_two_targets_run_the_same():
    makefile = (REPO / "Makefile").read_text()
    recipes = re.findall(r"^[a-z0-9-]+:.*##.*\n((?:\t.*\n)+)", makefile, re.M)
    assert len(recipes) > 10 and len(set(recipes)) == len(recipes)
