"""What only a GPU can show: `make test-gpu`; elsewhere each is skipped with a reason.

What was measured is appended to build/gpu.jsonl in the ledger's form, with the device, its driver,
the versions and the commit, to be kept under data/measured.
"""

import json
import subprocess

import pytest
import torch
from conftest import REPO

from helpers import (
    ablation,
    checkpoint,
    fp8,
    hardware,
    ledger,
    models,
    phi4_slice,
    roofline,
    server_log,
    serving,
    slice_speed,
    throughput,
    workspace,
)

PHI4 = roofline.load_config(workspace.data("phi4"))
SHAPES = {t.name.split(".")[-2]: t.shape for t in roofline.tensors(PHI4) if ".layers.0." in t.name
          and len(t.shape) == 2}
# Name: tokens of prompt, tokens to generate, streams at once. The first generates 500 tokens, as
# the card says; its prompt and its one stream are ours.
WORK = {"decode": (64, 500, 1), "prefill": (2048, 1, 1), "8 streams": (64, 128, 8),
        "64 streams": (64, 128, 64)}
ROUNDS = 3
RANDOM = ["--load-format", "dummy", "--skip-tokenizer-init", "--no-enable-prefix-caching"]
MARLIN = "MarlinFP8ScaledMMLinearKernel"


@pytest.fixture(scope="module")
def gpu():
    """The GPU that is used; skips where there is none with an FP8 mode, or its driver is too old.
    """
    machine = hardware.detect()
    if hardware.serving_mode(machine).device != "cuda":
        pytest.skip(f"no GPU with an FP8 mode here: {hardware.serving_mode(machine).why}")
    if hardware.driver_fault(machine.gpus):
        pytest.skip(hardware.driver_fault(machine.gpus))
    return hardware.best_gpu(machine)


@pytest.fixture
def tensor_cores(gpu):
    """A GPU that multiplies FP8; skips on one of an older capability."""
    if gpu.compute_capability < hardware.W8A8_CAPABILITY:
        pytest.skip(f"FP8 products need capability 8.9, and {gpu.name} has "
                    f"{hardware.capability(gpu)}")
    return gpu


def ask(script: str, *arguments: str, asked: str = "") -> tuple[dict, str]:
    """What a script of tests/serve_side answers, and its log."""
    done = subprocess.run(
        [serving.serve_python(), REPO / "tests" / "serve_side" / script, *arguments], cwd=REPO,
        input=asked, capture_output=True, text=True, env=serving.environment()
        | {"PYTHONPATH": str(REPO)})
    log = done.stdout + done.stderr
    answers = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    assert done.returncode == 0 and len(answers) == 1, log[-3000:]
    return json.loads(answers[0].removeprefix("ANSWER ")), log


# The layers


@pytest.mark.parametrize("name", SHAPES)
def test_an_fp8_product_is_the_float64_one_of_the_same_codes(tensor_cores, name):
    """torch's FP8 product on tensor cores at Phi-4's shapes, per-token by per-channel scales."""
    if not torch.cuda.is_available():
        pytest.skip("this environment's torch has no CUDA")
    out, into = SHAPES[name]
    torch.manual_seed(0)
    codes, scale = fp8.quantize_per_channel(torch.randn(out, into).mul(0.02).bfloat16())
    x = torch.randn(64, into)
    x_scale = ablation.amax(x, "row") / fp8.E4M3.max
    x = fp8.encode(x / x_scale)
    exact = (fp8.decode(x).double() * x_scale) @ (fp8.decode(codes).double() * scale.double()).T
    made = torch._scaled_mm(
        x.cuda().view(torch.float8_e4m3fn), codes.cuda().view(torch.float8_e4m3fn).t(),
        scale_a=x_scale.cuda(), scale_b=scale.float().cuda().t(), out_dtype=torch.bfloat16)
    # bf16 keeps eight bits: half a unit in the last place of the largest is 2^-9 of it.
    assert (made.cpu().double() - exact).abs().max() <= 2**-8 * exact.abs().max()


def test_vllms_layers_compute_what_their_path_says(gpu):
    """At Phi-4's shapes, against float64: W8A8 where there are tensor cores, and W8A16."""
    w8a8 = gpu.compute_capability >= hardware.W8A8_CAPABILITY
    measured, _ = ask("gpu_layers.py", *(["auto"] if w8a8 else []), "marlin")
    for layer, found in measured["marlin"].items():
        assert found["kernel"] == MARLIN
        assert found["w8a16"] <= 2 * found["bf16"], (layer, found)
    for layer, found in measured.get("auto", {}).items():
        assert found["kernel"] != MARLIN
        # What the tensor cores' own sums are off is little beside the rounding that was asked for.
        assert found["w8a8"] <= found["rounding"] / 2, (layer, found)


# The server


def served(tiny_fp8, flags: list[str]) -> tuple[str, str]:
    with serving.VllmServer(tiny_fp8, flags) as server:
        return server.kernel, server.complete("Question: 2 + 3?\nAnswer:", max_tokens=16)


def test_the_server_takes_the_kernel_of_its_path_and_gives_the_memory_back(gpu, tiny_fp8):
    import pynvml

    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(gpu.index)
    before = pynvml.nvmlDeviceGetMemoryInfo(handle).used
    mode = hardware.gpu_mode(gpu)
    with serving.VllmServer(tiny_fp8, serving.default_flags(models.tiny(), mode)) as server:
        assert (server.kernel == MARLIN) == (mode.key == "gpu-w8a16"), server.kernel
        assert server.kernel != "not named in the log"
        assert pynvml.nvmlDeviceGetMemoryInfo(handle).used > before
    assert pynvml.nvmlDeviceGetMemoryInfo(handle).used <= before + 64 * 2**20


def test_the_same_checkpoint_is_served_in_both_arithmetics(tensor_cores, tiny_fp8):
    """Forced Marlin (W8A16) on hardware that has W8A8."""
    flags = serving.default_flags(models.tiny(), hardware.gpu_mode(tensor_cores))
    own, answer = served(tiny_fp8, flags)
    forced, other = served(tiny_fp8, flags + serving.MARLIN)
    assert (own != MARLIN, forced) == (True, MARLIN)
    assert answer and other


# Phi-4 at its full size, of random weights: nothing is downloaded


@pytest.fixture(scope="module")
def copy_bandwidth(gpu) -> float:
    """Bytes/s, read and written, of copies in this GPU's memory, by the serving environment."""
    done = subprocess.run(
        [serving.serve_python(), "-c",
         "from helpers import roofline; print(roofline.measured_copy())"],
        cwd=REPO, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout)


@pytest.fixture(scope="module")
def speed(gpu, copy_bandwidth, tiny_fp8, tmp_path_factory):
    """A function of an arm and more flags: its seconds by name of work, and vLLM's kernel.

    Each is measured once, and recorded.
    """
    mode, known = hardware.gpu_mode(gpu), {}

    def measure(arm: str, *more: str) -> tuple[dict[str, list[float]], str]:
        nbytes = {"bf16": models.PHI4.bf16_bytes, "fp8": models.PHI4.fp8_bytes}[arm]
        if not models.fits(nbytes, models.PHI4, hardware.detect()):
            pytest.skip(f"Phi-4's {nbytes / 1e9:.1f} GB of {arm} weights do not fit {gpu.name}, "
                        f"which has {gpu.memory_bytes / 1e9:.1f} GB")
        if (arm, more) not in known:
            model = random_phi4(tmp_path_factory.mktemp(arm), arm, tiny_fp8)
            flags = serving.default_flags(models.PHI4, mode)
            asked = {"flags": ["--model", str(model), *flags, *RANDOM, *more], "work": WORK,
                     "rounds": ROUNDS}
            seconds, log = ask("speed.py", asked=json.dumps(asked))
            kernel = server_log.selected_kernel(checkpoint.read_config(model), log)
            record(arm, seconds, kernel, mode, copy_bandwidth)
            known[arm, more] = seconds, kernel
        return known[arm, more]

    return measure


def random_phi4(place, arm: str, tiny_fp8):
    """A directory with Phi-4's config, and for FP8 the scheme that LLM Compressor wrote into ours.
    """
    config = json.loads((workspace.data("phi4") / "config.json").read_text())
    if arm == "fp8":
        config["quantization_config"] = tiny_fp8.config["quantization_config"]
    workspace.write_json(place / "config.json", config)
    return place


def record(arm: str, seconds: dict, kernel: str, mode, bandwidth: float) -> None:
    """Into build/gpu.jsonl: tokens/s, and of one stream's decoding the share of the bandwidth."""
    (REPO / "build").mkdir(exist_ok=True)
    for name, (prompt, generated, streams) in WORK.items():
        tokens = streams * (generated if generated > 1 else prompt)
        rates = sorted(tokens / each for each in seconds[name])
        metrics = {"output_tok_s" if generated > 1 else "prefill_tok_s": rates[len(rates) // 2]}
        if generated > 1:
            metrics |= {"output_tok_s_min": rates[0], "output_tok_s_max": rates[-1]}
        if name == "decode":
            metrics |= {"copy_bytes_s": bandwidth, "share_of_copy_bandwidth": share(
                arm, seconds[name], bandwidth)}
        ledger.record(
            "throughput", arm, {"input_tokens": prompt, "output_tokens": generated,
                                "concurrency": streams, "rounds": ROUNDS}, metrics,
            model={"profile": "phi-4-random", "repo": "random weights", "revision": ""},
            mode=mode.key, kernel=kernel, ledger=REPO / "build" / "gpu.jsonl")


def share(arm: str, seconds: list[float], bandwidth: float) -> float:
    """Bytes of weights read for each token, times tokens/s, over the copy bandwidth."""
    median = sorted(seconds)[len(seconds) // 2]
    return roofline.decode_bytes(PHI4, arm) * WORK["decode"][1] / median / bandwidth


@pytest.mark.parametrize("arm", ["bf16", "fp8"])
def test_500_tokens_of_one_stream_stay_below_what_the_memory_can_give(
    speed, copy_bandwidth, arm
):
    """No decoding can read faster than the memory; a copy comes within a tenth of its best."""
    seconds, _ = speed(arm)
    reached = share(arm, seconds["decode"], copy_bandwidth)
    print(f"{arm}: {reached:.0%} of the copy bandwidth")
    assert 0 < reached < 1.1


def test_one_stream_is_faster_in_fp8_and_by_no_more_than_its_bytes(speed):
    times = {arm: sorted(speed(arm)[0]["decode"])[ROUNDS // 2] for arm in ("bf16", "fp8")}
    most = roofline.decode_bytes(PHI4, "bf16") / roofline.decode_bytes(PHI4, "fp8")
    assert 1 < times["bf16"] / times["fp8"] < 1.05 * most


@pytest.mark.parametrize("arm", ["bf16", "fp8"])
def test_more_streams_generate_more_and_a_prompt_is_read_faster_than_it_is_written(speed, arm):
    seconds, _ = speed(arm)
    rates = {name: WORK[name][1] * WORK[name][2] / min(seconds[name])
             for name in ("decode", "8 streams", "64 streams")}
    assert rates["decode"] < rates["8 streams"] < rates["64 streams"]
    assert WORK["prefill"][0] / min(seconds["prefill"]) > rates["decode"]


def test_phi4_is_served_by_forced_marlin_too(tensor_cores, speed):
    """vLLM's own choice on this GPU is another kernel; asked for Marlin, it takes Marlin."""
    _, own = speed("fp8")
    seconds, forced = speed("fp8", *serving.MARLIN)
    assert (own != MARLIN, forced) == (True, MARLIN)
    assert seconds.keys() == WORK.keys()


def test_the_slice_of_phi4_is_made_served_and_measured(gpu, tmp_workspace):
    """What notebook 07 does with it, in all arms of this GPU: 8 bits are faster at one stream."""
    from llmcompressor.modifiers.quantization import QuantizationModifier

    machine = hardware.detect()
    mode = hardware.serving_mode(machine)
    part = phi4_slice.choose(machine, mode)
    recipe = QuantizationModifier(targets="Linear", scheme="FP8_DYNAMIC", ignore=["lm_head"])
    with phi4_slice.made(part, {"fp8": recipe}) as copies:
        rounds = slice_speed.measure(part, copies, machine, mode)
    ratios = throughput.ratios(rounds).set_index(["arm", "work"])["ratio"]
    print(part.why, ratios, sep="\n")
    for arm in list(phi4_slice.arms(mode))[1:]:
        assert 1 < ratios[arm, "1 stream"] < 2
    assert throughput.kernel(rounds, phi4_slice.CARDS) == MARLIN
