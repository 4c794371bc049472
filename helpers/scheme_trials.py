"""Schemes tried on a model: made by LLM Compressor, read back from the checkpoint, and compared.

What is compared is what a checkpoint holds: it is loaded by Transformers, compressed-tensors turns
its codes back into weights, and rounds the inputs of its layers as its config says. Products are
float32, so all that differs from the model is the scheme.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from helpers import ablation, checkpoint, formats, quantize, schemes, stats, workspace
from helpers.checkpoint import Checkpoint
from helpers.formats import Losses

if TYPE_CHECKING:
    from datasets import Dataset
    from llmcompressor.modifiers import Modifier
    from pandas import DataFrame
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CALIBRATION = 64  # problems of the training set, with their answers
NEW_TOKENS = 132  # as many as the longest of the first 100 reference answers has


@dataclass(frozen=True)
class Trials:
    """What schemes did to a model.

    `bytes`: index scheme, columns "predicted" and "written", of all tensors, and "same": whether
    every tensor has the predicted name, type and shape. `losses`: `formats.Losses`, an arm a
    scheme. `right`: by scheme, and "bf16", 1 or 0 for each problem.
    """

    bytes: DataFrame
    losses: Losses
    right: dict[str, list[int]]

    def flips(self) -> DataFrame:
        """By scheme, bf16 first: how many answers are right, and how many of bf16's it turned.

        "p": McNemar's exact test of as many turned one way as the other.
        """
        import pandas as pd

        lines = {}
        for title, found in self.right.items():
            lost, gained = stats.lost_and_gained(self.right["bf16"], found)
            lines[title] = {"right": sum(found), "right to wrong": lost, "wrong to right": gained,
                            "p": stats.mcnemar(lost, gained)}
        return pd.DataFrame.from_dict(lines, orient="index").rename_axis("scheme")


def recipes(config: dict) -> dict[str, Modifier]:
    """LLM Compressor's recipe for each of `schemes.RECIPES`, for a model of this config.

    W4A16 shares a scale among 128 weights of a row, or among 64 where 128 does not divide every
    row, which LLM Compressor refuses.
    """
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier

    found = {}
    for title, name in schemes.RECIPES.items():
        scheme = schemes.preset(name)
        if scheme.weights.strategy == "group" and scheme.weights.group_size == ablation.GROUP and (
                config["hidden_size"] % ablation.GROUP):
            scheme.weights.group_size = ablation.GROUP // 2
        kind = GPTQModifier if title == schemes.GPTQ else QuantizationModifier
        found[title] = kind(config_groups={"group_0": scheme}, ignore=["lm_head"])
    return found


def calibration(base: Checkpoint, count: int = CALIBRATION) -> Dataset:
    """Token ids of the first problems of the training set with their answers."""
    import transformers
    from datasets import Dataset

    tokenizer = transformers.AutoTokenizer.from_pretrained(base.path)
    return Dataset.from_list([{"input_ids": ids[0].tolist()}
                              for ids in formats.texts(tokenizer, count, "train")])


def make(base: Checkpoint, recipe: Modifier, place: Path,
         text: Dataset | None = None) -> Checkpoint:
    """A checkpoint in the new folder `place`, by LLM Compressor's `oneshot`; not for keeping.

    `text`: what is run through the model first, for a recipe that needs it.
    """
    import torch
    from llmcompressor import oneshot
    from loguru import logger
    from transformers import AutoModelForCausalLM

    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)  # a rename, to come
    with contextlib.suppress(TypeError, ValueError):  # it is there already
        logger.level("METRIC", no=38)  # LLM Compressor leaves it out where its log is turned off
    text = {} if text is None else {"dataset": text, "num_calibration_samples": len(text),
                                    "shuffle_calibration_samples": False}
    with quantize.quiet(), _no_bars():
        model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.bfloat16)
        with ablation.threads(model):
            oneshot(model=model, recipe=recipe, **text)
        model.save_pretrained(place, save_compressed=True)
    del model
    quantize.forget()
    base.copy_beside(quantize.TOKENIZER_FILES, place)
    workspace.write_manifest(place)
    return checkpoint.just_written(place)


def load(made: Checkpoint) -> PreTrainedModel:
    """The model that a quantized checkpoint holds, its weights scaled back, computing in float32.

    The inputs of its Linears are rounded by compressed-tensors, in the checkpoint's own scheme.
    Weights are code times scale exactly, but NVFP4's, whose two scales it multiplies in bf16.
    """
    import torch
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    with quantize.quiet(), _no_bars():
        return AutoModelForCausalLM.from_pretrained(
            made.path, dtype=torch.float32, quantization_config=CompressedTensorsConfig(
                dequantize=True)).float().eval()  # 4-bit floats come in bf16 all the same


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Keep Transformers' bars, two for each checkpoint, off the page."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def scratch(name: str) -> Iterator[Path]:
    """A folder of the workspace that is gone after the block, however it ends."""
    target = workspace.folder("scratch") / name
    place = target.parent / f".{name}.made-{os.getpid()}"
    with workspace.writing(target, "What was begun has been removed."):
        workspace.clear(target)  # of processes that were killed
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        try:
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)


def run(base: Checkpoint, recipes: Mapping[str, Modifier], texts: int = 100) -> Trials:
    """Make every scheme's checkpoint of a small model, compare it, and throw it away.

    The KL is measured on the first `texts` problems of the test set with their answers; as many are
    answered. All checkpoints lie in the workspace's scratch meanwhile.
    """
    import pandas as pd
    from tqdm.auto import tqdm

    model, tokenizer = ablation.load(base)
    read, text = formats.texts(tokenizer, texts), calibration(base)
    reference = [formats.seen(model, ids) for ids in read]
    rows, sizes, right = {}, {}, {"bf16": answered(model, tokenizer, texts)}
    with scratch("schemes") as place:
        for title, recipe in tqdm(recipes.items(), leave=False):
            made = make(base, recipe, place / title,
                        text if title in schemes.CALIBRATED else None)
            predicted = schemes.predict(base.tensors, schemes.RECIPES[title])
            sizes[title] = {"predicted": checkpoint.total_bytes(predicted),
                            "written": checkpoint.total_bytes(made.tensors),
                            "same": schemes.same(predicted, made.tensors)}
            arm = load(made)
            rows[title] = formats.one_arm(arm, read, reference, contextlib.nullcontext)
            right[title] = answered(arm, tokenizer, texts)
    return Trials(pd.DataFrame(sizes).T.rename_axis("scheme").infer_objects(),
                  formats.losses([ids.numel() for ids in read], rows), right)


def answered(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
             count: int) -> list[int]:
    """1 or 0 for each of the first problems of the test set: whether the model's answer is right.

    Greedy, without examples before the question, all problems in one batch; the answer is read as
    the task's strict-match reads it.
    """
    with open(workspace.data("tiny_gsm8k", "test.jsonl")) as lines:
        problems = [json.loads(line) for line, _ in zip(lines, range(count), strict=False)]
    texts = answers(model, tokenizer, [f"Question: {row['question']}\nAnswer:" for row in problems])
    return [int(_number(text) == _number(row["answer"]))
            for text, row in zip(texts, problems, strict=True)]


def answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
            prompts: list[str]) -> list[str]:
    """What the model says next, greedily, up to `NEW_TOKENS` or the next question."""
    import torch

    before, tokenizer.padding_side = tokenizer.padding_side, "left"
    try:
        batch = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    finally:
        tokenizer.padding_side = before
    with torch.inference_mode(), ablation.threads(model):
        out = model.generate(**batch, do_sample=False, max_new_tokens=NEW_TOKENS,
                             stop_strings=["Question:"], tokenizer=tokenizer)
    said = tokenizer.batch_decode(out[:, batch.input_ids.shape[1]:], skip_special_tokens=True)
    return [text.split("Question:")[0] for text in said]


def _number(answer: str) -> str | None:
    found = re.search(r"#### (-?[0-9.,]+)", answer)  # tiny_gsm8k.yaml's strict-match
    return found and found[1].rstrip(".").replace(",", "")
