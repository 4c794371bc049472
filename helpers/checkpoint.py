"""What is inside a checkpoint, a directory of safetensors, as a value that is verified once.

Whoever needs a checkpoint is given a `Checkpoint`: its files have been hashed and its headers read
when it was opened, by `verified`, and nobody does either again.
"""

import contextlib
import functools
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from helpers import WorkbookError, headers, identity, workspace
from helpers.headers import ITEM_BYTES, TensorInfo
from helpers.identity import Origin

FP8_SUFFIX = ".weight_scale"
# `model_free_ptq` sees names, not classes, so its ignore list has to spare the embedding too.
EMBEDDING = "re:.*embed_tokens$"
ROLES = ("embedding", "attention", "mlp", "norm", "scale", "lm_head")  # from input to output
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
ATTEMPTS = 3  # at opening a checkpoint that another process is replacing
# What this workbook, Transformers and vLLM compute with.
CONFIG_TYPES = {name: int for name in (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "vocab_size", "max_position_embeddings")} | {
    "tie_word_embeddings": bool, "quantization_config": dict, "rope_parameters": dict}


@dataclass(frozen=True)
class Checkpoint:
    """A directory of safetensors that was verified when it was opened, by `verified`.

    `fingerprint`: one SHA-256 over all files that a loader reads; `tensors`: the census of its
    headers; `config`: config.json; `made_from`: None where the directory does not say.
    """

    path: Path
    fingerprint: str
    tensors: tuple[TensorInfo, ...] = field(repr=False)
    config: dict = field(repr=False, hash=False)
    made_from: Origin | None = field(default=None, repr=False)
    files: tuple = field(default=(), repr=False, compare=False)  # as they were when it was opened

    @property
    def name(self) -> str:
        """The directory's name."""
        return self.path.name

    @functools.cached_property
    def by_name(self) -> dict[str, TensorInfo]:
        """The census, by the tensors' names."""
        return {tensor.name: tensor for tensor in self.tensors}

    @contextlib.contextmanager
    def shard_of(self, name: str) -> Iterator:
        """The file that holds a tensor, opened by safetensors for torch.

        Raises `WorkbookError` when no tensor has this name, or when the checkpoint has been
        replaced since it was opened.
        """
        from safetensors import safe_open

        if name not in self.by_name:
            raise WorkbookError(f"There is no tensor {name} in {self.name}.",
                                "Names are those of the checkpoint's header.",
                                "Look at the checkpoint's `tensors` for the names there are.")
        self.require_unchanged()
        with safe_open(self.path / self.by_name[name].file, "pt") as shard:
            self.require_unchanged()  # an open file stays the one it was, whatever replaces it
            yield shard

    def copy_beside(self, patterns: Iterable[str], into: Path) -> None:
        """Copy what lies beside the weights, the files whose names match, to the folder `into`.

        Raises `WorkbookError` for a link that leads out of the folder, because the file behind it
        would be published with the checkpoint. The links of the hub's cache are allowed.
        """
        here = self.path.resolve()
        for file in [file for pattern in patterns for file in self.path.glob(pattern)]:
            if file.resolve().parent not in (here, here.parent.parent / "blobs"):
                raise WorkbookError(f"{file.name} of {self.name} is a link to {file.resolve()}.",
                                    "What lies there is no part of the model, and would be copied "
                                    "and published with it.",
                                    "Replace the link by the file, if it belongs to the model.")
            shutil.copyfile(file, into / file.name)

    def require_unchanged(self) -> None:
        """Raise `WorkbookError` if the files are not those that were opened and verified."""
        if _files(self.path) != self.files:
            raise WorkbookError(
                f"{self.name} has been replaced since it was opened.",
                "Another notebook made it again, or its files were changed; what was read of it "
                "and what would be read now may not belong together.",
                "Run this notebook again from its first cell.")


def verified(path: Path) -> Checkpoint:
    """Open the directory `path` and verify it, once; what it returns is handed on.

    Checked: a config.json of the right types, whole safetensors, no pickled weights, and every
    file's SHA-256 where there is a manifest. Raises `WorkbookError` that names what is wrong.
    """
    return _opened(Path(path).absolute(), check_sums=True)


def finished(path: Path) -> Checkpoint:
    """`verified`, of a directory that must have a manifest (`workspace`: name and SHA-256 of each
    file, written last), as all have that are made here."""
    if workspace.read_manifest(path) is None:
        workspace.verify(path)  # says that it was never finished
    return verified(path)


def just_written(path: Path) -> Checkpoint:
    """Open a directory that this process has just finished: its manifest's sums are fresh."""
    return _opened(path.absolute(), check_sums=False)


def _opened(path: Path, check_sums: bool) -> Checkpoint:
    for _ in range(ATTEMPTS):
        files = _files(path)
        try:
            found = _read(path, files, check_sums)
        except (WorkbookError, OSError):
            if _files(path) == files:
                raise
        else:
            if _files(path) == files:
                return found
    raise WorkbookError(f"{path.name} is being written by another process.",
                        "Its files changed while they were read.",
                        "Wait until it is done, and run this again.")


def _files(path: Path) -> tuple:
    """Name, inode, size and time of config.json and of each file of weights."""
    found = []
    # While another process replaces the directory, it is not there for a moment.
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for file in sorted((path / "config.json", *path.glob("*.safetensors"))):
            stat = file.stat()
            found.append((file.name, stat.st_ino, stat.st_size, stat.st_mtime_ns))
    return tuple(found)


def _read(path: Path, files: tuple, check_sums: bool) -> Checkpoint:
    config = read_config(path)
    pickles = sorted(f.name for f in path.iterdir() if f.suffix in PICKLES)
    if pickles:
        raise WorkbookError(
            f"{path}: it holds pickled weights ({', '.join(pickles)}).",
            "A pickle can run any code when it is opened, so none is opened here.",
            "Convert the model to safetensors and remove the pickles.")
    tensors = tuple(census(path))
    if check_sums and workspace.read_manifest(path) is not None:
        workspace.verify(path)
    return Checkpoint(path, identity.fingerprint(path), tensors, config, identity.origin(path),
                      files)


def read_config(path: Path) -> dict:
    """A model directory's config.json.

    Raises `WorkbookError` where it is missing, is not JSON, names no `model_type`, or has a value
    of the wrong type that this workbook computes with.
    """
    remedy = "Name a directory as Transformers' save_pretrained writes it."
    try:
        config = workspace.read_json(path / "config.json")
    except WorkbookError as error:
        raise WorkbookError(error.what, "Without it nobody knows what the weights are for.",
                            remedy) from None
    if not isinstance(config.get("model_type"), str):
        raise WorkbookError(f"{path}: config.json names no model_type.",
                            "It is not a Transformers model.", remedy)
    for name, kind in CONFIG_TYPES.items():
        value = config.get(name)
        if value is not None and (type(value) is not kind or kind is int and value <= 0):
            raise WorkbookError(
                f"{path}: config.json has {name} {value!r}, and it should be "
                f"{'a positive integer' if kind is int else f'a {kind.__name__}'}.",
                "It was edited or damaged; nothing computed from it would be right.",
                "Correct it, or fetch the model again.")
    return config


def census(path: Path) -> list[TensorInfo]:
    """Every tensor of the checkpoint directory `path`, in the order of its files.

    Raises `WorkbookError` when there are no safetensors, when the index cannot be read or names a
    shard that is missing, or when the index and the shards disagree on the tensors.
    """
    index, placed = path / "model.safetensors.index.json", None
    files = sorted(path.glob("*.safetensors"))
    if index.is_file():
        try:
            placed = workspace.read_json(index)["weight_map"]
            files = sorted({path / name for name in placed.values()})
            if any(file.parent != path for file in files):
                raise ValueError("it names a file outside of the folder")
        except (WorkbookError, ValueError, KeyError, TypeError, AttributeError) as error:
            why = error.what if isinstance(error, WorkbookError) else error
            raise WorkbookError(f"{index.name} of {path.name} is no index of shards ({why}).",
                                "Which file holds which tensor cannot be known.",
                                "Fetch or make the checkpoint again.") from None
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise WorkbookError(f"{path.name} lacks {', '.join(missing)}.",
                                "The index names these shards; the checkpoint is incomplete.",
                                "Fetch or make the checkpoint again.")
    if not files:
        raise WorkbookError(f"There are no safetensors in {path}.",
                            "It is not a checkpoint that this workbook can read.",
                            "Name a directory that holds config.json and *.safetensors.")
    tensors = [tensor for file in files for tensor in headers.read(file)]
    if placed is not None and placed != {t.name: t.file for t in tensors}:
        odd = sorted(set(placed.items()) ^ {(t.name, t.file) for t in tensors})[0]
        raise WorkbookError(f"{path.name}: the index and the shards disagree on {odd[0]} "
                            f"({odd[1]}).", "Files of two checkpoints have been mixed.",
                            "Fetch or make the checkpoint again.")
    return tensors


def total_bytes(tensors: Iterable[TensorInfo]) -> int:
    """Bytes of tensor data, headers not counted."""
    return sum(tensor.nbytes for tensor in tensors)


def by_dtype(tensors: Sequence[TensorInfo]):
    """A DataFrame by safetensors type: tensors, parameters, bytes, share of the bytes in %."""
    return _grouped(tensors, lambda tensor: tensor.dtype, "dtype")


def by_role(tensors: Sequence[TensorInfo]):
    """A DataFrame by what tensors are for, in the order of `ROLES`; columns as in `by_dtype`."""
    table = _grouped(tensors, role, "role")
    return table.loc[[each for each in ROLES if each in table.index]]


def role(tensor: TensorInfo) -> str:
    """What a tensor is for: one of `ROLES`."""
    name = tensor.name
    if name.endswith(FP8_SUFFIX):
        return "scale"
    for part, meaning in (("embed_tokens", "embedding"), ("self_attn", "attention"),
                          (".mlp.", "mlp"), ("lm_head", "lm_head")):
        if part in name:
            return meaning
    return "norm"


def _grouped(tensors: Sequence[TensorInfo], key: Callable, title: str):
    import pandas as pd

    rows = [{title: key(t), "tensors": 1, "parameters": prod(t.shape), "bytes": t.nbytes}
            for t in tensors]
    table = pd.DataFrame(rows).groupby(title, sort=False).sum()
    table["bytes, %"] = (100 * table["bytes"] / table["bytes"].sum()).round(2)
    return table


def read_tensor(model: Checkpoint, name: str):
    """One tensor of a checkpoint, alone in memory.

    Raises `WorkbookError` when no tensor has this name.
    """
    with model.shard_of(name) as shard:
        return shard.get_tensor(name)


def read_blocks(model: Checkpoint, name: str, rows: int = 1024) -> Iterator:
    """A tensor of a checkpoint by blocks of so many rows, of which one is in memory at a time.

    Raises `WorkbookError` when no tensor has this name.
    """
    with model.shard_of(name) as shard:
        tensor = shard.get_slice(name)
        for start in range(0, tensor.get_shape()[0], rows):
            yield tensor[start:start + rows]


def linears(tensors: Sequence[TensorInfo]) -> list[str]:
    """The modules that FP8_DYNAMIC quantizes: Linear layers but lm_head, in the file's order."""
    return [t.name.removesuffix(".weight") for t in tensors
            if _is_linear(t) and role(t) != "lm_head"]


def _is_linear(tensor: TensorInfo) -> bool:
    return (len(tensor.shape) == 2 and tensor.name.endswith(".weight")
            and role(tensor) not in ("embedding", "scale"))


def predict_fp8(base: Sequence[TensorInfo],
                ignore: tuple[str, ...] = ("lm_head",)) -> list[TensorInfo]:
    """The tensors that FP8_DYNAMIC makes of a 16-bit base checkpoint.

    A Linear weight [out, in] becomes F8_E4M3 of that shape, with a scale [out, 1] in the base's
    type; everything else is copied. Source: compressed-tensors, format `float-quantized`.
    """
    predicted = []
    for tensor in base:
        module = tensor.name.removesuffix(".weight")
        if not _is_linear(tensor) or module in ignore:
            predicted.append(tensor)
            continue
        out = tensor.shape[0]
        predicted.append(TensorInfo(tensor.name, "F8_E4M3", tensor.shape, prod(tensor.shape),
                                    tensor.file))
        predicted.append(TensorInfo(f"{module}{FP8_SUFFIX}", tensor.dtype, (out, 1),
                                    out * ITEM_BYTES[tensor.dtype], tensor.file))
    return predicted
