"""CUDA_VISIBLE_DEVICES as CUDA reads it, for the helpers, the set-up and the doctor alike."""

from __future__ import annotations  # make doctor imports this on an old Python

from collections.abc import Sequence


def indices(uuids: Sequence[str], setting: str | None) -> list[int]:
    """The indices of the GPUs that a value of CUDA_VISIBLE_DEVICES leaves visible, in its order.

    Entries are indices or beginnings of UUIDs; as in CUDA, what follows an invalid one is ignored.
    """
    if setting is None:
        return list(range(len(uuids)))
    chosen: list[int] = []
    for entry in (part.strip() for part in setting.split(",")):
        if entry.isdecimal():
            matches = [int(entry)] if int(entry) < len(uuids) else []
        else:
            matches = [i for i, uuid in enumerate(uuids) if entry and uuid.startswith(entry)]
        if len(matches) != 1:
            break
        chosen += matches
    return chosen
