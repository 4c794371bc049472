"""A hub on localhost: the part of the Hugging Face protocol that a download uses, and its faults.

Repository info by revision, HEAD and GET of files with ETag, X-Repo-Commit and byte ranges; large
files carry X-Linked-Etag (SHA-256), small ones a git object id.
"""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Hub:
    """`files`: path to content. `faults`: "gated", "missing", "busy", or {path: how it breaks}."""

    repo: str
    revision: str
    files: dict[str, bytes]
    fault: str = ""
    cut: dict[str, int] = field(default_factory=dict)  # path: bytes after which GET breaks, once
    hold: dict[str, int] = field(default_factory=dict)  # path: bytes after which GET hangs, once
    fetched: list[str] = field(default_factory=list)  # the paths whose content was asked for
    flip: set[str] = field(default_factory=set)  # paths whose last byte is sent wrong
    ranges: list[str] = field(default_factory=list)  # the Range headers that were asked for
    asked: list[str] = field(default_factory=list)  # every request's path
    url: str = ""


def etag(content: bytes, path: str) -> str:
    if path.endswith(".safetensors"):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0%b" % (len(content), content)).hexdigest()


def large(path: str, content: bytes) -> dict:
    """What the tree of a repository says besides of a file that is kept outside git."""
    if not path.endswith(".safetensors"):
        return {}
    return {"lfs": {"oid": etag(content, path), "size": len(content), "pointerSize": 134}}


@contextlib.contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def answer(self, body: bool):
            path = self.path.partition("?")[0]
            hub.asked.append(path)
            if hub.fault:
                return self.refuse(*{
                    "gated": (401, "GatedRepo"), "missing": (404, "RepoNotFound"),
                    "busy": (429, ""), "broken": (503, "")}[hub.fault])
            if path.startswith("/api/"):
                # both the info of a revision and, below it, the tree of its files
                entries = [{"type": "file", "path": n, "size": len(c), "oid": etag(c, "")}
                           | large(n, c) for n, c in hub.files.items()]
                info = {"_id": "1", "id": hub.repo, "modelId": hub.repo, "sha": hub.revision,
                        "private": False, "tags": [], "downloads": 0, "likes": 0,
                        "siblings": [{"rfilename": name} for name in hub.files]}
                return self.send(json.dumps(entries if "/tree/" in path else info).encode(), body,
                                 {"Content-Type": "application/json"})
            name = path.partition(f"/resolve/{hub.revision}/")[2]
            if name not in hub.files:
                return self.refuse(404, "EntryNotFound")
            self.file(name, body)

        def file(self, name: str, body: bool):
            content = hub.files[name]
            headers = {"ETag": f'"{etag(content, name)}"', "X-Repo-Commit": hub.revision,
                       "X-Linked-Size": str(len(content)), "Accept-Ranges": "bytes"}
            if name.endswith(".safetensors"):
                headers["X-Linked-Etag"] = headers["ETag"]
            if name in hub.flip:
                content = content[:-1] + bytes([content[-1] ^ 1])
            asked = self.headers.get("Range")
            status = 200
            if asked and body:
                hub.ranges.append(asked)
                first = int(asked.removeprefix("bytes=").partition("-")[0])
                headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
                content, status = content[first:], 206
            cut = hub.cut.pop(name, None) if body else None
            hold = hub.hold.pop(name, None) if body else None
            if body:
                hub.fetched.append(name)
            self.send(content, body, headers, status, cut or hold)
            if hold is not None:
                self.wfile.flush()
                self.rfile.read(1)  # returns when the client is gone

        def send(self, content, body, headers, status=200, cut=None):
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                self.wfile.write(content[:cut])
            if cut is not None:
                self.close_connection = True

        def refuse(self, status: int, code: str):
            self.send_response(status)
            if code:
                self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
