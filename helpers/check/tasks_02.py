"""Tasks of notebook 02: the checkpoint's bytes, lm_head, a broken quantization_config."""

import copy
import re
from math import prod

from helpers.check.answers import all_same, each, how_many, near, number, results
from helpers.check.task import Key, Mistake, Task, Unusable, compared
from helpers.check.tasks_00 import _phi4

PREDICTED = ("the bundled model", "Phi-4")


def _censuses() -> list[tuple]:
    """Name and shape of every tensor of two bf16 models."""
    from helpers import models, roofline

    return [([(tensor.name, tensor.shape) for tensor in tensors],)
            for tensors in (models.tiny().checkpoint.tensors, roofline.tensors(_phi4()))]


def _written(tensors) -> int:
    """What LLM Compressor wrote of the bundled model, where it is there; else as predicted."""
    from helpers import checkpoint, headers, models, quantize

    names = {name for name, _ in tensors}
    base = models.tiny().checkpoint.tensors
    place = quantize.target(models.tiny())
    if names == {tensor.name for tensor in base} and (place / "MANIFEST.json").exists():
        return sum(t.nbytes for file in place.glob("*.safetensors") for t in headers.read(file))
    whole = [headers.TensorInfo(name, "BF16", tuple(shape), 2 * prod(shape))
             for name, shape in tensors]
    return checkpoint.total_bytes(checkpoint.predict_fp8(whole))


def _bytes(tensors, scale: int = 2, per_tensor: bool = False, head: bool = False,
           embedding: bool = False, norms: bool = False) -> int:
    total = 0
    for name, shape in tensors:
        taken = len(shape) == 2 and (head or "lm_head" not in name) and (
            embedding or "embed" not in name)
        if taken or norms and len(shape) == 1:
            total += prod(shape) + scale * (1 if per_tensor else shape[0])
        else:
            total += 2 * prod(shape)
    return total


def _bytes_key() -> Key:
    return Key(_written, (
        Mistake(lambda t: _bytes(t, scale=0), "The codes are counted, the scales are not: 2 bytes "
                                              "for each channel."),
        Mistake(lambda t: _bytes(t, scale=4), "The scales are stored in bf16, as the weights were: "
                                              "2 bytes each, and not float32's 4."),
        Mistake(lambda t: _bytes(t, per_tensor=True), "There is a scale for each channel, so as "
                                                      "many as the weight has rows."),
        Mistake(lambda t: _bytes(t, head=True),  # as large as the embedding
                "You quantized one matrix too many: the recipe ignores lm_head, and the embedding "
                "is no Linear."),
        Mistake(lambda t: _bytes(t, head=True, embedding=True),
                "You quantized everything with two dimensions. The embedding is no Linear, and "
                "lm_head is ignored."),
        Mistake(lambda t: _bytes(t, scale=0, head=True, embedding=True, norms=True),
                "Half of everything: but the embedding, lm_head and the norms stay in bf16, and "
                "scales come on top.")))


def _head_key() -> Key:
    from helpers import checkpoint, roofline

    base, rows, width = roofline.tensors(_phi4()), _phi4()["vocab_size"], _phi4()["hidden_size"]
    saved = checkpoint.total_bytes(checkpoint.predict_fp8(base)) - checkpoint.total_bytes(
        checkpoint.predict_fp8(base, ignore=()))
    return Key(saved, (
        Mistake(rows * width, "One byte fewer for each weight is right; but each channel would "
                              "then have a scale, of 2 bytes."),
        Mistake(rows * width - rows, "Nearly: a scale in bf16 takes 2 bytes, not one."),
        Mistake(rows * width - 2, "Nearly: there is a scale for each of the 100,352 channels, not "
                                  "one for the tensor."),
        Mistake(rows * width - 2 * width, "Nearly: a channel is an output, so there are 100,352 "
                                          "scales, and not 5,120."),
        Mistake(rows * width + 2 * rows, "That is what lm_head would take in FP8; asked is how "
                                         "much less that is than in bf16."),
        Mistake(saved / 1e6, "In bytes, please: that is in MB."),
        Mistake(saved / 2**20, "In bytes, please: that is in MiB.")))


def broken_config() -> dict:
    """The quantization_config of FP8_DYNAMIC with four faults, shorter than a real one."""
    return {
        "quant_method": "compressed-tensors", "format": "int-quantized", "ignore": [],
        "config_groups": {"group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True,
                        "dynamic": False},
            "input_activations": {"num_bits": 8, "type": "float", "strategy": "token",
                                  "symmetric": True, "dynamic": False}}}}


FAULTS = ("format", "ignore", "weights: strategy", "input_activations: dynamic")


def _mended(*left: str) -> dict:
    """The mended config, with those faults of `FAULTS` left in."""
    config = copy.deepcopy(broken_config())
    group = config["config_groups"]["group_0"]
    if "format" not in left:
        config["format"] = "float-quantized"
    if "ignore" not in left:
        config["ignore"] = ["lm_head"]
    if "weights: strategy" not in left:
        group["weights"]["strategy"] = "channel"
    if "input_activations: dynamic" not in left:
        group["input_activations"]["dynamic"] = True
    return config


def _meaning(config) -> dict[str, object]:
    """What a quantization_config says, by what it says it of; raises `Unusable` for another thing.
    """
    if not isinstance(config, dict):
        raise Unusable("A dictionary is wanted, the whole quantization_config.")
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        raise Unusable('"config_groups" should hold one group, "group_0", as it did.')
    (group,) = groups.values()
    ignore = config.get("ignore")
    if not isinstance(group, dict) or not isinstance(ignore, list | tuple):
        raise Unusable('A group is a dictionary, and "ignore" a list.')
    said = {"quant_method": config.get("quant_method"), "format": config.get("format"),
            "targets": list(group.get("targets") or []),
            "ignore": (_ignores(ignore, "lm_head"),
                       _ignores(ignore, "model.layers.0.mlp.down_proj"))}
    for part in ("weights", "input_activations"):
        arguments = group.get(part)
        if not isinstance(arguments, dict):
            raise Unusable(f'"{part}" should hold a dictionary of arguments.')
        said |= {f"{part}: {key}": arguments.get(key)
                 for key in ("num_bits", "type", "strategy", "symmetric", "dynamic")}
    return said


def _ignores(ignore, module: str) -> bool:
    """As compressed-tensors reads the list: names, and regular expressions after "re:"."""
    return any(entry == module or str(entry).startswith("re:") and re.match(entry[3:], module)
               for entry in ignore)


def _config_key() -> Key:
    """What LLM Compressor's preset says, in the form of the broken config."""
    from compressed_tensors.quantization import preset_name_to_scheme

    preset, right = preset_name_to_scheme("FP8_DYNAMIC", ["Linear"]), _mended()
    for part in ("weights", "input_activations"):
        arguments = right["config_groups"]["group_0"][part]
        for key in arguments:
            arguments[key] = getattr(getattr(preset, part), key)
    return Key(right, (
        Mistake(broken_config(), "Nothing is mended yet."),
        Mistake(_mended("format"), "The format is still one of integers: E4M3 is a float."),
        Mistake(_mended("ignore"), "The ignore list is still empty: vLLM would look for the codes "
                                   "of lm_head, which is stored in bf16."),
        Mistake(_mended("weights: strategy"),
                "The weights still have one scale for the tensor; the file holds one for each "
                "channel, [out, 1]."),
        Mistake(_mended("input_activations: dynamic"),
                "The activations are still static: vLLM would look for an input_scale, and the "
                "file has none.")))


def _mended_so_far(given: dict, right: dict) -> str:
    mended = [fault for fault in FAULTS if given[fault] == right[fault]]
    spoilt = [name for name in right if name not in FAULTS and given[name] != right[name]]
    said = f"{len(mended)} of the four faults are mended." if mended else ""
    return said + (f" What was right and is not any more: {', '.join(spoilt)}." if spoilt else "")


TASKS = (
    Task("fp8_bytes", "02", "medium", 6, "code", "predicting a size",
         ("Which tensors does the recipe take? Those of Linear layers, but lm_head.",
          "A Linear's weight has two dimensions; the embedding (embed_tokens) has two as well, and "
          "is no Linear.",
          "Taken: out × in bytes of codes and 2 × out bytes of scales. All others: 2 bytes a "
          "number."),
         _bytes_key, compared(each(number, results(_censuses)), all_same(near(1e-12)),
                              "Codes of one byte and a bf16 scale per channel for the Linears; 2 "
                              "bytes a number for the rest.",
                              how_many(near(1e-12), PREDICTED, "{:,.0f}".format),
                              "To the byte.")),
    Task("bytes_saved_on_lm_head", "02", "easy", 2, "value", "codes and scales",
         ("A weight takes 2 bytes now and would take 1.",
          "What comes on top: a scale for each channel, and a channel is a row.",
          "100,352 × 5,120 × (2 − 1) − 100,352 × 2."),
         _head_key, compared(number, near(1e-12), "One byte saved per weight, two spent per "
                                                  "channel.",
                             right_says="3.3 % of the checkpoint. It stays in bf16 because its "
                                        "errors go straight into the choice of the token.")),
    Task("config_mended", "02", "hard", 8, "code", "reading a config",
         ("Compare it, line by line, with what the recipe says: which tensors, which grid, what "
          "shares a scale, when is it made?",
          "Two faults stand at the top level, one in the weights, one in the activations.",
          "E4M3 is a float, lm_head is not quantized, a weight has a scale for each channel, and "
          "the activations' are made while the model runs."),
         _config_key, compared(_meaning, lambda a, b: a == b,
                               "Ask of each line what the file holds and when it was made.",
                               _mended_so_far,
                               "compressed-tensors' preset says the same."),
         material=broken_config),
)
