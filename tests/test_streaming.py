"""Streaming against `model_free_ptq` and `oneshot`, byte for byte; killed, disturbed, at size."""

import collections
import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import REPO
from safetensors.torch import load_file, save_file

from helpers import (
    WorkbookError,
    checkpoint,
    course,
    headers,
    identity,
    models,
    quantize,
    roofline,
    serving,
    verification,
    workspace,
)
from helpers.checkpoint import Checkpoint

sys.path.insert(0, str(REPO / "scripts"))
import full_size  # noqa: E402

CONFIG = full_size.scaled(roofline.load_config(REPO / "data" / "phi4"), 100)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, tiny_base):
    """The bundled model in three shards, its tensors dealt out in turn."""
    base = tmp_path_factory.mktemp("sharded")
    tensors = load_file(tiny_base.path / "model.safetensors")
    names = [f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)]
    weight_map = {tensor: names[i % 3] for i, tensor in enumerate(sorted(tensors))}
    for name in names:
        save_file({t: tensors[t] for t, n in weight_map.items() if n == name}, base / name)
    (base / "model.safetensors.index.json").write_text(json.dumps(
        {"metadata": {"total_size": 0}, "weight_map": weight_map}))
    (base / "config.json").write_bytes((tiny_base.path / "config.json").read_bytes())
    workspace.write_manifest(base)
    return checkpoint.verified(base)


def model_free(base: Checkpoint, place: Path, ignore: list[str]) -> Path:
    from llmcompressor import model_free_ptq

    model_free_ptq(base.path, place, scheme="FP8_DYNAMIC", ignore=ignore, device="cpu")
    (place / workspace.MANIFEST).unlink()  # copied from the base
    return place


def test_the_files_are_those_of_model_free_ptq_byte_for_byte(sharded, tmp_path):
    theirs = model_free(sharded, tmp_path / "theirs", ["lm_head", checkpoint.EMBEDDING])
    ours = quantize.stream(sharded, tmp_path / "ours")
    workspace.verify(ours.path)
    names = {file.name for file in theirs.iterdir()}
    added = {workspace.MANIFEST, identity.MADE_FROM}
    assert len(names) == 5 and names == {f.name for f in ours.path.iterdir()} - added
    for name in names:
        assert (ours.path / name).read_bytes() == (theirs / name).read_bytes(), name


def test_a_block_of_one_row_makes_the_same_bytes(sharded, tmp_path, monkeypatch):
    from helpers import streaming

    whole = quantize.stream(sharded, tmp_path / "whole")
    monkeypatch.setattr(streaming, "BLOCK_BYTES", 100_001)  # of no row's size, and a ragged end
    cut = quantize.stream(sharded, tmp_path / "cut")
    assert cut.fingerprint == whole.fingerprint


def test_the_short_way_makes_the_same_codes_of_every_bf16_number():
    """Rows of widely different scale, so that all exponents occur; and no way back from E4M3."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from helpers import streaming

    class FromE4M3(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten._to_copy.default:
                self.count += args[0].dtype == torch.float8_e4m3fn
            return out

    bits = torch.arange(0x7F80, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    finite = torch.cat([bits, -bits])[torch.randperm(2 * len(bits))]
    weight = torch.cat([finite.reshape(-1, 32),  # each row as it comes, and sorted by magnitude
                        finite[finite.abs().float().argsort()].reshape(-1, 32)])
    converter = streaming._converter()
    made, ways_back = [], []
    for way in (contextlib.nullcontext(), streaming._short_way()):
        with way, FromE4M3() as casts:
            made.append(converter.process({"a.weight": weight}))
        ways_back.append(casts.count)
    assert ways_back == [1, 0]
    for name in ("a.weight", "a.weight_scale"):
        assert torch.equal(*(each[name].view(torch.uint8) for each in made)), name


def test_the_sums_taken_while_writing_are_those_of_the_files(sharded, tmp_path):
    made = quantize.stream(sharded, tmp_path / "made")
    for name, entry in workspace.read_manifest(made.path).items():
        assert entry["sha256"] == hashlib.sha256((made.path / name).read_bytes()).hexdigest()


def test_the_tensors_are_oneshots_to_the_bit(tiny_base, tiny_fp8, tmp_path):
    made = quantize.stream(tiny_base, tmp_path / "made")
    ours, theirs = (load_file(d.path / "model.safetensors") for d in (made, tiny_fp8))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype
        assert torch.equal(ours[name].view(torch.uint8), theirs[name].view(torch.uint8)), name
    assert verification.verify_fp8(tiny_base, made).ignored == ("lm_head",)
    assert scheme(made) == scheme(tiny_fp8)


def scheme(model: Checkpoint) -> dict:
    """What vLLM reads of a checkpoint's scheme; the rest says how the scales were found."""
    (group,) = model.config["quantization_config"]["config_groups"].values()
    read = ("num_bits", "type", "strategy", "symmetric", "dynamic")
    return {part: {key: group[part][key] for key in read}
            for part in ("weights", "input_activations")} | {"targets": group["targets"]}


def test_an_embedding_that_was_not_ignored_is_found_out(tmp_workspace, sharded, tmp_path):
    wrong = model_free(sharded, tmp_path / "wrong", ["lm_head"])
    with pytest.raises(WorkbookError, match="model.embed_tokens"):
        verification.verify_fp8(sharded, checkpoint.verified(wrong))


def test_the_way_is_chosen_by_the_memory_that_is_free(tiny_base, monkeypatch):
    from helpers import hardware

    weights = models.tiny().bf16_bytes
    monkeypatch.setattr(hardware, "available_ram", lambda: 2 * weights)
    fits = quantize.route(tiny_base)
    assert not fits.streams and fits.ram == int(1.6 * weights)
    monkeypatch.setattr(hardware, "available_ram", lambda: weights)
    small = quantize.route(tiny_base)
    assert small.streams and "the model does not fit, so its shards are streamed" in small.why


def test_a_model_that_does_not_fit_is_streamed_and_said_so(
        tmp_workspace, tiny_base, monkeypatch, capsys):
    from helpers import hardware

    monkeypatch.setattr(hardware, "available_ram", lambda: 1_000_000)
    made = quantize.fp8_checkpoint(models.tiny(), tiny_base)
    assert "0.001 GB of RAM free: the model does not fit" in capsys.readouterr().out
    # oneshot leaves a recipe.yaml; streaming, which loads no model, does not
    assert not (made.path / "recipe.yaml").exists()


@pytest.fixture(scope="module")
def hundredth(tmp_path_factory):
    base = tmp_path_factory.mktemp("hundredth") / "base"
    full_size.write_base(base, CONFIG, seed=1)
    workspace.write_manifest(base)
    return checkpoint.verified(base)


def test_a_notebook_hashes_and_reads_each_file_once(
        hundredth, tmp_workspace, monkeypatch):
    """What notebook 07 does on a GPU: five rounds of two arms take six starts of a server."""
    quantize.stream(hundredth, quantize.target(models.directory_profile(hundredth)))
    counted = collections.Counter()

    def count(module, name, what):
        original = getattr(module, name)

        def counting(file, *rest):
            if what == "headers" or Path(file).suffix == ".safetensors":
                counted[what, Path(file)] += 1
            return original(file, *rest)

        monkeypatch.setattr(module, name, counting)

    count(headers, "read", "headers")
    count(workspace, "sha256", "sums")
    monkeypatch.setenv(models.VARIABLE, str(hundredth.path))
    phi4 = course.open_course()
    for arm, model in (phi4.arms() | {"bf16": phi4.base(), "fp8": phi4.fp8()}).items():
        assert roofline.bytes_per_token(model.tensors) > 0, arm
        for _ in range(3):
            serving.VllmServer(model).checkpoint.require_unchanged()
    verification.verify_fp8(phi4.base(), phi4.fp8())
    assert len(counted) == 2 * 2 * full_size.SHARDS  # of two checkpoints
    assert set(counted.values()) == {1}


def test_a_killed_run_goes_on_at_its_shard_and_ends_with_the_same_bytes(
        hundredth, tmp_path, capsys):
    place, partial = tmp_path / "made", tmp_path / ".made.streaming"
    code = ("import sys; from pathlib import Path; from helpers import checkpoint, quantize\n"
            "quantize.stream(checkpoint.verified(sys.argv[1]), Path(sys.argv[2]))")
    running = subprocess.Popen([sys.executable, "-c", code, hundredth.path, place], cwd=REPO)
    deadline = time.monotonic() + 120
    while not (list(partial.glob("*2-of-*.safetensors"))) and time.monotonic() < deadline:
        time.sleep(0.001)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    kept = {f.name: f.stat().st_ino for f in partial.glob("*.safetensors")}
    assert 2 <= len(kept) < full_size.SHARDS and not place.exists()

    made = quantize.stream(hundredth, place)
    assert f"{len(kept)} of 6 shards are there" in capsys.readouterr().out
    assert kept.items() <= {f.name: f.stat().st_ino for f in place.iterdir()}.items()
    whole = quantize.stream(hundredth, tmp_path / "whole")
    assert made.fingerprint == whole.fingerprint
    assert not partial.exists()


def test_what_was_begun_from_another_base_is_not_gone_on_with(sharded, tmp_path, capsys):
    partial = tmp_path / ".made.streaming"
    partial.mkdir()
    (partial / identity.MADE_FROM).write_text("{}")
    (partial / "model-00001-of-00003.safetensors").write_bytes(b"another model's")
    made = quantize.stream(sharded, tmp_path / "made")
    assert verification.verify_fp8(sharded, made).quantized == 16
    assert "interrupted" not in capsys.readouterr().out


def test_two_at_once_is_a_sentence(sharded, tmp_path):
    from helpers import streaming

    (tmp_path / ".made.streaming").mkdir()
    with (streaming._alone(tmp_path / ".made.streaming"),
          pytest.raises(WorkbookError, match="Another process is writing")):
        quantize.stream(sharded, tmp_path / "made")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_disk_full_half_way_keeps_what_is_done_and_goes_on(sharded, tmp_path, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk]).returncode:
        pytest.skip("this container does not allow mounts")
    try:
        with pytest.raises(WorkbookError, match="Writing made needs 0.0 GB of disk"):
            quantize.stream(sharded, disk / "made")
        with monkeypatch.context() as patch:  # as when somebody takes the space afterwards
            patch.setattr(workspace, "require_disk", lambda *_: None)
            with pytest.raises(WorkbookError, match="The disk filled up while made was"):
                quantize.stream(sharded, disk / "made")
        subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)
        made = quantize.stream(sharded, disk / "made")
        assert verification.verify_fp8(sharded, made).quantized == 16
    finally:
        subprocess.run(["umount", disk], check=True)


def test_the_full_size_proof_at_a_hundredth(tmp_path):
    result = full_size.measure(tmp_path / "proof", scale=100)
    planned = roofline.tensors(CONFIG)
    assert len(planned) == len(roofline.tensors(roofline.load_config(REPO / "data" / "phi4")))
    assert 29_319_014_400 / 130 < result["bytes bf16"] < 29_319_014_400 / 80
    assert result["bytes FP8"] == checkpoint.total_bytes(checkpoint.predict_fp8(planned))
    assert result["modules re-derived"] == 20
    from helpers import streaming

    assert streaming.memory() / 2 < result["peak bytes"] < streaming.memory()
    assert not (tmp_path / "proof").exists()


def test_the_proof_finds_one_wrong_code_and_cleans_up(hundredth, tmp_path):
    made = quantize.stream(hundredth, tmp_path / "made")
    assert full_size.verify(hundredth, made, CONFIG, seed=3)
    module = full_size.verify(hundredth, made, CONFIG, seed=3)[0]
    weight = made.by_name[f"{module}.weight"]
    with open(made.path / weight.file, "r+b") as handle:
        handle.seek(weight.start)
        code = handle.read(1)[0]
        handle.seek(weight.start)
        handle.write(bytes([code ^ 1]))
    os.utime(made.path / weight.file, ns=(0, dict(
        (name, time) for name, _, _, time in made.files)[weight.file]))  # found by its code alone
    with pytest.raises(WorkbookError, match="differs from E4M3 arithmetic"):
        full_size.verify(hundredth, made, CONFIG, seed=3)


def test_the_proof_refuses_without_the_disk(tmp_path, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=45_000_000_000))
    with pytest.raises(WorkbookError, match="45.1 GB of disk .* and 45.0 GB are free"):
        full_size.measure(tmp_path / "proof")
    assert not (tmp_path / "proof").exists()
