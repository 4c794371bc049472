"""`make rehearse-gpu`: the GPU path on a machine without a GPU, as far as real code goes.

Each machine of `rehearsal.cases` is put in front of the project's own code and of vLLM's, in the
GPU's real serving environment, over stand-ins for the driver's two libraries (`rehearsal.stand_in`)
and with no CUDA toolkit on the machine. What the two say is held together by `judge`. When all is
well, what was found is kept in data/measured, and `tests/test_rehearsal.py` holds it to what it was
made from.

SERVE=folder names a serving environment that was made elsewhere from the same lists; ONLY=name
rehearses the machines that have this in their name, and keeps nothing.
"""

import hashlib
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

import environments
from one_set_up import SetupError, locked, say
from rehearsal import cases, stand_in
from rehearsal.cases import Case
from rehearsal.judge import judge, row

from helpers import rehearsed, schemes, serving, workspace

REPO = Path(__file__).resolve().parent.parent
BUILD = REPO / "build" / "rehearsal"
HERE = REPO / "scripts" / "rehearsal"
AT_ONCE = 2  # vLLM processes, each of about 2 GB
LIMIT = 300  # seconds for each
PACKAGES = ("vllm", "torch", "triton", "flashinfer-python", "compressed-tensors", "transformers")
# Bytes that a server takes beside weights and KV cache, and before it looks at what is free: the
# workbook's allowances (`helpers.capacity`), written here again so that a change of them shows.
REST, CONTEXT = 1_500_000_000, 800_000_000
# Phi-4-mini's sizes where they differ from Phi-4's; `tests/test_roofline.py` holds them to its
# published parameters.
MINI = {"hidden_size": 3072, "intermediate_size": 8192, "vocab_size": 200064,
        "num_attention_heads": 24, "num_key_value_heads": 8, "num_hidden_layers": 32,
        "tie_word_embeddings": True, "bos_token_id": 199999, "eos_token_id": 199999,
        "pad_token_id": 199999}


def serving_environment() -> Path:
    """The GPU's serving environment: made here if it is not there, as `make setup` makes it."""
    if given := os.environ.get("SERVE"):
        return Path(given).resolve()
    env = environments.environments(gpu=True)[1]
    with locked(REPO):
        if not environments.is_whole(env):
            environments.require_disk(REPO, env.nbytes + environments.GB)
            say(f"{env.folder.name}: about {env.nbytes / environments.GB:.1f} GB on disk")
            uv, environ = environments.bootstrap_uv()
            environments.run_uv([uv, "venv", "--quiet", "--clear", "--python", sys.executable,
                                 env.folder], environ, env.folder.name)
            environments.install(env, uv, environ, environments.torch_build(
                uv, environ, env.python, gpu=True))
    return env.folder


def model_folders() -> dict[tuple[str, str], str]:
    """By profile and arm: a folder with the config.json that vLLM builds the model from."""
    from compressed_tensors.quantization import QuantizationConfig

    quantization = QuantizationConfig(
        config_groups={"group_0": schemes.preset("FP8_DYNAMIC")}, ignore=["lm_head"],
        format="float-quantized", quantization_status="compressed").model_dump(mode="json")
    phi4 = json.loads(workspace.data("phi4", "config.json").read_text())
    tiny = json.loads(workspace.data("tiny_phi4", "config.json").read_text())
    folders = {}
    for name, config in (("phi-4", phi4), ("phi-4-mini", phi4 | MINI), ("tiny-phi4", tiny)):
        for arm, more in (("bf16", {}), ("fp8", {"quantization_config": quantization})):
            folder = BUILD / "models" / f"{name}-{arm}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.json").write_text(json.dumps(config | more, indent=1))
            folders[name, arm] = str(folder)
    return folders


def decisions(machines: list[Case], folder: Path = BUILD) -> dict:
    """What the project decides for each machine: `rehearsal/decide.py` over the stand-in NVML."""
    libraries = stand_in.libraries(folder / "lib")
    (folder / "gpus").mkdir(exist_ok=True)
    asked = []
    for number, case in enumerate(machines):
        place = folder / "gpus" / f"{number}.txt"
        place.write_text(case.described())
        asked.append({"name": case.name, "gpus": str(place), "environ": case.environ})
    environ = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME")}
    done = subprocess.run([sys.executable, HERE / "decide.py"], input=json.dumps(asked), text=True,
                          capture_output=True, cwd=REPO,
                          env=environ | {"LD_LIBRARY_PATH": str(libraries)})
    if done.returncode:
        raise SystemExit(f"The project's own code stopped:\n{done.stderr[-3000:]}")
    answers = json.loads(done.stdout)
    for each in asked:
        answers["cases"][each["name"]]["stub"] = each["gpus"]
    return answers


def serves(decision: dict, folders: dict) -> list[dict]:
    """What vLLM is asked of one machine: both arms, whether the project offers them or not.

    Then FP8 forced to 16-bit activations, where the GPU has its own products (notebook 07), and the
    bundled model. Of a GPU without FP8, the FP8 arm alone.
    """
    if "profile" not in decision:
        flags = ["--dtype", "float16", "--max-model-len", "4096"]
        return [{"name": "fp8", "model": folders["phi-4", "fp8"], "flags": flags}]
    of = {"total": decision["total"], "free": decision["free"] - CONTEXT, "rest": REST}
    own, flags = decision["profile"], decision["flags"]
    asked = [("bf16", own, "bf16", flags), ("fp8", own, "fp8", flags)]
    if decision["mode"] == "gpu-w8a8":
        asked.append(("fp8 W8A16", own, "fp8", [*flags, *serving.MARLIN]))
    asked.append(("fp8 of tiny-phi4", "tiny-phi4", "fp8", decision["flags of tiny-phi4"]))
    return [{"name": name, "model": folders[profile, arm], "flags": flags, **of}
            for name, profile, arm, flags in asked]


def ask_vllm(decision: dict, asked: list[dict], serve: Path, environ: dict,
             log: str) -> dict:
    """What vLLM says of one machine, in a process of its own; its log is in the build folder."""
    log = BUILD / "logs" / f"{log}.txt"
    answer = log.with_suffix(".json")
    answer.unlink(missing_ok=True)
    environ = {
        "HOME": str(BUILD / "home"), "LD_LIBRARY_PATH": str(BUILD / "lib"),
        "NVML_STUB": decision["stub"], "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        **decision.get("variables", {}), **environ}
    with log.open("w") as out:
        try:
            done = subprocess.run(
                [serve / "bin" / "python", HERE / "in_vllm.py"], text=True, stdout=out, stderr=out,
                input=json.dumps({"serves": asked, "answer": str(answer)}),
                env=environ, cwd=REPO, timeout=LIMIT)
        except subprocess.TimeoutExpired:
            return {"failed": f"no answer in {LIMIT} s ({log.relative_to(REPO)})"}
    if done.returncode or not answer.exists():
        said = [line for line in log.read_text().splitlines() if line.strip()]
        return {"failed": f"{said[-1] if said else 'nothing said'} ({log.relative_to(REPO)})"}
    return json.loads(answer.read_text())


def rehearse(machines: list[Case], decided: dict, serve: Path) -> dict[str, dict]:
    """vLLM's answers by machine: without a toolkit, and once for each capability with one."""
    folders = model_folders()
    for folder in ("logs", "home", "no-toolkit"):
        (BUILD / folder).mkdir(parents=True, exist_ok=True)
    programs = stand_in.programs(BUILD / "programs")
    bare = {"PATH": str(programs), "CUDA_HOME": str(BUILD / "no-toolkit")}
    jobs, seen = {}, set()
    for number, case in enumerate(machines):
        decision = decided["cases"][case.name]
        if decision["set-up"] or "capability" not in decision:
            continue
        asked = serves(decision, folders)
        jobs[case.name] = decision, asked, serve, bare | case.environ, f"{number}"
        if decision["usable GPU"] and tuple(decision["capability"]) not in seen:
            seen.add(tuple(decision["capability"]))
            kit = stand_in.toolkit(BUILD / f"toolkit-{number}")
            path = os.pathsep.join(map(str, (serve / "bin", kit / "bin", programs)))
            jobs[f"{case.name}, toolkit"] = (decision, asked[1:2], serve,
                                             {"PATH": path, "CUDA_HOME": str(kit)},
                                             f"{number}-toolkit")
    done, started = {}, time.monotonic()
    if not jobs:
        return {}
    first, *others = jobs  # alone, for vLLM keeps what it learns of a model's class
    done[first] = ask_vllm(*jobs[first])
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for name, answer in zip(others, pool.map(lambda key: ask_vllm(*jobs[key]), others),
                                strict=True):
            done[name] = answer
            say(f"      {len(done)} of {len(jobs)}, {time.monotonic() - started:.0f} s: {name}")
    for name in jobs:
        if name.endswith(", toolkit"):
            called = BUILD / f"toolkit-{jobs[name][-1].partition('-')[0]}" / "called"
            done[name]["nvcc called"] = called.read_text().splitlines()
    return done


def versions(serve: Path) -> dict[str, str]:
    """Versions of what decides, in the serving environment."""
    asked = "import importlib.metadata as m, sys; print([m.version(p) for p in sys.argv[1:]])"
    told = subprocess.check_output([serve / "bin" / "python", "-c", asked, *PACKAGES], text=True)
    return dict(zip(PACKAGES, json.loads(told.replace("'", '"')), strict=True))


def made_from(decided: dict) -> dict[str, str]:
    """SHA-256 of what a rehearsal follows from: when one of them moves on, it has to run again."""
    lists = REPO / "requirements"
    what = {"the serving requirements": (lists / "serve.txt").read_text()
            + (lists / "constraints" / "serve.txt").read_text(),
            "data/gpus.json": workspace.data("gpus.json").read_text(),
            "the project's decisions (mode, profile, arms, flags, variables)": json.dumps(
                {name: {key: value for key, value in found.items()
                        if key not in ("stub", "note")}  # a note may speak of the environment
                 for name, found in decided["cases"].items()}, sort_keys=True),
            "the rehearsal itself": "".join(file.read_text() for file in (
                Path(__file__), *sorted(HERE.glob("*.[cp]*"))) if file.is_file())}
    return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in what.items()}


def main() -> int:
    started = time.monotonic()
    only = os.environ.get("ONLY", "")
    machines = [case for case in (*cases.listed(), *cases.odd()) if only in case.name]
    try:
        serve = serving_environment()
    except SetupError as error:
        print(f"\nSet-up stopped: {error}", file=sys.stderr)
        return 1
    ready = time.monotonic()
    decided = decisions(machines)
    answers = rehearse(machines, decided, serve)
    rows, faults = [], []
    for case in machines:
        decision, answer = decided["cases"][case.name], answers.get(case.name, {})
        found = judge(case, decision, answer, answers.get(f"{case.name}, toolkit"))
        rows.append(row(case, decision, answer, found))
        faults += [f"{case.name}: {fault}" for fault in found]
    seconds = time.monotonic() - ready
    result = {"made": date.today().isoformat(), "versions": versions(serve),
              "seconds": round(seconds), "made from": made_from(decided), "rows": rows,
              "not shown": rehearsed.NOT_SHOWN}
    print(rehearsed.table(rows).to_string())
    print(f"\n{len(rows)} machines in {seconds:.0f} s, after {ready - started:.0f} s for the "
          f"environment. What this cannot show: {'; '.join(rehearsed.NOT_SHOWN)}.")
    for fault in faults:
        print(f"[FAIL] {fault}")
    if faults or only:
        return bool(faults)
    rehearsed.KEPT.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(f"[OK]   kept in {rehearsed.KEPT.relative_to(REPO)}; `.venv/bin/python -m helpers.readme`"
          " writes the README's table from it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
