"""Run by the serving environment: a model's directory, then GPU counts.

vLLM builds one layer of the model, of its config alone and with no memory behind it, as the first
of so many tensor-parallel ranks. Printed: by count, what vLLM refuses, "" where it refuses nothing.
The group of ranks is made up: a real one needs as many processes, and where there is no GPU as many
NUMA nodes.
"""

import json
import sys
from types import SimpleNamespace

import torch
from vllm.config import set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models.phi3 import Phi3ForCausalLM

model, *counts = sys.argv[1:]
config = EngineArgs(model=model, hf_overrides={"num_hidden_layers": 1}, dtype="bfloat16",
                    enforce_eager=True, skip_tokenizer_init=True).create_engine_config()


def group(size: int) -> SimpleNamespace:
    return SimpleNamespace(world_size=size, rank_in_group=0, rank=0, ranks=list(range(size)),
                           is_first_rank=True, is_last_rank=True)


answers = {}
for count in counts:
    config.compilation_config.static_forward_context.clear()  # the layers of the count before
    parallel_state._TP, parallel_state._PP = group(int(count)), group(1)
    try:
        with set_current_vllm_config(config), torch.device("meta"):
            Phi3ForCausalLM(vllm_config=config)
        answers[count] = ""
    except AssertionError as refused:
        answers[count] = str(refused) or "refused"
print(json.dumps(answers))
