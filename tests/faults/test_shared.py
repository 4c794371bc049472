"""A room's shared server: it goes away and comes back, and thirty people ask it at once."""

import statistics
import threading
import time
from concurrent import futures
from pathlib import Path
from types import SimpleNamespace

import lm_eval
import pytest
import serve
from on_a_gpu import beside_others

from helpers import WorkbookError, address, course, evaluation, models, serving, shared
from helpers.serve_side import about

PEOPLE, ROWS = 30, 20
KEY = "a-key-of-the-room"


@pytest.fixture
def opened(tmp_workspace, monkeypatch):
    monkeypatch.setenv(models.VARIABLE, "tiny-phi4")
    return course.open_course()


@pytest.fixture
def start(opened, tmp_path, tiny_base):
    """Starts the room's server, and starts it again: the same port and key."""
    port, file, started = address.free_port(()), tmp_path / "about.json", []

    def start() -> serving.VllmServer:
        flags = [*serve.flags(opened, {"bf16": tiny_base}, "bf16"), *beside_others(opened.mode)]
        server = serving.VllmServer(tiny_base, flags, port=port, key=KEY,
                                    env={about.VARIABLE: str(file)})
        started.append(server.start())
        serve.describe(opened, "bf16", server, file)
        return server

    yield start
    serving.stop_together(started)


def kept() -> int:
    import sqlite3

    for file in (Path(evaluation.workspace.root()) / "results" / "unfinished").glob("*.db"):
        with sqlite3.connect(file) as cache:
            return cache.execute("SELECT count(*) FROM unnamed").fetchone()[0]
    return 0


@pytest.mark.slow
@pytest.mark.fault("a shared server goes away during an evaluation, and comes back")
def test_an_evaluation_goes_on_when_the_server_is_back(start, happened, capsys):
    first = start()
    server = shared.SharedServer(first.url, KEY)

    def away_and_back():
        while kept() < 10:
            time.sleep(0.01)
        first.stop()
        time.sleep(2)
        start()

    restart = threading.Thread(target=away_and_back)
    restart.start()
    found = evaluation.run(server, server.profile, "bf16", limit=60, concurrency=4)
    restart.join()
    assert found.n == 60 and all(item["response"] for item in found.samples)
    assert "waiting for the server" in capsys.readouterr().out
    happened("it waits, says so, and goes on: all 60 rows are answered")


@pytest.mark.slow
@pytest.mark.fault("a shared server goes away and stays away")
def test_a_server_that_stays_away_is_a_sentence(start, monkeypatch, happened):
    monkeypatch.setattr(shared.SharedServer, "patience", 5)
    first = start()
    server = shared.SharedServer(first.url, KEY)
    first.stop()
    with pytest.raises(WorkbookError, match="did not answer a request") as said:
        evaluation.run(server, server.profile, "bf16", limit=4)
    assert "are kept" in said.value.meaning and "tunnel" in said.value.remedy
    with pytest.raises(WorkbookError, match="does not answer"):
        server.complete("1")
    happened(f"{said.value.what} {said.value.meaning}")


def thirty(server: shared.SharedServer, rows: int, people: int = PEOPLE) -> SimpleNamespace:
    """So many evaluations at once, each with a cache of its own; their answers and seconds."""
    arguments = [evaluation.lm_eval_arguments(server, server.profile, f"person {n}", limit=rows)
                 for n in range(people)]
    for n, each in enumerate(arguments):
        each["use_cache"] += f"-{n:02}"  # no name begins another
    began = time.monotonic()

    def evaluate(number: int) -> tuple[evaluation.Evaluation, float]:
        results = lm_eval.simple_evaluate(**arguments[number])
        return evaluation.collect(results, f"person {number}"), time.monotonic() - began

    with evaluation.in_words(), futures.ThreadPoolExecutor(people) as everybody:
        found = list(everybody.map(evaluate, range(people)))
    return SimpleNamespace(scores=[score for score, _ in found], took=[took for _, took in found],
                           whole=time.monotonic() - began)


@pytest.mark.slow
@pytest.mark.fault("thirty people evaluate at once against one server")
def test_thirty_evaluations_at_once(start, happened):
    server = shared.SharedServer(start().url, KEY)
    alone = evaluation.run(server, server.profile, "alone", limit=ROWS)
    found = thirty(server, ROWS)
    assert [score.n for score in found.scores] == [ROWS] * PEOPLE
    for score in found.scores:
        assert [item["doc_id"] for item in score.samples] == list(range(ROWS))
        assert all(item["response"] for item in score.samples)
        # another batch rounds otherwise: an answer or two may flip, none is lost
        flipped = sum(a != b for a, b in zip(evaluation.correct(alone), evaluation.correct(score),
                                             strict=True))
        assert flipped <= 2
    happened(f"{PEOPLE} of {PEOPLE} finish, {PEOPLE * ROWS} answers, none lost; the last after "
             f"{found.whole:.0f} s, the median after {statistics.median(found.took):.0f} s")
