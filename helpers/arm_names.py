"""What the arms are called in tables and pictures.

In the ledger, and wherever a program looks them up, they are "bf16" and "fp8". But a GPU older than
Ampere has no bf16: there the model that is not quantized is served in fp16, and is called so.
"""

import re
from collections.abc import Iterable

TITLES = {"bf16": "bf16", "fp8": "FP8"}


def sixteen_bits(dtype: str) -> str:
    """A 16-bit type of vLLM's in short: "fp16" for "float16", else "bf16"."""
    return "fp16" if dtype == "float16" else "bf16"


def served_in(dtype: str) -> None:
    """Call the arms by what they are served in from now on."""
    TITLES["bf16"] = sixteen_bits(dtype)


def base(arms: Iterable[str]) -> str:
    """The 16-bit one of these arms, which the others are compared with."""
    return next(arm for arm in arms if arm in ("bf16", "fp16"))


def titled(label: str) -> str:
    """A label that begins with an arm, such as "bf16, with BOS", by its title."""
    return re.sub(r"^bf16\b", TITLES["bf16"], label)
