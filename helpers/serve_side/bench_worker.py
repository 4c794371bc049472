"""vLLM's serving benchmark in the serving environment, imported once and run as often as asked.

`helpers.throughput` starts `python -m helpers.serve_side.bench_worker` and sends it the arguments
and the server's key over a pipe.
"""

import argparse
import json
import os
import sys


def serve_requests() -> None:
    """A line of JSON in, a run of the benchmark, a line of JSON out, until the pipe closes."""
    from vllm.benchmarks import serve

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the benchmark prints goes to the log
    parser = argparse.ArgumentParser(exit_on_error=False)
    serve.add_cli_args(parser)
    for line in sys.stdin:
        request = json.loads(line)
        os.environ["OPENAI_API_KEY"] = request["key"]
        try:
            answer = {"result": serve.main(parser.parse_args(request["arguments"]))}
        except (Exception, SystemExit) as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer, default=float) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve_requests()
