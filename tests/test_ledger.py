"""The ledger: appended under a lock, validated, mended around a damaged line."""

import json
import multiprocessing
import subprocess
import sys

import pytest
from conftest import REPO

from helpers import ledger

MODEL = {"profile": "tiny-phi4", "repo": "bundled", "revision": "1"}


def add(file, arm="fp8", n=1, **metrics):
    for _ in range(n):
        row = ledger.record("gsm8k", arm, {"limit": 100}, metrics or {"strict-match": 0.9},
                            model=MODEL, mode="cpu-w8a16", kernel="K", ledger=file)
    return row


def test_a_result_carries_its_provenance(tmp_path):
    file = tmp_path / "ledger.jsonl"
    written = add(file)
    (row,) = ledger.read(file)
    assert row == written
    head = subprocess.run(["git", "-C", REPO, "rev-parse", "HEAD"], capture_output=True, text=True)
    assert row["commit"].rstrip("+") == head.stdout.strip()
    assert row["versions"]["llmcompressor"] == "0.14.0.1"
    assert row["versions"]["vllm"] == "0.32.0"
    assert row["hardware"]["cores"] >= 1 and row["time"].endswith("+00:00")


def test_two_processes_writing_at_once_lose_nothing(tmp_path):
    file = tmp_path / "ledger.jsonl"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=add, args=(file, arm, 25)) for arm in ("bf16", "fp8")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    rows = ledger.read(file)
    assert len({row["id"] for row in rows}) == 50
    assert {arm: sum(r["arm"] == arm for r in rows) for arm in ("bf16", "fp8")} == {
        "bf16": 25, "fp8": 25}


def test_a_damaged_line_is_reported_and_the_rest_kept(tmp_path):
    file = tmp_path / "ledger.jsonl"
    first = add(file)
    with open(file, "a") as handle:
        handle.write('{"schema": 1, "id": "half a li')  # a writer that died, no newline
    last = add(file)
    with pytest.warns(UserWarning, match="line 2 is skipped: not JSON"):
        assert ledger.read(file) == [first, last]


@pytest.mark.parametrize("change, says", [
    ({"schema": 99}, "schema 99"), ({"arm": "int3"}, "unknown experiment or arm"),
    ({"metrics": [1]}, "metrics is not dict"), ({"model": {}}, "model lacks profile"),
])
def test_a_line_of_another_form_is_skipped_with_its_fault(tmp_path, change, says):
    file = tmp_path / "ledger.jsonl"
    good = add(file)
    with open(file, "a") as handle:
        handle.write(json.dumps(good | change) + "\n")
    with pytest.warns(UserWarning, match=says):
        assert ledger.read(file) == [good]


def test_what_is_no_row_is_not_written(tmp_path):
    file = tmp_path / "ledger.jsonl"
    with pytest.raises(ValueError, match="unknown experiment or arm"):
        add(file, arm="int3")
    assert ledger.read(file) == []


def test_latest_is_the_newest_of_its_arm_and_profile(tmp_path):
    file = tmp_path / "ledger.jsonl"
    add(file, "bf16")
    newest = add(file, "bf16")
    add(file, "fp8")
    assert ledger.latest("gsm8k", "bf16", "tiny-phi4", file) == newest
    assert ledger.latest("gsm8k", "bf16", "phi-4", file) is None
    assert ledger.latest("throughput", "bf16", ledger=file) is None


def test_several_ledgers_become_one_table_with_each_row_once(tmp_path):
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    add(one)
    two.write_text(one.read_text())
    add(two, "bf16")
    assert len(ledger.merge([one, two])) == 2
    shown = subprocess.run([sys.executable, "-m", "helpers.ledger", one, two], cwd=REPO,
                           capture_output=True, text=True, check=True).stdout
    assert len(shown.strip().splitlines()) == 3 and "strict-match 0.9" in shown


def test_published_rows_are_shown_with_their_source():
    shown = ledger.published_table()
    assert "0.93 ± 0.0256" in set(shown["value"])
    assert all(shown["source"])
    assert set(ledger.published_table("throughput")["value"]) == {"17", "32"}
