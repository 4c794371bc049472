"""gsm8k through lm-eval, item by item.

The notebook calls `lm_eval.simple_evaluate` itself, with the arguments made here:

    arguments = evaluation.lm_eval_arguments(server, profile)
    with evaluation.watched(server, "bf16"):
        results = lm_eval.simple_evaluate(**arguments)
    score = evaluation.collect(results, "bf16")

An evaluation that was interrupted goes on where it stopped: lm-eval's own cache keeps each answer
as it arrives, under a name made of everything the answers depend on, and `collect` removes it.
"""

import asyncio
import contextlib
import hashlib
import json
import os
import re
import sys
import time
from concurrent import futures
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

from helpers import WorkbookError, server_log, workspace
from helpers.progress import in_notebook

GSM8K_VARIABLE = "PHI4_FP8_GSM8K"
FILTERS = ("strict-match", "flexible-extract")


@dataclass(frozen=True)
class Evaluation:
    """One arm's answers to one task.

    `results`: filter name to (exact_match, stderr), fractions. `samples`: a dict an item with
    doc_id, question, target, prompt, response, and by filter name `extracted` and `exact_match`.
    `table`: lm-eval's own table of the results.
    """

    arm: str
    task: str
    n: int
    results: dict[str, tuple[float, float]]
    samples: list[dict]
    config: dict
    table: str


def task(profile) -> tuple:
    """The lm-eval task of a profile and the TaskManager that knows it.

    Tiny profiles have the bundled `tiny_gsm8k`. The others have lm-eval's own `gsm8k`, by name;
    or, when PHI4_FP8_GSM8K names a directory with the official train.jsonl and test.jsonl, the
    same definition with the place of the data replaced and nothing else, so that no network is
    needed.
    """
    import lm_eval.tasks

    if profile.task == "tiny_gsm8k":
        folder = workspace.data("tiny_gsm8k")
        if not (folder / "tiny_gsm8k.yaml").is_file():
            raise WorkbookError(
                f"There is no task definition in {folder}.",
                "The bundled problems are part of the repository and a file of theirs is missing.",
                "Restore data/tiny_gsm8k, for instance with `git checkout data/tiny_gsm8k`.")
        manager = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)
        return "tiny_gsm8k", manager
    folder = Path(lm_eval.tasks.__file__).parent / "gsm8k"
    manager = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)
    if not os.environ.get(GSM8K_VARIABLE):
        return "gsm8k", manager
    official = workspace.resolved(os.environ[GSM8K_VARIABLE])
    return _gsm8k_from(official, folder / "gsm8k.yaml"), manager


def _gsm8k_from(directory: Path, definition: Path) -> dict:
    from lm_eval.tasks._yaml_loader import load_yaml

    files = {split: directory / f"{split}.jsonl" for split in ("train", "test")}
    missing = [file.name for file in files.values() if not file.is_file()]
    if missing:
        raise WorkbookError(
            f"{GSM8K_VARIABLE} is {directory}, and {' and '.join(missing)} cannot be found there.",
            "gsm8k needs its training problems for the five shots and its test problems.",
            "Name a directory that has GSM8K's own train.jsonl and test.jsonl, or unset the "
            "variable to fetch the data set from the Hugging Face hub.")
    location = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {
        "data_files": {split: str(file.resolve()) for split, file in files.items()}}}
    return {**load_yaml(definition), **location}


def lm_eval_arguments(server, profile, limit: int | None = 100, *, num_fewshot: int = 5,
                      concurrency: int = 8, max_new_tokens: int = 256, bos: bool = False,
                      chat: bool = False) -> dict:
    """Keyword arguments for `lm_eval.simple_evaluate` against a running `VllmServer`.

    The defaults are our baseline. The published model card states 100 rows (here the first;
    `limit=None` takes all) and 5-shot; greedy is the task's own. 256 new tokens, no BOS and the
    plain few-shot form are lm-eval's defaults, of which the card says nothing. The prompts are
    tokenized here with the server's own tokenizer and sent as token ids. No key is in them: see
    `watched`.
    """
    name, manager = task(profile)
    arguments = {
        "model": "local-completions",
        "model_args": {
            "model": server.model_name,
            "base_url": f"{server.url}/v1/completions",
            "tokenizer_backend": "huggingface",
            "tokenizer": str(server.model),
            "num_concurrent": concurrency,
            "max_gen_toks": max_new_tokens,
            "max_length": 2048,
            "add_bos_token": bos,
            "timeout": 1800,
        },
        "tasks": [name],
        "num_fewshot": num_fewshot,
        "limit": limit,
        "apply_chat_template": chat,
        "log_samples": True,
        "task_manager": manager,
    }
    return arguments | {"use_cache": str(_cache(server, arguments))}


def _cache(server, arguments: dict) -> Path:
    """Where the answers of an unfinished evaluation are kept, by what they depend on.

    Neither the number of rows nor of concurrent requests is part of it: what was answered in an
    evaluation of 100 rows that was interrupted is not asked again in one of 1,319.
    """
    from importlib.metadata import version

    own = {"model_args": {key: value for key, value in arguments["model_args"].items()
                          if key in ("max_gen_toks", "max_length", "add_bos_token")},
           "tasks": arguments["tasks"], "num_fewshot": arguments["num_fewshot"],
           "chat": arguments["apply_chat_template"], "lm_eval": version("lm_eval"),
           "kernel": server.kernel, "checkpoint": server.checkpoint.fingerprint}
    key = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:16]
    return workspace.root() / "results" / "unfinished" / key


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
        if isinstance(value, dict):
            print(f"    {name}={{")
            print("".join(f"        {key!r}: {text(entry)},\n" for key, entry in value.items()),
                  end="    },\n")
        else:
            print(f"    {name}={text(value)},")
    print(")")


@contextlib.contextmanager
def watched(server, arm: str):
    """Let `lm_eval.simple_evaluate` talk to the server, and say how far it is.

    Inside, lm-eval finds the server's key where it looks for one (OPENAI_API_KEY), its requests
    run beside a notebook's own event loop, and its bars and warnings make room for one line with
    the time left. A server that stops answering, a data set out of reach: `WorkbookError`.
    """
    import aiohttp
    import requests
    from datasets.exceptions import DatasetsError
    from lm_eval.api import model, task
    from lm_eval.models import api_models

    def silent(items, **_):
        return items

    progress = _Progress(arm)
    try:
        with (mock.patch.dict(os.environ, OPENAI_API_KEY=server.api_key),
              mock.patch.object(task, "tqdm", silent),
              mock.patch.object(model, "tqdm", silent),
              mock.patch.object(api_models, "tqdm", progress.start),
              mock.patch.object(api_models, "tqdm_asyncio", progress),
              mock.patch.object(asyncio, "run", progress.run),
              _quiet()):
            yield
        progress.finish()
    except (aiohttp.ClientError, requests.RequestException, TimeoutError) as error:
        raise WorkbookError(
            f"The {arm} server did not answer a request: {error}.",
            f"{progress.done} of {progress.total} answers had arrived, and they are kept. "
            f"{server_log.explain(server.log())[0]}",
            "Start the server again and run this cell again: only the missing rows are asked for. "
            f"The server's log is {server.log_path}.") from None
    except (ConnectionError, DatasetsError) as error:
        raise WorkbookError(
            f"The gsm8k data set could not be had: {error}",
            "Its problems come from the Hugging Face hub, which this machine does not reach.",
            f"Set {GSM8K_VARIABLE} to a directory with GSM8K's own train.jsonl and test.jsonl."
        ) from None


@contextlib.contextmanager
def _quiet():
    """Keep lm-eval's warnings of what was asked for, and its data loader's bars, off the page."""
    import logging

    from datasets.utils import logging as datasets_logging

    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, datasets_logging.is_progress_bar_enabled()
    logger.setLevel(logging.CRITICAL)
    datasets_logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            datasets_logging.enable_progress_bar()


class _Progress:
    """One line: answers so far, time gone, time left. Stands in for the bars that lm-eval makes.

    The requests run in a thread of their own, because a notebook's kernel already runs an event
    loop in this one; this one meanwhile redraws the line.
    """

    def __init__(self, label: str):
        self.label, self.done, self.total, self.handle = label, 0, 0, None
        self.started = time.monotonic()

    def start(self, total: int, **_) -> "_Progress":
        self.done, self.total, self.started = 0, total, time.monotonic()
        return self

    def update(self, answers: int) -> None:
        self.done += answers
        self.draw()

    async def gather(self, *requests, **_) -> list:
        self.start(len(requests))

        async def counted(request):
            answer = await request
            self.done += 1
            return answer

        return await asyncio.gather(*map(counted, requests))

    def run(self, coroutine):
        def work():
            with asyncio.Runner() as runner:
                loops.append(runner.get_loop())
                return runner.run(coroutine)

        loops = []
        with futures.ThreadPoolExecutor(1) as thread:
            answers = thread.submit(work)
            try:
                while not futures.wait([answers], timeout=0.5).done:
                    self.draw()
            except KeyboardInterrupt:
                for loop in loops:
                    loop.call_soon_threadsafe(
                        lambda loop=loop: [job.cancel() for job in asyncio.all_tasks(loop)])
                raise
            return answers.result()

    def draw(self, last: bool = False) -> None:
        from tqdm import tqdm

        gone = time.monotonic() - self.started
        form = "{desc}: {n_fmt} of {total_fmt} answers, {elapsed} gone, {remaining} to go"
        if last:
            form = "{desc}: {n_fmt} answers in {elapsed}"
        line = tqdm.format_meter(self.done, self.total, gone, prefix=self.label, bar_format=form)
        if in_notebook():
            from IPython.display import display

            shown = {"text/plain": line}
            if self.handle is None:
                self.handle = display(shown, raw=True, display_id=True)
            else:
                self.handle.update(shown, raw=True)
        elif sys.stderr.isatty() or last:
            print(f"\r{line:<78}", end="\n" if last else "", file=sys.stderr, flush=True)

    def finish(self) -> None:
        if self.total:
            self.draw(last=True)
        else:
            print(f"{self.label}: all answers were there from the run that was interrupted")


def collect(results: dict, arm: str) -> Evaluation:
    """lm-eval's results as an `Evaluation`, saved as JSON in the workspace's results.

    The saved file is `results/TASK-ARM.json`. The cache of the evaluation is removed, so that
    the next one measures again.
    """
    from lm_eval.utils import make_table

    name = next(iter(results["results"]))
    scores, config = results["results"][name], results["configs"][name]
    arguments, items = results["config"]["model_args"], _items(results["samples"][name])
    evaluation = Evaluation(
        arm=arm,
        task=name,
        n=results["n-samples"][name]["effective"],
        results={each: (float(scores[f"exact_match,{each}"]),
                        float(scores[f"exact_match_stderr,{each}"])) for each in FILTERS},
        samples=items,
        config={"version": results["versions"][name], "num_fewshot": config["num_fewshot"],
                "limit": results["config"]["limit"], "rows": results["n-samples"][name]["original"],
                "max_new_tokens": arguments["max_gen_toks"], "bos": arguments["add_bos_token"],
                # lm-eval does not say; the plain form begins with the first shot
                "chat": not items[0]["prompt"].startswith("Question: "),
                "concurrency": arguments["num_concurrent"],
                "lm_eval": results["lm_eval_version"]},
        table=make_table(results),
    )
    workspace.write_json(_saved(name, arm), asdict(evaluation))
    for kept in Path(results["config"]["use_cache"]).parent.glob(
            f"{Path(results['config']['use_cache']).name}*"):
        kept.unlink()
    return evaluation


def _saved(task_name: str, arm: str) -> Path:
    return (workspace.root() / "results"
            / f"{task_name}-{re.sub(r'[^a-z0-9.]+', '-', arm.lower())}.json")


def load(task_name: str, arm: str) -> Evaluation | None:
    """The last evaluation of an arm that was collected in this workspace, if there is one."""
    path = _saved(task_name, arm)
    if not path.is_file():
        return None
    saved = json.loads(path.read_text())
    saved["results"] = {name: tuple(pair) for name, pair in saved["results"].items()}
    return Evaluation(**saved)


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


def run(server, profile, arm: str, limit: int | None = 100, **protocol) -> Evaluation:
    """Evaluate in one call: the notebook's three steps. `protocol` as `lm_eval_arguments`."""
    import lm_eval

    arguments = lm_eval_arguments(server, profile, limit, **protocol)
    with watched(server, arm):
        results = lm_eval.simple_evaluate(**arguments)
    return collect(results, arm)


def ledger_row(evaluation: Evaluation, base: Evaluation | None = None) -> dict:
    """`work` and `metrics` of an evaluation, as the ledger keeps them.

    `metrics`: by filter exact_match and, with `_stderr` after the name, its standard error; and
    where `base` is another evaluation of the same items, how many of them were `lost` and `gained`
    from it, by strict-match.
    """
    pairs = [] if base in (None, evaluation) else list(
        zip(correct(base), correct(evaluation), strict=True))
    same = ("version", "num_fewshot", "max_new_tokens", "bos", "chat")
    return {
        "work": {"task": evaluation.task, "limit": evaluation.n,
                 **{key: evaluation.config[key] for key in same}},
        "metrics": {f"{name}{suffix}": value
                    for name, pair in evaluation.results.items()
                    for suffix, value in zip(("", "_stderr"), pair, strict=True)}
        | ({"lost": pairs.count((1, 0)), "gained": pairs.count((0, 1))} if pairs else {}),
    }


def print_table(*evaluations: Evaluation) -> None:
    """Print lm-eval's own table for each evaluation, as the model card does."""
    for evaluation in evaluations:
        print(f"{evaluation.arm}:\n\n{evaluation.table}")


def correct(evaluation: Evaluation, name: str = "strict-match") -> list[int]:
    """1 or 0 for each item in the order of doc_id, by one filter: what `statistics` takes."""
    return [item["exact_match"][name] for item in evaluation.samples]


def flips(first: Evaluation, second: Evaluation, name: str = "strict-match"):
    """The items whose score differs between two arms, as a DataFrame.

    Columns: doc_id, question, each arm's extracted answer and response, and `change`: "lost" when
    only the first arm is right, "gained" when only the second is.
    """
    import pandas as pd

    rows = []
    for before, after in zip(first.samples, second.samples, strict=True):
        change = after["exact_match"][name] - before["exact_match"][name]
        if change:
            rows.append({
                "doc_id": before["doc_id"], "change": "gained" if change > 0 else "lost",
                "question": before["question"],
                f"{first.arm} answer": before["extracted"][name],
                f"{second.arm} answer": after["extracted"][name],
                f"{first.arm} response": before["response"],
                f"{second.arm} response": after["response"],
            })
    return pd.DataFrame(rows, columns=[
        "doc_id", "change", "question", f"{first.arm} answer", f"{second.arm} answer",
        f"{first.arm} response", f"{second.arm} response"])


def side_by_side(first: Evaluation, second: Evaluation, doc_id: int):
    """Two arms' answers to one item, for a notebook: HTML with the words that differ marked."""
    import difflib
    import html

    from IPython.display import HTML

    pair = [next(item for item in arm.samples if item["doc_id"] == doc_id)
            for arm in (first, second)]
    words = [re.findall(r"\s+|[^\s]+", item["response"].strip()) for item in pair]
    marked = ["", ""]
    for kind, *bounds in difflib.SequenceMatcher(None, *words, autojunk=False).get_opcodes():
        for side, (start, end) in enumerate((bounds[:2], bounds[2:])):
            text = html.escape("".join(words[side][start:end]))
            marked[side] += text if kind == "equal" or not text else f"<mark>{text}</mark>"
    cells = "".join(f"<td style='text-align:left;vertical-align:top;white-space:pre-wrap'>{text}"
                    "</td>" for text in marked)
    return HTML(f"<p>{html.escape(pair[0]['question'])}</p><table><tr><th>{html.escape(first.arm)}"
                f"</th><th>{html.escape(second.arm)}</th></tr><tr>{cells}</tr></table>")
