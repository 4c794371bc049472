"""Write data/tiny_gsm8k/train.jsonl and test.jsonl: `python -m training.make_problems`."""

import json
from pathlib import Path

from training.problems import Problem, stream

TARGET = Path(__file__).resolve().parent.parent / "data" / "tiny_gsm8k"
TEST_ROWS = 1319  # as many as GSM8K
TRAIN_ROWS = 2500
TEST_SEED, TRAIN_SEED = "tiny_gsm8k test", "tiny_gsm8k train"


def distinct(seed: str, rows: int, forbidden: set[str]) -> list[Problem]:
    """The first `rows` problems of a stream that are all different and not in `forbidden`."""
    found: dict[str, Problem] = {}
    for drawn in stream(seed, forbidden):
        found.setdefault(drawn.question, drawn)
        if len(found) == rows:
            return list(found.values())


def splits() -> dict[str, list[Problem]]:
    """The test and the train split; no train question is a test question."""
    test = distinct(TEST_SEED, TEST_ROWS, set())
    train = distinct(TRAIN_SEED, TRAIN_ROWS, {p.question for p in test})
    return {"test": test, "train": train}


def as_jsonl(problems: list[Problem]) -> str:
    """One JSON object a line, with GSM8K's two fields."""
    return "".join(
        json.dumps({"question": p.question, "answer": p.answer}) + "\n" for p in problems
    )


def main() -> None:
    TARGET.mkdir(parents=True, exist_ok=True)
    for name, problems in splits().items():
        path = TARGET / f"{name}.jsonl"
        path.write_text(as_jsonl(problems))
        print(f"{path.name}: {len(problems)} problems, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
