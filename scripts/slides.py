"""`make slides`: workshop/slides.ipynb, executed, as one HTML file that opens with no network.

nbconvert makes the slides; reveal.js 5.2.1 (MIT), which shows them, lies in workshop/reveal/ and is
put into the file, where nbconvert's own page would fetch it. The S key opens the speaker's notes.
"""

import os
import re
import sys
from pathlib import Path

from nbconvert import SlidesExporter
from nbformat import NotebookNode
from run_notebooks import BUILD, REPO, NotebookStopped, execute, shown, write

WORKSHOP = REPO / "workshop"
REVEAL = WORKSHOP / "reveal"
STYLESHEET = re.compile(r'<link [^>]*href="[^"]*/dist/([^"]+)"[^>]*>')


def deck(nb: NotebookNode) -> str:
    """The HTML of an executed notebook's slides, by each cell's `slideshow.slide_type`."""
    def style(match: re.Match) -> str:
        return f"<style>{(REVEAL / Path(match[1]).name).read_text()}</style>"

    scripts = {name: (REVEAL / f"{name}.js").read_text() for name in ("reveal", "notes")}
    exporter = SlidesExporter(
        template_file=str(WORKSHOP / "deck.html.j2"), reveal_theme="white", exclude_input=True,
        exclude_input_prompt=True, exclude_output_prompt=True, exclude_anchor_links=True)
    html, _ = exporter.from_notebook_node(nb, resources={"deck": scripts})
    return STYLESHEET.sub(style, html)


def main() -> int:
    target = BUILD / "slides.html"
    os.environ["PHI4_FP8_PROFILE"] = "tiny-phi4"  # what was kept of it is on the slides
    try:
        nb = execute(WORKSHOP / "slides.ipynb", BUILD / "slides.ipynb", "slides.ipynb")
        write(target, deck(nb))
    except NotebookStopped as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130
    print(f"The slides: {shown(target)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
