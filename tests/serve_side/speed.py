"""Run by scripts/accept_steps.py in the serving environment: a model's speed, without a server.

Standard input: {"flags": vLLM's, "work": {name: [prompt tokens, generated tokens, streams]},
"rounds": n} as JSON. Printed: by name, each round's seconds, as JSON.
"""

import json
import random
import sys
import time

from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

VOCABULARY = 400  # token ids that the bundled model has, too


def main(asked: dict) -> dict:
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    llm = LLM.from_engine_args(EngineArgs.from_cli_args(parser.parse_args(asked["flags"])))
    numbers, seconds = random.Random(0), {}

    def run(prompt: int, generated: int, streams: int) -> float:
        prompts = [{"prompt_token_ids": numbers.choices(range(3, VOCABULARY), k=prompt)}
                   for _ in range(streams)]
        sampling = SamplingParams(temperature=0, max_tokens=generated, ignore_eos=True,
                                  detokenize=False)
        start = time.perf_counter()
        answers = llm.generate(prompts, sampling, use_tqdm=False)
        took = time.perf_counter() - start
        lengths = {len(answer.outputs[0].token_ids) for answer in answers}
        assert lengths == {generated}, lengths
        return took

    for name, work in asked["work"].items():
        run(work[0], min(work[1], 32), work[2])  # once to warm up
        seconds[name] = [run(*work) for _ in range(asked["rounds"])]
    return seconds


if __name__ == "__main__":
    print("ANSWER", json.dumps(main(json.load(sys.stdin))))
