"""The artefacts are valid and hold no secret; vLLM's own parser takes their flags."""

import json
import shlex
import subprocess

import pytest
import yaml
from accept_steps import RANDOM
from conftest import REPO

from helpers import deployment, hardware, models, roofline, serving
from helpers.hardware import Gpu, Machine

PHI4 = roofline.load_config(REPO / "data" / "phi4")


@pytest.fixture
def own(tiny_base):
    return deployment.Deployment(tiny_base.path, "mine", 2048, 7_000_000)


FROM_HUB = deployment.Deployment("me/phi-4-fp8", "phi-4-fp8", 16384, 15_691_827_200, gpus=2)


def in_serving(script: str, arguments: list[str]) -> dict:
    done = subprocess.run(
        [serving.serve_python(), REPO / "tests" / "serve_side" / script, *arguments], text=True,
        capture_output=True, env=serving.environment(), cwd=REPO)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def ask_vllm(commands: list[list[str]]) -> list[dict]:
    environment = serving.environment()
    done = subprocess.run(
        [serving.serve_python(), REPO / "tests" / "serve_side" / "parse_flags.py"], text=True,
        input="".join(json.dumps(c) + "\n" for c in commands), capture_output=True,
        env=environment, cwd=REPO)
    answers = [json.loads(line.removeprefix("ANSWER "))
               for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    assert len(answers) == len(commands), done.stderr[-2000:]
    return answers


def test_the_image_is_of_the_version_that_is_tested():
    assert f"vllm=={deployment.IMAGE.rpartition(':v')[2]}\n" in (
        REPO / "requirements/serve.txt").read_text()


def test_the_docker_line_mounts_the_checkpoint_and_binds_to_this_machine(own, tiny_base):
    words = shlex.split(deployment.docker_run(own))
    assert f"type=bind,source={tiny_base.path},target=/model,readonly=true" in words
    assert "127.0.0.1:8000:8000" in words
    assert words[words.index("-e") + 1] == "VLLM_API_KEY"  # its name; the value stays outside
    assert words[words.index("--entrypoint") + 1:][:2] == ["sh", deployment.IMAGE]
    assert words[-len(deployment.arguments(own)):] == deployment.arguments(own)


def test_the_compose_file_is_yaml_with_a_health_check_and_a_key_from_outside(own):
    for each, volumes in ((own, False), (FROM_HUB, True)):
        file = yaml.safe_load(deployment.compose(each))
        service = file["services"]["vllm"]
        assert service["command"][3:] == deployment.arguments(each)
        assert service["environment"]["VLLM_API_KEY"].startswith("${VLLM_API_KEY:?")
        assert "/health" in service["healthcheck"]["test"][-1]
        compile(service["healthcheck"]["test"][-1], "health", "exec")
        assert ("volumes" in file) == volumes
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert device["count"] == each.gpus


def test_the_runpod_template_has_the_fields_of_its_api_and_room_for_the_weights():
    template = json.loads(deployment.runpod_template(FROM_HUB))
    assert template["dockerStartCmd"][3:] == deployment.arguments(FROM_HUB)
    assert template["ports"] == ["8000/http"] and template["volumeInGb"] == 21
    known = {"name", "imageName", "category", "dockerEntrypoint", "dockerStartCmd", "env", "ports",
             "containerDiskInGb", "volumeInGb", "volumeMountPath", "isPublic", "isServerless"}
    assert template.keys() <= known and {"name", "imageName"} <= template.keys()
    assert "RUNPOD_SECRET_" in template["env"]["VLLM_API_KEY"] and not template["isPublic"]


def test_phi4_divides_over_the_gpu_counts_that_vllm_builds_it_for():
    sizes = roofline.tensor_parallel_sizes(PHI4)
    assert sizes == [1, 2]
    built = in_serving("build_parallel.py", [str(REPO / "data" / "phi4"), *map(str, range(1, 41))])
    assert [n for n, refused in built.items() if not refused] == [str(n) for n in sizes], built
    assert "100352 is not divisible by 5" in built["5"]  # heads and KV heads would divide


def test_a_vocabulary_that_divides_leaves_the_heads_to_decide():
    wider = PHI4 | {"vocab_size": 102_400}
    assert roofline.tensor_parallel_sizes(wider) == [1, 2, 5, 10, 20, 40]


def test_flags_of_ones_own_are_in_every_command():
    marlin = tuple(serving.MARLIN)
    served = deployment.Deployment("me/phi-4-fp8", "phi-4-fp8", 16384, 1, flags=marlin)
    shown = [deployment.docker_run(served),
             shlex.join(yaml.safe_load(deployment.compose(served))["services"]["vllm"]["command"]),
             shlex.join(json.loads(deployment.runpod_template(served))["dockerStartCmd"])]
    shown += [command for machines in
              deployment.beyond_one_gpu("me/phi-4-fp8", marlin).values() for command in machines]
    assert all("--linear-backend marlin" in command for command in shown)
    for capability, flags in (((7, 5), marlin), ((8, 6), marlin), ((8, 9), ()), ((12, 0), ())):
        mode = hardware.gpu_mode(Gpu(0, "a GPU", 24 << 30, capability, ""))
        assert deployment.path_flags(mode) == flags
    assert deployment.path_flags(hardware.ServingMode("cpu-w8a16", "cpu", "", "")) == marlin
    assert "marlin" not in deployment.docker_run(FROM_HUB)


def test_commands_of_the_workbooks_own_environment_sample_without_a_compiler():
    for machines in deployment.beyond_one_gpu("me/phi-4-fp8").values():
        for words in map(shlex.split, machines):
            assert words[:4] == ["env", "VLLM_USE_FLASHINFER_SAMPLER=0", "vllm", "serve"]


def test_vllms_own_parser_takes_every_command(own, tiny_base):
    """Phi-4 by its config alone: parsing and vLLM's check of the sizes need no weights."""
    phi4 = str(REPO / "data" / "phi4")
    commands = [[str(tiny_base.path), *deployment.arguments(own)[1:]]]
    for machines in deployment.beyond_one_gpu(phi4).values():
        commands += [shlex.split(machine)[4:] for machine in machines
                     if "--headless" not in machine]
    commands += [[phi4, "--tensor-parallel-sise", "2"], [phi4, "--tensor-parallel-size", "3"],
                 [phi4, "--max-model-len", "32768"]]
    # the flags that a GPU gets, or two, and those of make accept-gpu
    machines = [Machine((Gpu(0, "a GPU", 24 << 30, capability, ""),) * count, "", 2, frozenset(),
                        0, 0, "", "", "") for capability, count in (((8, 9), 1), ((8, 6), 2))]
    on_gpu = [[phi4, *serving.default_flags(models.PHI4, hardware.serving_mode(where), where),
               *more] for where in machines for more in ([], RANDOM)]
    answers = ask_vllm(commands + on_gpu)
    *taken, misspelt, three, too_long = answers[:len(commands)]
    on_gpu = answers[len(commands):]
    assert [each.get("max_model_len") for each in on_gpu] == [4096] * 4, answers
    assert [each["linear_backend"] for each in on_gpu] == ["auto"] * 2 + ["marlin"] * 2
    assert [each["tp"] for each in on_gpu] == [1, 1, 2, 2]
    assert "refused" in misspelt
    assert "(40) must be divisible by tensor parallel size (3)" in three["refused"]
    assert "max_position_embeddings=16384" in too_long["refused"]  # Red Hat's card asks for it
    assert taken[0] == {"tp": 1, "pp": 1, "dp": 1, "host": "0.0.0.0", "port": 8000,
                        "max_model_len": 2048, "name": ["mine"], "linear_backend": "auto"}
    over_ray = taken.pop()  # Ray is not part of the serving environment on a CPU
    assert over_ray.get("pp") == 8 or "Failed to import Ray" in over_ray["refused"]
    sizes = [(each["tp"], each["pp"], each["dp"]) for each in taken[1:]]
    assert sizes == [(2, 1, 1), (1, 1, 2), (2, 4, 1), (2, 1, 4), (2, 1, 8)]
