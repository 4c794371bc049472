"""The room's page: what was handed in is data, a bad file is named, the figures are right."""

import json
import os
import re

import pytest
import room as page
from bs4 import BeautifulSoup
from conftest import REPO

from helpers import WorkbookError, ledger, models, room, slice_speed

# A run of the notebooks on a CPU, kept as it was: the tests state its figures.
MEASURED = REPO / "tests" / "room_ledger.jsonl"
MODEL = models.model_info(models.PHI4)
HOSTILE = ["<script>alert('evil')</script>", "<img src=x onerror=alert('evil')>",
           "</td></tr></table><iframe src='https://evil.example'>", "{{ 7 * 7 }}{% raw %}",
           "$\\frac{evil$ \\evil", "\x1b]0;evil\x07\x1b[31mevil", "x\u202eevil", "a\nb\tc",
           "\"'onmouseover=evil", "&lt;b&gt;evil", "x" * 5000]


UNSEEN = "[\x00-\x09\x0b-\x1f\x7f\u202e]"  # control characters


def changed(rows: list[dict], **fields) -> str:
    """Rows as lines, each with an id of its own and these fields changed."""
    return "".join(json.dumps(row | {"id": os.urandom(8).hex()} | fields) + "\n" for row in rows)


@pytest.fixture
def measured() -> list[dict]:
    return ledger.read(MEASURED)


@pytest.fixture
def folder(tmp_path):
    """An empty folder for what is handed in."""
    (tmp_path / "room").mkdir()
    return tmp_path / "room"


def shown(folder) -> BeautifulSoup:
    return BeautifulSoup(page.page(*room.read_all(folder)), "html.parser")


def handed_in(folder, name: str, rows: str, **header) -> None:
    first = json.dumps({room.HEADER: 1, "name": name, **header})
    (folder / f"{os.urandom(4).hex()}.jsonl").write_text(f"{first}\n{rows}")


def test_two_real_ledgers_become_one_page(tmp_workspace, folder, tmp_path):
    (folder / "one.jsonl").write_bytes(MEASURED.read_bytes())
    ledger.record("gsm8k", "fp8", {"task": "tiny_gsm8k", "limit": 100, "num_fewshot": 5},
                  {"strict-match": 0.91}, model=ledger.read(MEASURED)[0]["model"],
                  mode="cpu-w8a16", kernel="K")
    room.hand_in("blue fox", folder / "two.jsonl")
    handed, refused = room.read_all(folder)
    assert [(each.name, len(each.rows)) for each in handed] == [("no name 1", 14), ("blue fox", 1)]
    assert refused == [] and all(each.skipped == () for each in handed)
    text = shown(folder)
    assert "2 ledgers" in text.h1.text
    cells = [cell.text for cell in text.find_all("table")[-1].find_all("td")]
    assert cells[0] == "no name 1" and "blue fox" in cells
    pictures = text.find_all("img")
    assert len(pictures) == 5 and "Share of right answers" in pictures[0]["alt"]
    assert "0.99 times bf16's speed on one machine" in str(pictures)


def test_the_figures_are_those_of_the_rows(measured, folder):
    (folder / "one.jsonl").write_bytes(MEASURED.read_bytes())
    handed, _ = room.read_all(folder)
    bf16, fp8 = sorted(room.accuracies(handed), key=lambda point: point.arm)
    # Wilson's interval of 90 of 100, as Newcombe (1998), table I, has it for such a proportion.
    z = 1.959964
    centre, half = (0.9 + z * z / 200) / (1 + z * z / 100), z * (
        0.9 * 0.1 / 100 + z * z / 40000) ** 0.5 / (1 + z * z / 100)
    assert (bf16.estimate.value, fp8.estimate.value) == (0.9, 0.89)
    assert bf16.estimate.low == pytest.approx(centre - half, abs=1e-6)
    assert bf16.estimate.high == pytest.approx(centre + half, abs=1e-6)
    ratios, unbelievable = room.ratios(handed)
    assert unbelievable == 0 and len(ratios) == 5
    one = next(point for point in ratios if "1 stream of" in point.work)
    speeds = {row["arm"]: row["metrics"] for row in measured
              if row["experiment"] == "throughput" and row["work"]["concurrency"] == 1}
    assert one.estimate.value == speeds["fp8"]["output_tok_s"] / speeds["bf16"]["output_tok_s"]
    assert one.estimate.low == (speeds["fp8"]["output_tok_s_min"]
                                / speeds["bf16"]["output_tok_s_max"])
    assert one.estimate.low < one.estimate.value < one.estimate.high


def test_the_newest_of_a_machines_results_counts(measured, folder):
    scores = [row for row in measured if row["experiment"] == "gsm8k"]
    later = [row | {"metrics": {"strict-match": 0.5}} for row in scores]
    (folder / "a.jsonl").write_text(changed(scores) + changed(later))
    handed, _ = room.read_all(folder)
    assert [point.estimate.value for point in room.accuracies(handed)] == [0.5, 0.5]


def test_a_shared_server_is_one_machine_and_its_speeds_are_not_compared(measured, folder):
    rows = [row | {"work": row["work"] | {"shared": "NVIDIA H100"}} for row in measured]
    (folder / "a.jsonl").write_text(changed(rows))
    handed, _ = room.read_all(folder)
    assert {point.machine for point in room.accuracies(handed)} == {"a shared server"}
    assert room.ratios(handed) == ([], 0)
    assert "Left out: 10 speed(s) of a shared server" in shown(folder).text


def test_works_that_differ_are_not_set_side_by_side(measured, folder):
    fewer = [row | {"work": row["work"] | {"limit": 50}} for row in measured
             if row["experiment"] == "gsm8k"]
    (folder / "a.jsonl").write_text(changed(measured))
    (folder / "b.jsonl").write_text(changed(measured, hardware={"gpus": ["NVIDIA A40"]}))
    (folder / "c.jsonl").write_text(changed(fewer))
    found = room.by_work(room.accuracies(room.read_all(folder)[0]))
    assert [len(points) for _, points in found] == [4, 2]
    assert "100 questions" in found[0][0] and "50 questions" in found[1][0]


def test_what_others_wrote_is_shown_and_never_acts(measured, folder, monkeypatch, capsys):
    for evil in HOSTILE:
        rows = [row | {"mode": evil, "kernel": evil, "hardware": {"gpus": [evil]},
                       "time": evil, "versions": {"vllm": evil}, "commit": evil}
                for row in measured if row["work"].get("concurrency", 1) == 1]
        handed_in(folder, evil, changed(rows) + json.dumps({evil: evil}) + "\n",
                  tasks={evil: {"done": True, "hints": 1}}, predictions={evil: {evil: 1.0}})
    (folder / "<b>evil\x1b]0;evil\x07").write_text("")
    monkeypatch.setattr(page, "PAGE", folder.parent / "room.html")
    assert page.main(["page", str(folder)]) == 0
    assert not re.search(UNSEEN, capsys.readouterr().out)
    text = BeautifulSoup(page.PAGE.read_text(), "html.parser")
    assert {tag.name for tag in text.find_all(True)} <= {
        "html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "table", "tr", "th",
        "td", "img"}
    assert {name for tag in text.find_all(True) for name in tag.attrs} <= {
        "lang", "charset", "http-equiv", "content", "class", "alt", "src"}
    assert all(tag["src"].startswith("data:image/png;base64,") for tag in text.find_all("img"))
    assert not re.search(UNSEEN, str(text))
    assert max(len(cell.text) for cell in text.find_all("td")) < 400
    names = {row.td.text for row in text.find_all("table")[-2].find_all("tr") if row.td}
    assert {" ".join("".join(c if c.isprintable() else " " for c in evil).split())[:39]
            for evil in HOSTILE} == {name[:39] for name in names}
    assert text.text.count("line 8 is skipped") == len(HOSTILE)
    assert len(text.find_all("img")) == 2


@pytest.mark.parametrize("evil", ["$\\frac{evil$ \\evil", "x" * 5000, "\n\t\x1b{}%s"])
def test_a_models_or_tasks_name_may_be_anything(measured, folder, evil):
    (folder / "a.jsonl").write_text("".join(
        changed([row], model=row["model"] | {"profile": evil},
                work=row["work"] | ({"task": evil} if "task" in row["work"] else {}))
        for row in measured if row["work"].get("concurrency", 1) in (1, 2)))
    pictures = shown(folder).find_all("img")
    assert len(pictures) == 3 and all(len(picture["alt"]) < 300 for picture in pictures)


def test_a_bad_file_is_named_and_left_out(measured, folder):
    (folder / "good.jsonl").write_text(changed(measured[:1]))
    (folder / "again.jsonl").write_text((folder / "good.jsonl").read_text())
    (folder / "text.jsonl").write_text("no JSON\n")
    (folder / "empty.jsonl").write_text("")
    (folder / "deep.jsonl").write_text("[" * 100_000)
    (folder / "picture.png").write_bytes(os.urandom(2000))
    (folder / "folder").mkdir()
    (folder / "link.jsonl").symlink_to("/etc/passwd")
    os.mkfifo(folder / "pipe.jsonl")
    with open(folder / "large.jsonl", "wb") as file:
        file.truncate(room.LARGEST_FILE + 1)
    (folder / ".hidden").write_text("not looked at")
    handed, refused = room.read_all(folder)
    assert [each.file for each in handed] == ["again.jsonl"]
    said = dict(refused)
    assert said.keys() == {"good.jsonl", "text.jsonl", "empty.jsonl", "deep.jsonl", "picture.png",
                           "folder", "link.jsonl", "pipe.jsonl", "large.jsonl"}
    assert said["good.jsonl"] == "every row of it is in another file, too"
    assert {said["folder"], said["link.jsonl"], said["pipe.jsonl"]} == {"not a plain file"}
    assert "not JSON" in said["text.jsonl"] and said["large.jsonl"].startswith("20 MB")
    assert all(name in shown(folder).text for name in said)


def test_a_bad_line_is_left_out_and_the_rest_of_its_file_kept(measured, folder):
    (folder / "a.jsonl").write_text(changed(measured[:2]) + "half a li\n")
    (each,), refused = room.read_all(folder)
    assert len(each.rows) == 2 and refused == []
    assert each.skipped[0].startswith("line 3 is skipped: not JSON")


@pytest.mark.parametrize("speed", [0, -5, 1e300, 1e-300, float("nan"), float("inf"), 10**17])
def test_a_speed_that_no_machine_reaches_bends_no_axis(measured, folder, speed):
    rows = [row if (row["arm"], row["experiment"]) != ("fp8", "throughput") else
            row | {"metrics": dict.fromkeys(room.SPEED, speed)} for row in measured]
    (folder / "a.jsonl").write_text(changed(rows))
    (folder / "b.jsonl").write_text(changed(measured))
    handed, _ = room.read_all(folder)
    ratios, unbelievable = room.ratios(handed)
    assert {point.who for point in ratios} == {"no name 2"}
    assert unbelievable == (0 if speed != speed or speed == float("inf") else 5)


def test_what_is_handed_in_comes_back(tmp_workspace, tmp_path, folder):
    with pytest.raises(WorkbookError, match="has no result yet"):
        room.hand_in("early", folder / "a.jsonl")
    row = ledger.record("gsm8k", "fp8", {"task": "gsm8k", "limit": 100}, {"strict-match": 0.9},
                        model=MODEL, mode="gpu-w8a8", kernel="K")
    room.hand_in("é" * 60, folder / "a.jsonl")
    room.hand_in("", folder / "b.jsonl")
    (each,), refused = room.read_all(folder)
    assert each.rows == [row] and each.name == "é" * 40
    assert refused == [("b.jsonl", "every row of it is in another file, too")]


def test_a_folder_that_is_not_there_is_a_sentence(capsys):
    assert page.main(["page", "no/such/folder"]) == 1
    assert "cannot be read: No such file or directory." in capsys.readouterr().err


def test_a_folder_without_a_ledger_is_a_sentence(folder, capsys):
    (folder / "a.jsonl").write_text("x")
    assert page.main(["page", str(folder)]) == 1
    said = capsys.readouterr()
    assert "Left out: a.jsonl" in said.out and "is a ledger." in said.err


def test_thirty_machines_are_one_page(measured, folder):
    for number in range(30):
        (folder / f"{number:02}.jsonl").write_text(changed(measured))
    handed, _ = room.read_all(folder)
    assert len(handed) == 30 and len(room.by_work(room.accuracies(handed))[0][1]) == 60
    assert len(page.page(handed, [])) < 3_000_000


def a_slice(measured: list[dict], ratios: list[float], arm="fp8", numerics="w8a16") -> str:
    """Rows as notebook 07 leaves them of Phi-4's shapes, one for each of its works."""
    lines = ""
    for work, ratio in zip(slice_speed.WORK, ratios, strict=True):
        lines += changed(measured[:1], experiment="slice", arm=arm,
                         work=work.in_ledger() | {"numerics": numerics, "layers": 2},
                         metrics={"tok_s": 9.0, "ratio": ratio, "ratio_low": ratio * 0.9,
                                  "ratio_high": ratio * 1.1})
    return lines


def test_predictions_stand_beside_what_was_measured(measured, folder):
    handed_in(folder, "a", a_slice(measured, [1.9, 0.9, 0.7]) + a_slice(
        measured, [1.8, 1.7, 1.6], arm="int8", numerics="w8a8"), predictions={"slice": [2, 1, 0.5]})
    handed_in(folder, "b", a_slice(measured, [2.1, 1.2, 1e9]),
              predictions={"slice": [1.5, 1.5, 1.5], "lost": 3})
    handed_in(folder, "nothing measured", changed(measured), predictions={"slice": [9, 9, 9]})
    handed_in(folder, "nonsense", a_slice(measured, [1, 1, 1]), predictions={"slice": [1, "x", 1]})
    handed, _ = room.read_all(folder)
    assert sorted(room.predicted(handed)) == [
        ("1 stream", 1.5, 2.1), ("1 stream", 2, 1.9), ("8 streams", 1, 0.9),
        ("8 streams", 1.5, 1.2), ("prompt of 512", 0.5, 0.7)]
    points, unbelievable = room.ratios(handed)
    assert unbelievable == 1
    (work, first), *_ = room.by_work(points)
    assert work == "FP8 W8A16, 1 stream of 1 + 16 tokens, 2 layers of Phi-4's shapes"
    assert [point.estimate.value for point in first] == [1, 1.9, 2.1]
    assert (first[-1].estimate.low, first[-1].estimate.high) == (2.1 * 0.9, 2.1 * 1.1)
    assert any(work.startswith("INT8 W8A8, prompt of 512") for work, _ in room.by_work(points))
    pictures = shown(folder).find_all("img")
    assert "5 points" in pictures[-1]["alt"]
