"""Which model a machine gets, and what is refused, by the real files and the real hub client."""

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys

import pytest
from conftest import REPO

from helpers import WorkbookError, checkpoint, hardware, hub, models, workspace

GB = 10**9


def machine(name="", memory_gb=0, capability=(8, 9), ram_gb=24) -> hardware.Machine:
    gpus = (hardware.Gpu(0, name, memory_gb * GB, capability, "580"),) if name else ()
    return hardware.Machine(gpus, "CPU", 2, frozenset({"avx512_bf16"}), ram_gb * GB, 100 * GB,
                            "Linux", "3.11", "")


@pytest.fixture(autouse=True)
def no_choice(monkeypatch):
    monkeypatch.delenv(models.VARIABLE, raising=False)


@pytest.mark.parametrize("gpu, memory, capability, expected, arms", [
    ("T4", 16, (7, 5), "phi-4-mini", ("bf16", "fp8")),
    ("V100", 32, (7, 0), "tiny-phi4", ("bf16", "fp8")),
    ("A10", 24, (8, 6), "phi-4", ("fp8",)), ("A40", 48, (8, 6), "phi-4", ("bf16", "fp8")),
    ("A100", 40, (8, 0), "phi-4", ("bf16", "fp8")), ("L4", 24, (8, 9), "phi-4", ("fp8",)),
    ("L40S", 48, (8, 9), "phi-4", ("bf16", "fp8")), ("RTX 3090", 24, (8, 6), "phi-4", ("fp8",)),
    ("RTX 4090", 24, (8, 9), "phi-4", ("fp8",)), ("RTX 5090", 32, (12, 0), "phi-4", ("fp8",)),
    ("H100", 80, (9, 0), "phi-4", ("bf16", "fp8")), ("H200", 141, (9, 0), "phi-4",
                                                     ("bf16", "fp8")),
    ("B200", 180, (10, 0), "phi-4", ("bf16", "fp8")),
    ("RTX 6000 Ada", 48, (8, 9), "phi-4", ("bf16", "fp8")),
    ("GTX 1080", 8, (6, 1), "tiny-phi4", ("bf16", "fp8")),
    ("", 0, None, "tiny-phi4", ("bf16", "fp8")),
])
def test_the_best_model_that_fits_is_chosen(gpu, memory, capability, expected, arms):
    here = machine(gpu, memory, capability)
    assert models.choose(here).name == expected
    assert models.arms(models.choose(here), here) == arms


def test_of_several_gpus_the_one_that_is_used_has_to_hold_the_model():
    t4, v100 = machine("T4", 16, (7, 5)).gpus[0], machine("V100", 32, (7, 0)).gpus[0]
    both = dataclasses.replace(machine(), gpus=(v100, t4))
    assert models.choose(both).name == "phi-4-mini"  # FP8 runs on the T4, and Phi-4 does not fit it


def test_the_variable_overrides_and_the_argument_overrides_it(monkeypatch):
    monkeypatch.setenv(models.VARIABLE, "phi-4-mini")
    assert models.choose(machine("H100", 80)).name == "phi-4-mini"
    assert models.choose(machine("H100", 80), "tiny-phi4").name == "tiny-phi4"


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(WorkbookError, match="phi-4, phi-4-mini, smollm2, tiny-phi4"):
        models.choose(machine(), "phi-5")


def test_a_gpu_too_small_for_the_profile_is_a_sentence():
    with pytest.raises(WorkbookError, match="20.0 GB .* the GPU has 16.0 GB"):
        models.choose(machine("T4", 16, (7, 5)), "phi-4")


def test_the_bundled_profile_is_the_bundled_directory(tiny_base):
    profile = models.tiny()
    assert profile.checkpoint == tiny_base and profile.task == "tiny_gsm8k"
    assert 2_000_000 < profile.parameters < 5_000_000
    assert profile.bf16_bytes == 2 * profile.parameters
    assert profile.revision.startswith("sha256:")
    assert hub.obtain(profile) == tiny_base


def test_a_directory_is_a_profile(tmp_workspace, tiny_base, tmp_path):
    copy = shutil.copytree(tiny_base.path, tmp_path / "mine")
    profile = models.choose(machine(), str(copy))
    assert (profile.source, profile.task) == ("directory", "tiny_gsm8k")
    assert profile.name == f"mine-{tiny_base.fingerprint[:8]}" and "mine" in profile.title
    assert hub.obtain(profile).path == copy


@pytest.mark.parametrize("damage, says", [
    (lambda d: (d / "config.json").unlink(), "there is no config.json"),
    (lambda d: (d / "config.json").write_text("{"), "not JSON"),
    (lambda d: (d / "config.json").write_text("{}"), "model_type"),
    (lambda d: (d / "pytorch_model.bin").write_bytes(b"\x80"), "pickled weights"),
    (lambda d: (d / "model.safetensors").unlink(), "no safetensors"),
    (lambda d: (d / "model.safetensors").write_bytes(
        (d / "model.safetensors").read_bytes()[:-9]), "its header announces"),
    (lambda d: workspace.flip_a_bit(d / "model.safetensors"), "has changed since it was written"),
])
def test_a_directory_that_is_no_usable_model_is_refused(tiny_base, tmp_path, damage, says):
    copy = shutil.copytree(tiny_base.path, tmp_path / "mine")
    damage(copy)
    with pytest.raises(WorkbookError, match=says):
        checkpoint.verified(copy)
    with pytest.raises(WorkbookError, match=says):
        models.choose(machine(), str(copy))


def obtain_offline(tmp_path, **environment) -> str:
    """What `hub.obtain` of Phi-4 says in a process of its own, with an empty cache."""
    code = ("from helpers import WorkbookError, hub, models\n"
            "try: hub.obtain(models.PHI4)\n"
            "except WorkbookError as error: print(error)")
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO,
                          env=os.environ | {"HF_HOME": str(tmp_path)} | environment).stdout


def test_no_network_on_a_hub_profile_is_a_sentence(tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    shutil_free = shutil.disk_usage(tmp_path).free
    if shutil_free < models.PHI4.bf16_bytes:
        pytest.skip("the disk is checked before the network, and it is too small here")
    said = obtain_offline(tmp_path, HF_ENDPOINT=f"http://127.0.0.1:{port}")
    assert "microsoft/phi-4 at 187ef034 could not be downloaded" in said
    assert "tiny-phi4, which is bundled" in said


def test_offline_mode_is_honoured(tmp_path):
    if shutil.disk_usage(tmp_path).free < models.PHI4.bf16_bytes:
        pytest.skip("the disk is checked before the network, and it is too small here")
    assert "could not be downloaded" in obtain_offline(tmp_path, HF_HUB_OFFLINE="1")


def test_a_disk_too_small_is_said_first_with_the_variable_that_names_it(tmp_path, monkeypatch):
    """What is written goes to the workspace; what is fetched, to the hub's cache."""
    with pytest.raises(WorkbookError, match="nothing half-written is left") as written:
        workspace.require_disk(tmp_path, 10**18, "Writing phi-4-fp8")
    assert "PHI4_FP8_WORKSPACE" in written.value.remedy and "HF_" not in written.value.remedy
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    for variable in ("HF_HOME", "HF_HUB_CACHE"):  # the second is the stronger, where it is set
        with pytest.raises(hub.HubError) as fetched:
            hub._require_disk(tmp_path, 10**18)
        assert f"set {variable}, which says where downloads go" in fetched.value.remedy
        assert str(tmp_path) in fetched.value.why and "WORKSPACE" not in fetched.value.remedy
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))


def test_the_ledger_gets_name_repository_and_revision():
    assert models.model_info(models.PHI4) == {
        "profile": "phi-4", "repo": "microsoft/phi-4",
        "revision": "187ef0342fff0eb3333be9f00389385e95ef0b61"}
    assert json.dumps(models.model_info(models.tiny()))
