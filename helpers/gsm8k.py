"""The problems: lm-eval's task gsm8k, its bundled twin, and where their data is."""

import json
import os
from pathlib import Path

from helpers import WorkbookError, workspace
from helpers.models import Profile

VARIABLE = "PHI4_FP8_GSM8K"


def task(profile: Profile) -> tuple:
    """The lm-eval task of a profile and the TaskManager that knows it.

    The bundled model has the bundled `tiny_gsm8k`. Other models have lm-eval's own `gsm8k`, by
    name. When PHI4_FP8_GSM8K names a directory with the official train.jsonl and test.jsonl, they
    have lm-eval's definition with the place of the data replaced and nothing else, and no network
    is needed.
    """
    import lm_eval.tasks

    if profile.task == "tiny_gsm8k":
        folder = workspace.data("tiny_gsm8k")
        if not (folder / "tiny_gsm8k.yaml").is_file():
            raise WorkbookError(
                f"There is no task definition in {folder}.",
                "The bundled problems are part of the repository and a file of theirs is missing.",
                "Restore data/tiny_gsm8k, for instance with `git checkout data/tiny_gsm8k`.")
        manager = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)
        return "tiny_gsm8k", manager
    folder = Path(lm_eval.tasks.__file__).parent / "gsm8k"
    manager = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)
    if not os.environ.get(VARIABLE):
        return "gsm8k", manager
    directory = workspace.resolved(os.environ[VARIABLE])
    return _gsm8k_from(directory, folder / "gsm8k.yaml"), manager


def _gsm8k_from(directory: Path, definition: Path) -> dict:
    from lm_eval.tasks._yaml_loader import load_yaml

    files = {split: directory / f"{split}.jsonl" for split in ("train", "test")}
    missing = [file.name for file in files.values() if not file.is_file()]
    if missing:
        raise WorkbookError(
            f"{VARIABLE} is {directory}, and {' and '.join(missing)} cannot be found there.",
            "gsm8k needs its training problems for the five shots and its test problems.",
            "Name a directory that has GSM8K's own train.jsonl and test.jsonl, or unset the "
            "variable to fetch the data set from the Hugging Face hub.")
    for file in files.values():
        if fault := _fault(file):
            raise WorkbookError(
                f"{file} is no file of GSM8K problems: {fault}.",
                "A score on other problems, or on fewer, would not be gsm8k's.",
                f"Put GSM8K's own {file.name} there, or unset {VARIABLE}.")
    location = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {
        "data_files": {split: str(file.resolve()) for split, file in files.items()}}}
    return {**load_yaml(definition), **location}


def _fault(file: Path) -> str:
    """What is wrong with a .jsonl file of problems, in words; "" when it has GSM8K's form."""
    number = 0
    try:
        with open(file, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):  # noqa: B007
                row = json.loads(line)
                if not isinstance(row["question"], str) or "#### " not in row["answer"]:
                    return f"line {number} has no question, or an answer without #### and a number"
    except (KeyError, TypeError):
        return f"line {number} has no question and answer"
    except (OSError, ValueError, RecursionError) as error:
        return f"line {number + 1 if isinstance(error, UnicodeError) else number}: {error}"
    return "" if number else "it is empty"
