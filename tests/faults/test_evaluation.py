"""Faults of an evaluation: its server, its disk, its problems, and who can listen."""

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import lm_eval
import pytest
import stand_in
from on_a_gpu import server_flags

from helpers import WorkbookError, evaluation, gsm8k, serving, workspace

TINY = SimpleNamespace(task="tiny_gsm8k")
REAL = SimpleNamespace(task="gsm8k")
KEY = "the-servers-key"

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="a disk of one's own needs root to mount")


@pytest.fixture(autouse=True)
def own_workspace(tmp_workspace):
    """Every fault has a workspace of its own."""


@contextlib.contextmanager
def disk(place, size: str):
    """A disk of `size` at `place`; yields a function that makes it read-only."""
    place.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", place], check=True)
    try:
        yield lambda: subprocess.run(["mount", "-o", "remount,ro", place], check=True)
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


# Who can listen


@pytest.mark.fault("an evaluation with HTTP_PROXY set")
@pytest.mark.parametrize("concurrency", [1, 4], ids=["one at a time", "four at once"])
def test_nothing_of_an_evaluation_goes_to_a_proxy(concurrency, monkeypatch, happened):
    with stand_in.vllm() as server, stand_in.proxy(monkeypatch) as leaked:
        found = evaluation.run(server, TINY, "bf16", limit=4, concurrency=concurrency)
    assert leaked == [] and len(server.asked) == 4
    assert {request.headers["Authorization"] for request in server.asked} == {f"Bearer {KEY}"}
    happened(f"{found.n} of {found.n} requests went to the server, none to the proxy")


@pytest.mark.fault("a ~/.netrc with an entry for every host")
def test_an_evaluation_keeps_its_key_beside_a_netrc(tmp_path, monkeypatch, happened):
    (tmp_path / ".netrc").write_text("default login reader password theirs\n")
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    with stand_in.vllm() as server:
        evaluation.run(server, TINY, "bf16", limit=2)
    assert {request.headers["Authorization"] for request in server.asked} == {f"Bearer {KEY}"}
    happened("the server's own key was sent")


# The server


@pytest.mark.fault("a request that vLLM refuses during an evaluation")
def test_a_refused_request_is_said_at_once(happened):
    refusal = json.dumps({"error": {"message": "maximum context length is 512"}}).encode()
    with (stand_in.vllm(lambda request: (400, refusal)) as server,
          pytest.raises(WorkbookError, match="refused a request \\(HTTP 400\\)") as said):
        evaluation.run(server, TINY, "bf16", limit=2, concurrency=1)
    assert "maximum context length is 512" in said.value.meaning
    # The second row may have been on its way; what was refused is not asked again.
    prompts = [str(json.loads(request.body)["prompt"]) for request in server.asked]
    assert len(prompts) == len(set(prompts))
    happened(said.value)


@pytest.mark.fault("another program answers at the server's port")
@pytest.mark.parametrize("body", [
    b"<html>Log in to the network</html>", b'{"choices": []}', b'{"object": "list"}', b"[]",
    b'{"choices": [{"index": 5, "text": "2"}]}', b'{"choices": [{"index": 0, "text": 2}]}'],
    ids=["a page", "no choice", "no choices", "a list", "a choice too many", "a number"])
def test_an_answer_that_is_no_completion(body, happened):
    with (stand_in.vllm(lambda request: (200, body)) as server,
          pytest.raises(WorkbookError, match="something that is no completion") as said):
        evaluation.run(server, TINY, "bf16", limit=2)
    happened(said.value)


@pytest.mark.fault("a server that answers with nothing but an end")
def test_an_answer_that_is_null_is_wrong_and_not_an_error(happened):
    silent = json.dumps({"choices": [{"index": 0, "text": None}]}).encode()
    with stand_in.vllm(lambda request: (200, silent)) as server:
        found = evaluation.run(server, TINY, "bf16", limit=3)
    assert [item["response"] for item in found.samples] == ["", "", ""]
    assert found.results["strict-match"][0] == found.results["flexible-extract"][0] == 0
    happened("three empty answers, scored as wrong")


@pytest.mark.fault("a server that fails for a moment")
def test_a_request_that_failed_once_is_asked_again(happened):
    with stand_in.vllm(lambda request: (503, b"") if request.number == 1
                       else (200, stand_in.COMPLETION)) as server:
        found = evaluation.run(server, TINY, "bf16", limit=2, concurrency=1)
    assert found.n == 2 and len(server.asked) == 3
    happened("asked again, and answered")


STOPPED = """
import sys, threading, time, os, signal
from types import SimpleNamespace
import stand_in
from helpers import evaluation
def answer(request):
    if request.number > 2:
        if request.number == 3:
            threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT)).start()
        time.sleep(600)
    return 200, stand_in.COMPLETION
with stand_in.vllm(answer) as server:
    try:
        evaluation.run(server, SimpleNamespace(task="tiny_gsm8k"), "bf16", limit=6, concurrency=2)
    except KeyboardInterrupt:
        print("STOPPED", flush=True)
        os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.fault("Ctrl-C while the server is silent")
def test_an_interrupted_evaluation_stops_at_once_and_keeps_its_answers(happened):
    child = subprocess.run([sys.executable, "-c", STOPPED], cwd=workspace.repo() / "tests",
                           capture_output=True, text=True, timeout=500,  # it is silent for 600 s
                           env={**os.environ, "PYTHONPATH": str(workspace.repo())})
    assert "STOPPED" in child.stdout, child.stderr
    assert "stopped after 2 of 6 answers" in child.stdout
    with stand_in.vllm() as server:
        found = evaluation.run(server, TINY, "bf16", limit=6, concurrency=2)
    assert found.n == 6 and len(server.asked) == 4
    happened("stopped; the next run asked for the four rows that were missing")


def kept() -> int:
    """How many answers the unfinished evaluation has on the disk."""
    for file in (workspace.root() / "results").rglob("*.db"):
        with contextlib.closing(sqlite3.connect(file)) as cache, contextlib.suppress(sqlite3.Error):
            return cache.execute("SELECT count(*) FROM unnamed").fetchone()[0]
    return 0


@pytest.mark.slow
@pytest.mark.fault("vLLM is killed half-way through an evaluation")
def test_an_evaluation_goes_on_after_its_server_was_killed(tiny_base, happened):
    flags = server_flags()
    with serving.VllmServer(tiny_base, flags) as server:
        def kill():
            while kept() < 20:
                time.sleep(0.01)
            for process in serving.processes(server):
                process.kill()

        killer = threading.Thread(target=kill)
        killer.start()
        with pytest.raises(WorkbookError, match="bf16 server did not answer") as said:
            evaluation.run(server, TINY, "bf16", limit=200, concurrency=2)
        killer.join()
    arrived = int(said.value.meaning.split()[0])
    assert 20 <= arrived < 200
    with serving.VllmServer(tiny_base, flags) as server:
        arguments = evaluation.lm_eval_arguments(server, TINY, "bf16", limit=200)
        asked, ask = [], arguments["model"].generate_until
        arguments["model"].generate_until = lambda requests: asked.extend(requests) or ask(requests)
        with evaluation.in_words():
            found = evaluation.collect(lm_eval.simple_evaluate(**arguments), "bf16")
    assert found.n == 200
    # Two were under way when it was killed, and may have arrived after the error was counted.
    assert 200 - arrived - 2 <= len(asked) <= 200 - arrived
    happened(said.value)


# The disk


@as_root
@pytest.mark.fault("the disk fills up during an evaluation")
def test_answers_that_cannot_be_kept_any_more(tmp_workspace, happened, capfd):
    with disk(tmp_workspace, "160k"):
        long = json.dumps({"choices": [{"index": 0, "text": "1 " * 20_000}]}).encode()
        with (stand_in.vllm(lambda request: (200, long)) as server,
              pytest.raises(WorkbookError, match="cannot be kept on the disk") as said):
            evaluation.run(server, TINY, "bf16", limit=30, concurrency=2)
        assert len(server.asked) < 30
    assert "Traceback" not in capfd.readouterr().err
    happened(said.value)


@as_root
@pytest.mark.fault("a read-only workspace for an evaluation")
def test_a_workspace_that_cannot_be_written_to(tmp_workspace, happened, capfd):
    with disk(tmp_workspace, "1m") as read_only:
        (tmp_workspace / "results" / "unfinished").mkdir(parents=True)
        read_only()
        with (stand_in.vllm() as server,
              pytest.raises(WorkbookError, match="cannot be written: Read-only") as said):
            evaluation.run(server, TINY, "bf16", limit=2)
    assert server.asked == [] and "Traceback" not in capfd.readouterr().err
    happened(said.value)


@pytest.mark.fault("a file where the results' folder should be")
def test_a_file_in_place_of_the_results(tmp_workspace, happened):
    (workspace.root() / "results").write_text("mine")
    with (stand_in.vllm() as server,
          pytest.raises(WorkbookError, match="results is a file, and should be a folder") as said):
        evaluation.run(server, TINY, "bf16", limit=2)
    assert server.asked == [] and (tmp_workspace / "results").read_text() == "mine"
    happened(said.value)


@as_root
@pytest.mark.fault("the finished results cannot be saved")
def test_results_that_cannot_be_saved_are_not_asked_for_again(tmp_workspace, happened):
    results = tmp_workspace / "results"
    with disk(results, "1m") as read_only, disk(results / "unfinished", "1m"):
        read_only()
        with stand_in.vllm() as server, pytest.raises(WorkbookError) as said:
            evaluation.run(server, TINY, "bf16", limit=3)
        assert len(server.asked) == 3
        subprocess.run(["mount", "-o", "remount,rw", results], check=True)
        with stand_in.vllm() as server:
            found = evaluation.run(server, TINY, "bf16", limit=3)
        assert server.asked == [] and found.n == 3
        assert json.loads((results / "tiny_gsm8k-bf16.json").read_text())["n"] == 3
    happened(said.value)


@pytest.mark.fault("a damaged file of an interrupted evaluation")
@pytest.mark.parametrize("damage", ["torn", "overwritten", "emptied"])
def test_a_damaged_cache_is_not_used(damage, happened, capfd):
    with stand_in.vllm() as server:
        arguments = evaluation.lm_eval_arguments(server, TINY, "bf16", limit=3)
        with evaluation.in_words():
            lm_eval.simple_evaluate(**arguments)  # and never collected
        (kept,) = (workspace.root() / "results" / "unfinished").iterdir()
        whole = kept.read_bytes()
        kept.write_bytes({"torn": whole[:len(whole) // 2], "overwritten": b"x" * len(whole),
                          "emptied": b""}[damage])
        found = evaluation.run(server, TINY, "bf16", limit=3)
    assert found.n == 3 and len(server.asked) == 6
    said = capfd.readouterr()
    assert "Traceback" not in said.err
    if damage != "emptied":  # an empty file is an empty cache
        assert "damaged: all rows are asked again" in said.out
    happened("said, and all rows were asked again")


@pytest.mark.fault("an arm's name with slashes and dots")
def test_a_name_with_a_slash_stays_in_the_results(happened):
    with stand_in.vllm() as server:
        evaluation.run(server, TINY, "../../My org/phi-4: FP8", limit=2)
    saved, folder = sorted((workspace.root() / "results").iterdir())
    assert (saved.name, folder.name) == ("tiny_gsm8k-..-..-my-org-phi-4-fp8.json", "unfinished")
    happened(f"saved as {saved.name}")


# The problems


GOOD = json.dumps({"question": "1 + 1?", "answer": "1 + 1 = 2\n#### 2"}) + "\n"


@pytest.mark.fault("PHI4_FP8_GSM8K names broken problems")
@pytest.mark.parametrize(("broken", "says"), [
    (GOOD + GOOD[:30], "line 2"), ("", "it is empty"), (GOOD + "\n" + GOOD, "line 2"),
    (GOOD + '{"question": "1 + 1?"}\n', "line 2 has no question and answer"),
    (GOOD + '{"question": 2, "answer": "#### 2"}\n', "line 2 has no question"),
    (GOOD + '{"question": "1?", "answer": "2"}\n', "line 2 has no question, or an answer without"),
    (GOOD + "[" * 100_000, "line 2"), (GOOD + "17\n", "line 2"), (b"\xff\xfe\x00", "line 1"),
], ids=["cut off", "empty", "an empty line", "no answer", "a number", "no ####", "brackets",
        "another form", "not text"])
def test_broken_problems_are_refused_by_line(broken, says, tmp_path, monkeypatch, happened):
    (tmp_path / "train.jsonl").write_text(GOOD * 6)
    test = tmp_path / "test.jsonl"
    test.write_bytes(broken if isinstance(broken, bytes) else broken.encode())
    monkeypatch.setenv(gsm8k.VARIABLE, str(tmp_path))
    with pytest.raises(WorkbookError, match="no file of GSM8K problems") as said:
        gsm8k.task(REAL)
    assert says in said.value.what and str(test) in said.value.what
    happened(said.value)


@pytest.mark.fault("PHI4_FP8_GSM8K under ~, or relative")
@pytest.mark.parametrize("named", ["~/problems", "{}/problems"], ids=["home", "relative"])
def test_a_place_under_home_is_found(named, tmp_path, monkeypatch, happened):
    (tmp_path / "problems").mkdir()
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / "problems" / name).write_text(GOOD * 6)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(gsm8k.VARIABLE, named.format(os.path.relpath(tmp_path, workspace.repo())))
    found, _ = gsm8k.task(REAL)
    assert found["dataset_kwargs"]["data_files"]["test"] == str(tmp_path / "problems/test.jsonl")
    happened("the problems were found")


OFFLINE = """
import sys, os
sys.path[:0] = [os.getcwd(), os.getcwd() + "/tests"]
from types import SimpleNamespace
import stand_in
from helpers import WorkbookError, evaluation
try:
    with stand_in.vllm() as server:
        evaluation.run(server, SimpleNamespace(task=sys.argv[1]), "bf16", limit=2)
except WorkbookError as error:
    print(error)
"""


def in_a_process(task: str, **env: str) -> str:
    done = subprocess.run([sys.executable, "-c", OFFLINE, task], cwd=workspace.repo(), text=True,
                          capture_output=True, timeout=200, env={**os.environ, **env})
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.fault("gsm8k without a network and without PHI4_FP8_GSM8K")
def test_a_hub_out_of_reach(tmp_path, happened):
    said = in_a_process("gsm8k", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path), PHI4_FP8_GSM8K="")
    assert "could not be had" in said and "Set PHI4_FP8_GSM8K" in said
    happened(said)


@as_root
@pytest.mark.slow
@pytest.mark.fault("the Hugging Face cache is read-only or full")
@pytest.mark.parametrize("how", ["read-only", "full"])
def test_a_cache_that_cannot_be_written_to(how, tmp_path, happened):
    problems = tmp_path / "problems"
    problems.mkdir()
    for name in ("train.jsonl", "test.jsonl"):
        (problems / name).write_text(GOOD * 6)
    with disk(tmp_path / "hf", "64k") as read_only:
        if how == "full":
            with contextlib.suppress(OSError):
                (tmp_path / "hf" / "filler").write_bytes(bytes(2**20))
        else:
            read_only()
        said = in_a_process("gsm8k", HF_HOME=str(tmp_path / "hf"), PHI4_FP8_GSM8K=str(problems))
    assert "The problems cannot be prepared" in said and "HF_HOME" in said
    happened(said)


# What is asked for


@pytest.mark.fault("an evaluation of one row, of none, or with no requests at once")
@pytest.mark.parametrize("protocol", [
    {"limit": 1}, {"limit": 0}, {"limit": -3}, {"concurrency": 0}, {"max_new_tokens": 0},
    {"num_fewshot": -1}], ids=str)
def test_numbers_that_make_no_evaluation(protocol, happened):
    with (stand_in.vllm() as server,
          pytest.raises(WorkbookError, match="nothing can be evaluated") as said):
        evaluation.run(server, TINY, "bf16", **{"limit": 2, **protocol})
    happened(said.value)


@pytest.mark.fault("more new tokens than a request can hold")
def test_new_tokens_that_leave_no_room_for_a_prompt(happened):
    with (stand_in.vllm() as server,
          pytest.raises(WorkbookError, match="leave no room for a prompt") as said):
        evaluation.run(server, TINY, "bf16", limit=2, max_new_tokens=2047)
    assert server.asked == []
    happened(said.value)


@pytest.mark.fault("prompts that are cut to fit")
def test_prompts_that_lose_their_beginning_are_said(happened, capsys):
    with stand_in.vllm() as server:
        evaluation.run(server, TINY, "bf16", limit=2, max_new_tokens=1900)
    lengths = {len(json.loads(request.body)["prompt"][0]) for request in server.asked}
    assert lengths == {147}
    said = capsys.readouterr().out
    assert "2 of 2 prompts are longer than the 147 tokens that fit" in said
    happened(said)


@pytest.mark.fault("lm-eval's bars in a new version")
def test_no_bar_and_no_warning_is_on_the_page(capfd, happened):
    with stand_in.vllm() as server:
        evaluation.run(server, TINY, "bf16", limit=2)
    said = capfd.readouterr()
    assert "it/s" not in said.err + said.out and "%|" not in said.err + said.out
    assert "bf16: 2 answers in" in said.out
    happened(said.out)


