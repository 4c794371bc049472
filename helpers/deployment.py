"""One click: a checkpoint of one's own on vLLM's official image, and on more than one GPU.

Everything made here is text to look at and take along; nothing is started. The key comes from the
environment variable VLLM_API_KEY, which vLLM reads itself, and is in none of the files.
"""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

# The version that the workbook is tested with (requirements/serve.txt; a test compares).
IMAGE = "vllm/vllm-openai:v0.32.0"
PORT = 8000
MOUNT = "/model"
HEALTH = f"import urllib.request as r; r.urlopen('http://127.0.0.1:{PORT}/health')"


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


def tensor_parallel_sizes(config: dict) -> list[int]:
    """The GPU counts that one layer of this config can be divided over, in vLLM 0.32.

    Query heads are dealt out evenly; KV heads too, or each is copied to the same number of GPUs;
    and so are the rows of the embedding and of lm_head, padded to a multiple of 64.
    Source: vLLM's `ModelConfig.verify_with_parallel_config`, `LlamaAttention` (Phi-4's class is
    built on it) and `VocabParallelEmbedding`; a test builds Phi-4 with each.
    """
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    vocabulary = -(-config["vocab_size"] // 64) * 64
    return [n for n in range(1, heads + 1) if heads % n == 0 and vocabulary % n == 0
            and (kv_heads % n == 0 or n % kv_heads == 0)]


def arguments(deployment: Deployment) -> list[str]:
    """What follows `vllm serve`: the model and its flags, everything else vLLM's default."""
    model = MOUNT if deployment.directory else str(deployment.model)
    flags = ["--served-model-name", deployment.name, "--max-model-len",
             str(deployment.max_model_len), "--host", "0.0.0.0", "--port", str(PORT)]
    parallel = ["--tensor-parallel-size", str(deployment.gpus)] if deployment.gpus > 1 else []
    return [model, *flags, *parallel, *deployment.flags]


def docker_run(deployment: Deployment) -> str:
    """The `docker run` line; the port is bound to this machine alone."""
    volume = (["-v", f"{deployment.directory}:{MOUNT}:ro"] if deployment.directory
              else ["-v", f"hub-cache:{MOUNT}", "-e", f"HF_HOME={MOUNT}"])
    return shlex.join(["docker", "run", "--rm", "--gpus", "all", "--ipc", "host",
                       "-e", "VLLM_API_KEY", "-p", f"127.0.0.1:{PORT}:{PORT}", *volume,
                       "--entrypoint", "vllm", IMAGE, "serve", *arguments(deployment)])


def compose(deployment: Deployment) -> str:
    """A compose file with a health check; it refuses to start without VLLM_API_KEY."""
    import yaml

    volume = (f"{deployment.directory}:{MOUNT}:ro" if deployment.directory
              else f"hub-cache:{MOUNT}")
    environment = {"VLLM_API_KEY": "${VLLM_API_KEY:?set a key of your own}"}
    gpus = {"driver": "nvidia", "count": deployment.gpus, "capabilities": ["gpu"]}
    service = {
        "image": IMAGE, "entrypoint": ["vllm", "serve"], "command": arguments(deployment),
        "environment": environment | ({} if deployment.directory else {"HF_HOME": MOUNT}),
        "ports": [f"127.0.0.1:{PORT}:{PORT}"], "volumes": [volume], "ipc": "host",
        "deploy": {"resources": {"reservations": {"devices": [gpus]}}},
        # Phi-4 from a slow disk takes minutes; until then a failed check does not count.
        "healthcheck": {"test": ["CMD", "python3", "-c", HEALTH], "interval": "10s",
                        "timeout": "5s", "retries": 3, "start_period": "30m"},
    }
    file = {"services": {"vllm": service}}
    if not deployment.directory:
        file["volumes"] = {"hub-cache": {}}
    return yaml.safe_dump(file, sort_keys=False)


def runpod_template(deployment: Deployment) -> str:
    """A template as RunPod's REST API takes it (version 1, `POST /templates`), as JSON.

    The platform's proxy reaches the port over HTTPS and asks for no key of its own, so vLLM's key
    is taken from a secret called vllm_api_key. A directory of one's own has to be on the volume.
    """
    gigabytes = -(-deployment.nbytes // 10**9)
    environment = {"VLLM_API_KEY": "{{ RUNPOD_SECRET_vllm_api_key }}"}
    return json.dumps({
        "name": f"{deployment.name}-vllm", "imageName": IMAGE, "category": "NVIDIA",
        "dockerEntrypoint": ["vllm", "serve"], "dockerStartCmd": arguments(deployment),
        "env": environment | ({} if deployment.directory else {"HF_HOME": MOUNT}),
        "ports": [f"{PORT}/http"],
        "containerDiskInGb": 20, "volumeInGb": gigabytes + 5, "volumeMountPath": MOUNT,
        "isPublic": False, "isServerless": False}, indent=2)


def beyond_one_gpu(model: str, flags: tuple[str, ...] = ()) -> dict[str, list[list[str]]]:
    """Commands for 2 GPUs, 8 GPUs and 2 nodes of 8: by title, one list of arguments per machine.

    Phi-4 divides over 2 GPUs and no more (`tensor_parallel_sizes`); so 8 GPUs are 2 (tensor) times
    4 (pipeline), or replicas behind one endpoint (data). `flags`: as in `Deployment`.
    """
    serve = ["vllm", "serve", model, *flags]
    eight = ["--tensor-parallel-size", "2", "--pipeline-parallel-size", "4"]
    replicas = ["--tensor-parallel-size", "2", "--data-parallel-size", "8",
                "--data-parallel-size-local", "4", "--data-parallel-address", "10.0.0.1",
                "--data-parallel-rpc-port", "13345"]
    return {
        "2 GPUs, each layer divided": [[*serve, "--tensor-parallel-size", "2"]],
        "2 GPUs, two replicas": [[*serve, "--data-parallel-size", "2"]],
        "8 GPUs, layers in four stages": [[*serve, *eight]],
        "8 GPUs, four replicas of two": [[*serve, "--tensor-parallel-size", "2",
                                          "--data-parallel-size", "4"]],
        "2 nodes of 8 GPUs, replicas": [
            [*serve, *replicas],
            [*serve, "--headless", "--data-parallel-start-rank", "4", *replicas]],
        "2 nodes of 8 GPUs, stages over Ray": [
            [*serve, "--tensor-parallel-size", "2", "--pipeline-parallel-size", "8",
             "--distributed-executor-backend", "ray"]],
    }
