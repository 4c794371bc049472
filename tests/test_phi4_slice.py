"""The slice of Phi-4: how large it is where, that it is what it says, and that nothing is left."""

import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import REPO

from helpers import (
    WorkbookError,
    checkpoint,
    hardware,
    ledger,
    phi4_slice,
    roofline,
    serving,
    slice_speed,
    throughput,
    workspace,
)
from helpers.hardware import Gpu
from helpers.phi4_slice import Slice
from helpers.throughput import Work

GB = 10**9
WHOLE = roofline.load_config(workspace.data("phi4"))
TINY = roofline.load_config(workspace.data("tiny_phi4"))


def machine(capacity: int = 0, capability=(8, 6), features=frozenset()):
    gpus = (Gpu(0, "a GPU", capacity, capability, "580"),) if capacity else ()
    return replace(hardware.detect(), gpus=gpus, cpu_features=frozenset(features), note="")


def chosen(free: int, **kind) -> Slice:
    where = machine(**kind)
    return phi4_slice.choose(where, hardware.serving_mode(where), free)


# What is chosen

@pytest.mark.parametrize("free, layers, together", [
    (20 * GB, 2, True), (7 * GB, 2, True), (5.5 * GB, 1, True), (4 * GB, 2, False),
    (2.5 * GB, 1, False)])
def test_a_cpu_with_less_memory_makes_fewer_layers_or_serves_them_in_turn(free, layers, together):
    found = chosen(int(free))
    assert (found.layers, found.together) == (layers, together)
    assert ("more memory would take 2 layers" in found.why) == ((layers, together) != (2, True))
    assert f"{layers} of Phi-4's 40 layers" in found.why


@pytest.mark.parametrize("memory, layers, together", [
    (80, 10, True), (24, 10, True), (16, 6, True), (8, 1, True), (6, 5, False)])
def test_a_gpu_gets_as_many_layers_as_its_memory_holds_three_times(
        memory, layers, together, monkeypatch):
    monkeypatch.setattr(hardware, "available_ram", lambda: 64 * GB)
    found = chosen(memory * GB, capacity=memory * GB, capability=(8, 9))
    assert (found.layers, found.together) == (layers, together)


def test_a_gpu_beside_little_ram_gets_what_can_be_made_there(monkeypatch):
    monkeypatch.setattr(hardware, "available_ram", lambda: 6 * GB)
    found = chosen(80 * GB, capacity=80 * GB)
    assert 1 < found.layers < 10 and found.together


def test_a_machine_that_holds_not_one_layer_is_told_so():
    with pytest.raises(WorkbookError, match="One layer of Phi-4 takes .*, and 1.0 GB are free"):
        chosen(GB)


def test_the_bf16_copy_is_of_the_size_that_was_meant(monkeypatch):
    monkeypatch.setattr(hardware, "available_ram", lambda: 64 * GB)
    for kind, least, most in (({}, 1, 3), ({"capacity": 80 * GB}, 4, 8)):
        found = chosen(80 * GB, **kind)
        assert least * GB < checkpoint.total_bytes(found.tensors("bf16")) < most * GB


@pytest.mark.parametrize("layers", [1, 2, 10])
def test_the_ceiling_of_the_ratio_is_phi4s_own(layers):
    found = Slice(phi4_slice.sliced(WHOLE, layers), True, "")
    ceiling = roofline.decode_bytes(WHOLE, "bf16") / roofline.decode_bytes(WHOLE, "fp8")
    assert found.bytes_per_token("bf16") / found.bytes_per_token("fp8") == pytest.approx(
        ceiling, rel=1e-3)
    # so many fortieths of what Phi-4 reads for a token
    assert found.bytes_per_token("bf16") == pytest.approx(
        roofline.decode_bytes(WHOLE, "bf16") * layers / 40, rel=1e-3)


def test_the_layers_are_phi4s_own_layers():
    def shapes(config, layer):
        return {t.name: (t.shape, t.dtype) for t in roofline.tensors(config)
                if f"layers.{layer}." in t.name}
    assert shapes(phi4_slice.sliced(WHOLE, 2), 1) == shapes(WHOLE, 1) != {}


@pytest.mark.parametrize("kind, names", [
    ({}, ["bf16", "FP8 W8A16", "INT8 W8A8"]),
    ({"capacity": GB, "capability": (8, 6)}, ["bf16", "FP8 W8A16"]),
    ({"capacity": GB, "capability": (9, 0)}, ["bf16", "FP8 W8A8", "FP8 W8A16"])])
def test_every_machine_has_the_cards_arithmetic_and_its_own(kind, names):
    found = phi4_slice.arms(hardware.serving_mode(machine(**kind)))
    assert list(found) == names
    assert found["FP8 W8A16"].flags == (tuple(serving.MARLIN) if kind else ())


def test_a_cpu_without_the_instructions_is_given_the_reason():
    def said(*features):
        where = machine(features=features)
        return phi4_slice.caveat(where, hardware.serving_mode(where))

    full = hardware.cpu.PACKED_FEATURES
    assert said(*full) == said(*full, "amx_int8") == ""
    assert "unpacked to bf16" in said("avx2") and "VNNI" in said("avx2")
    assert "lacks" in said(*full - {"avx512_bf16"})
    assert "VNNI" not in said(*full - {"avx512_bf16"})
    gpu = machine(capacity=GB)
    assert phi4_slice.caveat(gpu, hardware.serving_mode(gpu)) == ""


@pytest.mark.parametrize("memory", [24, 80])
def test_the_servers_of_a_gpu_share_it_and_each_has_room_for_its_weights(memory, monkeypatch):
    monkeypatch.setattr(hardware, "available_ram", lambda: 64 * GB)
    where = machine(capacity=memory * GB, capability=(9, 0))
    mode = hardware.serving_mode(where)
    part = phi4_slice.choose(where, mode)
    copies = {"bf16": SimpleNamespace(path=REPO), "fp8": SimpleNamespace(path=REPO)}
    shares = {}
    for name, server in slice_speed.servers(part, copies, where, mode).items():
        flags = dict(zip(server.flags, server.flags[1:], strict=False))
        shares[name] = float(flags["--gpu-memory-utilization"])
        weights = checkpoint.total_bytes(part.tensors(phi4_slice.arms(mode)[name].format))
        assert shares[name] * memory * GB > weights + int(flags["--kv-cache-memory-bytes"])
        assert ("--linear-backend" in flags) == (name == "FP8 W8A16")
        # one request of the full length has to fit the cache
        assert int(flags["--kv-cache-memory-bytes"]) >= int(flags["--max-model-len"]) * (
            roofline.kv_bytes_per_token(part.config))
    assert len(shares) == 3 and sum(shares.values()) < 1


def test_the_slices_attention_needs_no_cuda_toolkit_either(monkeypatch):
    monkeypatch.setattr(hardware, "available_ram", lambda: 64 * GB)
    for capability, named in (((9, 0), False), ((10, 0), True)):
        where = machine(capacity=80 * GB, capability=capability)
        mode = hardware.serving_mode(where)
        copies = {"bf16": SimpleNamespace(path=REPO), "fp8": SimpleNamespace(path=REPO)}
        part = phi4_slice.choose(where, mode)
        for server in slice_speed.servers(part, copies, where, mode).values():
            assert ("--attention-backend" in server.flags) == named


# What is made

@pytest.fixture
def small():
    return Slice(phi4_slice.sliced(TINY, 1), True, "")


@pytest.fixture
def recipes():
    from llmcompressor.modifiers.quantization import QuantizationModifier

    return {format: QuantizationModifier(targets="Linear", scheme=phi4_slice.PRESETS[format],
                                         ignore=["lm_head"]) for format in ("fp8", "int8")}


def left(workspace_folder) -> list:
    return list((workspace_folder / "scratch").iterdir())


def test_its_checkpoints_have_the_predicted_tensors_and_are_gone_after_it(
        tmp_workspace, small, recipes):
    with phi4_slice.made(small, recipes) as found:
        assert list(found) == ["bf16", "fp8", "int8"]
        for format, model in found.items():
            made, planned = ([(t.name, t.dtype, t.shape, t.nbytes) for t in each]
                             for each in (model.tensors, small.tensors(format)))
            assert sorted(made) == sorted(planned)
        assert len({model.fingerprint for model in found.values()}) == 3
        assert len(left(tmp_workspace)) == 1
    assert left(tmp_workspace) == []


def test_an_interruption_leaves_nothing(tmp_workspace, small):
    with pytest.raises(KeyboardInterrupt), phi4_slice.made(small, {}) as found:
        assert found["bf16"].path.exists()
        raise KeyboardInterrupt
    assert left(tmp_workspace) == []


def test_what_a_killed_process_left_is_removed_the_next_time(tmp_workspace, small):
    died = subprocess.run([sys.executable, "-c", f"""
import os
from helpers import phi4_slice
with phi4_slice.made(phi4_slice.Slice({small.config!r}, True, ""), {{}}):
    os._exit(9)"""])
    assert died.returncode == 9
    assert len(left(tmp_workspace)) == 1
    with phi4_slice.made(small, {}):
        assert [str(os.getpid()) in each.name for each in left(tmp_workspace)] == [True]
    assert left(tmp_workspace) == []


def test_a_disk_that_is_too_small_is_said_before_anything_is_written(
        tmp_workspace, small, monkeypatch):
    needed = sum(checkpoint.total_bytes(small.tensors(each)) for each in ("bf16", "int8"))
    monkeypatch.setattr(workspace.shutil, "disk_usage",
                        lambda place: SimpleNamespace(free=needed - 1))
    with (pytest.raises(WorkbookError, match="The slice of Phi-4 needs .* GB of disk"),
          phi4_slice.made(small, {"int8": None})):
        pass
    assert left(tmp_workspace) == []


def test_the_weights_are_random_and_finite_and_no_token_without_text_is_ever_chosen(tmp_path):
    config = phi4_slice.sliced({**TINY, "vocab_size": 4 * TINY["vocab_size"] * 4}, 2)
    made = phi4_slice.random_checkpoint(config, tmp_path / "slice")
    gate = checkpoint.read_tensor(made, "model.layers.0.mlp.gate_up_proj.weight").float()
    other = checkpoint.read_tensor(made, "model.layers.1.mlp.gate_up_proj.weight").float()
    assert gate.abs().min() >= 1 / 128 and gate.abs().max() < 1 / 8
    assert gate.unique().numel() == 2 * 4 * 128  # signs, powers of two, mantissas: all there are
    assert gate.mean().abs() < 1e-3 and not gate.equal(other)
    head = checkpoint.read_tensor(made, "lm_head.weight")
    assert config["vocab_size"] > TINY["vocab_size"]
    assert head[:TINY["vocab_size"]].all() and not head[TINY["vocab_size"]:].any()
    assert checkpoint.read_tensor(made, "model.norm.weight").eq(1).all()


def test_transformers_reads_it_and_it_says_only_tokens_with_text(tmp_path):
    from transformers import AutoModelForCausalLM

    made = phi4_slice.random_checkpoint(
        phi4_slice.sliced({**TINY, "vocab_size": 4000}, 2), tmp_path / "slice")
    model = AutoModelForCausalLM.from_pretrained(made.path)
    said = model.generate(torch.tensor([[3]]), max_new_tokens=20, do_sample=False)
    assert said.max() < TINY["vocab_size"]
    assert model.dtype == torch.bfloat16 and model.config.model_type == "phi3"


# What is measured

def test_a_slice_is_served_measured_and_recorded(tmp_workspace, small, recipes, monkeypatch):
    """Two arms of a slice of the bundled model, by the functions that notebook 07 calls."""
    where = hardware.detect()
    mode = hardware.serving_mode(where)
    monkeypatch.setattr(slice_speed, "WORK", (Work(1, 1, 64, 2), Work(1, 32, 1, 2)))
    every = phi4_slice.arms(mode)
    two = {name: every[name] for name in [*every][::len(every) - 1]}  # the first and the last
    monkeypatch.setattr(phi4_slice, "arms", lambda mode: two)
    format = [arm.format for arm in two.values()][1]
    with phi4_slice.made(small, {format: recipes[format]}) as found:
        rounds = slice_speed.measure(small, found, where, mode)
        slice_speed.record(small, mode, rounds, found)
    assert len(rounds) == 2 * 2 * 2 and (rounds["tok_s"] > 0).all()
    rows = ledger.read()
    assert [row["arm"] for row in rows] == ["bf16", "bf16", format, format]
    assert {row["experiment"] for row in rows} == {"slice"}
    assert rows[0]["kernel"] == "unquantized" != rows[2]["kernel"]
    assert rows[0]["checkpoint"] == found["bf16"].fingerprint
    ratios = throughput.ratios(rounds).set_index(["arm", "work"])["ratio"]
    assert rows[3]["metrics"]["ratio"] == pytest.approx(ratios.iloc[3], abs=1e-4)
    assert rows[3]["work"]["input_tokens"] == 32 and rows[3]["work"]["layers"] == 1


@pytest.mark.parametrize("answer, said", [
    (..., "Not predicted yet"), ([1, 2], "Not kept"), (1.5, "Not kept"), ("abc", "Not kept"),
    ([1, -1, 1], "Not kept"), ([1, None, 1], "Not kept"), ([float("nan")] * 3, "Not kept"),
    ([1.9, 1, 0.8], "Kept: 1 stream 1.9x, 8 streams 1x, prompt of 512 0.8x")])
def test_a_prediction_is_kept_or_it_is_said_why_not(tmp_workspace, capsys, answer, said):
    slice_speed.predict(answer)
    assert said in capsys.readouterr().out
    assert slice_speed.predicted() == ({} if not said.startswith("Kept") else {
        "1 stream": 1.9, "8 streams": 1.0, "prompt of 512": 0.8})


def test_the_prediction_stands_below_what_it_is_of():
    import pandas as pd

    ratios = pd.DataFrame([
        {"arm": arm, "work": work, "tok_s": 17.04, "ratio": ratio, "low": ratio - 0.1,
         "high": ratio + 0.1}
        for arm, each in (("bf16", (1, 1)), ("FP8 W8A16", (1.9, 0.8)), ("INT8 W8A8", (1.8, 1.7)))
        for work, ratio in zip(("1 stream", "prompt of 512"), each, strict=True)])
    shown = slice_speed.table(ratios, {"1 stream": 1.5, "prompt of 512": 1})
    assert shown["1 stream"].to_list() == [
        "17.0 tokens/s", "1.90x (1.80 to 2.00)", "1.50x", "1.80x (1.70 to 1.90)"]
    assert "FP8 W8A16" in shown.index[2] and len(slice_speed.table(ratios)) == 3
