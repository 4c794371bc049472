"""The model that lm-eval is given: its own for completions, over the workbook's HTTP client.

lm-eval makes the prompts, reads the answers and scores them. Only the sending is ours. lm-eval's
own client takes the key from the environment, sends single requests through whatever proxy is set
there, and sends several at once from an event loop, of which a notebook's process allows no second
one. Here a few threads send them with `helpers.client`.
"""

import copy
import time
from concurrent import futures

import requests
import tenacity
from requests import RequestException

from helpers import WorkbookError, client
from helpers.endpoint import Endpoint
from helpers.progress import Progress

MAX_LENGTH = 2048  # tokens of prompt and answer together; lm-eval's default


def model(server: Endpoint, label: str, concurrency: int, max_new_tokens: int, bos: bool):
    """A `lm_eval.api.model.LM` for `simple_evaluate(model=...)` that asks a running server.

    `label` is what the line of progress and the errors call it; `concurrency` requests are under
    way at once. Prompts are tokenized here with the server's own tokenizer and sent as token ids; a
    prompt that does not fit `MAX_LENGTH` with its answer loses its beginning, as in lm-eval, which
    is said. Raises `WorkbookError` when the server refuses, stops answering, or answers with
    anything but a completion.
    """
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    class ServerCompletions(_OurRequests, LocalCompletionsAPI):
        pass

    return ServerCompletions(server, label, {
        "model": server.model_name,
        "base_url": f"{server.url}/v1/completions",
        "tokenizer_backend": "huggingface",
        "tokenizer": str(server.model),
        "num_concurrent": concurrency,
        "max_gen_toks": max_new_tokens,
        "max_length": MAX_LENGTH,
        "add_bos_token": bos,
    })


class _OurRequests:
    """What differs from lm-eval's `LocalCompletionsAPI`: how requests are sent."""

    def __init__(self, server: Endpoint, label: str, arguments: dict):
        super().__init__(**arguments)
        self.arguments = arguments  # as they are shown to the reader
        self._server, self._label, self._chat = server, label, False
        self._away = False  # whether the last request found no server

    def get_model_info(self) -> dict:
        """lm-eval adds this to the "config" of its results."""
        return {"max_new_tokens": self.arguments["max_gen_toks"],
                "bos": self.arguments["add_bos_token"],
                "concurrency": self.arguments["num_concurrent"], "chat": self._chat}

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        self._chat = True  # lm-eval's results do not say so
        return super().apply_chat_template(chat_history, add_generation_prompt)

    def generate_until(self, requests, disable_tqdm=False) -> list[str]:
        """The answers, in the order of lm-eval's `requests`; each is cached as it arrives."""
        payloads = self._payloads(requests)
        progress, began = Progress(self._label), time.monotonic()
        threads = futures.ThreadPoolExecutor(self.arguments["num_concurrent"])
        jobs = [threads.submit(self._answer, request, payload)
                for request, payload in zip(requests, payloads, strict=True)]
        waiting = set(jobs)
        try:
            while waiting:
                done, waiting = futures.wait(waiting, 0.5, futures.FIRST_EXCEPTION)
                for job in done:
                    job.result()  # raises what was raised in the thread
                doing = "waiting for the server" if self._away else "asking"
                progress.show(doing, _so_far(_answered(jobs), len(jobs),
                                             time.monotonic() - began))
        except BaseException as error:
            progress.close(f"{self._label}: stopped after {_answered(jobs)} of {len(jobs)} answers")
            if isinstance(error, RequestException):
                raise self._unanswered(error, _answered(jobs), len(jobs)) from None
            raise
        finally:
            # After an error or Ctrl-C nobody waits for the requests that are still under way.
            threads.shutdown(wait=False, cancel_futures=True)
        progress.close(f"{self._label}: {len(jobs)} answers in {time.monotonic() - began:.0f} s")
        return [job.result() for job in jobs]

    def _payloads(self, requests) -> list[dict]:
        prompts = self.tok_encode([request.args[0] for request in requests],
                                  add_special_tokens=self.add_bos_token)
        payloads = [self._create_payload([prompt], generate=True, seed=self._seed,
                                         gen_kwargs=copy.deepcopy(request.args[1]))
                    for request, prompt in zip(requests, prompts, strict=True)]
        cut = 0
        for payload in payloads:
            room = self.max_length - payload["max_tokens"]
            if room < 1:
                raise WorkbookError(
                    f"{payload['max_tokens']} new tokens leave no room for a prompt: {MAX_LENGTH} "
                    "tokens are both together at most.",
                    "Nothing was asked.", "Ask for fewer new tokens (`max_new_tokens`).")
            cut += len(payload["prompt"][0]) > room
            payload["prompt"] = [payload["prompt"][0][-room:]]
        if cut:
            print(f"{self._label}: {cut} of {len(payloads)} prompts are longer than the {room} "
                  "tokens that fit, and lose their beginning, as in lm-eval's own client.")
        return payloads

    def _answer(self, request, payload: dict) -> str:
        """One answer; runs in a thread."""
        response = self._post(payload)
        try:
            (answer,) = self.parse_generations(response.json())
            answer = "" if answer is None else answer + ""  # None, as lm-eval takes it; else a text
        except (ValueError, KeyError, IndexError, TypeError):
            raise WorkbookError(
                f"What answers at {self._server.url} sent something that is no completion.",
                "It is not the server that was started, or vLLM has changed its form.",
                f"Start the server again; its log is {self._server.log_path}.") from None
        self.cache_hook.add_partial("generate_until", request.args, answer)
        return answer

    def _post(self, payload: dict) -> requests.Response:
        """The server's answer, asked for up to three times, as lm-eval's own client does.

        A shared server may be away for longer, and is asked until its `patience` ends.
        """
        patience = self._server.patience
        for attempt in tenacity.Retrying(
                stop=(tenacity.stop_after_delay(patience) if patience
                      else tenacity.stop_after_attempt(self.max_retries)),
                wait=tenacity.wait_random_exponential(multiplier=0.5, min=1, max=10),
                before_sleep=lambda _: self._is_away(True),
                retry=tenacity.retry_if_exception_type(RequestException), reraise=True):
            with attempt, client.session(self._server.api_key) as http:
                answer = http.post(self.base_url, json=payload)
                if 400 <= answer.status_code < 500:  # it would refuse again
                    raise WorkbookError(
                        f"The {self._label} server refused a request (HTTP {answer.status_code}).",
                        f"It says: {client.refusal(answer)}",
                        "See that prompt and answer fit the server's --max-model-len.")
                answer.raise_for_status()
        self._is_away(False)
        return answer

    def _is_away(self, away: bool) -> None:
        self._away = away

    def _unanswered(self, error: RequestException, answered: int, asked: int) -> WorkbookError:
        return WorkbookError(
            f"The {self._label} server did not answer a request: {_reason(error)}.",
            f"{answered} of {asked} answers had arrived, and they are kept. "
            f"{self._server.why_away()}",
            f"{self._server.how_back()}: only the missing rows are asked for.")


def _answered(jobs: list[futures.Future]) -> int:
    return sum(job.done() and not job.cancelled() and job.exception() is None for job in jobs)


def _so_far(answered: int, asked: int, gone: float) -> str:
    from tqdm import tqdm

    said = f"{answered} of {asked} answers"
    if not answered:
        return said
    return f"{said}, {tqdm.format_interval(gone / answered * (asked - answered))} to go"


def _reason(error: RequestException) -> str:
    """The error in words; requests' own for a lost connection shows Python's inner objects."""
    if isinstance(error, requests.Timeout):
        return f"nothing came for {client.TIMEOUT[1] // 60} minutes"
    if isinstance(error, requests.ConnectionError):
        return "it is not there, or broke the connection off"
    return str(error)
