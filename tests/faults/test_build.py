"""Faults of running the notebooks: a build/ that is full, closed, or holds what is no notebook."""

import book
import nbformat
import pytest
import run_notebooks
from nbformat.v4 import new_code_cell, new_notebook, new_output
from small_disk import mounted


@pytest.fixture
def places(tmp_path, monkeypatch):
    """One notebook that prints a megabyte, and a build/ of our own."""
    (tmp_path / "notebooks").mkdir()
    nbformat.write(new_notebook(cells=[new_code_cell("print('x' * 10**6)")]),
                   tmp_path / "notebooks" / "00_a.ipynb")
    monkeypatch.setattr(run_notebooks, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setattr(run_notebooks, "BUILD", tmp_path / "build")
    return tmp_path


@pytest.mark.fault("the disk fills up when a run notebook is written")
def test_a_full_disk(places, capsys, happened):
    with mounted(places / "build", "size=128k") as build:
        (build / "notebooks").mkdir()
        (build / "notebooks" / "00_a.ipynb").write_text("of the last run")
        assert run_notebooks.main(["run"]) == 1
        assert (build / "notebooks" / "00_a.ipynb").read_text() == "of the last run"
        assert [file.name for file in (build / "notebooks").iterdir()] == ["00_a.ipynb"]
    said = capsys.readouterr().err
    assert "00_a.ipynb could not be written: No space left on device" in said
    happened(said)


@pytest.mark.fault("the disk fills up when the book is made")
@pytest.mark.parametrize("size", ["200k", "600k"], ids=["its sources", "its pages"])
def test_a_full_disk_for_the_book(places, size, happened):
    with mounted(places / "build", f"size={size}") as build:
        (build / "book").mkdir()
        (build / "book" / "index.html").write_text("the last book")
        with pytest.raises(run_notebooks.NotebookStopped, match="No space left on device") as said:
            book.build([places / "notebooks" / "00_a.ipynb"], build / "book")
        assert (build / "book" / "index.html").read_text() == "the last book"
        assert [file.name for file in build.iterdir()] == ["book"]
    happened(said.value)


@pytest.mark.fault("a file where build/ should be")
def test_a_file_called_build(places, capsys, happened):
    (places / "build").write_text("a file")
    assert run_notebooks.main(["run"]) == 1
    said = capsys.readouterr().err
    assert "could not be written: Not a directory" in said
    happened(said)


@pytest.mark.fault("a notebook that is none")
@pytest.mark.parametrize("content", [b"", b"{", b'{"cells": 1}', b"\xff", b"[" * 100_000, None])
def test_a_notebook_that_is_none(places, capsys, content, happened):
    file = places / "notebooks" / "00_a.ipynb"
    file.unlink()
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(content)
    assert run_notebooks.main(["run"]) == 1
    said = capsys.readouterr().err
    assert "00_a.ipynb cannot be read as a notebook" in said
    happened(said)


@pytest.mark.fault("a half-written notebook of an earlier run in build/")
def test_a_torn_notebook_of_an_earlier_run(places, happened):
    torn = places / "01_b.ipynb"
    text = nbformat.writes(new_notebook(cells=[new_code_cell("1", outputs=[
        new_output("stream", text="words")])]))
    torn.write_text(text[:-40])
    with pytest.raises(run_notebooks.NotebookStopped, match="01_b.ipynb cannot be read") as said:
        book.build([torn], places / "build" / "book")
    happened(said.value)
