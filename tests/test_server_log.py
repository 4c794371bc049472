"""What a server's log says: vLLM's own sentences, on a GPU as well as on a CPU."""

import re

import pytest
from conftest import REPO

from helpers import server_log, serving_env

# As a server on a GPU writes them, in order, by either of its model runners; with vLLM's file.
ON_A_GPU = (
    ("config/model.py", "Resolved architecture: Phi3ForCausalLM", "starting the engine's process"),
    ("v1/engine/core.py", "Initializing a V1 LLM engine (v0.32.0) with config: ...",
     "starting the engine"),
    ("v1/worker/gpu_model_runner.py", "Starting to load model /m...", "loading the weights"),
    ("v1/worker/gpu/model_runner.py", "Loading model from scratch...", "loading the weights"),
    ("model_executor/model_loader/weight_utils.py", "Loading safetensors checkpoint shards:  50%",
     "loading the weights"),
    ("compilation/backends.py", "Using cache directory: /c for vLLM's torch.compile", "compiling"),
    ("compilation/backends.py", "Dynamo bytecode transform time: 4.10 s", "compiling"),
    ("compilation/backends.py", "Compiling a graph for compile range (1, 8192) takes 9.10 s",
     "compiling"),
    ("v1/worker/gpu_model_runner.py", "Profiling CUDA graph memory: PIECEWISE=11 (largest=64)",
     "measuring the memory that is left"),
    ("v1/worker/gpu/cudagraph_utils.py", "Capturing CUDA graphs (PIECEWISE):  50%",
     "capturing CUDA graphs"),
    ("v1/core/kv_cache_utils.py", "GPU KV cache size: 91,024 tokens", "preparing the KV cache"),
    ("v1/worker/gpu_model_runner.py",
     "Capturing CUDA graphs (mixed prefill-decode, PIECEWISE):  10%", "capturing CUDA graphs"),
    ("v1/worker/gpu_model_runner.py", "Graph capturing finished in 5 secs, took 0.20 GiB",
     "capturing CUDA graphs"),
    ("entrypoints/launchers/api_server/entry.py", "Starting vLLM server on http://127.0.0.1:8000",
     "opening its port"),
)


def test_each_phase_of_a_start_on_a_gpu_is_said_in_its_turn():
    log = "INFO 11-25 importing\n"
    assert server_log.phase(log) == "importing"
    for _, line, doing in ON_A_GPU:
        log += f"(EngineCore pid=7) INFO 11-25 10:00:00 [a.py:1] {line}\n"
        assert server_log.phase(log) == doing, line


def vllm():
    (package,) = serving_env.folder().glob("lib/python3*/site-packages/vllm")
    return package


@pytest.mark.parametrize("file, line", [(file, line) for file, line, _ in ON_A_GPU
                                        if "Graph capturing finished" not in line])  # no phase's
def test_the_sentences_of_a_start_are_vllms(file, line):
    """What is matched stands in the source of the vLLM that serves; it holds the GPU's code too."""
    source = (vllm() / file).read_text()
    marks = [said for said, _ in server_log._PHASES if said in line]
    assert marks and all(mark in source for mark in marks)


@pytest.mark.parametrize("said, file", [
    ("Graph capturing finished", "v1/worker/gpu_model_runner.py"),
    ("Graph capturing finished", "v1/worker/gpu/model_runner.py"),
    ("Dynamo bytecode transform", "compilation/backends.py"),
    ("Directly load", "compilation/backends.py"),
    ("Directly load", "compilation/decorators.py")])
def test_the_proofs_of_a_compiled_model_are_vllms_sentences(said, file):
    """What `make accept-gpu` looks for in the log of a server on a GPU."""
    assert f'"{said}' in (vllm() / file).read_text().replace('"%s', '"')
    assert said in (REPO / "scripts" / "accept_steps.py").read_text()


def test_the_kernel_of_four_bits_is_read_as_well():
    """vLLM says "Using" of it, and not "Selected"."""
    written = "\n".join(file.read_text() for file in (
        vllm() / "model_executor/layers/quantization/compressed_tensors/schemes").glob("*.py"))
    assert re.search(r'"Using %s for CompressedTensorsWNA16"', written)
    config = {"quantization_config": {}}
    assert server_log.selected_kernel(
        config, "INFO Using MarlinLinearKernel for CompressedTensorsWNA16\n"
    ) == "MarlinLinearKernel"
    attention = "INFO Using FLASH_ATTN attention backend out of potential backends: ['FLASH_ATTN']"
    assert server_log.selected_kernel(config, attention) == "not named in the log"
    # A model without a scheme has no kernel of that kind, whatever else has been selected.
    assert server_log.selected_kernel({}, "Selected SomeKernel for experts") == "unquantized"
