"""gsm8k through lm-eval, item by item.

The notebook calls `lm_eval.simple_evaluate` itself, with the arguments made here:

    arguments = evaluation.lm_eval_arguments(server, profile, "bf16")
    with evaluation.in_words():
        results = lm_eval.simple_evaluate(**arguments)
    score = evaluation.collect(results, "bf16")

An evaluation that was interrupted goes on where it stopped: lm-eval's own cache keeps each answer
as it arrives, under a name made of everything the answers depend on, and `collect` removes it.
"""

import contextlib
import hashlib
import json
import re
import sqlite3
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

from helpers import WorkbookError, gsm8k, lm_client, stats, workspace
from helpers.arm_names import titled
from helpers.endpoint import Endpoint
from helpers.models import Profile

FILTERS = ("strict-match", "flexible-extract")


@dataclass(frozen=True)
class Evaluation:
    """One arm's answers to one task.

    `results`: filter name to (exact_match, its standard error), both fractions. `samples`: one
    dict per item with doc_id, question, target, prompt, response, and by filter name `extracted`
    and `exact_match` (1 or 0). `config`: the protocol. `table`: lm-eval's own table of the results.
    """

    arm: str
    task: str
    n: int
    results: dict[str, tuple[float, float]]
    samples: list[dict]
    config: dict
    table: str


def lm_eval_arguments(server: Endpoint, profile: Profile, arm: str, limit: int | None = 100, *,
                      num_fewshot: int = 5, concurrency: int = 8, max_new_tokens: int = 256,
                      bos: bool = False, chat: bool = False) -> dict:
    """Keyword arguments for `lm_eval.simple_evaluate` against a running server.

    The defaults are our baseline. The published model card states 100 rows (here the first;
    `limit=None` takes all) and 5-shot; greedy is the task's own. 256 new tokens, no BOS and the
    plain few-shot form are lm-eval's defaults, of which the card says nothing. `arm` is what the
    line of progress calls it.
    """
    if min(concurrency, max_new_tokens, num_fewshot + 1) < 1 or (limit is not None and limit < 2):
        raise WorkbookError(
            f"{limit} rows, {num_fewshot} examples, {max_new_tokens} new tokens, {concurrency} "
            "requests at once: nothing can be evaluated like that.",
            "It takes two rows or more, since one has no standard error, and at least one new "
            "token and one request.",
            "Correct the number; `limit=None` takes all rows.")
    name, manager = gsm8k.task(profile)
    arguments = {
        "model": lm_client.model(server, titled(arm), concurrency, max_new_tokens, bos),
        "tasks": [name],
        "num_fewshot": num_fewshot,
        "limit": limit,
        "apply_chat_template": chat,
        "log_samples": True,
        "task_manager": manager,
    }
    return arguments | {"use_cache": str(_cache(server, arguments))}


def _cache(server: Endpoint, arguments: dict) -> Path:
    """Where the answers of an unfinished evaluation are kept, by what they depend on.

    Neither the number of rows nor of concurrent requests is part of it: what was answered in an
    evaluation of 100 rows that was interrupted is not asked again in one of 1,319.
    """
    from importlib.metadata import version

    own = {"model_args": {key: value for key, value in arguments["model"].arguments.items()
                          if key in ("max_gen_toks", "max_length", "add_bos_token")},
           "tasks": arguments["tasks"], "num_fewshot": arguments["num_fewshot"],
           "chat": arguments["apply_chat_template"], "lm_eval": version("lm_eval"),
           "kernel": server.kernel, "checkpoint": server.checkpoint.fingerprint}
    key = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:16]
    return _writable(workspace.folder("results", "unfinished") / key)


def _writable(place: Path) -> Path:
    """The cache's place, once it can be written to and holds no damaged file.

    lm-eval opens the cache in a thread of its own, whose errors would show as tracebacks.
    """
    with workspace.writing(place, "Nothing was asked: what is answered would be lost."):
        tempfile.TemporaryFile(dir=place.parent).close()
    for file in place.parent.glob(f"{place.name}*.db"):
        try:
            with contextlib.closing(sqlite3.connect(file)) as cache:
                whole = cache.execute("PRAGMA quick_check").fetchone() == ("ok",)
        except sqlite3.DatabaseError:
            whole = False
        if not whole:
            file.unlink()
            print(f"{file.name}, the answers of an interrupted run, is damaged: all rows are "
                  "asked again.")
    return place


def show(arguments: dict) -> None:
    """Print the call that the arguments make, without this machine's paths and port."""
    places = {str(workspace.root()): "workspace", str(workspace.repo()): ".",
              str(Path.home()): "~"}

    def text(value) -> str:
        found = repr(value) if not hasattr(value, "load") else "TaskManager(...)"
        for place, short in places.items():
            found = found.replace(place, short)
        return re.sub(r"(127\.0\.0\.1):\d+", r"\1:PORT", found)

    print("lm_eval.simple_evaluate(")
    for name, value in arguments.items():
        if name == "model":
            print("    model=LocalCompletionsAPI(")
            print("".join(f"        {key}={text(entry)},\n"
                          for key, entry in value.arguments.items()), end="    ),\n")
        else:
            print(f"    {name}={text(value)},")
    print(")")


@contextlib.contextmanager
def in_words():
    """Run `lm_eval.simple_evaluate` without its bars and warnings, and with its errors in words.

    A data set out of reach, a full or read-only disk: `WorkbookError`. What a server can do wrong
    is put in words where it is asked, in `lm_client`.
    """
    from datasets.exceptions import DatasetsError

    try:
        with _quiet():
            yield
    except sqlite3.Error as error:
        raise WorkbookError(
            f"The answers cannot be kept on the disk: {error}.",
            "An evaluation goes on from them when it is interrupted. Those kept before are still "
            "there.",
            "Free some space, or set PHI4_FP8_WORKSPACE to a folder on a larger disk, and run this "
            "again: only the missing rows are asked for.") from None
    except ConnectionError as error:
        raise _out_of_reach(error) from None
    except (OSError, DatasetsError) as error:
        if isinstance(error, DatasetsError) and not isinstance(error.__cause__, OSError):
            raise _out_of_reach(error) from None
        raise WorkbookError(
            f"The problems cannot be prepared: {error.__cause__ or error}.",
            "The library that reads them (datasets) keeps a copy in the Hugging Face cache.",
            "Free some space, or set HF_HOME to a folder that can be written to.") from None


def _out_of_reach(error: Exception) -> WorkbookError:
    return WorkbookError(
        f"The gsm8k data set could not be had: {error}",
        "Its problems come from the Hugging Face hub, which this machine does not reach.",
        f"Set {gsm8k.VARIABLE} to a directory with GSM8K's own train.jsonl and test.jsonl.")


@contextlib.contextmanager
def _quiet():
    """Keep bars, and warnings about what was asked for on purpose, off the page.

    lm-eval has no argument for its two bars, so their names in it are replaced. When a new version
    has them elsewhere, `mock.patch.object` raises AttributeError, or the bars show: a test sees
    either.
    """
    import logging

    from datasets.utils import logging as datasets_logging
    from lm_eval.api import model, task

    def no_bar(items, **_):
        return items

    loggers = [logging.getLogger(name) for name in ("lm_eval", "sqlitedict")]
    levels, bars = [logger.level for logger in loggers], datasets_logging.is_progress_bar_enabled()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    datasets_logging.disable_progress_bar()
    try:
        with mock.patch.object(task, "tqdm", no_bar), mock.patch.object(model, "tqdm", no_bar):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            datasets_logging.enable_progress_bar()


def collect(results: dict, arm: str) -> Evaluation:
    """lm-eval's results as an `Evaluation`, saved as JSON in the workspace's results.

    The saved file is `results/TASK-ARM.json`. The cache of the evaluation is removed, so that
    the next one measures again.
    """
    from lm_eval.utils import make_table

    name = next(iter(results["results"]))
    scores, asked = results["results"][name], results["config"]
    evaluation = Evaluation(
        arm=arm,
        task=name,
        n=results["n-samples"][name]["effective"],
        results={each: (float(scores[f"exact_match,{each}"]),
                        float(scores[f"exact_match_stderr,{each}"])) for each in FILTERS},
        samples=_items(results["samples"][name]),
        config={"version": results["versions"][name],
                "num_fewshot": results["configs"][name]["num_fewshot"], "limit": asked["limit"],
                "rows": results["n-samples"][name]["original"],
                **{key: asked[key] for key in ("max_new_tokens", "bos", "chat", "concurrency")},
                "lm_eval": results["lm_eval_version"]},
        table=make_table(results),
    )
    workspace.write_json(_saved(name, arm), asdict(evaluation))
    cache = Path(asked["use_cache"])
    for kept in cache.parent.glob(f"{cache.name}*"):
        kept.unlink()
    return evaluation


def _saved(task_name: str, arm: str) -> Path:
    return (workspace.root() / "results"
            / f"{task_name}-{re.sub(r'[^a-z0-9.]+', '-', arm.lower())}.json")


def _items(samples: list[dict]) -> list[dict]:
    """lm-eval's samples, one a filter and item, as one an item."""
    items = {}
    for sample in samples:
        item = items.setdefault(sample["doc_id"], {
            "doc_id": sample["doc_id"],
            "question": sample["doc"]["question"],
            "target": sample["target"],
            "prompt": sample["arguments"][0][0],
            "response": sample["resps"][0][0],
            "extracted": {},
            "exact_match": {},
        })
        item["extracted"][sample["filter"]] = sample["filtered_resps"][0]
        item["exact_match"][sample["filter"]] = int(sample["exact_match"])
    return [items[doc_id] for doc_id in sorted(items)]


def run(server: Endpoint, profile: Profile, arm: str, limit: int | None = 100,
        **protocol) -> Evaluation:
    """Evaluate in one call: the notebook's three steps. `protocol` as `lm_eval_arguments`."""
    import lm_eval

    arguments = lm_eval_arguments(server, profile, arm, limit, **protocol)
    with in_words():
        results = lm_eval.simple_evaluate(**arguments)
    return collect(results, arm)


def ledger_row(evaluation: Evaluation, base: Evaluation | None = None) -> dict:
    """`work` and `metrics` of an evaluation, as the ledger keeps them.

    `metrics`: by filter exact_match and, with `_stderr` after the name, its standard error; and
    where `base` is another evaluation of the same items, how many of them were `lost` and `gained`
    from it, by strict-match.
    """
    same = ("version", "num_fewshot", "max_new_tokens", "bos", "chat")
    metrics = {f"{name}{suffix}": value for name, pair in evaluation.results.items()
               for suffix, value in zip(("", "_stderr"), pair, strict=True)}
    if base not in (None, evaluation):
        metrics["lost"], metrics["gained"] = stats.lost_and_gained(
            correct(base), correct(evaluation))
    return {"work": {"task": evaluation.task, "limit": evaluation.n,
                     **{key: evaluation.config[key] for key in same}},
            "metrics": metrics}


def correct(evaluation: Evaluation, name: str = "strict-match") -> list[int]:
    """1 or 0 for each item in the order of doc_id, by one filter."""
    return [item["exact_match"][name] for item in evaluation.samples]
