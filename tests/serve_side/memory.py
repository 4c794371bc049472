"""Run by the serving environment: lines of JSON in, each a GPU's memory and what a server needs.

vLLM's own two checks at a server's start: of the memory that is free, and of what is left for the
KV cache. Printed: the bytes left, or what vLLM refuses, as its log would have it.
"""

import json
import sys
from types import SimpleNamespace

from vllm.v1.core.kv_cache_utils import _check_enough_kv_cache_memory
from vllm.v1.worker.utils import request_memory

for line in sys.stdin:
    asked = json.loads(line)
    seen = SimpleNamespace(total_memory=asked["total"], free_memory=asked["free"], device_="cuda:0")
    try:
        taken = request_memory(seen, SimpleNamespace(gpu_memory_utilization=asked["share"]))
        left = taken - asked["taken"]
        _check_enough_kv_cache_memory(left, lambda kv=asked["kv"]: kv, asked["tokens"], lambda _: 0)
        answer = {"left": left}
    except ValueError as refused:
        answer = {"refused": f"ValueError: {refused}"}
    print("ANSWER", json.dumps(answer), flush=True)
