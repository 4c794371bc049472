"""Run by the notebooks' environment: machines as JSON in, what the project decides for each out.

NVML is the stand-in, which reads its GPUs anew each time it is initialized: every case is one more
value of NVML_STUB. All else is the project's own code.
"""

import json
import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

import environments  # noqa: E402
import needs  # noqa: E402
import nvml  # noqa: E402
from one_set_up import SetupError  # noqa: E402

from helpers import hardware, models, roofline, serving, serving_env, workspace  # noqa: E402


def decided() -> dict:
    """What the project makes of the machine that NVML shows now."""
    usable = nvml.usable_gpu()
    serve = environments.environments(usable)[1]
    machine = hardware.detect()
    mode = hardware.serving_mode(machine)
    found = {"usable GPU": usable, "environment": serve.folder.name, "note": machine.note,
             "set-up": "", "mode": mode.key if machine.gpus else "cpu", "dtype": mode.dtype,
             "energy": hardware.energy_joules()}
    if usable:
        try:
            needs.require_driver(nvml.driver(), serve.constraints)
        except SetupError as stopped:
            found["set-up"] = str(stopped)
    if mode.device != "cuda":
        if machine.gpus:
            found["capability"] = list(hardware.best_gpu(machine).compute_capability)
        return found
    profile = models.choose(machine)
    gpu = hardware.best_gpu(machine)
    env = serving_env.environment()
    return found | {
        "profile": profile.name, "arms": list(models.arms(profile, machine)),
        "gpus": models.gpus(profile, machine), "capability": list(gpu.compute_capability),
        "flags": serving.default_flags(profile, mode, machine),
        "flags of tiny-phi4": serving.default_flags(models.tiny(), mode, machine),
        "max_model_len": profile.max_model_len,
        "total": gpu.memory_bytes, "free": gpu.free_bytes,
        "variables": {name: value for name, value in env.items()
                      if name in serving_env.ENVIRONMENT or name.startswith("CUDA_")}}


def plan(name: str) -> dict:
    """What the plan says of a GPU of data/gpus.json: its sentence, and tokens by arm."""
    config = roofline.load_config(workspace.data("phi4"))
    budgets = roofline.budgets(config, roofline.named(name))
    return {"says": roofline.explain(config, name),
            "tokens": {arm: budget.tokens for arm, budget in budgets.items()}}


def main() -> None:
    listed = {gpu["name"] for gpu in roofline.gpus()}
    answers = {}
    for case in json.load(sys.stdin):
        os.environ["NVML_STUB"] = case["gpus"]
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        os.environ.update(case["environ"])
        answers[case["name"]] = decided() | (
            {"plan": plan(case["name"])} if case["name"] in listed else {})
    print(json.dumps({"cases": answers}))


if __name__ == "__main__":
    main()
