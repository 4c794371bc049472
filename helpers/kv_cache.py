"""The KV cache in 8 bits: its bytes from the config, its error on a model's keys and values.

Only what vLLM would keep is rounded: keys after the rotary embedding, and values. Queries and the
attention itself stay as they are. Scales as vLLM 0.32 has them (`vllm/config/cache.py`,
`vllm/model_executor/layers/quantization/kv_cache.py`): 1.0 for every layer, unless the checkpoint
brings one for its keys and one for its values, or one for each token and head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from helpers import ablation, roofline

if TYPE_CHECKING:
    from pandas import DataFrame
    from torch import Tensor
    from transformers import PreTrainedModel

SCALE_BYTES = 4  # vLLM keeps these scales in float32


def sizes(config: dict) -> DataFrame:
    """Bytes of KV cache per token by vLLM's `--kv-cache-dtype`, from a config.json.

    A DataFrame, index dtype: "codes", "scales" and "total" in bytes, "of bf16" the ratio.
    """
    import pandas as pd

    bf16 = roofline.kv_bytes_per_token(config)
    scales = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * SCALE_BYTES
    table = pd.DataFrame({"codes": {"auto (bf16)": bf16, "fp8": bf16 // 2,
                                    "fp8_per_token_head": bf16 // 2},
                          "scales": {"fp8_per_token_head": scales}})
    table["scales"] = table["scales"].fillna(0).astype(int)  # two a layer for all tokens are none
    table["total"] = table["codes"] + table["scales"]
    table["of bf16"] = table["total"] / bf16
    return table.rename_axis("--kv-cache-dtype")


@contextlib.contextmanager
def replaced(model: PreTrainedModel, change: Callable) -> Iterator[None]:
    """Within the block, attention reads other keys and values than were computed.

    `change(what, layer, tensor)` gets "K" or "V", the layer's number and a tensor
    [batch, heads, tokens, head], and returns what takes its place.
    """
    from transformers import DynamicCache

    class Changed(DynamicCache):
        def update(self, key_states, value_states, layer_idx, *args, **kwargs):
            return super().update(change("K", layer_idx, key_states),
                                  change("V", layer_idx, value_states), layer_idx, *args, **kwargs)

    def begin(_module, args, kwargs):
        return args, kwargs | {"past_key_values": Changed(config=model.config), "use_cache": True}

    hook = model.register_forward_pre_hook(begin, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def observe(model: PreTrainedModel, ids: Tensor,
            keep: Callable) -> dict[tuple[str, int], object]:
    """What `keep(tensor)` makes of every layer's keys and values: ("K" or "V", layer) to it."""
    import torch

    found = {}

    def look(what, layer, tensor):
        found[what, layer] = keep(tensor)
        return tensor

    with replaced(model, look), torch.inference_mode(), ablation.threads(model):
        model(ids)
    return found


def calibrated(model: PreTrainedModel, texts: list[Tensor],
               grid: str) -> dict[tuple[str, int], Tensor]:
    """One scale for the keys and one for the values of each layer: ("K" or "V", layer) to it.

    The amax over the texts / the grid's largest number.
    """
    peaks: dict = {}
    for ids in texts:
        for key, peak in observe(model, ids, lambda x: x.abs().max()).items():
            peaks[key] = max(peak, peaks.get(key, peak))
    return {key: peak / ablation.LARGEST[grid] for key, peak in peaks.items()}


def rounding(grid: str, scales: Mapping | float | None = None) -> Callable:
    """What `replaced` takes: keys and values rounded to a grid.

    `scales`: 1.0 for vLLM's default, `calibrated`'s for one each of keys and values in a layer,
    None for one each token and head.
    """
    def change(what, layer, tensor):
        scale = scales[what, layer] if isinstance(scales, Mapping) else scales
        return ablation.rounded(tensor.flatten(0, -2), grid, scale=scale).view(tensor.shape)

    return change


def ways(model: PreTrainedModel, calibration: list[Tensor]) -> dict[str, Callable]:
    """The cache's formats by title, as `replaced` takes them.

    `calibration`: the texts that calibrated scales are set on. "INT8, calibrated" is not vLLM's; it
    stands beside E4M3 with the same scales.
    """
    return {"E4M3, scale 1": rounding("e4m3", 1.0),
            "E4M3, calibrated": rounding("e4m3", calibrated(model, calibration, "e4m3")),
            "E4M3, per token and head": rounding("e4m3"),
            "E5M2, scale 1": rounding("e5m2", 1.0),
            "INT8, calibrated": rounding("int8", calibrated(model, calibration, "int8"))}


def arms(model: PreTrainedModel, ways: dict[str, Callable]) -> dict[str, Callable]:
    """`ways` as `formats.measure` takes them."""
    return {title: lambda way=way: replaced(model, way) for title, way in ways.items()}


def error(model: PreTrainedModel, ids: Tensor, ways: dict[str, Callable]) -> DataFrame:
    """SQNR in dB of all layers' keys and values together: a DataFrame, index way, "K" and "V"."""
    import pandas as pd
    import torch

    kept = observe(model, ids, lambda x: x)
    rows = {}
    for title, way in ways.items():
        rows[title] = {what: ablation.sqnr(
            torch.cat([x.flatten() for (kind, _), x in kept.items() if kind == what]),
            torch.cat([way(kind, layer, x).flatten() for (kind, layer), x in kept.items()
                       if kind == what])) for what in ("K", "V")}
    return pd.DataFrame(rows).T
