"""The notebooks in a real JupyterLab and a real Chromium; 00, 01 and 03 with every control.

All others are opened as they are committed, and not run. `make test-browser` runs this in
.venv-browser. The notebooks are copies in build/browser; what a
reader sees is left in build/screenshots.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
from playwright.sync_api import expect

REPO = Path(__file__).resolve().parent.parent.parent
PLACE, SCREENSHOTS = REPO / "build" / "browser", REPO / "build" / "screenshots"
RUN_LIMIT = 300  # seconds for a notebook; 03 takes about one minute on two quiet cores
NAMES = ("00_start_here", "01_load_phi4", "03_inspect_the_scales")  # run, and turned
EVERY = sorted(path.stem for path in (REPO / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="session")
def lab():
    """JupyterLab on a free port of 127.0.0.1 with a token, on copies: its URL and the token."""
    shutil.rmtree(PLACE, ignore_errors=True)
    shutil.rmtree(SCREENSHOTS, ignore_errors=True)
    (PLACE / "notebooks").mkdir(parents=True)
    SCREENSHOTS.mkdir()
    for name in NAMES:
        blank = json.loads((REPO / "notebooks" / f"{name}.ipynb").read_text())
        blank["metadata"].pop("widgets", None)
        for cell in blank["cells"]:
            if cell["cell_type"] == "code":
                cell |= {"outputs": [], "execution_count": None}
        (PLACE / "notebooks" / f"{name}.ipynb").write_text(json.dumps(blank))
    shutil.copytree(REPO / "notebooks", PLACE / "notebooks" / "committed",
                    ignore=shutil.ignore_patterns(".*", "__pycache__"))
    token = secrets.token_urlsafe(24)
    own = {f"JUPYTER_{kind}_DIR": str(PLACE / kind.lower()) for kind in ("CONFIG", "DATA",
                                                                         "RUNTIME")}
    environ = {**os.environ, **own, "JUPYTER_TOKEN": token, "PHI4_FP8_PROFILE": "tiny-phi4",
               "PHI4_FP8_WORKSPACE": str(PLACE / "workspace"), "PYTHONPATH": str(REPO)}
    with open(PLACE / "lab.log", "w") as log:
        server = subprocess.Popen(
            [REPO / ".venv" / "bin" / "jupyter", "lab", "--no-browser", "--ip=127.0.0.1",
             "--port=0", "--allow-root", f"--notebook-dir={PLACE / 'notebooks'}"],
            stdout=log, stderr=log, env=environ, start_new_session=True)
    try:
        yield address(server), token
    finally:
        server.terminate()  # it ends its kernels first
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(timeout=20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)


def address(server: subprocess.Popen) -> str:
    """The URL that JupyterLab has chosen, once it answers."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # past any proxy
    for _ in range(600):
        assert server.poll() is None, (PLACE / "lab.log").read_text()
        for file in (PLACE / "runtime").glob("jpserver-*.json"):
            with contextlib.suppress(OSError, ValueError):
                url = json.loads(file.read_text())["url"]
                with direct.open(f"{url}api", timeout=5):
                    return url
        time.sleep(0.1)
    raise AssertionError("JupyterLab did not answer within a minute")


@pytest.fixture(scope="module", params=NAMES)
def page(request, lab, chromium):
    """A notebook, opened with the token and run to its end by the Run menu."""
    (url, token), name = lab, request.param
    page = watched(chromium, url, name)
    # A workspace of its own: the other notebook's tab would be opened again beside it.
    page.goto(f"{url}lab/workspaces/{name}/tree/{name}.ipynb?token={token}")
    page.locator(".jp-Notebook .jp-Cell").first.wait_for(timeout=60_000)
    idle(page)
    menu(page, "Run", "Run All Cells")
    prompts = page.locator(".jp-Notebook .jp-CodeCell .jp-InputPrompt")
    expect(prompts.first).not_to_have_text("[ ]:", timeout=10_000)
    expect(prompts.last).to_have_text(re.compile(r"\[\d+\]:"), timeout=RUN_LIMIT * 1000)
    idle(page)
    yield page
    page.close()


def watched(chromium, url: str, name: str):
    """A new page that keeps what its console complains of and what it asks of other places."""
    page = chromium.new_page(viewport={"width": 1440, "height": 900})
    page.name, page.complaints, page.foreign = name, [], []
    page.on("console", lambda said: said.type == "error" and page.complaints.append(
        f"{said.text} ({said.location.get('url')})"))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("request", lambda request: request.url.startswith(("http", "ws"))
            and not request.url.startswith(url) and page.foreign.append(request.url))
    return page


def idle(page) -> None:
    """Wait until the status bar says that the kernel is there and waits for work."""
    expect(page.locator("#jp-main-statusbar").get_by_text("| Idle")).to_be_visible(timeout=60_000)


def menu(page, *path: str) -> None:
    """Choose an entry of JupyterLab's menu bar."""
    page.locator(".lm-MenuBar-item", has_text=path[0]).first.click()
    for entry in path[1:]:
        page.locator(".lm-Menu-item", has_text=re.compile(f"^{re.escape(entry)}")).first.click()


START_HERE, LOAD, SCALES = (pytest.mark.parametrize("page", [name], indirect=True)
                            for name in NAMES)


def explorer(page):
    """The cell of notebook 03 that holds the explorer of the scales."""
    return page.locator(".jp-CodeCell").filter(has_text="widgets.explorer(base, fp8)").first


def test_every_cell_has_run_and_none_ended_in_an_error(page):
    page.keyboard.press("Control+s")
    saved = PLACE / "notebooks" / f"{page.name}.ipynb"
    end = time.monotonic() + 30
    while not (counts := executed(saved))[-1] and time.monotonic() < end:
        time.sleep(0.2)
    assert counts == list(range(1, len(counts) + 1))
    assert '"output_type": "error"' not in saved.read_text()
    assert page.get_by_text("Traceback (most recent call last)").count() == 0


def executed(notebook: Path) -> list[int | None]:
    return [cell["execution_count"] for cell in json.loads(notebook.read_text())["cells"]
            if cell["cell_type"] == "code"]


def test_every_picture_is_there_and_says_in_words_what_it_shows(page):
    pictures = page.locator(".jp-OutputArea-output img")
    found = pictures.evaluate_all("all => all.map(one => [one.alt, one.naturalWidth])")
    assert found
    assert all(len(alt) > 20 and width > 300 for alt, width in found), found


@START_HERE
@pytest.mark.parametrize("key, says", [
    ("ArrowLeft", "scale = 1/2 × amax / 448"), ("End", "scale = 65,536 × amax / 448"),
    ("Home", "scale = 1/64 × amax / 448")])
def test_the_slider_moves_the_scale(page, key, says):
    """Both ends of the slider, and one step: the sentence, and another picture."""
    cell = page.locator(".jp-CodeCell").filter(has_text="widgets.scale_slider(sample)")
    picture, sentence = cell.locator("img"), cell.locator(".widget-html-content")
    before = picture.get_attribute("src")
    cell.locator(".noUi-handle").press(key)
    expect(sentence).to_contain_text(says)
    expect(picture).not_to_have_attribute("src", before)
    expect(picture).to_have_count(1)
    expect(picture).to_have_attribute("alt", re.compile(re.escape(says.removeprefix("scale = "))))
    page.wait_for_timeout(1000)
    cell.screenshot(path=SCREENSHOTS / f"{page.name}-slider-{key}.png")


@START_HERE
def test_a_task_is_answered_wrong_hinted_and_answered_right(page):
    """Typed into its cell, as a learner does; the notebook's other cells are left alone."""
    cell = page.locator(".jp-CodeCell").filter(has_text="check.scale_per_channel(answer)").first
    empty = "\n".join(cell.locator(".cm-line").all_text_contents())
    call = 'check.hint("scale_per_channel")'
    wrong = empty.replace("...", "return weights.abs().max() / 448")
    right = empty.replace("...", "return weights.abs().amax(dim=1) / 448")
    for name, code, says in (
            ("wrong", wrong, "This is one scale for the whole tensor."),
            ("hinted", wrong.replace(f"# {call}", call), "Hint 1 of 3: "),
            ("right", right, "Right. ")):
        cell.locator(".cm-content").click()
        page.keyboard.press("ControlOrMeta+a")
        page.keyboard.insert_text(code)
        page.keyboard.press("Shift+Enter")
        expect(cell.locator(".jp-OutputArea")).to_contain_text(says, timeout=60_000)
        page.wait_for_timeout(1000)  # cells that come into sight are laid out, and move this one
        cell.screenshot(path=SCREENSHOTS / f"{page.name}-task-{name}.png")


@LOAD
def test_the_menu_of_gpus_changes_sentence_and_table(page):
    cell = page.locator(".jp-CodeCell").filter(has_text="widgets.gpu_menu()")
    sentence, table = cell.locator(".widget-html-content"), cell.locator("table")
    table.scroll_into_view_if_needed()
    expect(table).to_contain_text("24.6")  # the A40's; a cell out of sight has no inner text
    page.wait_for_timeout(1000)  # cells that come into sight are laid out, and move this one
    before = sentence.inner_text(), table.inner_text()
    assert before[1]
    cell.get_by_label("GPU", exact=True).select_option("L4")
    expect(sentence).not_to_have_text(before[0])
    expect(table).to_contain_text("20.5")
    assert table.inner_text() != before[1]


@SCALES
@pytest.mark.parametrize("control, choice", [
    ("module", "gate_up_proj"), ("view", "weights"), ("view", "error"), ("layer", "2"),
    ("view", "scales"), ("module", "qkv_proj")])
def test_each_control_changes_the_picture(page, control, choice):
    cell = explorer(page)
    picture = cell.locator("img")
    before = picture.get_attribute("src")
    cell.get_by_label(control, exact=True).select_option(choice)
    expect(picture).not_to_have_attribute("src", before)
    expect(picture).to_have_count(1)
    assert (choice if control == "module" else "model.layers") in picture.get_attribute("alt")
    if control == "view":
        cell.scroll_into_view_if_needed()
        page.wait_for_timeout(1000)  # cells that come into sight are laid out, and move this one
        cell.screenshot(path=SCREENSHOTS / f"{page.name}-{choice}.png")


@SCALES
def test_the_map_changes_and_its_cells_select(page):
    cell = explorer(page)
    buttons, picture = cell.locator("button.widget-button"), cell.locator("img")
    words, before = buttons.all_text_contents(), picture.get_attribute("src")
    cell.get_by_label("map", exact=True).select_option("SQNR, dB")
    expect(buttons.first).not_to_have_text(words[0])
    assert not set(buttons.all_text_contents()) & set(words)
    cell.get_by_title(re.compile("^layer 3, down_proj:")).click()
    expect(picture).not_to_have_attribute("src", before)
    expect(cell.get_by_label("layer", exact=True).locator("option:checked")).to_have_text("3")
    expect(picture).to_have_attribute("alt", re.compile("model.layers.3.mlp.down_proj"))


# The contrast that WCAG 2.2 asks of text (4.5, success criterion 1.4.3), for every visible piece of
# the outputs and controls; a colour that lets the one below shine through is looked up there.
CONTRAST = """cells => cells.flatMap(cell => {
  const parts = colour => colour.match(/[\\d.]+/g).map(Number);
  const light = colour => parts(colour).slice(0, 3).map(value => {
    const share = value / 255;
    return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
  }).reduce((sum, value, i) => sum + value * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = node => {
    for (; node; node = node.parentElement) {
      const colour = getComputedStyle(node).backgroundColor;
      if ((parts(colour)[3] ?? 1) > 0.5) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  return [...cell.querySelectorAll("*")].filter(node => node.checkVisibility()
      && [...node.childNodes].some(child => child.nodeType === 3 && child.data.trim()))
    .map(node => {
      const [a, b] = [light(getComputedStyle(node).color), light(ground(node))];
      const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
      return [node.textContent.trim().slice(0, 40), getComputedStyle(node).color, ground(node),
              ratio, parseFloat(getComputedStyle(node).fontSize)];
    }).filter(([, , , ratio, size]) => ratio < 4.5 || size < 11);
})"""


@pytest.mark.parametrize("theme", ["Dark", "Light"])
def test_text_is_readable_in_both_themes_and_nothing_is_cut_off(page, theme):
    menu(page, "Settings", "Theme", f"JupyterLab {theme}")
    light = "true" if theme == "Light" else "false"
    expect(page.locator("body")).to_have_attribute("data-jp-theme-light", light)
    page.set_viewport_size({"width": 1440, "height": 15_000})  # all of it, at 100 %
    cells = page.locator(".jp-Notebook .jp-Cell")
    cells.first.scroll_into_view_if_needed()
    page.wait_for_timeout(2000)  # the theme's colours fade in, and cells out of sight are laid out
    first, last = cells.first.bounding_box(), cells.last.bounding_box()
    page.screenshot(path=SCREENSHOTS / f"{page.name}-{theme.lower()}.png",
                    clip=first | {"height": last["y"] + last["height"] - first["y"]})
    outputs = page.locator(".jp-Notebook .jp-OutputArea-output")
    assert outputs.evaluate_all(CONTRAST) == []
    cut = outputs.locator("img, button, select, .widget-label, table").evaluate_all(
        """all => all.filter(one => one.scrollWidth > one.clientWidth + 1
           && getComputedStyle(one).overflowX !== "visible").map(one => one.outerHTML.slice(0, 200))
        """)
    assert cut == []
    page.set_viewport_size({"width": 1440, "height": 900})


def test_nothing_complained_and_nothing_left_this_machine(page):
    assert page.complaints == []
    assert page.foreign == []


@pytest.mark.parametrize("name", EVERY)
def test_every_notebook_opens(lab, chromium, name):
    """Its title, its first cells in a picture, nothing complained of, nothing fetched elsewhere."""
    url, token = lab
    page = watched(chromium, url, name)
    page.goto(f"{url}lab/workspaces/open-{name}/tree/committed/{name}.ipynb?token={token}",
              wait_until="domcontentloaded", timeout=60_000)
    source = json.loads((REPO / "notebooks" / f"{name}.ipynb").read_text())["cells"][0]["source"]
    title = "".join(source).splitlines()[0].removeprefix("# ")
    heading = page.locator(".jp-Notebook .jp-MarkdownOutput h1").first
    expect(heading).to_contain_text(title, timeout=60_000)
    page.screenshot(path=SCREENSHOTS / f"{name}-opened.png")
    assert page.complaints == [] and page.foreign == []
    page.close()
