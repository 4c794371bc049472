"""FP8_DYNAMIC of a checkpoint larger than memory: LLM Compressor's converter, block by block.

`model_free_ptq` hands whole shards to its converter, so its peak is a shard and its temporaries.
A per-channel scale depends on one row alone, so here the same converter gets blocks of rows, and
each result goes to its place in the output file. The files are those of `model_free_ptq`, byte for
byte (a test compares them).
"""

import contextlib
import fcntl
import functools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from helpers import WorkbookError, checkpoint, headers, identity, verification, workspace
from helpers.checkpoint import Checkpoint
from helpers.headers import TensorInfo
from helpers.identity import Origin

if TYPE_CHECKING:
    import numpy
    import torch
    from llmcompressor.entrypoints.model_free import ModelFreePtqConverter

IGNORE = ("lm_head", checkpoint.EMBEDDING)
# Measured on two cores with 1 MiB of L2 cache each: smaller blocks cost time, and larger ones cost
# memory and no less time.
BLOCK_BYTES = 4 * 2**20
# Peak RSS with 4 MiB blocks and three threads: 0.54 GB once the libraries are imported, and 0.3 GB
# more, most of it kept by the allocator; both rounded up.
LIBRARIES = 600_000_000
BLOCKS_A_THREAD = 32


@dataclass(frozen=True)
class Block:
    """A piece of one source tensor, and what takes it to its place in the output."""

    nbytes: int
    write: Callable[[], None]


def memory() -> int:
    """Bytes of RAM that `stream` takes on this machine, whatever the model's size."""
    return LIBRARIES + _threads() * BLOCKS_A_THREAD * BLOCK_BYTES


def _threads() -> int:
    """A thread for each core, up to eight, which are faster than a disk, and one that waits for it.
    """
    return min(8, len(os.sched_getaffinity(0))) + 1


def versions() -> dict[str, str]:
    """The libraries that the codes and scales depend on, each with its version."""
    return {name: metadata.version(name) for name in ("llmcompressor", "compressed-tensors")}


def stream(base: Checkpoint, place: Path, copied: tuple[str, ...],
           made_from: Origin) -> Checkpoint:
    """Quantize the safetensors of `base` into `place`, with the files matching `copied`.

    Memory: some blocks of 4 MiB for each core, whatever the model's size. A run that was killed is
    taken up at the shard it was at, if it was begun with the same `made_from`, which is kept in the
    directory from the beginning. Raises `WorkbookError` when the disk is too small or cannot be
    written, or when another process is at the same work.
    """
    partial = place.parent / f".{place.name}.streaming"
    with workspace.writing(place, "The shards that were finished are kept, and it goes on from "
                           "there."):
        place.parent.mkdir(parents=True, exist_ok=True)
        workspace.clear(place)
        partial.mkdir(exist_ok=True)
        with _alone(partial):
            _forget_another_base(partial, asdict(made_from))
            shards = list(dict.fromkeys(t.file for t in base.tensors))
            for left in partial.glob("*.unfinished"):
                left.unlink()
            todo = [shard for shard in shards if not (partial / shard).exists()]
            if len(todo) < len(shards):
                print(f"Going on with an interrupted run: {len(shards) - len(todo)} of "
                      f"{len(shards)} shards are there.")
            needed = sum(t.nbytes for t in checkpoint.predict_fp8(base.tensors) if t.file in todo)
            workspace.require_disk(partial, needed, f"Writing {place.name}")
            converter = _converter()
            sums = _shards(base, partial, todo, converter)
            _describe(base, partial, copied, converter)
            base.require_unchanged()
            workspace.write_manifest(partial, sums)
            workspace.replace(
                partial.rename(place.parent / f".{place.name}.partial-{os.getpid()}"), place)
    return checkpoint.just_written(place)


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Hold the directory's lock, which the system releases when the process dies."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise WorkbookError(
            f"Another process is writing {directory}.", "Two would overwrite each other's shards.",
            "Wait until it is done; the checkpoint is then there.") from None
    finally:
        os.close(handle)


def _forget_another_base(partial: Path, made_from: dict) -> None:
    """Empty `partial` unless it was begun from this very base by these very libraries."""
    try:
        known = workspace.read_json(partial / identity.MADE_FROM)
    except WorkbookError:
        known = None
    if known != made_from:
        for file in partial.iterdir():
            file.unlink()
        workspace.write_json(partial / identity.MADE_FROM, made_from)


def _converter() -> "ModelFreePtqConverter":
    """LLM Compressor's converter for FP8_DYNAMIC, its scheme filled in.

    The library writes the format's name into the scheme at the first weight it converts; one
    without data makes it do so, also where a resumed run has no shard left to convert.
    """
    import torch
    from llmcompressor.entrypoints.model_free import ModelFreePtqConverter
    from llmcompressor.entrypoints.model_free.validate import validate_config

    converter = ModelFreePtqConverter(validate_config(None, "FP8_DYNAMIC", list(IGNORE)))
    converter.process({"any.weight": torch.empty(16, 16, dtype=torch.bfloat16, device="meta")})
    return converter


@contextlib.contextmanager
def _short_way() -> Iterator[None]:
    """Within the block, LLM Compressor's quantization reaches the same codes in fewer steps.

    The converter makes a Linear for each block and overwrites its weights at once; filling them
    with random numbers first took a quarter of the time. Of what was left, two thirds were spent on
    the rounded weights' way back to bf16, from which they are cast to E4M3 a second time, and on a
    clamp between tensors, which torch does not vectorize; see `_register_straight`.
    """
    import torch

    reset = torch.nn.Linear.reset_parameters
    torch.nn.Linear.reset_parameters = lambda module: None
    straight = _register_straight()
    straight.append(True)
    try:
        yield
    finally:
        straight.pop()
        torch.nn.Linear.reset_parameters = reset


@functools.cache
def _register_straight() -> list[bool]:
    """Register a faster function for compressed-tensors' `_quantize`, in its own registry.

    It is used while the returned list is not empty, so that `oneshot` stays as the library has it.
    """
    import torch
    from compressed_tensors.quantization.quant_args import round_to_quantized_type_args
    from compressed_tensors.utils.impl_backend import ImplBackend

    wanted: list[bool] = []

    def fits(x, scale, zero_point, q_min, q_max, args, dtype=None, global_scale=None) -> bool:
        return (bool(wanted) and x.device.type == "cpu" and dtype == torch.float8_e4m3fn
                and zero_point is None and global_scale is None)

    @ImplBackend.register("_quantize", fits, 0)
    def straight_to_e4m3(x, scale, zero_point, q_min, q_max, args, dtype=None, global_scale=None):
        return round_to_quantized_type_args(
            x / scale, args, float(q_min), float(q_max), cast_to_original_dtype=False)

    return wanted


def _shards(base: Checkpoint, partial: Path, names: list[str],
            converter: "ModelFreePtqConverter") -> dict[str, str]:
    """Write each shard under a temporary name, and rename it when it is on the disk.

    Returns the shards' SHA-256 by name.
    """
    import torch
    from tqdm.auto import tqdm

    total = sum((base.path / name).stat().st_size for name in names)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with (_short_way(), contextlib.ExitStack() as opened,
              ThreadPoolExecutor(_threads()) as pool, ThreadPoolExecutor(1) as finisher,
              tqdm(total=total, unit="B", unit_scale=True, desc="quantizing", leave=False) as bar):
            finished = {}
            for name in names:
                output = opened.enter_context(
                    open(partial / f"{name}.unfinished", "wb", buffering=0))
                for done in pool.map(_run, _blocks(base, name, output, converter)):
                    bar.update(done)
                # The disk takes this shard while the next one is computed.
                finished[name] = finisher.submit(_finish, output, base.path / name, partial / name)
            return {name: shard.result() for name, shard in finished.items()}
    finally:
        torch.set_num_threads(threads)


def _finish(output: BinaryIO, source: Path, target: Path) -> str:
    """Flush a written shard to the disk and give it its name; returns its SHA-256.

    The source's pages are given up first: they are not read again, and the output's are, for the
    sum, which is why it is taken here and not when all shards are done.
    """
    with open(source, "rb") as done:
        os.posix_fadvise(done.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with output:
        found = workspace.sha256(Path(output.name))
        os.fsync(output.fileno())
    Path(output.name).rename(target)
    return found


def _run(block: Block) -> int:
    block.write()
    return block.nbytes


def _blocks(base: Checkpoint, shard: str, output: BinaryIO,
            converter: "ModelFreePtqConverter") -> list[Block]:
    """Write the output's header; return the blocks that fill in the data."""
    import torch

    before = [tensor for tensor in base.tensors if tensor.file == shard]
    made = {t.name: converter.process({t.name: torch.empty(
        t.shape, dtype=_torch_dtype(t.dtype), device="meta")}) for t in before}
    places = headers.write(output, [_info(name, tensor) for each in made.values()
                                    for name, tensor in each.items()])
    blocks = []
    for tensor in before:
        if len(made[tensor.name]) == 1:  # not a target: its bytes are copied
            step = BLOCK_BYTES // 8 * 8  # whole numbers of every type
            for first in range(0, tensor.nbytes, step):
                size = min(step, tensor.nbytes - first)
                blocks.append(_copied(base, tensor, first, size, output,
                                      places[tensor.name] + first))
            continue
        row = tensor.nbytes // tensor.shape[0]
        rows = max(1, BLOCK_BYTES // row)
        for first in range(0, tensor.shape[0], rows):
            count = min(rows, tensor.shape[0] - first)
            blocks.append(_quantized(base, tensor, first, count, output, places, converter))
    return blocks


def _copied(base: Checkpoint, tensor: TensorInfo, first: int, size: int, output: BinaryIO,
            at: int) -> Block:
    import torch

    def write() -> None:
        data = _read(base.path / tensor.file, tensor.start + first, size)
        if not torch.isfinite(torch.from_numpy(data).view(_torch_dtype(tensor.dtype))).all():
            raise verification.not_finite(base, tensor.name)
        _write(output, data, at)

    return Block(size, write)


def _quantized(base: Checkpoint, tensor: TensorInfo, first: int, count: int, output: BinaryIO,
               places: dict[str, int], converter: "ModelFreePtqConverter") -> Block:
    import torch

    row = tensor.nbytes // tensor.shape[0]

    def write() -> None:
        data = _read(base.path / tensor.file, tensor.start + first * row, count * row)
        weight = torch.from_numpy(data).view(_torch_dtype(tensor.dtype)).reshape(count, -1)
        for name, part in converter.process({tensor.name: weight}).items():
            # A row's scale is its largest magnitude over 448: NaN and infinity show in it.
            if name.endswith(checkpoint.FP8_SUFFIX) and not torch.isfinite(part).all():
                raise verification.not_finite(base, tensor.name)
            # Weight and scale both have the output channels as rows.
            data = part.contiguous().view(torch.uint8).numpy().reshape(-1)
            _write(output, data, places[name] + first * (data.nbytes // count))

    return Block(count * row, write)


def _read(source: Path, start: int, size: int) -> "numpy.ndarray":
    """Bytes of a file as a uint8 array; read, not mapped, so that no file is held in memory."""
    import numpy as np

    return np.fromfile(source, np.uint8, size, offset=start)


def _write(output: BinaryIO, data: "numpy.ndarray", at: int) -> None:
    rest = memoryview(data)
    while rest:  # a write near the end of the disk's space can be short; the next one raises
        written = os.pwrite(output.fileno(), rest, at)
        rest, at = rest[written:], at + written


def _info(name: str, tensor: "torch.Tensor") -> TensorInfo:
    """A (meta) tensor's entry in a header."""
    kinds = {_torch_dtype(kind): kind for kind in ("BF16", "F16", "F32", "F8_E4M3")}
    return TensorInfo(name, kinds[tensor.dtype], tuple(tensor.shape), tensor.nbytes)


def _torch_dtype(name: str) -> "torch.dtype":
    """torch's type for one of safetensors' names; a checkpoint of another type is refused."""
    import torch

    types = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32,
             "F8_E4M3": torch.float8_e4m3fn}
    if name not in types:
        raise WorkbookError(f"The checkpoint holds tensors of type {name}.",
                            "FP8_DYNAMIC starts from 16-bit or 32-bit floating point.",
                            "Name a directory with the model's bf16 weights.")
    return types[name]


def _describe(base: Checkpoint, partial: Path, copied: tuple[str, ...],
              converter: "ModelFreePtqConverter") -> None:
    """The files beside the weights: those of the base, and the library's own config and index."""
    from compressed_tensors.utils.safetensors_load import update_safetensors_index
    from llmcompressor.entrypoints.model_free.save_utils import update_config

    base.copy_beside(("config.json", "generation_config.json", *copied), partial)
    update_config(partial, converter.config)
    tensors = [t for file in sorted(partial.glob("*.safetensors"))
               for t in headers.read(file)]
    update_safetensors_index(partial, checkpoint.total_bytes(tensors),
                             {t.name: t.file for t in tensors})
