"""Pictures one can turn: the scales of a checkpoint, chosen by layer, module and view.

What is drawn is worked out by the functions above the explorer, which read one tensor or one slice
of it at a time, so that a 14.7B checkpoint needs no more memory than a small one.
"""

import re
from pathlib import Path

from helpers import WorkbookError, ablation, checkpoint, plots
from helpers.fp8 import upcast

SLICE = 2**19  # weights worked on at once: 2 MB in float32 stay in the processor's cache
MAP_ROWS = 64  # output channels that a cell of the SQNR map is taken from
VIEWS = ("scales", "weights", "error")


def modules(fp8: Path) -> list[tuple[int, str, str]]:
    """(layer, short name, full name) of every FP8 module of the checkpoint, in its order.

    Raises `WorkbookError` when the checkpoint is incomplete or holds no FP8 weight.
    """
    found = []
    for tensor in checkpoint.census(fp8):
        match = re.fullmatch(r"(.*\.layers\.(\d+)\..*?([^.]+))\.weight", tensor.name)
        if match and tensor.dtype == "F8_E4M3":
            found.append((int(match[2]), match[3], match[1]))
    if not found:
        raise WorkbookError(f"{fp8.name} holds no FP8 weight.",
                            "Its Linear layers are stored in another type.",
                            "Name a checkpoint that FP8_DYNAMIC made; notebook 02 makes one.")
    return found


def scales(fp8: Path, module: str):
    """The scales of a module's output channels: float32 [out].

    Raises `WorkbookError` when there is no such module, it is not FP8, it has one scale for the
    tensor, or a scale is not a positive number.
    """
    import torch

    tensors = {tensor.name: tensor for tensor in checkpoint.census(fp8)}
    weight, scale = (tensors.get(f"{module}.weight"), tensors.get(f"{module}.weight_scale"))
    if weight is None:
        raise WorkbookError(f"There is no module {module} in {fp8.name}.",
                            "Names are those of the checkpoint's header.",
                            "widgets.modules(path) lists the FP8 modules there are.")
    if weight.dtype != "F8_E4M3" or scale is None:
        raise WorkbookError(f"{module} of {fp8.name} is not FP8: its weight is {weight.dtype}"
                            f"{'' if scale else ' without a scale'}.",
                            "There are no scales to look at.",
                            "Choose a module that FP8_DYNAMIC quantized.")
    if scale.shape != (weight.shape[0], 1):
        raise WorkbookError(f"{module} has scales of shape {list(scale.shape)}, and "
                            f"{weight.shape[0]} output channels.",
                            "It was quantized per tensor or in groups, not per channel.",
                            "Choose a checkpoint that FP8_DYNAMIC made.")
    values = checkpoint.read_tensor(fp8, scale.name).float().flatten()
    bad = ~(torch.isfinite(values) & (values > 0))
    if bad.any():
        first = int(bad.nonzero()[0])
        raise WorkbookError(f"{int(bad.sum())} of {len(values)} scales of {module} are no positive "
                            f"number; the first is {values[first]:g}, of channel {first}.",
                            "Its weights cannot be rebuilt.", "Make the checkpoint again.")
    return values


def rows(path: Path, name: str, start: int, stop: int):
    """Rows start to stop of a tensor, float32; nothing else of it is read."""
    from safetensors import safe_open

    with safe_open(_file(path, name), "pt") as shard:
        return shard.get_slice(name)[start:stop].float()


def _file(path: Path, name: str) -> Path:
    """The shard that holds a tensor."""
    file = next((t.file for t in checkpoint.census(path) if t.name == name), None)
    if file is None:
        raise WorkbookError(f"There is no tensor {name} in {path.name}.",
                            "The two checkpoints are not of one model.",
                            "Name the base that the FP8 checkpoint was made from.")
    return path / file


def _require_one_model(base: Path, fp8: Path, name: str) -> None:
    shapes = [next((t.shape for t in checkpoint.census(path) if t.name == name), None)
              for path in (base, fp8)]
    if None not in shapes and shapes[0] != shapes[1]:
        raise WorkbookError(
            f"{name} is {list(shapes[0])} in {base.name} and {list(shapes[1])} in {fp8.name}.",
            "The two checkpoints are not of one model.",
            "Name the base that the FP8 checkpoint was made from.")


def channel_error(base: Path, fp8: Path, module: str, channels: int | None = None):
    """Squares of signal and of error by output channel: two float32 tensors [channels].

    `channels`: the first so many only; all when None.
    """
    import torch
    from safetensors import safe_open

    scale = scales(fp8, module)[:channels]
    name = f"{module}.weight"
    _require_one_model(base, fp8, name)
    signal, noise = torch.empty_like(scale), torch.empty_like(scale)
    with (safe_open(_file(base, name), "pt") as before, safe_open(_file(fp8, name), "pt") as after):
        original, codes = before.get_slice(name), after.get_slice(name)
        step = max(1, SLICE // codes.get_shape()[1])
        for start in range(0, len(scale), step):
            part = slice(start, min(start + step, len(scale)))
            weight = original[part].float()
            error = torch.addcmul(weight, upcast(codes[part]), scale[part, None], value=-(2.0**8))
            signal[part] = torch.linalg.vecdot(weight, weight)
            noise[part] = torch.linalg.vecdot(error, error)
    return signal, noise


def spread_map(fp8: Path):
    """Largest over smallest channel scale: a DataFrame, index layer, columns module."""
    def spread(module):
        values = scales(fp8, module)
        return float(values.max() / values.min())

    return _map(fp8, spread)


def sqnr_map(base: Path, fp8: Path):
    """SQNR in dB of the first `MAP_ROWS` channels: a DataFrame, index layer, columns module."""
    import torch

    def sqnr(module):
        signal, noise = channel_error(base, fp8, module, MAP_ROWS)
        return float(10 * torch.log10(signal.sum() / noise.sum()))

    return _map(fp8, sqnr)


def _map(fp8: Path, value):
    import pandas as pd

    table = {}
    for layer, short, module in modules(fp8):
        table.setdefault(short, {})[layer] = value(module)
    return pd.DataFrame(table).rename_axis(index="layer", columns="module")


def largest(scale, count: int = 5) -> str:
    """The channels with the largest scales, named, largest first."""
    top = scale.topk(min(count, len(scale)))
    return ", ".join(f"{int(channel)} ({value:.3g})" for value, channel in zip(*top, strict=True))


def draw(base: Path, fp8: Path, module: str, view: str) -> None:
    """Show one view of one module: "scales", "weights" (of its loudest channel) or "error"."""
    scale = scales(fp8, module)
    if view == "scales":
        plots.channel_scales(module, scale)
    elif view == "weights":
        _require_one_model(base, fp8, f"{module}.weight")
        channel = int(scale.argmax())
        part = (channel, channel + 1)
        plots.weights_on_grid(module, channel, rows(base, f"{module}.weight", *part)[0],
                              rows(fp8, f"{module}.weight", *part)[0], float(scale[channel]))
    elif view == "error":
        signal, noise = channel_error(base, fp8, module)
        plots.channel_error(module, (noise / signal.clamp_min(ablation.TINY)).sqrt())
    else:
        raise ValueError(f"no view {view!r}: {', '.join(VIEWS)}")


def explorer(base: Path, fp8: Path):
    """The explorer: controls for layer, module and view, a map whose cells select, the picture.

    Bad input is a sentence where the picture would be.
    """
    import ipywidgets as ui

    picture, note, grid = ui.Output(), ui.HTML(), ui.VBox()
    try:
        found = {(layer, short): module for layer, short, module in modules(fp8)}
    except WorkbookError as error:
        note.value = _sentence(error)
        return note
    layer = ui.Dropdown(options=sorted({key[0] for key in found}), description="layer")
    short = ui.Dropdown(options=list(dict.fromkeys(key[1] for key in found)), description="module")
    view = ui.Dropdown(options=VIEWS, description="view")
    colour = ui.Dropdown(options=["scale spread", "SQNR, dB"], description="map")

    def update(*_):
        picture.clear_output(wait=True)
        module = found.get((layer.value, short.value))
        try:
            if module is None:
                raise WorkbookError(f"Layer {layer.value} has no FP8 module {short.value}.",
                                    "It was left in the base's type.", "Choose another module.")
            note.value = f"largest scales, by channel: {largest(scales(fp8, module))}"
            with picture:
                draw(base, fp8, module, view.value)
        except WorkbookError as error:
            picture.clear_output()  # the last module's picture must not stand under the sentence
            note.value = _sentence(error)

    def select(key):
        layer.value, short.value = key

    def colour_map(*_):
        try:
            table = spread_map(fp8) if colour.value == "scale spread" else sqnr_map(base, fp8)
            grid.children = _buttons(table, select)
        except WorkbookError as error:
            grid.children = [ui.HTML(_sentence(error))]

    for control in (layer, short, view):
        control.observe(update, "value")
    colour.observe(colour_map, "value")
    update()
    colour_map()
    return ui.VBox([ui.HBox([layer, short, view]), note, picture, colour, grid])


def _sentence(error: WorkbookError) -> str:
    import html

    return html.escape(f"{error.what} {error.meaning} {error.remedy}")


def _buttons(table, select) -> list:
    """A row of buttons a layer, coloured by value; a click hands (layer, module) to `select`."""
    import ipywidgets as ui
    import matplotlib
    from matplotlib.colors import Normalize, to_hex

    norm = Normalize(table.min().min(), table.max().max())
    lines = []
    for layer, values in table.iterrows():
        line = [ui.Label(f"layer {layer}", layout=ui.Layout(width="5em"))]
        for short, value in values.dropna().items():
            colour = to_hex(matplotlib.colormaps["cividis"](norm(value)))
            button = ui.Button(
                description=f"{short} {value:.1f}", tooltip=f"layer {layer}, {short}: {value:.3f}",
                layout=ui.Layout(width="11em"),
                style={"button_color": colour, "text_color": plots.ink(colour)})
            button.on_click(lambda _, key=(layer, short): select(key))
            line.append(button)
        lines.append(ui.HBox(line))
    return lines
