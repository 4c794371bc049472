"""Two arms' answers to the same problems, for reading: their tables, flips, and changed words."""

import re
from typing import TYPE_CHECKING

from helpers.arm_names import titled
from helpers.evaluation import Evaluation

if TYPE_CHECKING:
    import pandas as pd
    from IPython.display import HTML


def print_table(*evaluations: Evaluation) -> None:
    """Print lm-eval's own table for each evaluation, as the model card does."""
    for evaluation in evaluations:
        print(f"{titled(evaluation.arm)}:\n\n{evaluation.table}")


def flips(first: Evaluation, second: Evaluation,
          name: str = "strict-match") -> "pd.DataFrame":
    """The items whose score differs between two arms, as a DataFrame.

    Columns: doc_id, question, each arm's extracted answer and response, and `change`: "lost" when
    only the first arm is right, "gained" when only the second is.
    """
    import pandas as pd

    rows, one, other = [], titled(first.arm), titled(second.arm)
    for before, after in zip(first.samples, second.samples, strict=True):
        change = after["exact_match"][name] - before["exact_match"][name]
        if change:
            rows.append({
                "doc_id": before["doc_id"], "change": "gained" if change > 0 else "lost",
                "question": before["question"],
                f"{one} answer": before["extracted"][name],
                f"{other} answer": after["extracted"][name],
                f"{one} response": before["response"],
                f"{other} response": after["response"],
            })
    return pd.DataFrame(rows, columns=[
        "doc_id", "change", "question", f"{one} answer", f"{other} answer",
        f"{one} response", f"{other} response"])


def side_by_side(first: Evaluation, second: Evaluation, doc_id: int) -> "HTML":
    """Two arms' answers to one item, for a notebook: HTML with the words that differ marked."""
    import difflib
    import html

    from IPython.display import HTML

    pair = [next(item for item in arm.samples if item["doc_id"] == doc_id)
            for arm in (first, second)]
    words = [re.findall(r"\s+|[^\s]+", item["response"].strip()) for item in pair]
    marked = ["", ""]
    for kind, *bounds in difflib.SequenceMatcher(None, *words, autojunk=False).get_opcodes():
        for side, (start, end) in enumerate((bounds[:2], bounds[2:])):
            text = html.escape("".join(words[side][start:end]))
            marked[side] += text if kind == "equal" or not text else f"<mark>{text}</mark>"
    cells = "".join(f"<td style='text-align:left;vertical-align:top;white-space:pre-wrap'>{text}"
                    "</td>" for text in marked)
    heads = "".join(f"<th>{html.escape(titled(each.arm))}</th>" for each in (first, second))
    return HTML(f"<p>{html.escape(pair[0]['question'])}</p><table><tr>{heads}</tr>"
                f"<tr>{cells}</tr></table>")
