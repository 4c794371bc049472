"""lm-eval through our arguments, against plain lm-eval and against scoring by hand."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import lm_eval
import pytest
from conftest import REPO

from helpers import WorkbookError, answers, client, evaluation, gsm8k, models

OFFICIAL = REPO / "data" / "gsm8k_sample"
TINY = SimpleNamespace(task="tiny_gsm8k")
REAL = SimpleNamespace(task="gsm8k")
ROWS = 8


@pytest.fixture(scope="module")
def module_workspace(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PHI4_FP8_WORKSPACE", str(tmp_path_factory.mktemp("evaluation")))
        yield


@pytest.fixture(scope="module")
def score(bf16_server, module_workspace) -> evaluation.Evaluation:
    return evaluation.run(bf16_server, TINY, "bf16", limit=ROWS)


@contextmanager
def proxy(server, fails_after: int | None = None):
    """A server-like object whose requests go to `server` and are kept.

    A request that was seen before is answered as it was then. `seen`: body to answer; `asked`: the
    number of requests. After `fails_after` answers every further one is 503.
    """
    front = SimpleNamespace(**{name: getattr(server, name) for name in (
        "api_key", "model_name", "model", "checkpoint", "kernel", "log_path", "patience",
        "why_away", "how_back")},
        seen={}, asked=0)
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            with lock:
                front.asked += 1
                refused = fails_after is not None and front.asked > fails_after
            key = json.dumps(json.loads(body), sort_keys=True)
            if refused:
                self.send_error(503)
                return
            if key not in front.seen:
                answer = client.session().post(
                    server.url + self.path, data=body, timeout=600, headers={
                        "Authorization": self.headers["Authorization"],
                        "Content-Type": "application/json"})
                answer.raise_for_status()
                front.seen[key] = answer.content
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(front.seen[key])

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    front.url = f"http://127.0.0.1:{http.server_port}"
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield front
    finally:
        http.shutdown()
        http.server_close()


@pytest.fixture
def idle():
    """What the functions that send nothing need of a server."""
    return SimpleNamespace(url="http://127.0.0.1:9", api_key="secret-key", model_name="tiny",
                           model=REPO / "data" / "tiny_phi4", kernel="unquantized",
                           checkpoint=models.tiny().checkpoint,
                           log_path=Path("vllm.log"), patience=0, why_away=lambda: "It is not up.",
                           how_back=lambda: "Start it")


# The task


def test_only_the_place_of_the_data_is_replaced(tmp_path, monkeypatch):
    from lm_eval.tasks._yaml_loader import load_yaml

    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(
            json.dumps({"question": "1 + 1?", "answer": "2\n#### 2"}) + "\n")
    monkeypatch.setenv("PHI4_FP8_GSM8K", str(tmp_path))
    ours, _ = gsm8k.task(REAL)
    plain = load_yaml(Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k.yaml")
    location = {"dataset_path", "dataset_name", "dataset_kwargs"}
    assert {k: v for k, v in ours.items() if k not in location} == {
        k: v for k, v in plain.items() if k not in location}
    assert ours["dataset_kwargs"]["data_files"]["test"] == str(tmp_path / "test.jsonl")


def test_gsm8k_is_lm_evals_own_without_the_variable(monkeypatch):
    monkeypatch.delenv("PHI4_FP8_GSM8K", raising=False)
    name, manager = gsm8k.task(REAL)
    assert name == "gsm8k" and "gsm8k" in manager.all_tasks


def test_a_directory_without_the_problems_is_refused(tmp_path, monkeypatch):
    (tmp_path / "train.jsonl").write_text("{}")
    monkeypatch.setenv("PHI4_FP8_GSM8K", str(tmp_path))
    with pytest.raises(WorkbookError, match="test.jsonl cannot be found"):
        gsm8k.task(REAL)


def test_a_missing_task_definition_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(gsm8k.workspace, "data", lambda *parts: tmp_path.joinpath(*parts))
    with pytest.raises(WorkbookError, match="no task definition"):
        gsm8k.task(TINY)


# The arguments


def test_the_arguments_are_the_cards_protocol(idle, tmp_workspace):
    arguments = evaluation.lm_eval_arguments(idle, TINY, "bf16")
    assert (arguments["num_fewshot"], arguments["limit"]) == (5, 100)
    asked = arguments["model"].arguments
    assert asked["max_gen_toks"] == arguments["model"]._max_gen_toks == 256
    assert not asked["add_bos_token"] and not arguments["apply_chat_template"]


def test_no_key_in_the_arguments_and_nothing_of_this_machine_on_the_page(
        idle, tmp_workspace, capsys):
    arguments = evaluation.lm_eval_arguments(idle, TINY, "bf16")
    assert idle.api_key not in repr(arguments) + repr(arguments["model"].arguments)
    evaluation.show(arguments)
    shown = capsys.readouterr().out
    assert "num_fewshot=5" in shown and "PORT" in shown and "max_gen_toks=256" in shown
    for private in (str(REPO), str(tmp_workspace), ":9/"):
        assert private not in shown


def test_unfinished_answers_are_kept_by_what_they_depend_on(idle, tmp_workspace):
    def place(server=idle, **protocol):
        return evaluation.lm_eval_arguments(server, TINY, "bf16", **protocol)["use_cache"]

    assert place() == place(limit=1319) == place(concurrency=2)
    other_kernel = SimpleNamespace(**{**vars(idle), "kernel": "MarlinFP8ScaledMMLinearKernel"})
    others = [place(max_new_tokens=64), place(bos=True), place(chat=True), place(num_fewshot=0),
              place(other_kernel)]
    assert len({place(), *others}) == 6


# The evaluation


def test_both_filters_are_scored_as_by_hand(score):
    assert score.n == len(score.samples) == ROWS
    patterns = {"strict-match": r"#### (\-?[0-9\.\,]+)",
                "flexible-extract": r"(-?[$0-9.,]{2,})|(-?[0-9]+)"}
    for name, pattern in patterns.items():
        hits = []
        for item in score.samples:
            found = re.findall(pattern, item["response"])
            if found and name == "flexible-extract":
                found = [next(part for part in found[-1] if part)]
            given = re.sub(r",|\$|\.$", "", found[0].strip()) if found else "[invalid]"
            hits.append(int(given == item["target"].split("#### ")[1].replace(",", "")))
        assert evaluation.correct(score, name) == hits
        assert score.results[name][0] == pytest.approx(sum(hits) / ROWS)


def test_the_rows_are_the_first_of_the_test_set_with_five_shots(score):
    with open(REPO / "data" / "tiny_gsm8k" / "test.jsonl") as lines:
        questions = [json.loads(next(lines))["question"] for _ in range(ROWS)]
    assert [item["question"] for item in score.samples] == questions
    for item in score.samples:
        assert item["prompt"].count("Question: ") == 6 and item["response"].strip()
        assert item["prompt"].endswith(f"Question: {item['question']}\nAnswer:")


def test_the_table_has_the_model_cards_form(score, capsys):
    answers.print_table(score)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "bf16:"
    head, rule, flexible, strict = (re.split(r"\s*\|\s*", line) for line in lines[2:6])
    assert head[1:-1] == ["Tasks", "Version", "Filter", "n-shot", "Metric", "", "Value", "",
                          "Stderr"]
    assert flexible[1:7] == ["tiny_gsm8k", "3", "flexible-extract", "5", "exact_match", "↑"]
    assert strict[3] == "strict-match"
    for line, name in ((flexible, "flexible-extract"), (strict, "strict-match")):
        assert float(line[7]) == pytest.approx(score.results[name][0], abs=5e-5)
        assert line[8] == "±" and float(line[9]) == pytest.approx(score.results[name][1], abs=5e-5)


def test_the_items_are_kept(score, bf16_server, module_workspace):
    saved = Path(os.environ["PHI4_FP8_WORKSPACE"]) / "results" / "tiny_gsm8k-bf16.json"
    assert bf16_server.api_key not in saved.read_text()
    assert json.loads(saved.read_text()) == json.loads(json.dumps(asdict(score)))


def test_a_finished_evaluation_leaves_no_cache_and_no_key(score, module_workspace):
    results = Path(os.environ["PHI4_FP8_WORKSPACE"]) / "results"
    assert not list((results / "unfinished").iterdir())
    assert "OPENAI_API_KEY" not in os.environ


def test_the_ledger_row_has_what_a_comparison_needs(score):
    row = evaluation.ledger_row(score)
    assert row["work"] == {"task": "tiny_gsm8k", "limit": ROWS, "version": 3.0, "num_fewshot": 5,
                           "max_new_tokens": 256, "bos": False, "chat": False}
    for name in ("strict-match", "flexible-extract"):
        pair = row["metrics"][name], row["metrics"][f"{name}_stderr"]
        assert pair == score.results[name]
    json.dumps(row)


def test_the_ledger_row_of_an_arm_counts_what_it_lost_and_gained(score):
    changed = [dict(item, exact_match=dict(item["exact_match"])) for item in score.samples]
    for item in changed[:3]:
        item["exact_match"]["strict-match"] ^= 1
    were_right = sum(item["exact_match"]["strict-match"] for item in score.samples[:3])
    metrics = evaluation.ledger_row(replace(score, samples=changed), score)["metrics"]
    assert (metrics["lost"], metrics["gained"]) == (were_right, 3 - were_right)
    assert "lost" not in evaluation.ledger_row(score, score)["metrics"]


def test_it_runs_beside_a_notebooks_event_loop(bf16_server, tmp_workspace):
    async def cell():
        return evaluation.run(bf16_server, TINY, "bf16", limit=2, concurrency=2)

    assert asyncio.run(cell()).n == 2


def test_the_chat_form_is_another_prompt(bf16_server, tmp_workspace):
    found = evaluation.run(bf16_server, TINY, "chat", limit=2, concurrency=2, chat=True,
                           max_new_tokens=16)
    assert found.config["chat"] and found.config["max_new_tokens"] == 16
    assert found.samples[0]["prompt"].count("<|im_start|>") == 12  # 6 asked, 5 answered, 1 open


def test_flips_are_the_items_off_the_diagonal(score):
    changed = [dict(item, exact_match=dict(item["exact_match"])) for item in score.samples]
    for item in changed[:3]:
        item["exact_match"]["strict-match"] ^= 1
    other = replace(score, arm="fp8", samples=changed)
    found = answers.flips(score, other)
    assert found["doc_id"].tolist() == [item["doc_id"] for item in changed[:3]]
    assert found["change"].tolist() == [
        "lost" if right else "gained" for right in evaluation.correct(score)[:3]]
    assert answers.flips(score, score).empty


def test_side_by_side_marks_the_words_that_differ(score):
    item = score.samples[0]
    one = replace(score, samples=[dict(item, response=" 3 + 4 = 7 <b>\n#### 7")])
    other = replace(score, arm="fp8", samples=[dict(item, response=" 3 + 4 = 8 <b>\n#### 8")])
    page = answers.side_by_side(one, other, item["doc_id"]).data
    assert "3 + 4 = <mark>7</mark> &lt;b&gt;\n#### <mark>7</mark>" in page
    assert "3 + 4 = <mark>8</mark> &lt;b&gt;\n#### <mark>8</mark>" in page


# Interrupted, and broken

CHILD = """
import json, sys
from pathlib import Path
from types import SimpleNamespace
from helpers import checkpoint, evaluation
front = SimpleNamespace(**json.loads(sys.argv[1]))
front.checkpoint, front.patience = checkpoint.verified(front.model), 0
evaluation.run(front, SimpleNamespace(task="tiny_gsm8k"), "bf16", limit=16, concurrency=2)
"""


def test_a_killed_evaluation_asks_only_for_the_missing_rows(bf16_server, tmp_workspace):
    with proxy(bf16_server) as front:
        told = {name: str(getattr(front, name)) for name in
                ("url", "api_key", "model_name", "model", "kernel", "log_path")}
        child = subprocess.Popen([sys.executable, "-c", CHILD, json.dumps(told)], cwd=REPO,
                                 stderr=subprocess.DEVNULL)
        while front.asked < 8:
            assert child.poll() is None
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
        child.wait()
        at_kill = len(front.seen)
        front.asked = 0
        found = evaluation.run(front, TINY, "bf16", limit=16, concurrency=2)
    assert found.n == 16
    # two were under way, and the cache's writer may not have reached the disk with one or two more
    assert 16 - at_kill <= front.asked <= 16 - at_kill + 5
    assert front.asked < 12


def test_a_server_that_stops_answering_is_one_paragraph(bf16_server, tmp_workspace):
    with (proxy(bf16_server, fails_after=3) as front,
          pytest.raises(WorkbookError, match="did not answer a request") as caught):
        evaluation.run(front, TINY, "bf16", limit=6, concurrency=2)
    assert "3 of 6 answers" in caught.value.meaning
    assert "only the missing rows" in caught.value.remedy
    assert "OPENAI_API_KEY" not in os.environ


def test_no_server_at_all(idle, tmp_workspace):
    with pytest.raises(WorkbookError, match="did not answer"):
        evaluation.run(idle, TINY, "bf16", limit=2)


# The real gsm8k


def test_ten_real_rows_are_plain_lm_evals_item_by_item(
        bf16_server, tmp_workspace, tmp_path, monkeypatch):
    """Plain: lm-eval's gsm8k.yaml included, its data's place overridden, nothing of ours."""
    official = Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k.yaml"
    (tmp_path / "gsm8k.yaml").write_text(
        f"include: {official}\ndataset_path: json\ndataset_name: null\n"
        f"dataset_kwargs:\n  data_dir: {OFFICIAL}\n")
    with proxy(bf16_server) as front:
        monkeypatch.setenv("PHI4_FP8_GSM8K", str(OFFICIAL))
        ours = evaluation.run(front, REAL, "bf16", limit=10)
        requests = set(front.seen)
        assert len(requests) == 10
        monkeypatch.setenv("OPENAI_API_KEY", front.api_key)
        plain = lm_eval.simple_evaluate(
            model="local-completions", tasks=[str(tmp_path / "gsm8k.yaml")], limit=10,
            model_args=f"model={front.model_name},base_url={front.url}/v1/completions,"
                       f"tokenizer={front.model},tokenizer_backend=huggingface,num_concurrent=4",
            task_manager=lm_eval.tasks.TaskManager(include_defaults=False))
        assert set(front.seen) == requests  # byte for byte the same requests, so the same prompts
    for sample in plain["samples"]["gsm8k"]:
        item, name = ours.samples[sample["doc_id"]], sample["filter"]
        assert item["prompt"] == sample["arguments"][0][0]
        assert item["response"] == sample["resps"][0][0]
        assert item["extracted"][name] == sample["filtered_resps"][0]
        assert item["exact_match"][name] == sample["exact_match"]
    for name in evaluation.FILTERS:
        assert ours.results[name] == (plain["results"]["gsm8k"][f"exact_match,{name}"],
                                      plain["results"]["gsm8k"][f"exact_match_stderr,{name}"])
    assert ours.table == lm_eval.utils.make_table(plain)
