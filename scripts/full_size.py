"""The full-size proof: a random checkpoint of Phi-4's form, quantized, verified, timed, removed.

`make full-size` runs it; the tests run it at a hundredth of the size.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path

import numpy as np
import torch

from helpers import WorkbookError, checkpoint, fp8, headers, roofline, workspace
from helpers.checkpoint import Checkpoint
from helpers.headers import TensorInfo

SHARDS = 6  # microsoft/phi-4's index.json: model-0000n-of-00006
MODULES = 20  # chosen at random, re-derived from E4M3's definition
PIECE = 32 * 2**20


def scaled(config: dict, scale: int) -> dict:
    """Phi-4's config with every matrix `scale` times smaller; its layers and names are kept."""
    side = round(scale**0.5)
    smaller = {k: config[k] // side for k in ("hidden_size", "intermediate_size", "vocab_size")}
    # The heads' count stays, so their dimension shrinks; both divide Phi-4's hidden size.
    smaller["hidden_size"] -= smaller["hidden_size"] % config["num_attention_heads"]
    return config | smaller


def layout(planned: list[TensorInfo], shards: int = SHARDS) -> list[list[TensorInfo]]:
    """The tensors in `shards` files of about equal size, in the model's order."""
    total, files, size = checkpoint.total_bytes(planned), [[]], 0
    for tensor in planned:
        if size >= len(files) * total / shards:
            files.append([])
        files[-1].append(tensor)
        size += tensor.nbytes
    return files


def write_base(base: Path, config: dict, seed: int) -> None:
    """A checkpoint of random finite bf16 numbers of magnitude 2^-12 to 2^-1, in `SHARDS` files."""
    files = layout(roofline.tensors(config))
    base.mkdir(parents=True)
    names = [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    with ThreadPoolExecutor() as pool:
        list(pool.map(_write_shard, [base / n for n in names], files,
                      np.random.SeedSequence(seed).spawn(len(files))))
    weight_map = {t.name: n for n, tensors in zip(names, files, strict=True) for t in tensors}
    total = sum(t.nbytes for tensors in files for t in tensors)
    workspace.write_json(base / "model.safetensors.index.json",
                         {"metadata": {"total_size": total}, "weight_map": weight_map})
    workspace.write_json(base / "config.json", config)


def _write_shard(file: Path, tensors: list[TensorInfo], seed) -> None:
    numbers = np.random.Generator(np.random.SFC64(seed))
    with open(file, "wb") as output:
        headers.write(output, tensors)
        for tensor in sorted(tensors, key=lambda t: t.name):  # the order in the file
            _write_random(output, prod(tensor.shape), tensor.shape[-1], numbers)


def _write_random(output, count: int, row: int, numbers) -> None:
    """bf16 bits: sign, mantissa and three bits of exponent random; the row adds 0 to 3 to it."""
    rows = max(1, PIECE // (2 * row))
    for first in range(0, count // row, rows):
        here = min(rows, count // row - first)
        bits = np.frombuffer(numbers.bytes(2 * here * row), np.uint16).reshape(here, row)
        shift = (np.arange(first, first + here) % 4).astype(np.uint16)[:, None] << np.uint16(7)
        output.write(((bits & np.uint16(0x83FF)) | np.uint16(0x3A00)) + shift)


def verify(base: Checkpoint, made: Checkpoint, config: dict, seed: int) -> list[str]:
    """Hold every tensor's name, shape and type to the plan; re-derive `MODULES` modules.

    Raises `WorkbookError` at the first that differs. Returns the modules that were re-derived.
    """
    def refuse(what: str):
        raise WorkbookError(what, "The quantization is wrong, or the disk is.",
                            "Run it again; if it stays, report it with this sentence.")

    planned = {(t.name, t.dtype, t.shape) for t in checkpoint.predict_fp8(roofline.tensors(config))}
    odd = planned ^ {(t.name, t.dtype, t.shape) for t in made.tensors}
    if odd:
        refuse(f"{len(odd)} tensors are not as planned, one of them {min(odd)}.")
    modules = checkpoint.linears(base.tensors)
    chosen = random.Random(seed).sample(modules, min(MODULES, len(modules)))
    for module in chosen:
        name = f"{module}.weight"
        with base.shard_of(name) as old, made.shard_of(name) as new:
            weights, codes = (f.get_slice(name) for f in (old, new))
            scales = new.get_tensor(f"{module}.weight_scale")
            for first in range(0, scales.shape[0], 1024):
                rows = slice(first, first + 1024)
                expected, scale = fp8.quantize_per_channel(weights[rows])
                if not (torch.equal(codes[rows].view(torch.uint8), expected)
                        and torch.equal(scales[rows], scale)):
                    refuse(f"{module} differs from E4M3 arithmetic in rows {first} on.")
    return chosen


def measure(place: Path, scale: int = 1, seed: int = 0) -> dict:
    """Do all of it in the folder `place`, which must not exist; returns bytes, seconds and peak.

    The quantization runs in a process of its own, so that the peak is its alone.
    """
    config = scaled(roofline.load_config(workspace.data("phi4")), scale)
    planned = roofline.tensors(config)
    nbytes = checkpoint.total_bytes(planned)
    fp8_bytes = checkpoint.total_bytes(checkpoint.predict_fp8(planned))
    # The base, and beside it first its FP8 form and then a copy of one file of it.
    workspace.require_disk(place, nbytes + fp8_bytes + 10**8, "The full-size proof")
    place.mkdir(parents=True)
    try:
        base, made, copy = place / "base", place / "fp8", place / "copy"
        start = time.perf_counter()
        write_base(base, config, seed)
        result = {"seconds writing": time.perf_counter() - start}
        opened = checkpoint.verified(base)  # takes its sums, and the workspace keeps them
        _forget_cache(base)
        result |= _quantize_apart(base, made)
        start = time.perf_counter()
        product = checkpoint.verified(made)
        chosen = verify(opened, product, config, seed)
        result["seconds verifying"] = time.perf_counter() - start
        result |= {"modules re-derived": len(chosen), "bytes bf16": nbytes,
                   "bytes FP8": checkpoint.total_bytes(product.tensors)}
        shutil.rmtree(made)
        _forget_cache(base)
        result["seconds cp"] = sum(_copied(file, copy) for file in sorted(base.iterdir()))
        return result
    finally:
        shutil.rmtree(place)


def _copied(file: Path, copy: Path) -> float:
    """Seconds that `cp` takes for one file; the copy is removed, so that its place is enough."""
    start = time.perf_counter()
    subprocess.run(["cp", file, copy], check=True)
    seconds = time.perf_counter() - start
    copy.unlink()
    return seconds


def _forget_cache(directory: Path) -> None:
    """Drop the directory's files from the page cache, so that each reader starts from the disk."""
    for file in directory.iterdir():
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _quantize_apart(base: Path, made: Path) -> dict:
    code = ("import json, resource, sys, time\nfrom pathlib import Path\n"
            "from helpers import checkpoint, quantize\n"
            "start = time.perf_counter()\n"
            "quantize.stream(checkpoint.verified(sys.argv[1]), Path(sys.argv[2]))\n"
            "seconds = time.perf_counter() - start\n"
            "used = resource.getrusage(resource.RUSAGE_SELF)\n"
            # ru_maxrss would be that of the process which started this one, where that was larger.
            "status = dict(line.split(':', 1) for line in open('/proc/self/status'))\n"
            "print(json.dumps({'seconds quantizing': seconds, 'seconds of CPU': used.ru_utime "
            "+ used.ru_stime, 'peak bytes': int(status['VmHWM'].split()[0]) * 1024}))")
    done = subprocess.run([sys.executable, "-c", code, base, made], check=True, text=True,
                          stdout=subprocess.PIPE, cwd=workspace.repo())
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=int, default=1, help="times smaller than Phi-4 (1)")
    options = parser.parse_args()
    try:
        result = measure(workspace.root() / "full-size", options.scale)
    except WorkbookError as error:
        sys.exit(str(error))
    for name, value in result.items():
        print(f"{name:>28}  {value:,.1f}" if isinstance(value, float) else f"{name:>28}  {value:,}")
    ratio = result["seconds quantizing"] / result["seconds cp"]
    print(f"{'quantizing over cp':>28}  {ratio:.2f}")


if __name__ == "__main__":
    main()
