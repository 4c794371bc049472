"""The header of a safetensors file; nothing else in the workbook reads or writes one.

A file begins with an 8-byte length and a JSON object that gives every tensor a type, a shape and a
place in the data after it (https://github.com/huggingface/safetensors#format). Sizes, censuses and
predictions need headers only; no weight is loaded for them.
"""

import json
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import BinaryIO

from helpers import WorkbookError

ITEM_BYTES = {"F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1, "BF16": 2, "F16": 2,
              "I16": 2, "U16": 2, "F32": 4, "I32": 4, "U32": 4, "F64": 8, "I64": 8, "U64": 8}
LONGEST = 100_000_000  # bytes: the format's own limit on a header


@dataclass(frozen=True)
class TensorInfo:
    """One tensor's header.

    `dtype`: as safetensors names it; `nbytes`: of data; `file`: its file's name; `start`: where its
    data begins, in bytes from the file's start, which tells no tensor from another.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: str = ""
    start: int = field(default=0, compare=False, repr=False)


def read(file: Path) -> list[TensorInfo]:
    """The tensors of one safetensors file, in its header's order.

    Raises `WorkbookError` unless the file is as long as its header says, every tensor has the size
    that its type and shape make, and the tensors fill the data with no hole and no overlap.
    """
    try:
        size = file.stat().st_size
        with open(file, "rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            if length > min(size, LONGEST):
                raise ValueError("the header's length is out of range")
            header = json.loads(handle.read(length))
        found = [_tensor(name, entry, file.name, 8 + length)
                 for name, entry in header.items() if name != "__metadata__"]
    except (struct.error, ValueError, KeyError, TypeError, AttributeError,
            RecursionError) as error:
        raise _damaged(file, "is not a readable safetensors file "
                       f"({'nested too deep' if isinstance(error, RecursionError) else error})",
                       "It was cut off at its beginning, damaged, or is another kind of file."
                       ) from None
    except OSError as error:
        raise _damaged(file, f"cannot be read ({error.strerror})",
                       "It is gone, replaced, or not readable by this user.") from None
    end = 8 + length
    places = sorted(found, key=lambda tensor: (tensor.start, tensor.nbytes))
    last = max((t.start + t.nbytes for t in found), default=end)
    if last != size:
        raise _damaged(file, f"has {size:,} bytes, its header announces {last:,}")
    for tensor in places:
        if tensor.start != end:
            raise _damaged(file, f"announces a place for {tensor.name} that "
                           + ("overlaps another tensor's" if tensor.start < end else
                              "leaves a hole before it"))
        end += tensor.nbytes
    return found


def _tensor(name: str, entry: dict, file: str, data: int) -> TensorInfo:
    """One entry of a header as a value; ValueError where its numbers cannot be."""
    shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise ValueError(f"{name} has a shape or a place that is no natural number")
    if end - begin != prod(shape) * ITEM_BYTES.get(entry["dtype"], -1):
        raise ValueError(f"the size of {name} does not fit its shape and type, {entry['dtype']}")
    return TensorInfo(name, entry["dtype"], shape, end - begin, file, data + begin)


def _damaged(file: Path, what: str,
             meaning: str = "The file was truncated or damaged.") -> WorkbookError:
    return WorkbookError(f"{file.name} {what}.", meaning,
                         f"Delete {file} and fetch or make it again.")


def write(output: BinaryIO, tensors: Iterable[TensorInfo]) -> dict[str, int]:
    """Write a header, make room for the data; return where each tensor's data begins, by name.

    Order and padding are those of safetensors' own writer: larger types first, then by name; the
    header padded with spaces to eight bytes.
    """
    header, end = {}, 0
    for tensor in sorted(tensors, key=lambda t: (-ITEM_BYTES[t.dtype], t.name)):
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape),
                               "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    output.write(struct.pack("<Q", len(text)) + text)
    output.flush()
    os.ftruncate(output.fileno(), 8 + len(text) + end)
    return {name: 8 + len(text) + entry["data_offsets"][0] for name, entry in header.items()}
