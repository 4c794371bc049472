"""An HTTP server in place of vLLM, for faults between it and us; and a proxy that keeps requests.

What it answers means nothing. Faults in what vLLM itself says or does are provoked on vLLM.
"""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

from helpers import models

COMPLETION = json.dumps({"choices": [{"index": 0, "text": " 1 + 1 = 2\n#### 2"}]}).encode()
Answer = tuple[int, bytes]  # HTTP status and body


@contextlib.contextmanager
def listening(answer: Callable[[SimpleNamespace], Answer]) -> Iterator[SimpleNamespace]:
    """A server on 127.0.0.1: `url`, `port`, and `asked`, every request (path, headers, body)."""
    kept, lock = [], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def handle_any(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            request = SimpleNamespace(path=self.path, headers=dict(self.headers), body=body)
            with lock:
                kept.append(request)
                request.number = len(kept)
            status, said = answer(request)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(said)))
                self.end_headers()
                self.wfile.write(said)

        do_GET = do_POST = do_CONNECT = handle_any

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield SimpleNamespace(url=f"http://127.0.0.1:{http.server_port}", port=http.server_port,
                              asked=kept)
    finally:
        http.shutdown()
        http.server_close()


@contextlib.contextmanager
def vllm(answer: Callable[[SimpleNamespace], Answer] = lambda request: (200, COMPLETION)
         ) -> Iterator[SimpleNamespace]:
    """What an evaluation or a benchmark needs of a `VllmServer`, in front of a stand-in."""
    with listening(answer) as server:
        yield SimpleNamespace(
            url=server.url, asked=server.asked, api_key="the-servers-key", model_name="tiny",
            model=models.tiny().checkpoint.path, checkpoint=models.tiny().checkpoint,
            kernel="unquantized", log_path=Path("vllm.log"), log=lambda: "", patience=0,
            why_away=lambda: "It is a stand-in.", how_back=lambda: "Start it again")


@contextlib.contextmanager
def proxy(monkeypatch) -> Iterator[list]:
    """Every variable that names a proxy names this one; yields the requests that reached it."""
    with listening(lambda request: (502, b"{}")) as server:
        for name in ("http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.setenv(name, server.url)
            monkeypatch.setenv(name.upper(), server.url)
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        yield server.asked
