"""Every task: its solution is right, a usual mistake gets its sentence, nothing stops a cell."""

import ast
import io
import json
import re
import threading
from contextlib import redirect_stdout, suppress

import pytest

from helpers import WorkbookError, check, roofline, workspace
from helpers.check import answers, record, task

NAMES = list(check.TASKS)


def said(name: str, answer) -> str:
    with redirect_stdout(io.StringIO()) as out:
        getattr(check, name)(answer)
    return " ".join(out.getvalue().split())


@pytest.fixture(autouse=True)
def _own_workspace(tmp_workspace):
    """Tries are counted in a workspace of the test's own."""


# The tasks themselves


@pytest.mark.parametrize("name", NAMES)
def test_a_task_says_what_it_is(name):
    found = check.TASKS[name]
    assert found.level in task.LEVELS and found.kind in task.KINDS
    assert 1 <= found.minutes <= 15
    assert len(found.hints) == len(set(found.hints)) == 3
    assert found.trains and not found.trains.endswith(".")
    for text in (*found.hints, *(mistake.says for mistake in found.key().mistakes)):
        assert text == text.strip() and 3 <= len(text.split()) <= 60, text


def test_three_tasks_a_notebook_or_more_half_of_them_code_and_all_levels():
    every = check.TASKS.values()
    for number in range(10):
        assert sum(one.notebook == f"{number:02}" for one in every) >= 3
    assert len(NAMES) >= 30
    assert sum(one.kind == "code" for one in every) >= len(NAMES) / 2
    for level in task.LEVELS:
        assert sum(one.level == level for one in every) >= 5


@pytest.mark.parametrize("name", NAMES)
def test_every_usual_mistake_gets_the_sentence_that_undoes_it(name):
    key = check.TASKS[name].key()
    assert len(key.mistakes) >= 2
    for mistake in key.mistakes:
        text = said(name, mistake.answer)
        assert text.startswith("Not yet. ") and mistake.says in text
    for way in key.accepted:
        text = said(name, way.answer)
        assert text.startswith("Right. ") and way.says in text
    assert said(name, key.right).startswith("Right.")


# Other ways to write an answer, right and wrong, none of them the key's own


def by_numpy(weights):
    import numpy

    return numpy.abs(numpy.asarray(weights)).max(1, keepdims=True) / 448


def bf16_product(x, codes_w, s_w):
    import torch

    return (x.bfloat16() @ codes_w.to(torch.bfloat16).T).float() * s_w


def header_sum(path):
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return max(entry["data_offsets"][1] for entry in header.values())


def tensor_quantizer(weight):
    """Scales as [out], codes as bits."""
    import torch

    scale = (weight.abs().amax(1).float() / 448).bfloat16()
    codes = (weight / scale[:, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes.view(torch.uint8), scale


def torch_cast(x):
    import torch

    return torch.tensor(x).clamp(-448, 448).to(torch.float8_e4m3fn).float()


def fake(x):
    import torch

    return (x / (x.abs().amax(1, keepdim=True) / 448)).to(torch.float8_e4m3fn).float() * (
        x.abs().amax(1, keepdim=True) / 448)


@pytest.mark.parametrize("name, answer", [
    ("scale_per_channel", by_numpy), ("w8a16_product", bf16_product),
    ("rtx_a6000_ceiling", 52), ("rtx_a6000_ceiling", "52.4"),
    ("safetensors_bytes", header_sum), ("encoded", torch_cast), ("quantizer", tensor_quantizer),
    ("fake_linear", lambda x, w: fake(x) @ fake(w).mT), ("nearest_e4m3_to_0_3", 5 / 16),
    ("kernel_from_log", lambda log: next(iter(re.findall(r"Selected (\w+)", log)), None)
     or ("marlin" if "Marlin kernel" in log else None)),
    ("crossing_streams", lambda b, w, s, f: round(b / s * f / 2 / w)),
    ("rows_for_one_point", 788), ("same_work", "a"), ("same_work", ["A"]),
    ("red_hats_advice", [2, 16384]), ("card_faults", "c, e, g, h, k"),
    ("scheme_chosen", {"V100 SXM2 32 GB": None, "RTX 3090": None, "RTX 5090": "w4a16",
                       "A40": "FP8", "RTX 6000 Ada": "fp8", "A100 SXM 80 GB": "BF16"}),
])
def test_another_right_way_is_right(name, answer):
    assert said(name, answer).startswith("Right.")


@pytest.mark.parametrize("name, answer, words", [
    ("rtx_a6000_ceiling", 768 / 28.29, "bf16's ceiling"),
    ("rtx_a6000_ceiling", 768 / 14.66 * 1.02, "Bandwidth in bytes/s"),
    ("kv_bytes_per_token", lambda config: 204800, "1 of 3 cases are right"),
    ("kv_bytes_per_token", lambda config: [].sort(), "is a `return` missing?"),
    ("bytes_saved_on_lm_head", 100352 * 5120, "one byte fewer"),
    ("decoded", lambda code: 1 / (code - 1) if code else 0, "answer(1), raises ZeroDivision"),
    ("encoded", lambda x: x, "answer(0.3), gives 0.3, and 0.3125 is right"),
    ("quantizer", lambda w: w / 448, "A pair is wanted"),
    ("quantizer", lambda w: (w, w[:, :1]), "a cast is missing"),
    ("fake_linear", lambda x, w: fake(x), "shape [16, 32]"),
    ("mcnemar", lambda a, b: 0.05, "exact two-sided binomial"),
    ("standard_error", lambda scores, n: 0.05, "missing 1 required positional argument"),
    ("same_work", {"b"}, "Model, dataset"), ("card_faults", {"a", "c", "g"}, "2 of the 5 faults"),
    ("card_faults", {"a", "c", "g"}, "Sound is a"),
    ("red_hats_advice", (3, 16384), "Right so far: the tokens."),
    ("config_mended", {"quant_method": "fp8"}, "config_groups"),
    ("scheme_chosen", {"A40": "FP8"}, "lacks V100"),
    ("telling_inputs", [[1.0, 2.0]], "[rows, 256]"),
])
def test_a_wrong_answer_is_told_what_is_right_and_what_is_not(name, answer, words):
    text = said(name, answer)
    assert text.startswith("Not yet. ") and words.lower() in text.lower()


def test_one_mended_fault_of_a_config_is_said_and_so_is_one_made():
    config = check.material("config_mended")
    config["ignore"] = ["re:.*lm_head"]
    config["config_groups"]["group_0"]["weights"]["num_bits"] = 4
    text = said("config_mended", config)
    assert "1 of the four faults are mended" in text and "weights: num_bits" in text
    assert check.material("config_mended")["ignore"] == []  # each gets a copy


# No answer stops a notebook


class Broken:
    """Whatever is asked of it raises."""

    def _no(self, *_, **__):
        raise RuntimeError("no")

    __eq__ = __bool__ = __float__ = __iter__ = __len__ = __repr__ = __str__ = __array__ = _no
    __getattr__ = __index__ = __getitem__ = __call__ = _no
    __hash__ = object.__hash__


class Unspeakable(Exception):
    def __str__(self):
        raise ValueError("not even that")


def raises(*_):
    raise Unspeakable


def leaves(*_):
    raise SystemExit(1)


STRANGE = [None, "no", "", b"x", -1, 0, float("nan"), float("inf"), True, 1j, [], {}, {"a": []},
           set(), (1,), ("a", None), [[[1]]], object(), Broken(), Broken, raises, leaves,
           lambda: 0, lambda *_: [].sort(), lambda *_: "W4A4", lambda *_: Broken(), lambda *_: [[]],
           lambda *_: (1, 2), print, int]


@pytest.mark.parametrize("name", NAMES)
def test_a_strange_answer_is_not_yet_right_and_stops_nothing(name):
    for answer in STRANGE:
        assert "Not yet. " in said(name, answer), answer


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_answer_was_not_tried_and_is_not_counted(name):
    def stub(x): ...

    def explained(x):
        """Return it."""
        ...

    for empty in (..., stub, explained):
        assert said(name, empty).strip() == check.NOT_TRIED
    assert record.read() == {}


def test_a_loop_without_end_is_stopped_and_said(monkeypatch):
    monkeypatch.setattr(task, "SECONDS", 0.3)

    def endless(*_):
        while True:
            with suppress(Exception):  # which the stop is not
                sum(range(1000))

    text = said("standard_error", endless)
    assert text.startswith("Not yet. ") and "Does a loop never end?" in text


def test_an_interrupt_from_the_keyboard_goes_through():
    def interrupted(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        said("standard_error", interrupted)


def test_a_check_works_outside_of_the_main_thread():
    found = []
    worker = threading.Thread(target=lambda: found.append(said("same_work", {"a"})))
    worker.start()
    worker.join()
    assert found[0].startswith("Right.")


def test_a_function_cannot_spoil_the_inputs_of_the_next_answer():
    def spoils(x, w):
        x.zero_()
        return w

    said("fake_linear", spoils)
    assert said("fake_linear", lambda x, w: fake(x) @ fake(w).T).startswith("Right.")


def test_a_truth_that_is_not_to_be_had_is_a_sentence_and_no_try(monkeypatch):
    def damaged():
        raise WorkbookError("The file is damaged.", "Nothing is known.", "Make it again.")

    broken = task.Task(**{**vars(check.TASKS["sqnr"]), "key": damaged})
    monkeypatch.setitem(check.TASKS, "sqnr", broken)
    assert "The file is damaged." in said("sqnr", 3)
    assert record.read() == {}


# The truth, from a second source


def test_scales_are_those_of_compressed_tensors():
    from compressed_tensors.quantization import preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams

    arguments = preset_name_to_scheme("FP8_DYNAMIC", ["Linear"]).weights
    assert said("scale_per_channel", lambda w: calculate_qparams(
        w.amin(dim=1), w.amax(dim=1), arguments)[0]).startswith("Right.")


def test_the_kv_cache_is_as_large_as_that_of_the_model_itself(tiny_base):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_base.path, dtype=torch.bfloat16)
    cache = model(torch.arange(1, 8)[None], use_cache=True).past_key_values
    nbytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    right = check.TASKS["kv_bytes_per_token"].key().right
    assert nbytes == 7 * right(roofline.load_config(tiny_base.path))
    assert right(roofline.load_config(workspace.data("phi4"))) == 204_800


def test_the_linears_of_phi4_have_13_631_488_000_weights():
    right = check.TASKS["linear_weights"].key().right
    assert right(roofline.load_config(workspace.data("phi4"))) == 13_631_488_000


def test_bytes_codes_and_scales_are_those_that_llm_compressor_wrote(tiny_fp8, monkeypatch):
    """With its checkpoint in the workspace, and without."""
    from helpers import checkpoint
    from helpers.check import tasks_03

    without = tasks_03._stored()
    monkeypatch.setenv("PHI4_FP8_WORKSPACE", str(tiny_fp8.path.parent.parent))
    monkeypatch.setenv("PHI4_FP8_PROFILE", "tiny-phi4")
    weight, codes, scale = tasks_03._stored()
    name = "model.layers.0.self_attn.o_proj"
    assert codes.equal(checkpoint.read_tensor(tiny_fp8, f"{name}.weight"))
    assert scale.equal(checkpoint.read_tensor(tiny_fp8, f"{name}.weight_scale"))
    assert all(a.equal(b) for a, b in zip((weight, codes, scale), without, strict=True))
    sizes = [(t.name, t.shape) for t in check.TASKS["fp8_bytes"].key() and _tiny_tensors()]
    assert check.TASKS["fp8_bytes"].key().right(sizes) == checkpoint.total_bytes(tiny_fp8.tensors)


def _tiny_tensors():
    from helpers import models

    return models.tiny().checkpoint.tensors


def test_the_card_has_five_faults():
    assert sorted(check.TASKS["card_faults"].key().right) == ["c", "e", "g", "h", "k"]
    assert check.material("card_faults").count("\n") == 10


def test_the_log_lines_are_those_that_vllm_writes():
    """Both sentences, in the source of the vLLM that serves; and the workbook reads them so."""
    from helpers import server_log, serving
    from helpers.check import tasks_05

    (layers,) = serving.serve_python().parents[1].glob(
        "lib/python3*/site-packages/vllm/model_executor")
    written = [node.value for file in ("kernels/linear/__init__.py",
                                       "layers/quantization/utils/marlin_utils_fp8.py")
               for node in ast.walk(ast.parse((layers / file).read_text()))
               if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    assert "Selected %s for %s" in written
    assert any("leveraging the Marlin kernel" in text and text in tasks_05.logs()[tasks_05.MARLIN]
               for text in written)
    for kernel, log in tasks_05.logs().items():
        config = {} if kernel == "none" else {"quantization_config": {}}
        found = server_log.selected_kernel(config, log)
        assert found == ("unquantized" if kernel == "none" else kernel)


def test_a_number_is_read_from_what_libraries_return():
    import numpy
    import torch

    for one in (2, 2.0, "2", numpy.float32(2), numpy.array(2), torch.tensor(2.0),
                torch.tensor([2], dtype=torch.bfloat16)):
        assert answers.number(one) == 2.0
