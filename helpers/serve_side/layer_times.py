"""One FP8 layer timed with each kernel that vLLM has for it on this CPU: for the appendix."""

import os

from helpers.serve_side import cpu_kernels

WITHOUT = "--without-stock"


def measure(rows: int, columns: int, stock: bool = True):
    """Milliseconds for one token through one [rows, columns] layer, by kernel, on this CPU.

    A DataFrame with columns kernel, numerics and ms (medians): bf16 as vLLM computes it, vLLM's own
    choice for FP8 without this plugin, and the two with it. `stock=False` leaves vLLM's own choice
    out, since at Phi-4's shapes one product can take a minute. On one thread, since on a busy
    machine two wait for each other longer than a small layer takes. Runs in the serving
    environment.
    """
    import json
    import subprocess

    import pandas as pd

    from helpers import WorkbookError, serving

    ran = subprocess.run([serving.serve_python(), "-m", "helpers.serve_side.layer_times", str(rows),
                          str(columns), *([] if stock else [WITHOUT])],
                         capture_output=True, text=True,
                         env=serving.environment() | {"OMP_NUM_THREADS": "1"})
    if ran.returncode != 0:
        raise WorkbookError("The kernels could not be timed.",
                            (ran.stderr.strip().splitlines() or ["no reason was given"])[-1],
                            "See that `make setup` has run, then try again.")
    return pd.DataFrame(json.loads(ran.stdout.splitlines()[-1]))


def _time_layer(rows: int, columns: int, stock: bool) -> list[dict]:
    """The rows of `measure`, in the serving environment's Python."""
    import statistics
    import time

    import torch
    from vllm import _custom_ops as ops
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.kernels.linear import init_fp8_linear_kernel
    from vllm.model_executor.layers.quantization.utils import quant_utils as keys

    def milliseconds(compute, limit: int = 50) -> float:
        took = []
        while len(took) < limit and sum(took) < 1000 or len(took) < 2:
            begun = time.perf_counter()
            compute()
            took.append(1000 * (time.perf_counter() - begun))
        return statistics.median(took[1:])  # the first one makes oneDNN's primitive

    x = torch.randn(1, columns).bfloat16()
    codes = torch.randn(rows, columns).to(torch.float8_e4m3fn)
    handler = ops.create_onednn_mm(codes.to(torch.bfloat16).t(), 1)
    found = [{"kernel": "oneDNN", "numerics": "bf16",
              "ms": milliseconds(lambda: ops.onednn_mm(handler, x, None))}]
    for numerics in (*(["stock"] if stock else []), *cpu_kernels.NUMERICS):
        if numerics != "stock":
            os.environ[cpu_kernels.VARIABLE] = numerics
            cpu_kernels.register()
        with set_current_vllm_config(VllmConfig()):
            kernel = init_fp8_linear_kernel(
                activation_quant_key=keys.kFp8DynamicTokenSym,
                weight_quant_key=keys.kFp8StaticChannelSym, input_dtype=torch.bfloat16,
                out_dtype=torch.bfloat16, weight_shape=(rows, columns))
        layer = torch.nn.Module()
        layer.weight = torch.nn.Parameter(codes.t(), requires_grad=False)
        layer.weight_scale = torch.nn.Parameter(torch.full((rows, 1), 1e-3), requires_grad=False)
        kernel.process_weights_after_loading(layer)
        found.append({"kernel": type(kernel).__name__,
                      "numerics": "w8a8" if numerics == "stock" else numerics,
                      "ms": milliseconds(lambda k=kernel, on=layer: k.apply_weights(on, x))})
    return found


if __name__ == "__main__":
    import json
    import sys

    print(json.dumps(_time_layer(int(sys.argv[1]), int(sys.argv[2]), WITHOUT not in sys.argv)))
