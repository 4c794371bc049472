"""Run by the GPU's serving environment: a list of serves as JSON in, what vLLM says of each out.

A serve is the model's folder, the flags, the GPU's memory. vLLM's own code parses the flags, makes
its configuration, builds the model and divides the memory. NVML and the compiled libraries are
real code, over stand-ins for the driver's two libraries. What touches the device is not run; these
are the places where something else stands for it, each with what it leaves unseen:

- the model is built on torch's "meta" device: shapes and kernels, no bytes;
- one process stands for all ranks of a tensor parallel model, over gloo in place of NCCL;
- PYTORCH_NVML_BASED_CUDA_CHECK=1 lets torch count GPUs by NVML, as it may on a real machine;
- FlashAttention 4 is told the capability, which it asks the device for while it compiles;
- the memory that CUDA sees is NVML's, and what a run takes beside weights and KV cache (activations
  and graphs) is the workbook's allowance, `rest`.
"""

import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from types import SimpleNamespace

import torch
from vllm.config import set_current_vllm_config
from vllm.distributed import (
    ensure_model_parallel_initialized,
    init_distributed_environment,
    parallel_state,
)
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser


def configured(serve: dict):
    """vLLM's engine configuration of a serve, after every check that it makes of it."""
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(
        ["--model", serve["model"], *serve["flags"]])
    validate_parsed_serve_args(parsed)
    config = AsyncEngineArgs.from_cli_args(parsed).create_engine_config(
        UsageContext.OPENAI_API_SERVER)
    current_platform.check_if_supports_dtype(config.model_config.dtype)  # as gpu_worker.py does
    return config


def built(config) -> torch.nn.Module:
    """The model as vLLM builds it for its first rank, without bytes."""
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    with set_current_vllm_config(config):
        if not torch.distributed.is_initialized():
            meeting = Path(tempfile.mkdtemp()) / "meeting"
            init_distributed_environment(1, 0, f"file://{meeting}", 0, "gloo")
            ensure_model_parallel_initialized(1, 1)
        parallel_state._TP.world_size = config.parallel_config.tensor_parallel_size
        with set_default_torch_dtype(config.model_config.dtype), torch.device("meta"):
            return initialize_model(vllm_config=config)


def kernels(model: torch.nn.Module) -> dict[str, list]:
    """By Linear of a layer: the kernel that vLLM chose for it, and its shape, [out, in]."""
    found = {}
    for name, module in model.named_modules():
        if not hasattr(module, "quant_method") or ".layers.0." not in f"{name}.":
            continue
        last = name.rpartition(".")[2]
        if isinstance(getattr(module, "weight", None), torch.Tensor):
            own = [value for value in vars(getattr(module, "scheme", None) or object).values()
                   if type(value).__name__.endswith("Kernel")]
            found[last] = [type((own or [module.quant_method])[0]).__name__,
                           list(module.weight.shape)]
    return found


def attention(model: torch.nn.Module) -> str:
    return next(module.attn_backend.get_name() for module in model.modules()
                if hasattr(module, "attn_backend"))


def memory(config, model: torch.nn.Module, serve: dict) -> dict:
    """vLLM's own arithmetic of one GPU's memory, in bytes, and the tokens that its KV cache holds.

    In the order of vllm/v1/engine/core.py, `_initialize_kv_caches`.
    """
    from vllm.config import get_layers_from_vllm_config
    from vllm.distributed.kv_transfer.kv_connector.utils import get_current_attn_backends
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.utils.mem_utils import MemorySnapshot
    from vllm.v1.attention.backends.utils import (
        get_supported_kv_cache_layouts,
        resolve_kv_cache_layout,
    )
    from vllm.v1.core.kv_cache_utils import get_kv_cache_configs
    from vllm.v1.worker.utils import customize_attention_spec, request_memory

    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    seen = MemorySnapshot(device=torch.device("cpu"), auto_measure=False,
                          total_memory=serve["total"], free_memory=serve["free"])
    requested = request_memory(seen, config.cache_config)
    left = requested - weights - serve["rest"]
    specs = {name: customize_attention_spec(layer.get_attn_backend(),
                                            layer.get_kv_cache_spec(config))
             for name, layer in get_layers_from_vllm_config(config, AttentionLayerBase).items()}
    ranks = config.parallel_config.tensor_parallel_size
    with set_current_vllm_config(config):
        layouts = [layout.name for layout in
                   get_supported_kv_cache_layouts(get_current_attn_backends(config))]
        resolve_kv_cache_layout(config, [layouts] * ranks, [*specs.values()] * ranks)
        cache = get_kv_cache_configs(config, [specs] * ranks, [left] * ranks)[0]
    return {"weights": weights, "requested": requested,
            "tokens": cache.num_blocks * next(iter(specs.values())).block_size}


def gates(config, model: torch.nn.Module) -> dict:
    """What would be compiled while the server starts, by component."""
    from vllm.model_executor.warmup import cutedsl_warmup, deep_gemm_warmup
    from vllm.triton_utils import HAS_TRITON
    from vllm.utils.flashinfer import has_flashinfer
    from vllm.v1.sample.ops.topk_topp_sampler import flashinfer_sampler_supported

    try:
        sampler = flashinfer_sampler_supported()
    except Exception as asked:  # it is on, and looks at the device
        sampler = f"on: {type(asked).__name__}"
    compilation = config.compilation_config
    return {
        "FlashInfer kernels": has_flashinfer(), "FlashInfer sampler": sampler,
        "attention": attention(model), "Triton": HAS_TRITON,
        "DeepGEMM kernels": deep_gemm_warmup._count_warmup_iterations(
            model, config.scheduler_config.max_num_batched_tokens),
        "CuTe DSL kernels": len(list(cutedsl_warmup._iter_cutedsl_warmup_compile_units())),
        "torch.compile": [compilation.mode.name, compilation.backend],
        "CUDA graphs": compilation.cudagraph_mode.name}


def triton_compiles() -> str:
    """The architecture that Triton compiled a kernel for, and its C module, by its own means.

    The kernel goes through its own ptxas; the module that starts it through the machine's C
    compiler, with Python's headers and libcuda.
    """
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver
    from triton.compiler import ASTSource
    from triton.runtime.build import _build

    @triton.jit
    def doubled(x, n, block: tl.constexpr):
        at = tl.program_id(0) * block + tl.arange(0, block)
        tl.store(x + at, tl.load(x + at, mask=at < n) * 2, mask=at < n)

    capability = current_platform.get_device_capability().to_int()
    source = ASTSource(fn=doubled, signature={"x": "*fp16", "n": "i32", "block": "constexpr"},
                       constexprs={"block": 64})
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    with tempfile.TemporaryDirectory() as folder:
        _build("cuda_utils", str(Path(driver.dirname) / "driver.c"), folder, driver.library_dirs(),
               driver.include_dirs, driver.libraries, [])
    return f"sm_{capability}, {len(kernel.asm['cubin'])} bytes"


def flash_attention_4_compiles() -> str:
    """The architecture that FlashAttention 4 was compiled for, where vLLM takes it; else "".

    It compiles itself with nvidia-cutlass-dsl, which is in the environment: here the attention of
    Phi-4's heads, over a paged cache of fake tensors. torch and CuTe ask the device for its
    capability and for its multiprocessors, which are only the grid's size; they are told.
    """
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    capability = current_platform.get_device_capability()
    if get_flash_attn_version() != 4:
        return ""
    architecture = f"sm_{capability.to_int()}a"
    os.environ |= {"CUTE_DSL_ARCH": architecture, "FLASH_ATTENTION_ARCH": architecture[:-1]}
    told = SimpleNamespace(major=capability.major, minor=capability.minor, multi_processor_count=1)
    torch.cuda.get_device_capability = lambda *_: (capability.major, capability.minor)
    torch.cuda.get_device_properties, torch.cuda._lazy_init = lambda *_: told, lambda: None
    torch.cuda.current_device = lambda: 0

    import cutlass
    from torch._subclasses.fake_tensor import FakeTensorMode
    from vllm.vllm_flash_attn.cute.interface import _flash_attn_fwd

    cutlass.utils.HardwareInfo = lambda *_: SimpleNamespace(
        get_max_active_clusters=lambda *_: 1, get_device_multiprocessor_count=lambda *_: 1)
    with FakeTensorMode(allow_non_fake_inputs=True):
        def empty(*shape, dtype=torch.int32):
            return torch.empty(shape, dtype=dtype, device="cuda")

        cache = [empty(100, 16, 10, 128, dtype=torch.bfloat16) for _ in range(2)]
        _flash_attn_fwd(empty(64, 40, 128, dtype=torch.bfloat16), *cache, cu_seqlens_q=empty(9),
                        seqused_k=empty(8), page_table=empty(8, 12), softmax_scale=128**-0.5,
                        causal=True, max_seqlen_q=64, max_seqlen_k=192)
    return architecture


def rehearsed(serve: dict) -> dict:
    """What vLLM says of one serve; "refused" and "at" where it does not go to the end."""
    found, step = {"name": serve["name"]}, "flags and configuration"
    try:
        config = configured(serve)
        found |= {"dtype": str(config.model_config.dtype).removeprefix("torch."),
                  "batched tokens": config.scheduler_config.max_num_batched_tokens,
                  "ranks": config.parallel_config.tensor_parallel_size}
        step = "model"
        model = built(config)
        found |= {"kernels": kernels(model)}
        step = "gates"
        found |= {"gates": gates(config, model)}
        step = "memory"
        found |= {"memory": memory(config, model, serve)}
    except (Exception, SystemExit) as refused:
        traceback.print_exc()
        found |= {"at": step, "refused": str(refused)}
    return found


def main() -> None:
    asked = json.loads(sys.stdin.read())
    capability = current_platform.get_device_capability()
    answer = {"platform": type(current_platform).__name__,
              "capability": [capability.major, capability.minor],
              "serves": [rehearsed(serve) for serve in asked["serves"]]}
    for what, compiles in (("Triton", triton_compiles),
                           ("FlashAttention 4", flash_attention_4_compiles)):
        try:
            answer[f"{what} compiles"] = compiles()
        except Exception as failed:
            traceback.print_exc()
            answer[f"{what} compiles"] = f"no: {failed}"
    Path(asked["answer"]).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
