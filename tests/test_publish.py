"""Publishing, as far as it goes without a hub; tests/faults/test_publishing.py has one."""

import shutil

import pytest

from helpers import WorkbookError, card, checkpoint, models, publish


def test_a_dry_run_lists_exactly_what_would_be_sent(tiny_fp8):
    made = card.model_card(models.PHI4, [])
    files = publish.publish(tiny_fp8, made, "me/mine")
    there = {file.name for file in tiny_fp8.path.iterdir()} - {"MANIFEST.json"}
    assert files[0] == "README.md" and set(files[1:]) == there


def test_nothing_is_published_without_a_token_or_from_a_damaged_checkpoint(tiny_fp8, tmp_path):
    made = card.model_card(models.PHI4, [])
    with pytest.raises(WorkbookError, match="no token"):
        publish.publish(tiny_fp8, made, "me/mine", really=True)
    copy = shutil.copytree(tiny_fp8.path, tmp_path / "copy")
    opened = checkpoint.verified(copy)
    (copy / "config.json").write_text("{}")
    with pytest.raises(WorkbookError, match="config.json has"):
        publish.publish(opened, made, "me/mine")
