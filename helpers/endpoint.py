"""What answers under a URL as OpenAI's API does, and what can go wrong when it is asked."""

import time
from pathlib import Path

import requests

from helpers import WorkbookError, client
from helpers.checkpoint import Checkpoint


class Endpoint:
    """A server of one model, ours or shared.

    `model`: a local folder with the model's tokenizer; `kernel`: its linear kernel; `shared`: what
    it runs on if somebody else has started it, else ""; `patience`: seconds that it may be away.
    """

    url: str
    api_key: str
    model_name: str
    model: Path
    kernel: str
    checkpoint: Checkpoint
    log_path: Path | str | None
    shared = ""
    patience = 0.0

    def complete(self, prompt: str, max_tokens: int = 64, **sampling) -> str:
        """The continuation of `prompt`; greedy unless `sampling` says otherwise."""
        body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, **sampling}
        return self.post("/v1/completions", body)["choices"][0]["text"]

    def chat(self, messages: list[dict], max_tokens: int = 256, **sampling) -> str:
        """The answer to a list of {"role", "content"}; greedy unless `sampling` says otherwise."""
        body = {"messages": messages, "max_tokens": max_tokens, "temperature": 0, **sampling}
        return self.post("/v1/chat/completions", body)["choices"][0]["message"]["content"]

    def post(self, route: str, body: dict) -> dict:
        """What the server answers to a request, as JSON. Raises `WorkbookError` if it does not."""
        answer = self.asked(route, {"model": self.model_name, **body})
        if answer.ok:
            try:
                return answer.json()
            except requests.exceptions.InvalidJSONError as wrong:
                raise _not_json(wrong) from None
        if answer.status_code >= 500:  # 4xx is about the request; after 5xx the server may be dying
            self.check_alive()
        raise WorkbookError(
            f"vLLM refused the request (HTTP {answer.status_code}).", client.refusal(answer),
            "Change the request: its prompt, length or sampling.")

    def asked(self, route: str, body: dict) -> requests.Response:
        """The answer, whatever it is; a server that is away is waited for, as `patience` says."""
        began = time.monotonic()
        while True:
            try:
                with client.session(self.api_key) as session:
                    return session.post(self.url + route, json=body)
            except requests.exceptions.InvalidJSONError as wrong:
                raise _not_json(wrong) from None
            except requests.RequestException as broken:
                if time.monotonic() - began > self.patience:
                    raise self.unreached(broken) from None
                time.sleep(2)

    def check_alive(self) -> None:
        """Raise `WorkbookError` where it is known that the server is ending."""

    def unreached(self, broken: requests.RequestException) -> WorkbookError:
        """What to say when there was no answer."""
        raise NotImplementedError

    def since(self) -> str:
        """How it came to be there, in words."""
        raise NotImplementedError

    def why_away(self) -> str:
        """What is known of why it does not answer, in a sentence."""
        raise NotImplementedError

    def how_back(self) -> str:
        """What brings it back, as the beginning of a sentence."""
        raise NotImplementedError


def _not_json(wrong: Exception) -> WorkbookError:
    return WorkbookError("The request or its answer is not JSON.", f"{wrong}.",
                         "Change the request: JSON has no NaN, for instance.")


def checked_name(name: str) -> str:
    """`name`, where a model can be served under it; else `WorkbookError`."""
    if not name.strip() or not name.isprintable():
        raise WorkbookError(f"{name!r} is no name for a model.",
                            "Clients ask for the model by this name, in JSON.",
                            "Give `name` letters, digits, and what else can be printed.")
    return name
