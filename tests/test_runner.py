"""Running notebooks: what a failure says, what is kept of a run, and what `make test` lets pass."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import notebook_outputs
import psutil
import pytest
import run_notebooks
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from helpers import shared
from helpers.serve_side import cpu_kernels

REPO = Path(__file__).resolve().parent.parent
VIEW = notebook_outputs.VIEW


def write(path: Path, *sources: str) -> Path:
    cells = [new_markdown_cell(f"# Title of {path.stem}")]
    path.parent.mkdir(exist_ok=True)
    nbformat.write(new_notebook(cells=cells + [new_code_cell(s) for s in sources]), path)
    return path


# --- make run -----------------------------------------------------------------------------------

def test_a_failing_cell_stops_the_run_with_one_paragraph(tmp_path, monkeypatch, capsys):
    write(tmp_path / "notebooks" / "00_well.ipynb", "print(6 * 7)")
    write(tmp_path / "notebooks" / "01_ill.ipynb", "a = 1", "from helpers import WorkbookError\n"
          "raise WorkbookError('The disk is full.', 'Nothing fits.', 'Free some space.')", "a")
    write(tmp_path / "notebooks" / "02_never.ipynb", "a = 1")
    monkeypatch.setattr(run_notebooks, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setattr(run_notebooks, "BUILD", tmp_path / "build")
    assert run_notebooks.main(["run"]) == 1
    said = capsys.readouterr()
    assert "[1/3] 00_well.ipynb  done in" in said.out and "[2/3] 01_ill.ipynb  failed" in said.out
    assert "02_never" not in said.out
    assert said.err.split() == (
        "01_ill.ipynb stopped at code cell 2 of 3, which begins `from helpers import "
        "WorkbookError`. WorkbookError: The disk is full. What it means: Nothing fits. What to do: "
        f"Free some space. The notebook as far as it got: {tmp_path}/build/notebooks/01_ill.ipynb"
    ).split()
    kept = nbformat.read(tmp_path / "build" / "notebooks" / "01_ill.ipynb", as_version=4)
    assert [cell.execution_count for cell in kept.cells[1:]] == [1, 2, None]


def test_a_kernel_that_dies_is_told_from_a_cell_that_fails(tmp_path, capsys):
    source = write(tmp_path / "00_dies.ipynb", "a = 1", "import os\nos._exit(9)")
    with pytest.raises(run_notebooks.NotebookStopped, match="code cell 2 of 2.*`import os`") as e:
        run_notebooks.execute(source, tmp_path / "out.ipynb", "00")
    assert "The process that runs its cells died" in str(e.value)


def test_an_interrupted_run_says_so_and_leaves_no_kernel(tmp_path):
    write(tmp_path / "00_long.ipynb", f"open('{tmp_path}/begun', 'w')",
          "import time\ntime.sleep(300)")
    program = ("import pathlib, sys, run_notebooks\n"
               f"run_notebooks.NOTEBOOKS = run_notebooks.BUILD = pathlib.Path('{tmp_path}')\n"
               "sys.exit(run_notebooks.main(['run']))")
    running = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True,
                               env=dict(os.environ, PYTHONPATH=str(REPO / "scripts")))
    for _ in range(600):
        if (tmp_path / "begun").exists():
            break
        time.sleep(0.1)
    kernels = psutil.Process(running.pid).children(recursive=True)
    assert kernels
    running.send_signal(signal.SIGINT)
    assert "Interrupted." in (said := running.communicate(timeout=60)[1])
    assert "Traceback" not in said and running.returncode == 130
    assert psutil.wait_procs(kernels, timeout=10)[1] == []


def test_only_chooses_by_number_and_an_unknown_one_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(run_notebooks, "NOTEBOOKS", tmp_path)
    for name in ("a1_c", "05_b", "00_a", "notes"):
        write(tmp_path / f"{name}.ipynb", "1")
    every = ["00_a.ipynb", "05_b.ipynb", "a1_c.ipynb"]  # the appendix comes last
    assert [path.name for path in run_notebooks.notebooks()] == every
    for only, name in zip(("00", "05", "a1"), every, strict=True):
        assert [path.name for path in run_notebooks.notebooks(only)] == [name]
    with pytest.raises(run_notebooks.NotebookStopped, match="'09'. There are: 00, 05, a1."):
        run_notebooks.notebooks("09")


def test_a_run_ends_with_the_tables_and_names_the_book(tmp_path, monkeypatch, capfd):
    """The book of what was just run: two programs, the worse status counts."""
    monkeypatch.setattr(run_notebooks, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setattr(run_notebooks, "BUILD", tmp_path / "build")
    write(tmp_path / "notebooks" / "00_a.ipynb", "1")
    said, ran = ["the tables", "the book"], []

    def program(command, cwd):
        ran.append(Path(command[-1]).name)
        print(said[len(ran) - 1], flush=True)
        return SimpleNamespace(returncode=len(ran) - 1)

    monkeypatch.setattr(run_notebooks.subprocess, "run", program)
    assert run_notebooks.run() == 1
    assert ran == ["helpers.report", "book.py"]
    assert capfd.readouterr().out.splitlines()[-2:] == said


# --- make notebooks -----------------------------------------------------------------------------

def test_a_cleaned_notebook_holds_what_a_reader_wants(tmp_path):
    def stream(text, name="stdout"):
        return new_output("stream", name=name, text=text)

    def view(model, text):
        return new_output("display_data", data={
            VIEW: {"model_id": model, "version_major": 2, "version_minor": 0}, "text/plain": text})

    bars = stream("\r  0%|     | 0/2\r100%|#####| 2/2\nkept: \x1b[1mbold\x1b[0m\n")
    home = stream(f"{tmp_path}/repo/workspace/x, {tmp_path}/repo and {tmp_path}/elsewhere\n")
    figure = new_output("display_data", data={"image/png": f"{tmp_path}/repo/"})
    cell = new_code_cell("go()", execution_count=1, metadata={"execution": {}, "tags": ["t"]},
                         outputs=[bars, stream("a log line\n", "stderr"), home, figure,
                                  view("aa", "  0%|   | 0/5 [00:00<?, ?it/s]"),
                                  view("bb", "IntSlider(value=3)")])
    nb = new_notebook(cells=[cell], metadata={"widgets": {notebook_outputs.STATE: {"state": {
        "aa": {"children": "IPY_MODEL_dd"}, "bb": {"layout": "IPY_MODEL_cc"}, "cc": {}, "dd": {}},
        "version_major": 2}}})
    notebook_outputs.clean(nb, {tmp_path / "repo": "", tmp_path: "~"})
    assert [o.get("text") for o in cell.outputs] == [
        "kept: bold\n", "workspace/x, . and ~/elsewhere\n", None, None]
    assert cell.outputs[2].data["image/png"] == f"{tmp_path}/repo/"  # base64 is not text
    assert cell.outputs[3].data[VIEW]["model_id"] == "bb"
    assert nb.metadata.widgets[notebook_outputs.STATE]["state"].keys() == {"bb", "cc"}
    assert cell.metadata == {"tags": ["t"]}
    stamp = nb.metadata[notebook_outputs.STAMP]["sources_sha256"]
    assert stamp == notebook_outputs.sources_sha256(nb)
    cell.source = "went()"
    assert stamp != notebook_outputs.sources_sha256(nb)


# --- make test ----------------------------------------------------------------------------------

def test_a_notebook_that_hangs_or_runs_nothing_or_is_missing_fails(tmp_path):
    write(tmp_path / "00_well.ipynb", "1 + 1")
    write(tmp_path / "01_hangs.ipynb", "import time\ntime.sleep(300)")
    write(tmp_path / "02_empty.ipynb")
    write(tmp_path / "03_dies.ipynb", "import os\nos._exit(9)")
    program = (
        "import sys, pytest, run_tests\n"
        f"names = [f'{{n}}.ipynb' for n in {['00_well', '01_hangs', '02_empty', '03_dies']}]\n"
        "class Runs(run_tests.NotebookRuns):\n"
        "    def pytest_runtest_logreport(self, report):\n"
        "        if '00_well' in report.nodeid and report.when == 'call':\n"
        "            self.limit = 8 + 4 * report.duration\n"
        "runs = Runs(names + ['04_gone.ipynb'], 300)\n"
        "code = pytest.main(['.', '--nbmake', '--overwrite', '-p', 'no:cacheprovider'],\n"
        "                   plugins=[runs])\n"
        "print(runs.table())\n"
        "sys.exit(code)")
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True,
                            text=True, env=dict(os.environ, PYTHONPATH=str(REPO / "scripts")))
    table = {line.split()[0][:2]: line.split()[-1] for line in result.stdout.splitlines()
             if line.startswith(tuple(f"0{i}_" for i in range(5))) and line.endswith(("ed", "ED"))}
    assert result.returncode == 1, result.stdout
    assert table == {"00": "passed", "01": "FAILED", "02": "FAILED", "03": "FAILED",
                     "04": "FAILED"}
    assert re.search(r"01_hangs\.ipynb took more than \d+ s and was stopped\.", result.stdout)
    assert "02_empty.ipynb ended without having run all its code." in result.stdout
    assert "03_dies.ipynb: Kernel died" in result.stdout
    assert "= 3 failed, 1 passed" in result.stdout


def test_what_a_reader_has_set_for_a_room_is_not_tested(tmp_path, monkeypatch):
    import run_tests
    from conftest import READERS

    assert READERS == (shared.SERVERS, shared.KEY_FILE, cpu_kernels.VARIABLE)
    for name in READERS:
        monkeypatch.setenv(name, "theirs")
    monkeypatch.setenv("PHI4_FP8_PROFILE", "tiny-phi4")
    monkeypatch.setattr(run_tests, "BUILD", tmp_path)
    seen = {}
    monkeypatch.setattr(run_tests, "run", lambda *_: seen.update(os.environ) or 0)
    assert run_tests.main([]) == 0
    assert seen and "theirs" not in seen.values()


def test_more_than_one_notebook_after_only_is_a_sentence(capsys):
    assert run_notebooks.main(["run", "00", "99"]) == 1
    assert "ONLY takes one notebook's number, and not '00 99'" in capsys.readouterr().err
