"""What is closed to others: the key, on every route and in every artefact; no proxy in between."""

import asyncio
import csv
import http.client
import http.server
import json
import os
import runpy
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time

import pytest
import yaml
from on_a_gpu import server_flags

from helpers import (
    WorkbookError,
    address,
    client,
    deployment,
    divergence,
    serving,
    workspace,
)

GUARD = workspace.repo() / "helpers" / "serve_side" / "guard.py"

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS")
# Beside those that the server's own description names: some are not in it, some do not exist.
MORE_ROUTES = ("/docs", "/redoc", "/openapi.json", "/docs/oauth2-redirect", "/ping", "/metrics",
               "/server_info", "/reset_prefix_cache", "/sleep", "/pause", "/collective_rpc",
               "/start_profile", "/v1/load_lora_adapter", "/adapters", "/", "/nothing", "/HEALTH",
               "/healthz", "/health/../metrics", "/health%2F..%2Fmetrics", "/v1/../metrics")


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


def ask(port: int, method: str, path: str, headers: dict) -> int:
    """The status of a request whose path is sent exactly as it is given."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, headers=headers)
        return connection.getresponse().status
    finally:
        connection.close()


def open_routes(port: int, key: str) -> tuple[list[str], int]:
    """The requests that are answered without the right key, and how many were tried."""
    described = client.session(key).get(f"http://127.0.0.1:{port}/openapi.json").json()["paths"]
    assert {"/v1/completions", "/invocations", "/tokenize"} <= described.keys()
    paths = [path.replace("{", "").replace("}", "") for path in [*described, *MORE_ROUTES]]
    variants = {variant for path in paths for variant in (
        path, f"{path}/", f"/{path}", f"{path}?x=1", path.replace("/", "//"),
        f"http://127.0.0.1:{port}{path}")}
    variants -= {"/health", "/health?x=1", f"http://127.0.0.1:{port}/health"}
    wrong = ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {key}"},
             {"Authorization": f"Bearer {key}x"}, {"X-Api-Key": key})
    tried = [(method, path, wrong[number % len(wrong)]) for number, (path, method) in
             enumerate((path, method) for path in sorted(variants) for method in METHODS)]
    tried += [("GET", "/metrics", headers) for headers in wrong]
    answered = [f"{method} {path}: {status}" for method, path, headers in tried
                if (status := ask(port, method, path, headers)) != 401]
    return answered, len(tried)


@pytest.fixture
def proxy(monkeypatch):
    """A proxy that is named in the environment; it refuses, and keeps what it was asked."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def refuse(self):
            server.asked.append(f"{self.command} {self.path}")
            self.send_error(403)

        do_GET = do_POST = do_HEAD = do_CONNECT = refuse

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        for spelt in (name, name.lower()):
            monkeypatch.setenv(spelt, f"http://127.0.0.1:{server.server_port}")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def stranger():
    """A web server of somebody else's that answers 200 to everything and keeps the headers."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            server.seen.append(dict(self.headers))
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        do_POST = do_GET

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.seen = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


# The key


@pytest.mark.slow
@pytest.mark.fault("a request without the key, to any route of the server")
def test_every_route_but_health_asks_for_the_key(fp8_server, happened):
    port = port_of(fp8_server.url)
    answered, tried = open_routes(port, fp8_server.api_key)
    assert not answered
    assert ask(port, "GET", "/health", {}) == 200
    with_key = {"Authorization": f"Bearer {fp8_server.api_key}"}
    assert [ask(port, "GET", path, with_key) for path in ("/metrics", "/v1/models")] == [200, 200]
    happened(f"{tried} requests without the key: all refused (401); /health answers")


@pytest.mark.slow
@pytest.mark.fault("our container's command, with two API servers, asked without the key")
def test_a_deployed_server_asks_for_the_key(tiny_base, tmp_path, happened):
    """The `docker run` command's own arguments, run by the serving environment's vLLM."""
    (tmp_path / "vllm").write_text(
        f"#!{serving.serve_python()}\n"
        "import argparse\n"
        "from vllm.entrypoints.cli.serve import ServeSubcommand\n"
        "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
        "if __name__ == '__main__':\n"
        "    parser = FlexibleArgumentParser()\n"
        "    ServeSubcommand().subparser_init(parser.add_subparsers())\n"
        "    ServeSubcommand.cmd(parser.parse_args())\n")
    (tmp_path / "vllm").chmod(0o755)
    port, key = address.free_port(()), "a key of one's own"
    served = deployment.Deployment(tiny_base.path, "mine", 2048, 7_000_000)
    words = shlex.split(deployment.docker_run(served))
    guard = next(word for word in words if word.startswith("KEY_GUARD="))
    command = words[words.index(deployment.IMAGE) + 1:]
    command = [{"/model": str(tiny_base.path), "0.0.0.0": "127.0.0.1", "8000": str(port)}.get(w, w)
               for w in command] + server_flags() + ["--api-server-count", "2"]
    environment = {**serving.environment(), "VLLM_API_KEY": key,
                   "KEY_GUARD": guard.removeprefix("KEY_GUARD="),
                   "PATH": f"{tmp_path}:{os.environ['PATH']}",
                   "TMPDIR": tempfile.gettempdir(),  # short enough for a socket's name
                   "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(["sh", *command], env=environment, stdout=log, stderr=log,
                                   cwd=tmp_path, start_new_session=True)
    try:
        end = time.monotonic() + 180
        health = deployment.HEALTH.replace(str(deployment.PORT), str(port))
        while subprocess.run([sys.executable, "-c", health], capture_output=True).returncode:
            assert process.poll() is None and time.monotonic() < end, (tmp_path / "log").read_text()
            time.sleep(1)
        answered, tried = open_routes(port, key)
        assert not answered
        reply = client.session(key).post(
            f"http://127.0.0.1:{port}/v1/completions",
            json={"model": "mine", "prompt": "1", "max_tokens": 2}).json()
        assert reply["usage"]["completion_tokens"] >= 1
        assert (tmp_path / "log").read_text().count("Started server process") == 2
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        time.sleep(3)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    happened(f"{tried} requests without the key to two API servers: all refused (401)")


@pytest.mark.fault("a container that is started with no key")
@pytest.mark.parametrize("key", [None, "", "{{ RUNPOD_SECRET_vllm_api_key }}"],
                         ids=["none", "empty", "no secret"])
def test_no_key_no_server(key, happened):
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_API_KEY"}
    environment |= {} if key is None else {"VLLM_API_KEY": key}
    done = subprocess.run([sys.executable, GUARD], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    happened(done.stderr.splitlines()[-1])


@pytest.mark.fault("a websocket without the key")
@pytest.mark.parametrize("headers, passes", [
    ([], False), ([(b"authorization", b"Bearer wrong")], False),
    ([(b"authorization", b"Bearer one"), (b"authorization", b"Bearer the-key")], False),
    ([(b"authorization", b"bearer the-key")], True),
], ids=["no key", "another", "another first", "the key"])
def test_a_websocket_asks_for_the_key(headers, passes, monkeypatch, happened):
    """By itself: the bundled model has no route for one."""
    monkeypatch.setenv("VLLM_API_KEY", "the-key")
    guard = runpy.run_path(str(GUARD))["KeyGuard"]
    sent = []

    async def app(scope, receive, send):
        sent.append("passed")

    async def send(message):
        sent.append(message["type"])

    asyncio.run(guard(app)({"type": "websocket", "path": "/v1/realtime", "headers": headers},
                           None, send))
    assert sent == ["passed" if passes else "websocket.close"]
    happened("let through, with the key" if passes else "closed before it opens")


@pytest.mark.slow
@pytest.mark.fault("another program takes the port while vLLM starts")
def test_a_stranger_on_the_port_does_not_get_the_key(tmp_workspace, tiny_base, stranger,
                                                     monkeypatch, happened):
    monkeypatch.setattr(address, "free_port", lambda taken: stranger.server_port)
    with pytest.raises(WorkbookError, match="stopped while starting") as said:
        serving.VllmServer(tiny_base, server_flags()).start()
    assert stranger.seen and not any("Authorization" in each for each in stranger.seen)
    assert "Address already in use" in said.value.meaning
    happened(f"{said.value} {said.value.meaning}")


@pytest.mark.fault("a ~/.netrc with an entry for every host")
def test_netrc_does_not_replace_the_key(stranger, tmp_path, monkeypatch, happened):
    (tmp_path / ".netrc").write_text("default login somebody password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    client.session("the-key").get(f"http://127.0.0.1:{stranger.server_port}/")
    assert stranger.seen[0]["Authorization"] == "Bearer the-key"
    happened("the key is sent, and nothing of the file")


# Proxies


@pytest.mark.slow
@pytest.mark.fault("HTTP_PROXY is set: a server's start, its answers, its benchmark, its metrics")
def test_nothing_for_this_machine_goes_to_a_proxy(proxy, tmp_workspace, tiny_fp8, happened):
    from helpers import throughput

    with serving.VllmServer(tiny_fp8, server_flags()) as server:
        assert server.complete("1", max_tokens=2)
        assert server.chat([{"role": "user", "content": "1"}], max_tokens=2)
        divergence.read(server, "fp8", [("1 + 1 =", " 2")])
        assert client.session(server.api_key).get(f"{server.url}/metrics").ok
        with throughput.benchmark() as measure:
            measure(server, throughput.Work(generated_tokens=4))
        health = deployment.HEALTH.replace(str(deployment.PORT), str(port_of(server.url)))
        assert subprocess.run([sys.executable, "-c", health]).returncode == 0
        for process in serving.processes(server)[1:]:  # vLLM's own; the supervisor asks nobody
            assert not any(name.lower().endswith("_proxy") for name in process.environ())
    assert proxy.asked == []
    happened("the proxy was asked for nothing")


@pytest.mark.fault("HTTP_PROXY is set: a download")
def test_a_download_does_go_to_the_proxy(proxy, tmp_path, happened):
    """The hub is not on this machine, and a proxy may be the only way to it."""
    done = subprocess.run(
        [sys.executable, "-c", "from huggingface_hub import hf_hub_download as get\n"
         "get('owner/name', 'config.json')"], capture_output=True, text=True,
        env={**os.environ, "HF_ENDPOINT": "http://hub.example", "HF_HOME": str(tmp_path),
             "HF_HUB_OFFLINE": "0"})
    assert done.returncode and any("hub.example" in each for each in proxy.asked)
    happened(f"the proxy was asked: {proxy.asked[0]}")


# Texts that are pasted elsewhere


@pytest.mark.fault("a folder and a name with spaces, $ and quotes, in every deployment")
def test_names_are_quoted_for_shell_and_compose(tmp_path, happened):
    folder = tmp_path / "it's $HOME, \"really\": $(id) `id`"
    folder.mkdir()
    name = "mine $USER ${X:-y} $(id)"
    served = deployment.Deployment(folder, name, 2048, 7_000_000)
    printed = subprocess.run(
        ["sh", "-c", f'docker() {{ printf "%s\\0" "$@"; }}; {deployment.docker_run(served)}'],
        capture_output=True, text=True, check=True).stdout.split("\0")
    mounted = next(iter(csv.reader([printed[printed.index("--mount") + 1]])))
    assert name in printed and f"source={folder}" in mounted
    file = yaml.safe_load(deployment.compose(served))
    service = file["services"]["vllm"]
    assert _composed(service["volumes"][0]["source"]) == str(folder)
    assert name in map(_composed, service["command"])
    assert _composed(service["environment"]["KEY_GUARD"]) == GUARD.read_text()
    assert json.loads(deployment.runpod_template(served))["name"] == f"{name}-vllm"
    for machines in deployment.beyond_one_gpu(str(folder)).values():
        assert all(shlex.split(command)[4] == str(folder) for command in machines)
    happened("each text gives back the name and the folder as they are")


def _composed(text: str) -> str:
    """What compose makes of a text: `$$` is a `$`, and any other `$` would be a variable."""
    parts = text.split("$$")
    assert not any("$" in part for part in parts), text
    return "$".join(parts)


@pytest.mark.fault("the key, in any deployment's text")
def test_no_text_holds_the_key(monkeypatch, tiny_base, happened):
    monkeypatch.setenv("VLLM_API_KEY", "my-own-key")
    served = deployment.Deployment(tiny_base.path, "mine", 2048, 7_000_000)
    for make in (deployment.docker_run, deployment.compose, deployment.runpod_template):
        assert "my-own-key" not in make(served) and "KeyGuard" in make(served)
    happened("none holds it; each names the variable VLLM_API_KEY")
