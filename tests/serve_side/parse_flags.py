"""Run by the serving environment: lines of JSON in, each a list of `vllm serve` arguments.

Each is parsed by vLLM's own parser, and its sizes are checked against the model's config; printed
is what vLLM refuses, and the sizes it understood otherwise.
"""

import json
import sys

from vllm.config import ParallelConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.utils.argparse_utils import FlexibleArgumentParser

for line in sys.stdin:
    parser = make_arg_parser(FlexibleArgumentParser())
    model, *flags = json.loads(line)
    try:
        parsed = parser.parse_args(["--model", model, *flags])
        validate_parsed_serve_args(parsed)
        engine = AsyncEngineArgs.from_cli_args(parsed)
        config = engine.create_model_config()
        config.verify_with_parallel_config(ParallelConfig(
            tensor_parallel_size=engine.tensor_parallel_size,
            pipeline_parallel_size=engine.pipeline_parallel_size,
            distributed_executor_backend="ray" if engine.distributed_executor_backend == "ray"
            else "mp"))
        answer = {"tp": engine.tensor_parallel_size, "pp": engine.pipeline_parallel_size,
                  "dp": engine.data_parallel_size, "host": parsed.host, "port": parsed.port,
                  "max_model_len": config.max_model_len, "name": parsed.served_model_name,
                  "linear_backend": engine.linear_backend}
    except (SystemExit, Exception) as error:
        answer = {"refused": str(error)}
    print("ANSWER", json.dumps(answer), flush=True)
