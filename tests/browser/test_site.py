"""The book and the slides in a real Chromium, out of their folder, with no network."""

import re
import subprocess
from pathlib import Path

import pytest
from playwright.sync_api import expect

REPO = Path(__file__).resolve().parent.parent.parent
SITE, SCREENSHOTS = REPO / "build" / "book", REPO / "build" / "screenshots"


@pytest.fixture(scope="module")
def index():
    """The address of a fresh book's first page: a file's."""
    subprocess.run([REPO / ".venv" / "bin" / "python", REPO / "scripts" / "book.py"], check=True,
                   cwd=REPO)
    return (SITE / "index.html").as_uri()


@pytest.fixture
def page(chromium):
    """A page without a network that fails the test when it asks for more than files, or errs."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    wrong = []
    context = chromium.new_context(offline=True, viewport={"width": 1400, "height": 1000})
    page = context.new_page()
    page.on("request", lambda asked: None if asked.url.startswith(("file:", "data:"))
            else wrong.append(asked.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
    yield page
    context.close()
    assert wrong == []


def test_a_reader_finds_a_word_and_its_page(index, page):
    page.goto(index)
    page.get_by_placeholder("Search").fill("amax")
    page.keyboard.press("Enter")
    expect(page.locator("#search-results .search-summary")).to_contain_text(
        re.compile(r"found \d+ pages"))
    page.screenshot(path=SCREENSHOTS / "book-search.png")
    page.locator("#search-results").get_by_role("link", name="Glossary").click()
    expect(page.locator("h1")).to_contain_text("Glossary")


def test_every_page_opens_and_is_no_wider_than_the_window(index, page):
    page.goto(index)
    links = page.locator(".sidebar-tree a")
    addresses = [links.nth(i).evaluate("each => each.href") for i in range(links.count())]
    assert len(addresses) >= len(list((REPO / "notebooks").glob("*.ipynb")))
    for address in addresses:
        page.goto(address)
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), address
        assert page.evaluate("[...document.images].every(each => each.naturalWidth > 0)"), address
        page.screenshot(path=SCREENSHOTS / f"book-{Path(address).stem}.png")


def test_every_slide_fits_its_page(page):
    subprocess.run([REPO / ".venv" / "bin" / "python", REPO / "scripts" / "slides.py"], check=True,
                   cwd=REPO)
    page.set_viewport_size({"width": 1280, "height": 800})
    page.goto((REPO / "build" / "slides.html").as_uri())
    page.wait_for_function("window.Reveal && Reveal.isReady()")
    count = page.evaluate("Reveal.getTotalSlides()")
    assert count >= 18
    for slide in range(count):
        page.evaluate(f"Reveal.slide({slide})")
        size = page.evaluate("[Reveal.getCurrentSlide().scrollWidth, "
                             "Reveal.getCurrentSlide().scrollHeight]")
        assert size[0] <= 1280 and size[1] <= 800, f"slide {slide + 1} is {size} large"
        page.screenshot(path=SCREENSHOTS / f"slide-{slide + 1:02}.png")
