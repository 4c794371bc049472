"""Says what is served, to those who have no copy of it: a class for vLLM's flag `--middleware`.

GET /about is a JSON object, and /about/FILE one of the small files beside the weights, so that a
client far away can cut a text into this model's tokens. `helpers.serving` puts the guard outside of
this: both ask for the key.
"""

import json
import os
from pathlib import Path

VARIABLE = "PHI4_FP8_ABOUT"  # the file whose object is sent; it names the model's folder
FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
         "special_tokens_map.json", "chat_template.jinja")


class About:
    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        path = scope.get("path", "")
        if scope["type"] != "http" or scope["method"] != "GET" or not (
                path == "/about" or path.startswith("/about/")):
            await self.app(scope, receive, send)
            return
        body = _content(path.removeprefix("/about").removeprefix("/"))
        kind = b"application/json" if path == "/about" else b"application/octet-stream"
        await send({"type": "http.response.start", "status": 200 if body is not None else 404,
                    "headers": [(b"content-type", kind)]})
        await send({"type": "http.response.body", "body": body or b""})


def _content(name: str) -> bytes | None:
    """The object or a file; None where there is none, as before the server is ready."""
    try:
        known = json.loads(Path(os.environ[VARIABLE]).read_bytes())
    except OSError:
        return None
    if not name:
        return json.dumps({key: value for key, value in known.items() if key != "folder"}).encode()
    file = Path(known["folder"], name)
    return file.read_bytes() if name in FILES and file.is_file() else None
