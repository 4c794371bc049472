"""What one outlier costs INT8 and E4M3: the experiment behind "floats are for wide ranges".

INT8 has steps of one size, set by the largest value that shares the scale; E4M3's steps shrink with
the value. So INT8's error grows with an outlier and E4M3's does not, until values turn subnormal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from helpers import ablation, formats

if TYPE_CHECKING:
    from pandas import DataFrame
    from torch import Tensor
    from transformers import PreTrainedModel

SIZES = tuple(2**power for power in range(14))  # the outlier over the median feature
GRIDS, SCOPES = ("int8", "e4m3"), ("row", "tensor")
TITLES = {("int8", "row"): "INT8, per token", ("int8", "tensor"): "INT8, per tensor",
          ("e4m3", "row"): "E4M3, per token", ("e4m3", "tensor"): "E4M3, per tensor"}


def inputs(model: PreTrainedModel, ids: Tensor, name: str) -> Tensor:
    """What the Linear `name` is given for one text, float32 [tokens, in]; ids int64 [1, tokens]."""
    return ablation.observe(model, ids, lambda x: x)[name]


def with_outlier(x: Tensor, weight: Tensor, size: float,
                 tokens: slice = slice(None)) -> tuple[Tensor, Tensor]:
    """x [tokens, in] and weight [out, in] with one feature raised, their product as it was.

    The median feature (by amax) is multiplied so that its amax becomes `size` times what it was,
    and its column of the weight is divided by as much, as SmoothQuant moves ranges from one to the
    other (https://arxiv.org/abs/2211.10438). With `tokens`, the feature is raised in these alone
    and the weight stays.
    """
    feature = int(x.abs().amax(dim=0).argsort()[x.shape[1] // 2])
    x, weight = x.clone(), weight.clone()
    x[tokens, feature] *= size
    if tokens == slice(None):
        weight[:, feature] /= size
    return x, weight


def token_sqnr(x: Tensor, weight: Tensor, grid: str, scope: str) -> Tensor:
    """SQNR in dB of each token's output of a Linear whose inputs alone are rounded: float [tokens].

    x [tokens, in], weight [out, in].
    """
    exact = x.double() @ weight.double().T
    noise = ablation.rounded(x, grid, scope).double() @ weight.double().T - exact
    return 10 * (exact.square().sum(1) / noise.square().sum(1)).log10()


def sweep(x: Tensor, weight: Tensor,
          sizes: tuple[float, ...] = SIZES) -> dict[str, DataFrame]:
    """The median token's SQNR in dB against an outlier's size: two DataFrames, index size.

    "in every token": one feature is raised in all tokens, as outlier features are. "in one token":
    in the first alone, as massive activations are; that token is not in the median. Columns: grid
    and scope, as in `TITLES`.
    """
    import pandas as pd

    tables = {"in every token": {}, "in one token": {}}
    for size in sizes:
        for title, tokens, judged in (("in every token", slice(None), slice(None)),
                                      ("in one token", slice(0, 1), slice(1, None))):
            raised = with_outlier(x, weight, size, tokens)
            tables[title][size] = {
                TITLES[grid, scope]: float(token_sqnr(*raised, grid, scope)[judged].median())
                for grid in GRIDS for scope in SCOPES}
    return {title: pd.DataFrame(rows).T.rename_axis("size") for title, rows in tables.items()}


def crossing(table: DataFrame, scope: str) -> float | None:
    """The outlier's size from which E4M3 is ahead of INT8, by a line between the sizes tried.

    `table`: one of `sweep`'s; None when they do not cross.
    """
    import numpy as np

    lead = (table[TITLES["int8", scope]] - table[TITLES["e4m3", scope]]).to_numpy()
    if not (lead[0] > 0 and lead[-1] < 0):
        return None
    after = int(np.argmax(lead < 0))
    place = np.log2(table.index.to_numpy(dtype=float))[[after - 1, after]]
    return float(2 ** np.interp(0, -lead[[after - 1, after]], place))


def modules(model: PreTrainedModel, ids: Tensor) -> DataFrame:
    """Every quantized Linear on one text: a DataFrame, index module, in the model's order.

    "features": the input's largest feature over the median one, as in `outliers.table`. The columns
    of `TITLES`: the median token's SQNR in dB, the inputs rounded and the weights as they are.
    """
    import pandas as pd

    rows = {}
    for name, x in ablation.observe(model, ids, lambda x: x).items():
        features = x.abs().median(dim=0).values
        weight = model.get_submodule(name).weight.detach()
        rows[name.removeprefix("model.layers.")] = {
            "features": float(features.max() / features.median())} | {
            title: float(token_sqnr(x, weight, *key).median()) for key, title in TITLES.items()}
    return pd.DataFrame(rows).T


def measured(model: str) -> DataFrame:
    """The kept figures of `modules` of "tiny-phi4" or "smollm2"."""
    import pandas as pd

    return pd.DataFrame(formats.kept()[model]["modules"]).T


def beside(name: str, table: DataFrame) -> dict[str, DataFrame]:
    """`modules` of the model `name`, and the kept ones of its `formats.companion`."""
    return {name: table} | {other: measured(other) for other in formats.companion(name)}
