"""vLLM's platform for CPUs with two things changed, both for a quick start.

The engine is forked from the API server. vLLM forks by default, but on a CPU vLLM 0.32 sets
`VLLM_WORKER_MULTIPROC_METHOD=spawn`: its engine is a new Python, which imports torch, Transformers
and vLLM once more. That is half the time of a start. A process with one thread may be forked, and
when it makes its configuration the API server has one. Where it has more, vLLM's way stays.

Nothing is compiled. vLLM 0.32 compiles the small function that ranks a token among all others, by
torch's inductor, when the first request asks for logprobs: that takes 5 to 10 s and a C++ compiler,
and fails where there is none.

`helpers.serve_side.cpu_kernels.platform` names the class to vLLM.
"""

import gc
import os

from vllm.platforms.cpu import CpuPlatform


class ForkingCpuPlatform(CpuPlatform):
    simple_compile_backend = "eager"

    @classmethod
    def check_and_update_config(cls, vllm_config) -> None:
        super().check_and_update_config(vllm_config)
        in_one_process = vllm_config.parallel_config.distributed_executor_backend == "uni"
        if in_one_process and len(os.listdir("/proc/self/task")) == 1:
            os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
            # So that no collection writes to the pages which the two processes share: 0.2 GB.
            gc.freeze()
