"""What every notebook opens with, on this machine."""

import json

import pytest
from conftest import REPO

from helpers import (
    WorkbookError,
    course,
    cpu,
    hardware,
    ledger,
    models,
    streaming,
    throughput,
)


def test_without_a_gpu_the_bundled_model_is_chosen(monkeypatch):
    monkeypatch.delenv(models.VARIABLE, raising=False)
    opened = course.open_course()
    if opened.machine.gpus:
        pytest.skip("this machine has a GPU, and gets a larger model")
    assert opened.profile.name == "tiny-phi4"
    assert opened.mode.device == "cpu"
    assert opened.mode.title in repr(opened) and "tiny_gsm8k" in repr(opened)


GPU = hardware.Gpu(0, "NVIDIA A40", 48 * 10**9, (8, 6), "580")


@pytest.mark.parametrize("gpus, profile, says, says_not", [
    ((), models.tiny(), ("no NVIDIA GPU", "8-bit weights", "activations in 16 bits",
                         "3.5 million parameters, scored on the task tiny_gsm8k"), "GPU: "),
    ((GPU,), models.PHI4, ("GPU: NVIDIA A40", "8.6 (7.5 to 8.8)", "16-bit activations",
                           "14.7 billion parameters, scored on the task gsm8k"), "no NVIDIA GPU")])
def test_the_first_output_says_in_words_what_machine_mode_and_model_are(
    gpus, profile, says, says_not
):
    machine = hardware.Machine(gpus, "CPU", 8, cpu.PACKED_FEATURES, 64 * 2**30, 0, "", "", "")
    opened = course.Course(machine, hardware.serving_mode(machine), profile)
    words = " ".join(repr(opened).split())
    assert all(phrase in words for phrase in says) and says_not not in words
    assert [line.split()[0] for line in repr(opened).splitlines() if line[0] != " "] == [
        "machine", "mode", "model"]
    assert all(len(line) <= 100 for line in repr(opened).splitlines())


def test_an_unknown_profile_stops_the_opening_with_the_known_names(monkeypatch):
    monkeypatch.setenv(models.VARIABLE, "phi-5")
    with pytest.raises(WorkbookError, match="tiny-phi4"):
        course.open_course()


V100 = hardware.Gpu(0, "Tesla V100-SXM2-32GB", 34_359_738_368, (7, 0), "580")


@pytest.mark.parametrize("profile", [None, "tiny-phi4"])
def test_a_gpu_without_fp8_stops_the_opening_and_is_told_the_way_to_the_cpu(monkeypatch, profile):
    monkeypatch.delenv(models.VARIABLE, raising=False)
    if profile:
        monkeypatch.setenv(models.VARIABLE, profile)
    monkeypatch.setattr(hardware, "_gpus", lambda: ((V100,), ""))
    with pytest.raises(WorkbookError, match="no FP8 for this machine's GPU") as said:
        course.open_course()
    assert "Tesla V100-SXM2-32GB has compute capability 7.0" in said.value.meaning
    assert "`export CUDA_VISIBLE_DEVICES=`" in said.value.remedy
    monkeypatch.setattr(hardware, "_gpus", lambda: ((), "CUDA_VISIBLE_DEVICES='' hides 1 GPU(s)"))
    opened = course.open_course()
    assert (opened.profile.name, opened.mode.device) == ("tiny-phi4", "cpu")


def test_a_result_is_recorded_with_the_checkpoints_fingerprint(
    tmp_workspace, tiny_fp8, monkeypatch
):
    monkeypatch.setenv(models.VARIABLE, "tiny-phi4")
    opened = course.open_course()
    opened.record("quantize", "fp8", tiny_fp8, work={}, metrics={"modules": 16})
    (row,) = ledger.read()
    assert row["checkpoint"] == tiny_fp8.fingerprint
    assert (row["mode"], row["model"]["profile"]) == (opened.mode.key, "tiny-phi4")


def test_nothing_is_measured_again_when_the_ledger_has_it(
    tmp_workspace, tiny_fp8, monkeypatch, capsys
):
    monkeypatch.setenv(models.VARIABLE, "tiny-phi4")
    opened = course.open_course()
    for experiment in ("gsm8k", "throughput"):
        for arm in ("bf16", "fp8"):
            opened.record(experiment, arm, tiny_fp8, work={}, metrics={})
    opened.measure_what_is_missing()
    assert capsys.readouterr().out == ""
    assert len(ledger.read()) == 4


def test_notebook_09_can_be_the_first_that_is_opened(tmp_workspace, monkeypatch):
    """Its own cells in an empty workspace: they make the checkpoint, serve, score and time it."""
    monkeypatch.setenv(models.VARIABLE, "tiny-phi4")
    monkeypatch.setattr(course, "GSM8K_ROWS", 4)
    monkeypatch.setattr(course, "DECODING", throughput.Work(generated_tokens=64, rounds=2))
    cells = json.loads((REPO / "notebooks" / "09_report_and_publish.ipynb").read_text())["cells"]
    space = {"display": print}
    for cell in cells[:next(n for n, cell in enumerate(cells) if cell["id"] == "07-10")]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), space)  # noqa: S102
    rows = {(row["experiment"], row["arm"]): row for row in ledger.read()}
    assert set(rows) == {(what, arm) for what in ("gsm8k", "throughput") for arm in ("bf16", "fp8")}
    made = {"bf16": space["phi4"].base(), "fp8": space["phi4"].fp8()}
    for (what, arm), row in rows.items():
        assert row["checkpoint"] == made[arm].fingerprint
        assert (row["kernel"] == "unquantized") == (arm == "bf16")
        if what == "gsm8k":
            assert (row["work"]["task"], row["work"]["limit"]) == ("tiny_gsm8k", 4)
            assert row["metrics"]["strict-match"] in (0, 0.25, 0.5, 0.75, 1)
        else:
            assert row["work"] == course.DECODING.in_ledger()
            assert 0 < row["metrics"]["output_tok_s_min"] <= row["metrics"]["output_tok_s"]
    assert {"lost", "gained"} <= rows["gsm8k", "fp8"]["metrics"].keys()
    shown = space["report"].measured_beside_published(profile="tiny-phi4")
    assert shown["measured"].str.contains("tiny-phi4 on 4 rows of tiny_gsm8k").any()
    assert "tiny_gsm8k, 4, 5" in space["mine"].text  # the model card


@pytest.fixture
def fp8_alone(monkeypatch, tmp_workspace, tiny_fp8):
    """The bundled model as Phi-4 is to a 24 GB card: FP8 fits and bf16 does not."""
    monkeypatch.setenv(models.VARIABLE, "tiny-phi4")
    monkeypatch.setattr(models, "memory", lambda machine: 6_000_000)
    monkeypatch.setattr(course.quantize, "fp8_checkpoint", lambda profile, base: tiny_fp8)
    return course.open_course()


def test_where_bf16_does_not_fit_fp8_is_served_alone_and_said_so(fp8_alone, tiny_fp8, capsys):
    assert fp8_alone.arms() == {"fp8": tiny_fp8}
    assert "FP8 alone: bf16 takes 0.00695 GB of weights and does not fit" in repr(fp8_alone)
    assert not fp8_alone.compares("throughput")
    (line,) = capsys.readouterr().out.splitlines()
    assert "Published: " in line and "bf16" in line and "17 tok/s" in line and "32" not in line
    assert not fp8_alone.compares("gsm8k")
    assert "0.93 fraction right" in capsys.readouterr().out


def test_where_both_fit_both_are_served_and_nothing_is_said(
    monkeypatch, tmp_workspace, tiny_base, tiny_fp8, capsys
):
    monkeypatch.setenv(models.VARIABLE, "tiny-phi4")
    monkeypatch.setattr(course.quantize, "fp8_checkpoint", lambda profile, base: tiny_fp8)
    opened = course.open_course()
    assert list(opened.arms().items()) == [("bf16", tiny_base), ("fp8", tiny_fp8)]
    assert opened.compares("gsm8k") and "alone" not in repr(opened)
    assert capsys.readouterr().out == ""


def test_where_fp8_is_alone_its_rows_are_all_the_ledger_needs(fp8_alone, tiny_fp8, capsys):
    for experiment in ("gsm8k", "throughput"):
        fp8_alone.record(experiment, "fp8", tiny_fp8, work={}, metrics={})
    fp8_alone.measure_what_is_missing()
    assert capsys.readouterr().out == "" and len(ledger.read()) == 2


def test_where_fp8_is_alone_only_it_is_measured(fp8_alone, monkeypatch, capsys):
    served = []
    monkeypatch.setattr(fp8_alone.__class__, "_measure_throughput",
                        lambda self: served.extend(self.arms()))
    monkeypatch.setattr(fp8_alone.__class__, "measure_gsm8k",
                        lambda self, limit: served.extend(self.arms()))
    fp8_alone.measure_what_is_missing()
    assert served == ["fp8", "fp8"]


def test_the_first_question_is_one_the_model_was_not_trained_on():
    question = course.first_question(models.tiny())
    train = (REPO / "data" / "tiny_gsm8k" / "train.jsonl").read_text().splitlines()
    assert question not in {json.loads(line)["question"] for line in train}
    assert course.first_question(models.PHI4).count("?") == 1


def test_the_plan_names_every_step_with_disk_and_memory(monkeypatch):
    monkeypatch.setenv(models.VARIABLE, "tiny-phi4")
    plan = course.open_course().plan()
    assert list(plan["notebook"].str[:2]) == ["01", "02", "03", "05", "06", "07"]
    assert plan.loc[5, "writes to disk"].startswith("3.0 GB")  # 1.5 in bf16, twice half of it
    assert plan.loc[1, "writes to disk"].endswith("MB")


GB = 10**9


@pytest.mark.parametrize(("gpu", "free_ram", "quantizing", "serving", "loading"), [
    # (GB of GPU memory, GB of RAM free): streaming takes about 1 GB, oneshot 1.6 times 29.3 GB.
    (80, 200, "46.9 GB RAM", "29.3 GB GPU memory", "29.3 GB GPU memory"),
    (48, 16, "STREAMED", "29.3 GB GPU memory", "29.3 GB GPU memory"),
    (24, 16, "STREAMED", "15.7 GB GPU memory", "29.3 GB GPU memory and RAM together"),
    (24, 200, "STREAMED", "15.7 GB GPU memory", "29.3 GB GPU memory and RAM together"),
])
def test_the_plan_of_phi4_is_what_each_machine_will_do(
    monkeypatch, gpu, free_ram, quantizing, serving, loading
):
    card = hardware.Gpu(0, "a GPU", gpu * GB, (8, 9), "580")
    machine = hardware.Machine((card,), "CPU", 8, frozenset(), 256 * GB, 500 * GB, "", "", "")
    monkeypatch.setattr(hardware, "available_ram", lambda: free_ram * GB)
    opened = course.Course(machine, hardware.serving_mode(machine), models.PHI4)
    plan = opened.plan().set_index("notebook")
    streamed = f"{streaming.memory() / 1e9:.1f} GB RAM, streamed"
    memory = plan["weights in memory"]
    assert memory["02 quantize"] == quantizing.replace("STREAMED", streamed)
    assert streaming.memory() < 6 * GB
    assert memory["01 load"] == loading and memory["05 serve"].startswith("15.7 GB GPU memory")
    assert memory["06 gsm8k"] == f"{serving} and the KV cache"
    assert memory["07 throughput"].startswith(f"{serving} and the KV cache; before it a slice")
    assert (plan["writes to disk"]["01 load"], plan["writes to disk"]["02 quantize"]) == (
        "29.3 GB", "15.7 GB")


def test_a_cpus_plan_streams_when_its_ram_is_taken(monkeypatch):
    machine = hardware.Machine((), "CPU", 8, frozenset(), 64 * GB, 500 * GB, "", "", "")
    opened = course.Course(machine, hardware.serving_mode(machine), models.PHI4)
    for free, streams in ((60, False), (30, True)):
        monkeypatch.setattr(hardware, "available_ram", lambda free=free: free * GB)
        assert ("streamed" in opened.plan().loc[1, "weights in memory"]) == streams
