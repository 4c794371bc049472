"""`make editions`: the notebooks without their solutions, and with them filled in and executed.

Both come from the one source by nbconvert's preprocessors and the cells' tags. A task is three
cells: `task` (the question), `answer` (code with an empty answer and its check) and `solution`
(folded, its first fence the answer). nbgrader's and Otter's markers would put the solution into the
cell that asks for it, where a reader of the source sees it and `make run` would execute it.
"""

import os
import re
import shutil
import sys
from pathlib import Path

import nbformat
from nbconvert.preprocessors import ClearOutputPreprocessor, Preprocessor, TagRemovePreprocessor
from nbformat import NotebookNode
from notebook_outputs import clean
from run_notebooks import BUILD, REPO, NotebookStopped, execute, notebooks, read, write

STUDENT, SOLUTIONS = BUILD / "student", BUILD / "solutions"
WORKSPACE = BUILD / "solutions-workspace"
QUIZ = REPO / "workshop" / "quiz.ipynb"
STUB = re.compile(r"^(?:answer = \.\.\.|def answer\([^)]*\):\n    \.\.\.)$", re.M)
FENCE = re.compile(r"```python\n(.*?)```", re.S)
LINK = re.compile(r"\]\(([^)#\s:]+)(?=[)#])")
GOOD = ("Right", "Kept")  # what a check says of a right answer, and of a prediction


class NotATask(ValueError):
    """A cell that is tagged as part of a task and is none; the message says why."""


class FillAnswers(Preprocessor):
    """Puts each task's solution, the first fence of its solution cell, in place of its stub."""

    def preprocess(self, nb: NotebookNode, resources: dict) -> tuple[NotebookNode, dict]:
        for i, cell in enumerate(nb.cells):
            if is_tagged(cell, "answer"):
                following = nb.cells[i + 1] if i + 1 < len(nb.cells) else NotebookNode()
                fence = FENCE.search(following.get("source", ""))
                if not is_tagged(following, "solution") or not fence:
                    raise NotATask(f"no solution follows the answer cell\n{cell.source}")
                if len(STUB.findall(cell.source)) != 1:
                    raise NotATask(f"there is not one empty answer in the cell\n{cell.source}")
                cell.source = STUB.sub(lambda _, code=fence[1]: code.rstrip(), cell.source)
        return nb, resources


def is_tagged(cell: NotebookNode, tag: str) -> bool:
    return tag in cell.get("metadata", {}).get("tags", ())


def sources() -> list[Path]:
    """The notebooks in order, and the quiz."""
    return [*notebooks(), *([QUIZ] if QUIZ.exists() else [])]


def student(path: Path) -> NotebookNode:
    """A notebook as it is handed out: no outputs, no solutions, empty answers."""
    nb = read(path)
    for step in (TagRemovePreprocessor(remove_cell_tags={"solution"}), ClearOutputPreprocessor()):
        nb, _ = step.preprocess(nb, {})
    nb.metadata.pop("widgets", None)
    return moved(nb, path)


def solved(path: Path) -> NotebookNode:
    """A notebook with its answers filled in, not yet executed.

    Raises `NotebookStopped` for a task without a stub or a solution.
    """
    try:
        nb, _ = FillAnswers().preprocess(read(path), {})
    except NotATask as error:
        raise NotebookStopped(f"{path.name} has a task that is not whole: {error}") from None
    return moved(ClearOutputPreprocessor().preprocess(nb, {})[0], path)


def moved(nb: NotebookNode, path: Path) -> NotebookNode:
    """The notebook with its links as they are from a folder in build/; notebooks lie together."""
    def from_there(match: re.Match) -> str:
        target = os.path.normpath(path.parent / match[1])
        together = target.endswith(".ipynb") or os.path.basename(target) == "glossary.md"
        return f"]({os.path.basename(target) if together else os.path.relpath(target, STUDENT)}"

    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = LINK.sub(from_there, cell.source)
    return nb


def unconvinced(nb: NotebookNode) -> list[str]:
    """What the checks of an executed notebook said, where that is not "Right" or "Kept"."""
    said = ["".join(output.get("text", "") for output in cell.outputs)
            for cell in nb.cells if is_tagged(cell, "answer")]
    return [text for text in said if not convinced(text)]


def convinced(said: str) -> bool:
    """Whether a line of what an answer's cell printed is a check's that accepts it."""
    return any(line.startswith(GOOD) for line in said.splitlines())


def make_student(chosen: list[Path], folder: Path) -> None:
    """Write the student edition of some notebooks anew, with nothing else in the folder."""
    shutil.rmtree(folder, ignore_errors=True)
    for path in chosen:
        write(folder / path.name, nbformat.writes(student(path)))
    glossary(folder)


def make_solutions(only: str = "") -> int:
    """Execute the solutions edition anew, in a workspace of its own; how many tasks are right.

    On the bundled model, unless PHI4_FP8_PROFILE names another. Raises `NotebookStopped` where a
    cell fails or a check is not convinced by the solution.
    """
    chosen, tasks = [path for path in sources() if path.name.startswith(only)], 0
    if not chosen:
        raise NotebookStopped(f"No notebook begins with {only!r}, so ONLY={only} has nothing to "
                              "solve. Name one by its number, such as ONLY=06.")
    shutil.rmtree(WORKSPACE, ignore_errors=True)
    shutil.rmtree(SOLUTIONS, ignore_errors=True)
    os.environ["PHI4_FP8_WORKSPACE"] = str(WORKSPACE)
    os.environ.setdefault("PHI4_FP8_PROFILE", "tiny-phi4")
    for i, path in enumerate(chosen, start=1):
        target = SOLUTIONS / path.name
        write(target, nbformat.writes(solved(path)))
        nb = execute(target, target, f"[{i}/{len(chosen)}] {path.name}, solved")
        if doubts := unconvinced(nb):
            raise NotebookStopped(f"{path.name}: a check says of its own solution:\n"
                                  + "\n".join(doubts))
        tasks += sum(is_tagged(cell, "answer") for cell in nb.cells)
        clean(nb, {WORKSPACE: "workspace", REPO: ""})
        write(target, nbformat.writes(nb))
    glossary(SOLUTIONS)
    return tasks


def glossary(folder: Path) -> None:
    write(folder / "glossary.md", (REPO / "notebooks" / "glossary.md").read_text())


def main(arguments: list[str]) -> int:
    try:
        make_student(sources(), STUDENT)
        print(f"The student edition, {len(sources())} notebooks: build/student/", flush=True)
        tasks = make_solutions(*arguments)
    except NotebookStopped as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted; build/solutions/ is not whole. Run the same command again.",
              file=sys.stderr)
        return 130
    print(f"The solutions edition, {tasks} tasks solved and right: build/solutions/")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
