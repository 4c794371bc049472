"""The glossary: in order, and no term of it used before a sentence says what it is.

In a notebook's prose the first use of a term in the course is set in italics or bold, in the
sentence that explains it, or is a link to the glossary. Prose is the Markdown but for the opening
cell (title, aims, links), headings, code, formulas, folded solutions and links to notebooks.
"""

import re
from dataclasses import dataclass
from functools import cache

import nbformat
import pytest
from conftest import REPO

NOTEBOOKS = REPO / "notebooks"
COURSE = tuple(sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")))  # 00 to 09, then a1
SHORT = {"KL": "KL divergence", "McNemar's": "McNemar's test",  # short forms of a headword
         "Wilson's interval": "Wilson interval", "massive activations": "massive activation"}
MARK = r"(\*\*|\*|_)$"
STEM = 5  # letters that two forms of one word share


@dataclass(frozen=True)
class Term:
    name: str
    meaning: str


@cache
def glossary() -> list[Term]:
    """Every headword; one entry may have several, divided by commas."""
    entries = re.findall(r"^- \*\*(.+?)\*\*: (.+)$", (NOTEBOOKS / "glossary.md").read_text(), re.M)
    return [Term(name, meaning) for names, meaning in entries for name in names.split(", ")]


def prose(notebook: nbformat.NotebookNode) -> str:
    """What is read as sentences; a table's row is one."""
    text = "\n\n".join(cell.source for cell in notebook.cells[1:] if cell.cell_type == "markdown")
    for left_out in (r"<details>.*?</details>", r"```.*?```", r"\$\$.*?\$\$", r"`[^`\n]*`",
                     r"^#.*?$", r"\[[^\]]*\]\([\w/]+\.ipynb[^)]*\)", r"\]\((?!glossary)[^)]*\)"):
        text = re.sub(left_out, " ", text, flags=re.S | re.M)
    return re.sub(r"^\s*([-|]|\d+\.)", r"\n\n\1", text, flags=re.M)


def first_uses(text: str, terms: list[Term]) -> dict[str, re.Match]:
    """Where each term or its short form first stands: whole words, plurals too, longest first."""
    def pattern(name: str) -> str:
        first = name[0] if name[:2].isupper() else f"[{name[0].upper()}{name[0].lower()}]"
        return first + re.escape(name[1:]) + "s?"

    forms = {term.name: term.name for term in terms}
    forms |= {short: name for short, name in SHORT.items() if name in forms}
    names = sorted(forms, key=len, reverse=True)
    either = "|".join(f"({pattern(name)})" for name in names)
    found: dict[str, re.Match] = {}
    for match in re.finditer(rf"(?<![\w-])(?:{either})(?!-?\w)", text):
        found.setdefault(forms[names[match.lastindex - 1]], match)
    return found


def stems(words: str) -> set[str]:
    return {word[:STEM].lower() for word in re.findall(r"[^\W\d_]{4,}", words)}


def faults(text: str, terms: list[Term]) -> list[str]:
    """The terms whose first use does not say what they are, each with the words around it."""
    found, wrong = first_uses(text, terms), []
    for term in terms:
        if term.name not in found:
            continue
        start, end = found[term.name].span()
        around = " ".join(text[max(0, start - 40):end + 40].split())
        linked = re.match(r"[^\]\n]*\]\(glossary\.md", text[end:])
        mark = re.search(MARK, text[:start])
        if linked:
            continue
        if not (mark and text[end:].startswith(mark[1])):
            wrong.append(f"{term.name!r} is used before it is explained: … {around} …")
        elif not stems(term.meaning) & stems(sentence(text, start)) - stems(term.name):
            wrong.append(f"{term.name!r} is set off, and not explained: … {around} …")
    return wrong


def sentence(text: str, at: int) -> str:
    """The sentence around a place, up to a full stop, a colon's end counting as none."""
    ends = [0, *(m.end() for m in re.finditer(r"[.?!](?=\s)|\n\n", text)), len(text)]
    start = max(end for end in ends if end <= at)
    return text[start:min(end for end in ends if end > at)]


def course() -> str:
    """The prose of all notebooks, in the order in which they are read."""
    return "\n\n".join(prose(nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4))
                       for name in COURSE)


def test_no_term_is_used_before_it_is_explained():
    assert len(first_uses(course(), glossary())) > 60
    assert faults(course(), glossary()) == []


def test_every_entry_is_used_in_a_notebook():
    """In prose, or in what stands around it: code, tables, folded solutions."""
    everything = "\n".join(cell.source.lower() for name in COURSE for cell in nbformat.read(
        NOTEBOOKS / f"{name}.ipynb", as_version=4).cells)
    entries = re.findall(r"^- \*\*(.+?)\*\*", (NOTEBOOKS / "glossary.md").read_text(), re.M)
    forms = {name: short.lower() for short, name in SHORT.items()}
    unused = [entry for entry in entries if not any(
        form in everything for name in entry.split(", ")
        for form in (name.lower(), forms.get(name, name.lower())))]
    assert unused == []


@pytest.mark.parametrize("name", COURSE[:5])
def test_the_opening_cell_links_the_glossary(name):
    opening = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4).cells[0].source
    assert "](glossary.md)" in opening


def test_the_glossary_is_in_order_and_each_entry_is_half_a_sentence():
    names = re.findall(r"^- \*\*(.+?)\*\*", (NOTEBOOKS / "glossary.md").read_text(), re.M)
    assert names == sorted(names, key=str.lower)
    every = [term.name for term in glossary()]
    assert len(every) == len(set(every)) > 70
    for term in glossary():
        assert 3 <= len(term.meaning.split()) <= 35, term.name
        assert term.meaning.endswith("."), term.name


TERMS = [Term("scale", "the number that codes are multiplied by."),
         Term("code", "the 8 bits that are stored for a number."),
         Term("W8A8", "bits of weights and activations."),
         Term("KL divergence", "how far one distribution is from another.")]


@pytest.mark.parametrize("text, said", [
    ("A *scale* is what codes are multiplied by.", ["'code' is used before"]),
    ("A *code* is the 8 bits stored. A *scale* is the number it is multiplied by. Scales ...", []),
    ("Scales matter. A *scale* is the number that is multiplied.", ["'scale' is used before"]),
    ("This is a *scale*. It is the number that is multiplied.", ["'scale' is set off, and not"]),
    ("See [scale](glossary.md) and [the codes](glossary.md#code).", []),
    ("A scaled, pre-scale encode, w8a8 rescale", []),
    ("KL is 0. The *KL divergence* is how far one distribution is.", ["'KL divergence' is used"]),
    ("| 8.9 | W8A8 |", ["'W8A8' is used before"]),
])
def test_it_finds_a_term_that_is_not_explained(text, said):
    found = faults(text, TERMS)
    assert len(found) == len(said)
    assert all(one.startswith(words) for one, words in zip(found, said, strict=True))


def test_what_is_not_prose_does_not_count():
    cells = [nbformat.v4.new_markdown_cell(source) for source in (
        "# A scale", "## The scale\n\n`scale` [03 · The scales](03_inspect_the_scales.ipynb)\n"
        "$$scale$$\n```python\nscale\n```\n<details>scale</details>")]
    assert faults(prose(nbformat.v4.new_notebook(cells=cells)), TERMS) == []
