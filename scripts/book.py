"""`make book`: the executed notebooks as a static site in build/book/, which needs no network.

MyST-NB reads the notebooks and Sphinx makes the pages, their navigation and their search, whose
index is a script, so that it also works from a folder. What those two would fetch when a page is
opened is made here instead: formulas become MathML, and a control shows what it showed first.
"""

import html
import io
import os
import re
import shutil
import sys
from pathlib import Path

import nbformat
from docutils import nodes
from latex2mathml import converter
from nbformat import NotebookNode
from notebook_outputs import STATE, VIEW, clean
from run_notebooks import BUILD, NOTEBOOKS, REPO, NotebookStopped, notebooks, read, shown, write
from sphinx.application import Sphinx
from sphinx.errors import SphinxError
from sphinx.util.docutils import docutils_namespace, patch_docutils

STYLE = """
.content { width: min(60em, 100%); box-sizing: border-box }  /* code of 100 columns */
.main, .content, .article-container { min-width: 0 }
.text_html { overflow-x: auto }
.cell_output pre { white-space: pre-wrap }
.text_html table { border-collapse: collapse; font-size: 0.8em }
.text_html table, .text_html th, .text_html td { border: 1px solid var(--color-background-border) }
.text_html th, .text_html td { padding: 0.25em 0.5em; vertical-align: top }
"""
# Under the README's title, where the notebooks are the reader's own run.
YOURS = ("> **Your own results** are in the notebooks' pages, your verdicts in "
         "[09](notebooks/09_report_and_publish.ipynb). The figures on this page are kept runs of "
         "the workbook's authors.")
LINK = re.compile(r"\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")  # but those within a page
SETTINGS = {
    "project": "The Phi-4 FP8 workbook",
    "html_title": "The Phi-4 FP8 workbook",
    "extensions": ["myst_nb", "book"],
    "html_theme": "furo",
    "html_static_path": ["_static"],
    "html_css_files": ["book.css"],
    "html_math_renderer": "mathml",
    "html_copy_source": False,
    "html_show_copyright": False,
    "html_show_sphinx": False,
    "html_show_search_summary": False,  # a browser does not let a page read its neighbours' files
    "nb_execution_mode": "off",
    "nb_ipywidgets_js": {},
    "nb_merge_streams": True,
    "nb_render_markdown_format": "gfm",
    "myst_enable_extensions": ["dollarmath"],
    "myst_heading_anchors": 4,
    "suppress_warnings": ["toc.not_included"],  # a page that is only linked to
}


def executed() -> list[Path]:
    """The notebooks that `make run` executed to their end, now or before, in order.

    Where there is none: those of the project, which hold the outputs of one run on a CPU.
    """
    ran = [BUILD / "notebooks" / path.name for path in notebooks()]
    return [path for path in ran if path.exists() and ended(read(path))] or notebooks()


def ended(nb: NotebookNode) -> bool:
    """Whether every code cell ran, and none failed: `make run` keeps those that stopped as well."""
    cells = [cell for cell in nb.cells if cell.cell_type == "code"]
    return all(cell.execution_count and not any(out.output_type == "error" for out in cell.outputs)
               for cell in cells)


def gather(chosen: list[Path], folder: Path) -> None:
    """Lay the book's sources out in `folder` as they lie in the project; the README comes first."""
    pages = {f"notebooks/{path.name}" for path in chosen} | {"index.md", "notebooks/glossary.md"}
    for path in chosen:
        nb = read(path)
        clean(nb, {})
        still(nb)
        for cell in nb.cells:
            if cell.cell_type == "markdown":
                cell.source = with_links(cell.source, f"notebooks/{path.name}", pages, folder)
        write(folder / "notebooks" / path.name, nbformat.writes(nb))
    words = (NOTEBOOKS / "glossary.md").read_text()
    write(folder / "notebooks" / "glossary.md",
          with_links(words, "notebooks/glossary.md", pages, folder))
    readme = re.sub(r"^<!--.*-->\n", "", (REPO / "README.md").read_text(), flags=re.M)
    contents = "\n".join(f"notebooks/{stem}" for stem in [p.stem for p in chosen] + ["glossary"])
    if all(path.parent != NOTEBOOKS for path in chosen):
        readme = readme.replace("\n\n", f"\n\n{YOURS}\n\n", 1)
    write(folder / "index.md", f"{with_links(readme, 'index.md', pages, folder)}\n"
                               f"```{{toctree}}\n:hidden:\n\n{contents}\n```\n")
    write(folder / "_static" / "book.css", STYLE)


def with_links(source: str, page: str, pages: set[str], folder: Path) -> str:
    """The Markdown of a page whose links lead to something in the book, or are their text alone.

    A file of the project comes along, with those that it links to if it is a page.
    """
    def kept(match: re.Match) -> str:
        target = os.path.normpath(os.path.join(os.path.dirname(page), match[2]))
        if ":" in match[2] or target in pages:
            return match[0]
        if target.startswith("..") or target.endswith(".ipynb") or not (REPO / target).is_file():
            return match[1]
        pages.add(target)
        if target.endswith(".md"):
            write(folder / target, with_links((REPO / target).read_text(), target, pages, folder))
        else:
            (folder / target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(REPO / target, folder / target)
        return match[0]

    return LINK.sub(kept, source)


def still(nb: NotebookNode) -> None:
    """Put in place of each control what it shows without a kernel: its words and its picture."""
    state = nb.metadata.get("widgets", {}).get(STATE, {}).get("state", {})
    for cell in nb.cells:
        for output in cell.get("outputs", []):
            if view := output.get("data", {}).get(VIEW):
                shows = "".join(first_shown(state, view["model_id"]))
                output.data = NotebookNode({"text/html": (
                    "<p><em>In JupyterLab there are controls here; this is what they show "
                    f"first.</em></p>{shows}")})


def first_shown(state: dict, model: str) -> list[str]:
    """HTML of the texts and outputs of one widget and of those in it, from the top down."""
    widget = state.get(model, {})
    values, kind = widget.get("state", {}), widget.get("model_name")
    if kind == "HTMLModel":
        return [f"<p>{values.get('value', '')}</p>"]
    if kind == "OutputModel":
        return [each.get("data", {}).get("text/html")
                or f"<pre>{html.escape(each.get('text', ''))}</pre>"
                for each in values.get("outputs", [])]
    return [part for child in values.get("children", [])
            for part in first_shown(state, child.removeprefix("IPY_MODEL_"))]


def build(chosen: list[Path], target: Path) -> list[str]:
    """Make the site of some executed notebooks in `target`, all of it or none; Sphinx's warnings.

    Raises `NotebookStopped` for a notebook that is none, or where the disk does not take the site.
    """
    work, warnings = target.with_name(f".{target.name}"), io.StringIO()
    shutil.rmtree(work, ignore_errors=True)
    try:
        gather(chosen, work / "source")
        with patch_docutils(), docutils_namespace():
            app = Sphinx(work / "source", None, work / "site", work / "doctrees", "html",
                         confoverrides=SETTINGS, status=None, warning=warnings, freshenv=True)
            app.build()
        shutil.rmtree(target, ignore_errors=True)
        (work / "site").replace(target)
    except (OSError, SphinxError) as error:
        met = getattr(error, "orig_exc", None) or error  # the disk's, in a hook of Sphinx
        why = getattr(met, "strerror", None) or met
        raise NotebookStopped(
            f"{shown(target)} could not be made: {why}. The notebooks themselves are in build/"
            "notebooks/. Free some space, or make the folder one that you may write to, and run "
            "`make book` again.") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return warnings.getvalue().splitlines()


def setup(app) -> dict:
    """Sphinx's hook: formulas as MathML, which browsers draw by themselves."""
    def formula(display: str):
        def visit(self, node):
            made = converter.convert(node.astext(), display=display)
            self.body.append(made.replace(r"\_", "_"))  # which it leaves as it is in \texttt
            raise nodes.SkipNode
        return visit, None

    app.add_html_math_renderer("mathml", formula("inline"), formula("block"))
    return {"parallel_read_safe": True}


def main() -> int:
    try:
        chosen = executed()
        for line in build(chosen, BUILD / "book"):
            print(line, file=sys.stderr)
    except NotebookStopped as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    print(f"The book, of {len(chosen)} notebook(s): build/book/index.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
