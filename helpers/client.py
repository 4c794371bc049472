"""The one HTTP client for the workbook's own servers: their key, no proxy, time-outs.

`requests` reads proxies, and names and passwords, from its environment: HTTP_PROXY, and ~/.netrc,
whose entry would replace the key. Nothing that is meant for 127.0.0.1 may follow either.
"""

from collections.abc import Mapping

import requests
from requests.adapters import HTTPAdapter

# Seconds to connect, and to wait for the next byte of an answer: a long prompt on a slow CPU.
TIMEOUT = (5, 1800)

_PROXIES = ("http_proxy", "https_proxy", "ftp_proxy", "all_proxy", "no_proxy")


def session(key: str | None = None) -> requests.Session:
    """A `requests.Session` that sends `Authorization: Bearer KEY`, if it is given a key.

    It ignores proxies and ~/.netrc, and gives up after `TIMEOUT` where a request names no timeout
    of its own. Its errors are `requests`' own: `requests.RequestException`.
    """
    made = requests.Session()
    made.trust_env = False
    made.mount("http://", _Patient())
    if key:
        made.headers["Authorization"] = f"Bearer {key}"
    return made


def without_proxies(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for a process that talks to this machine alone: no proxy is named in it."""
    return {name: value for name, value in environment.items() if name.lower() not in _PROXIES}


def refusal(answer: requests.Response) -> str:
    """Why a request was refused: vLLM's own message, else the beginning of what came back."""
    try:
        return answer.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return answer.text[:300] or "It gave no reason."


class _Patient(HTTPAdapter):
    def send(self, request, timeout=None, **options):
        return super().send(request, timeout=timeout or TIMEOUT, **options)
