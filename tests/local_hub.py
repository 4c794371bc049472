"""A hub on localhost: the parts of the Hugging Face protocol that we use, and its faults.

Downloading: repository info by revision, its tree, HEAD and GET of files with ETag, X-Repo-Commit
and byte ranges; large files carry X-Linked-Etag (SHA-256), small ones a git object id. Publishing:
making a repository, what it is to be (private or not), and one commit with its files.
"""

import base64
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
    listed: dict[str, dict] = field(default_factory=dict)  # path: what the tree says instead
    more: dict[str, bytes] = field(default_factory=dict)  # path: what is sent after its content
    page: bytes = b""  # a page of HTML that answers every request, as a login page does
    # publishing
    repos: dict[str, bool] = field(default_factory=dict)  # the repositories: name to "is private"
    makes_public: bool = False  # a hub that makes repositories public whatever it is asked
    read_only: bool = False  # the token may read and not write
    commits: list[dict[str, bytes]] = field(default_factory=list)  # the files of each
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
            if hub.page:
                return self.send(hub.page, body, {"Content-Type": "text/html"})
            if hub.fault:
                return self.refuse(*{
                    "gated": (401, "GatedRepo"), "unknown": (401, ""),
                    "missing": (404, "RepoNotFound"),
                    "busy": (429, ""), "broken": (503, "")}[hub.fault])
            if path.startswith("/api/models/") and path.count("/") == 4:
                name = path.removeprefix("/api/models/")
                if name not in hub.repos:
                    return self.refuse(404, "RepoNotFound")
                return self.json({"_id": "1", "id": name, "modelId": name, "sha": hub.revision,
                                  "private": hub.repos[name], "tags": [], "siblings": []})
            if path.startswith("/api/"):
                # both the info of a revision and, below it, the tree of its files
                entries = [{"type": "file", "path": n, "size": len(c), "oid": etag(c, "")}
                           | large(n, c) | hub.listed.get(n, {}) for n, c in hub.files.items()]
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
            content += hub.more.get(name, b"")
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

        def do_POST(self):
            path = self.path.partition("?")[0]
            hub.asked.append(path)
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if hub.page:
                return self.send(hub.page, True, {"Content-Type": "text/html"})
            if hub.fault:
                return self.refuse(401 if hub.fault == "unknown" else 503, "")
            if path == "/api/validate-yaml":
                return self.json({"errors": [], "warnings": []})
            if hub.read_only:
                return self.refuse(403, "")
            if path == "/api/repos/create":
                asked = json.loads(body)
                name = f"{asked['organization']}/{asked['name']}"
                hub.repos[name] = asked.get("visibility") == "private" and not hub.makes_public
                return self.json({"url": f"{hub.url}/{name}", "name": name, "id": name})
            repo = "/".join(path.split("/")[3:5])
            if repo not in hub.repos:
                return self.refuse(404, "RepoNotFound")
            if "/preupload/" in path:
                return self.json({"files": [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for file in json.loads(body)["files"]]})
            lines = [json.loads(line) for line in body.splitlines()]
            hub.commits.append({
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines if line["key"] == "file"})
            self.json({"commitUrl": f"{hub.url}/{repo}/commit/{hub.revision}",
                       "commitOid": hub.revision, "hookOutput": "", "pullRequestUrl": None})

        def json(self, answer):
            self.send(json.dumps(answer).encode(), True, {"Content-Type": "application/json"})

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
