"""Asks for the key on every route but /health: a class for the flag `--middleware` of vLLM.

vLLM 0.32 itself asks below /v1, /v2, /inference and /cohere only (GUARDED_PREFIX in its
`entrypoints.serve.middleware.authenticate`): /invocations would generate for anybody, and /metrics
and /openapi.json would answer. This stands outside all of its own middleware, in each API server.
The file needs the standard library alone, because `helpers.deployment` sends it along as text.
"""

import hmac
import os

KEY = os.environ.get("VLLM_API_KEY", "")
if not KEY or KEY.startswith("{{"):  # a platform leaves {{ ... }} where its secret is missing
    raise RuntimeError("VLLM_API_KEY holds no key, and without one the server would be open")


class KeyGuard:
    """ASGI middleware: 401 for a request without `Authorization: Bearer KEY`, unless to /health."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan" or scope["path"] == "/health" or _has_key(scope["headers"]):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})  # the client gets HTTP 403
        else:
            headers = [(b"content-type", b"text/plain"), (b"www-authenticate", b"Bearer")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": b"Unauthorized"})


def _has_key(headers) -> bool:
    sent = next((value for name, value in headers if name == b"authorization"), b"")
    scheme, _, key = sent.partition(b" ")
    return scheme.lower() == b"bearer" and hmac.compare_digest(key, KEY.encode())
