"""The tasks as they stand in the notebooks: three tagged cells each, `task`, `answer`, `solution`.

Every task comes before the cell that reveals its answer, and no cell reads what a learner answered.
"""

import ast
import re

import nbformat
import pytest
from conftest import REPO
from editions import FENCE, STUB

from helpers import check
from helpers.check import record

WORDS = 40  # of a question, at most
# What reveals the answer, in the cell's own words: a task that comes after it is none.
REVEALED_BY = {
    "scale_per_channel": "s_w = w.abs().amax(dim=1)", "w8a16_product": "w8a16 = s_w * (x @",
    "rtx_a6000_ceiling": "plots.decode_ceilings(", "safetensors_bytes": "checkpoint.total_bytes(",
    "linear_weights": "plots.bytes_by_role(", "kv_bytes_per_token": "widgets.budget_table(",
    "fp8_bytes": "checkpoint.predict_fp8(", "bytes_saved_on_lm_head": "## What you learnt",
    "config_mended": 'fp8.config["quantization_config"]', "decoded": "exponent, mantissa = (codes",
    "nearest_e4m3_to_0_3": "e4m3.encode(numbers)", "encoded": "e4m3.encode(numbers)",
    "quantizer": "my_codes = (weight / my_scale)", "sqnr": "formats.activation_arms(",
    "fake_linear": "formats.activation_arms(", "kl_divergence": "formats.activation_arms(",
    "mode_of_capability": "CutlassFP8ScaledMMLinearKernel", "kernel_from_log": "server.kernel",
    "telling_inputs": "torch.randn(64, codes_w.shape[1]", "standard_error": "stats.wilson(",
    "mcnemar": "stats.mcnemar(", "rows_for_one_point": "plots.detectable_loss(",
    "ratio_by_round": "throughput.ratios(", "h100_expected": "**Where is the missing third?**",
    "crossing_streams": "plots.concurrency(", "bits_in_groups_of_256": "schemes.table(",
    "int4_rounded": "schemes.table(", "scheme_chosen": "## A rule",
    "verdict": "verdicts.of_this_machine(", "same_work": "Only those of the same work",
    "card_faults": "card.model_card(", "red_hats_advice": "deployment.compose("}
PRINTED = {  # how an answer would look, were it printed
    "rtx_a6000_ceiling": r"\b52\.\d", "bytes_saved_on_lm_head": r"513,601,536",
    "nearest_e4m3_to_0_3": r"0\.3125", "rows_for_one_point": r"\b79\d rows",
    "h100_expected": r"\b153\b", "bits_in_groups_of_256": r"4\.06",
    "red_hats_advice": r"--max-model-len (16384|16,384)"}


@pytest.fixture(autouse=True)
def _own_workspace(tmp_workspace):
    """Tries are counted in a workspace of the test's own."""


def tasks():
    """The task's name, all cells of its notebook, and the place of its answer cell."""
    for path in sorted((REPO / "notebooks").glob("[0-9]*.ipynb")):
        cells = nbformat.read(path, as_version=4).cells
        for at, cell in enumerate(cells):
            if tagged(cell, "answer"):
                (name,) = re.findall(r"check\.(\w+)\(answer\)", cell.source)
                yield pytest.param(name, cells, at, id=f"{path.stem[:2]}-{name}")


def tagged(cell, tag: str) -> bool:
    return cell.metadata.get("tags", []) == [tag]


def test_the_notebooks_hold_every_task_once_and_in_its_place():
    assert [parameter.id for parameter in tasks()] == [
        f"{one.notebook}-{one.name}" for one in check.TASKS.values()]


@pytest.mark.parametrize("name, cells, at", tasks())
def test_a_task_is_asked_answered_and_solved_in_three_cells(name, cells, at):
    asked, answer, solved = cells[at - 1:at + 2]
    found = check.TASKS[name]
    assert tagged(asked, "task") and tagged(solved, "solution")
    title, _, question = asked.source.partition("\n")
    assert title == f"### Task: {found.trains} ({found.level}, {found.minutes} min)"
    assert 2 <= len(question.split()) <= WORDS
    assert len(STUB.findall(answer.source)) == 1
    assert f'\n# check.hint("{name}")' in answer.source
    assert solved.source.startswith("<details><summary>Solution</summary>")
    assert solved.source.rstrip().endswith("</details>")


@pytest.mark.parametrize("name, cells, at", tasks())
def test_a_task_comes_before_what_reveals_its_answer(name, cells, at):
    reveals = [i for i, cell in enumerate(cells) if REVEALED_BY[name] in cell.source]
    assert reveals and at < reveals[0]
    for cell in cells[:at]:
        shown = [cell.source, *(str(output) for output in cell.get("outputs", []))]
        if name in PRINTED and not tagged(cell, "solution"):
            assert not any(re.search(PRINTED[name], text) for text in shown), cell.source


@pytest.mark.parametrize("name, cells, at", tasks())
def test_the_untouched_cell_is_not_tried_and_the_solution_is_right(name, cells, at, capsys):
    exec(cells[at].source, {})
    assert capsys.readouterr().out.splitlines()[-1] == check.NOT_TRIED
    solution = FENCE.search(cells[at + 1].source)[1]
    exec(STUB.sub(lambda stub: solution.rstrip(), cells[at].source), {})
    assert re.search(r"^Right\.", capsys.readouterr().out, re.M)
    assert record.read()[name] == {"done": True, "tries": 1, "hints": 0}


@pytest.mark.parametrize("name, cells, at", tasks())
def test_neither_cell_nor_solution_takes_a_name_of_the_notebook(name, cells, at):
    """What runs below a task must not depend on how it was answered."""
    others = [cell.source for cell in cells if cell.cell_type == "code"
              and not tagged(cell, "answer") and not tagged(cell, "prediction")]
    used = {node.id for source in others for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Name)}
    for source in (cells[at].source, FENCE.search(cells[at + 1].source)[1]):
        bound = {name for node in ast.parse(source).body for name in _bound(node)}
        assert not bound & used, bound & used


def _bound(node: ast.stmt) -> set[str]:
    """The names that a statement of a cell gives to something; modules are the same to all."""
    if isinstance(node, ast.FunctionDef):
        return {node.name}
    if isinstance(node, ast.Assign):
        return {each.id for target in node.targets for each in ast.walk(target)
                if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)}
    return set()


@pytest.mark.parametrize("path", sorted((REPO / "notebooks").glob("*.ipynb")),
                         ids=lambda path: path.stem)
def test_no_other_cell_reads_an_answer(path):
    """So a wrong answer changes nothing below it. A prediction is read where it is made."""
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code" and not (tagged(cell, "answer") or tagged(cell, "prediction")):
            names = {node.id for node in ast.walk(ast.parse(cell.source))
                     if isinstance(node, ast.Name)}
            assert "answer" not in names, cell.source


def test_progress_is_shown_first_and_last():
    for name in ("00_start_here", "09_report_and_publish"):
        cells = nbformat.read(REPO / "notebooks" / f"{name}.ipynb", as_version=4).cells
        assert any(cell.source.startswith("phi4.progress()") for cell in cells), name
