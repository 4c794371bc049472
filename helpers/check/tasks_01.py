"""Tasks of notebook 01: a safetensors header, the Linears' weights, the KV cache."""

import struct
from pathlib import Path

from helpers.check.answers import all_same, each, how_many, near, number, results
from helpers.check.task import Key, Mistake, Task, compared


def _bundled() -> Path:
    from helpers import workspace

    return workspace.data("tiny_phi4", "model.safetensors")


def _header_length(path) -> int:
    with open(path, "rb") as file:
        return struct.unpack("<Q", file.read(8))[0]


def _elements(path) -> int:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118


def _read_with_the_library(path) -> int:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118


def _header_key() -> Key:
    return Key(_read_with_the_library, (
        Mistake(lambda path: Path(path).stat().st_size,
                "That is the whole file. Its first 8 bytes and the header are no weights."),
        Mistake(lambda path: Path(path).stat().st_size - _header_length(path),
                "8 bytes too many: the length of the header is stored too, before it."),
        Mistake(_elements, "That counts numbers, and each of them takes 2 bytes in bf16: take "
                           "data_offsets, which are bytes.")))


def _configs() -> list[tuple]:
    from helpers import roofline, workspace

    phi4, tiny = (roofline.load_config(workspace.data(name)) for name in ("phi4", "tiny_phi4"))
    return [(phi4,), (tiny,), ({**tiny, "num_key_value_heads": 4, "num_hidden_layers": 6},)]


NAMES = ("Phi-4's config", "the bundled model's", "one with 4 KV heads and 6 layers")


def _linears(config: dict) -> int:
    """Counted in Transformers' own model of this config, made without its weights."""
    import torch
    from transformers import Phi3Config, Phi3ForCausalLM

    sizes = {key: config[key] for key in (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "vocab_size")}
    with torch.device("meta"):
        model = Phi3ForCausalLM(Phi3Config(**sizes, pad_token_id=0, bos_token_id=0,
                                            eos_token_id=0))
    return sum(module.weight.numel() for name, module in model.named_modules()
               if isinstance(module, torch.nn.Linear) and name != "lm_head")


def _by_hand(config: dict, grouped: bool = True, up: bool = True, layers: bool = True,
             head: bool = False) -> int:
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    share = config["num_key_value_heads"] / config["num_attention_heads"] if grouped else 1
    layer = int(hidden * hidden * (2 + 2 * share)) + (3 if up else 2) * hidden * ffn
    return (layer * (config["num_hidden_layers"] if layers else 1)
            + (config["vocab_size"] * hidden if head else 0))


def _linears_key() -> Key:
    return Key(_linears, (
        Mistake(lambda c: _by_hand(c, grouped=False),
                "You gave keys and values as many heads as queries. Phi-4 shares each KV head "
                "among four: K and V have num_key_value_heads heads."),
        Mistake(lambda c: _by_hand(c, up=False),
                "A matrix of the MLP is missing: gate and up are two, stored as one, and down is "
                "the third."),
        Mistake(lambda c: _by_hand(c, layers=False), "That is one layer's; there are "
                                                     "num_hidden_layers of them."),
        Mistake(lambda c: _by_hand(c, head=True), "You counted lm_head too. It is a Linear, but "
                                                  "one that the recipe ignores.")))


def _kv(config: dict, heads: str = "num_key_value_heads", both: int = 2,
        layers: bool = True) -> int:
    head = config["hidden_size"] // config["num_attention_heads"]
    return both * 2 * config[heads] * head * (config["num_hidden_layers"] if layers else 1)


def _kv_key() -> Key:
    from helpers import roofline

    return Key(roofline.kv_bytes_per_token, (
        Mistake(lambda c: _kv(c, heads="num_attention_heads"),
                "You counted the query heads. Only the KV heads have keys and values to keep."),
        Mistake(lambda c: _kv(c, both=1),
                "Half of it: keys and values are two tensors, and a bf16 number takes 2 bytes. "
                "(FP8 weights do not make the cache FP8.)"),
        Mistake(lambda c: _kv(c, layers=False), "That is one layer's; every layer keeps its own."),
        Mistake(lambda c: _kv(c) * c["max_position_embeddings"],
                "That is a full context's; asked is one token's.")))


def _counts(key, otherwise: str, right_says: str):
    exact = near(1e-9)
    return key, compared(each(number, results(_configs)), all_same(exact), otherwise,
                         how_many(exact, NAMES, "{:,.0f}".format), right_says)


TASKS = (
    Task("safetensors_bytes", "01", "medium", 6, "code", "a file format",
         ("The first 8 bytes are the header's length, an unsigned little-endian integer; then "
          "comes the header, JSON.",
          "struct.unpack('<Q', file.read(8)) gives a tuple with the length; json.loads reads the "
          "rest. An entry \"__metadata__\" is no tensor.",
          "Each tensor's \"data_offsets\" are [begin, end] in bytes: sum end - begin."),
         _header_key, compared(each(number, results(lambda: [(str(_bundled()),)])),
                               all_same(near(1e-9)),
                               "Sum what lies between the two data_offsets of each tensor.",
                               right_says="The safetensors library counts as many.")),
    Task("linear_weights", "01", "medium", 6, "code", "a layer's parts",
         ("A layer has four Linears: qkv_proj, o_proj, gate_up_proj, down_proj.",
          "qkv_proj makes a head's dimensions for each query head, and for each KV head twice: "
          "key and value.",
          "Per layer: hidden × (heads + 2 × KV heads) × head dimension, hidden × hidden, "
          "and three times hidden × intermediate."),
         *_counts(_linears_key, "Four Linears a layer: qkv, o, gate and up, down.",
                  "Transformers' own model has as many.")),
    Task("kv_bytes_per_token", "01", "easy", 4, "code", "the KV cache",
         ("What is kept: a key and a value, for each KV head, in each layer.",
          "A key has hidden_size / num_attention_heads numbers, of 2 bytes each.",
          "2 (K and V) × KV heads × head dimension × layers × 2 bytes."),
         *_counts(_kv_key, "K and V, KV heads, head dimension, layers, 2 bytes.",
                  "FP8 weights leave this as it is.")),
)
