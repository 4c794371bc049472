"""The client's rules: the key, no proxy, no ~/.netrc, and an end to waiting."""

import http.server
import threading

import pytest
import requests

from helpers import client


@pytest.fixture
def echo():
    """A server on 127.0.0.1 that keeps the headers of what it is asked; /slow never answers."""
    seen, release = [], threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(dict(self.headers))
            if self.path == "/slow":
                release.wait(30)
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.seen = seen
    yield server
    release.set()
    server.shutdown()
    server.server_close()


def test_the_key_is_sent_and_only_where_there_is_one(echo):
    url = f"http://127.0.0.1:{echo.server_port}/"
    client.session("secret").get(url)
    client.session().get(url)
    assert [seen.get("Authorization") for seen in echo.seen] == ["Bearer secret", None]


def test_a_server_that_never_answers_is_given_up(echo, monkeypatch):
    monkeypatch.setattr(client, "TIMEOUT", (5, 0.2))
    with pytest.raises(requests.Timeout):
        client.session().get(f"http://127.0.0.1:{echo.server_port}/slow")


def test_a_process_of_this_machine_is_told_of_no_proxy():
    names = {"HTTP_PROXY", "https_proxy", "ALL_PROXY", "no_proxy"}
    assert client.without_proxies({name: "http://x" for name in names} | {"HOME": "/h"}) == {
        "HOME": "/h"}
