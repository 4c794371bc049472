"""One click: a checkpoint of one's own on vLLM's official image, and on more than one GPU.

Everything made here is text to look at and take along; nothing is started. The key comes from the
environment variable VLLM_API_KEY and is in none of the texts. Every route but /health asks for it:
vLLM by itself would ask on /v1 only, so the source of `helpers.serve_side.guard` goes along, in the
variable KEY_GUARD. `START` writes it to a file where vLLM finds it as middleware. Without a key the
server does not start.
"""

import csv
import io
import json
import shlex
from dataclasses import dataclass
from pathlib import Path

from helpers import capacity, serving
from helpers.hardware import ServingMode
from helpers.serving_env import ENVIRONMENT

# The version that the workbook is tested with (requirements/serve.txt; a test compares).
IMAGE = "vllm/vllm-openai:v0.32.0"
PORT = 8000
MOUNT = "/model"
# Docker may put its own proxy into a container's environment; this must not go there.
HEALTH = ("from urllib.request import *; "
          f"build_opener(ProxyHandler({{}})).open('http://127.0.0.1:{PORT}/health', timeout=4)")
START = ('guard=$(mktemp -d) && printf %s "$KEY_GUARD" > "$guard/key_guard.py" && '
         'PYTHONPATH=$guard exec vllm serve "$@" --middleware key_guard.KeyGuard')


@dataclass(frozen=True)
class Deployment:
    """What is served: a directory, or a repository of the hub; `name` is what clients ask for."""

    model: str | Path
    name: str
    max_model_len: int
    nbytes: int  # of weights, for the disk that a platform is asked for
    gpus: int = 1
    flags: tuple[str, ...] = ()  # more of vLLM's own; `serving.MARLIN` for a Turing or Ampere GPU

    @property
    def directory(self) -> Path | None:
        """The model's directory, or None where it comes from the hub."""
        return Path(self.model).resolve() if Path(self.model).is_dir() else None


def path_flags(mode: ServingMode) -> tuple[str, ...]:
    """What a GPU of this mode needs beside vLLM's own defaults; without a GPU, what an A40 needs.

    Marlin by name below capability 8.9 (`serving.default_flags` says why). Below 8.0 vLLM takes
    float16 by itself where no `--dtype` is given (`_resolve_auto_dtype`).
    """
    return () if mode.key == "gpu-w8a8" else tuple(serving.MARLIN)


def arguments(deployment: Deployment) -> list[str]:
    """What follows `vllm serve`: the model and its flags, everything else vLLM's default.

    Of the memory it takes the share that the workbook's own servers take; vLLM's default is 0.92.
    """
    model = MOUNT if deployment.directory else str(deployment.model)
    flags = ["--served-model-name", deployment.name, "--max-model-len",
             str(deployment.max_model_len), "--gpu-memory-utilization", f"{capacity.SHARE:.2f}",
             "--host", "0.0.0.0", "--port", str(PORT)]
    parallel = ["--tensor-parallel-size", str(deployment.gpus)] if deployment.gpus > 1 else []
    return [model, *flags, *parallel, *deployment.flags]


def docker_run(deployment: Deployment) -> str:
    """The `docker run` command; the port is bound to this machine alone."""
    volume = ({"type": "bind", "source": deployment.directory, "target": MOUNT, "readonly": "true"}
              if deployment.directory else
              {"type": "volume", "source": "hub-cache", "target": MOUNT})
    cache = [] if deployment.directory else ["-e", f"HF_HOME={MOUNT}"]
    return shlex.join(["docker", "run", "--rm", "--gpus", "all", "--ipc", "host",
                       "-e", "VLLM_API_KEY", "-e", f"KEY_GUARD={_guard()}", *cache,
                       "-p", f"127.0.0.1:{PORT}:{PORT}", "--mount", _csv(volume),
                       "--entrypoint", "sh", IMAGE, *_start(deployment)])


def compose(deployment: Deployment) -> str:
    """A compose file with a health check; it refuses to start without VLLM_API_KEY.

    Compose puts variables in where it finds `$`, so a `$` that is meant is written `$$`.
    """
    import yaml

    volume = ({"type": "bind", "source": str(deployment.directory), "target": MOUNT,
               "read_only": True} if deployment.directory else
              {"type": "volume", "source": "hub-cache", "target": MOUNT})
    gpus = {"driver": "nvidia", "count": deployment.gpus, "capabilities": ["gpu"]}
    cache = {} if deployment.directory else {"HF_HOME": MOUNT}
    service = _literal({
        "image": IMAGE, "entrypoint": ["sh"], "command": _start(deployment),
        "environment": {"KEY_GUARD": _guard()} | cache,
        "ports": [f"127.0.0.1:{PORT}:{PORT}"], "volumes": [volume], "ipc": "host",
        "deploy": {"resources": {"reservations": {"devices": [gpus]}}},
        # Phi-4 from a slow disk takes minutes; until then a failed check does not count.
        "healthcheck": {"test": ["CMD", "python3", "-c", HEALTH], "interval": "10s",
                        "timeout": "5s", "retries": 3, "start_period": "30m"},
    })
    service["environment"]["VLLM_API_KEY"] = "${VLLM_API_KEY:?set a key of your own}"
    file = {"services": {"vllm": service}}
    if not deployment.directory:
        file["volumes"] = {"hub-cache": {}}
    return yaml.dump(file, Dumper=_dumper(), sort_keys=False, width=1000)


def runpod_template(deployment: Deployment) -> str:
    """A template as RunPod's REST API takes it (version 1, `POST /templates`), as JSON.

    The platform's proxy reaches the port over HTTPS and asks for no key of its own, so the key is
    taken from a secret called vllm_api_key. A directory of one's own has to be on the volume.
    """
    gigabytes = -(-deployment.nbytes // 10**9)
    environment = {"VLLM_API_KEY": "{{ RUNPOD_SECRET_vllm_api_key }}", "KEY_GUARD": _guard()}
    return json.dumps({
        "name": f"{deployment.name}-vllm", "imageName": IMAGE, "category": "NVIDIA",
        "dockerEntrypoint": ["sh"], "dockerStartCmd": _start(deployment),
        "env": environment | ({} if deployment.directory else {"HF_HOME": MOUNT}),
        "ports": [f"{PORT}/http"],
        "containerDiskInGb": 20, "volumeInGb": gigabytes + 5, "volumeMountPath": MOUNT,
        "isPublic": False, "isServerless": False}, indent=2)


def _guard() -> str:
    return (Path(__file__).parent / "serve_side" / "guard.py").read_text()


def _start(deployment: Deployment) -> list[str]:
    """What `sh` gets: the script, then its $0, then what becomes "$@"."""
    return ["-c", START, "vllm", *arguments(deployment)]


def _csv(fields: dict) -> str:
    """`docker run --mount`'s own form, which is a line of CSV: a path may hold a comma."""
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(f"{key}={value}" for key, value in fields.items())
    return line.getvalue()


def _literal(value):
    """The value with every `$` in its texts doubled, for compose."""
    if isinstance(value, dict):
        return {key: _literal(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_literal(each) for each in value]
    return value.replace("$", "$$") if isinstance(value, str) else value


def _dumper():
    """PyYAML's safe dumper, with a text of several lines as a block that can be read."""
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    Dumper.add_representer(str, lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style="|" if "\n" in text else None))
    return Dumper


def beyond_one_gpu(model: str, flags: tuple[str, ...] = ()) -> dict[str, list[str]]:
    """Commands for 2 GPUs, 8 GPUs and 2 nodes of 8: by title, one shell command per machine.

    For the workbook's serving environment, .venv-serve-gpu, with VLLM_API_KEY exported: there the
    guard of the key can be imported. They listen on the machine itself alone, and sample without
    FlashInfer, which needs nvcc; vLLM's own image, for the other artefacts, has it.

    Phi-4 divides over 2 GPUs and no more (`roofline.tensor_parallel_sizes`); so 8 GPUs are 2
    (tensor) times 4 (pipeline), or replicas behind one endpoint (data). `flags`: as in
    `Deployment`.
    """
    sampler = "VLLM_USE_FLASHINFER_SAMPLER"
    worker = ["env", f"{sampler}={ENVIRONMENT[sampler]}", "vllm", "serve", model, *flags]
    serve = [*worker, "--host", "127.0.0.1", *serving.GUARD]
    replicas = ["--tensor-parallel-size", "2", "--data-parallel-size", "8",
                "--data-parallel-size-local", "4", "--data-parallel-address", "10.0.0.1",
                "--data-parallel-rpc-port", "13345"]
    commands = {
        "2 GPUs, each layer divided": [[*serve, "--tensor-parallel-size", "2"]],
        "2 GPUs, two replicas": [[*serve, "--data-parallel-size", "2"]],
        "8 GPUs, layers in four stages": [
            [*serve, "--tensor-parallel-size", "2", "--pipeline-parallel-size", "4"]],
        "8 GPUs, four replicas of two": [[*serve, "--tensor-parallel-size", "2",
                                          "--data-parallel-size", "4"]],
        "2 nodes of 8 GPUs, replicas": [
            [*serve, *replicas],
            [*worker, "--headless", "--data-parallel-start-rank", "4", *replicas]],
        "2 nodes of 8 GPUs, stages over Ray": [
            [*serve, "--tensor-parallel-size", "2", "--pipeline-parallel-size", "8",
             "--distributed-executor-backend", "ray"]],
    }
    return {title: [shlex.join(command) for command in machines]
            for title, machines in commands.items()}
