"""Run by tests/test_cpu_kernels.py in .venv-serve: a model's greedy tokens through vLLM.

`greedy.py MODEL PROMPTS OUT`: PROMPTS and OUT are JSON; written are the tokens of each prompt under
one thread and under two, and the kernel. One process holds the engine and all, so that a start is
half of a server's. Everything beside the FP8 layers is in float32, as in the emulation.
"""

import json
import os
import sys

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "2",
               "GOMP_SPINCOUNT": "1000",  # see `serving`: else the threads wait against each other
               "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}


def main(model: str, prompts: list[str]) -> dict:
    import torch
    from vllm import LLM, SamplingParams

    set_threads = torch.set_num_threads  # which vLLM takes away once it has bound its threads
    llm = LLM(model, dtype="float32", max_model_len=512, enforce_eager=True, max_num_seqs=4,
              kv_cache_memory_bytes=2**26, distributed_executor_backend="uni",
              enable_prefix_caching=False)
    greedy = SamplingParams(temperature=0, max_tokens=96, stop=["\n\n"])
    found = {"kernels": llm.apply_model(kernels)[0]}
    for threads in (1, 2):
        set_threads(threads)
        answers = llm.generate(prompts, greedy, use_tqdm=False)
        found[str(threads)] = [
            {"prompt": list(answer.prompt_token_ids), "tokens": list(answer.outputs[0].token_ids)}
            for answer in answers]
    return found


def kernels(model) -> list[str]:
    """The linear kernels of a model's quantized layers, each once."""
    schemes = (getattr(module, "scheme", None) for module in model.modules())
    return sorted({type(scheme.fp8_linear).__name__ for scheme in schemes if scheme is not None})


if __name__ == "__main__":
    with open(sys.argv[2]) as file:
        asked = json.load(file)
    result = main(sys.argv[1], asked)
    with open(sys.argv[3], "w") as out:
        json.dump(result, out)
