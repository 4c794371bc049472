"""What a reader turns: a scale, the explorer of a checkpoint's scales, the menu of GPUs."""

from helpers import (
    WorkbookError,
    arm_names,
    hardware,
    plots,
    roofline,
    scale_plots,
    scales,
    value_plots,
    workspace,
)
from helpers.checkpoint import Checkpoint
from helpers.fp8 import MAX

VIEWS = ("scales", "weights", "error")
MAPS = {"scale spread": lambda base, fp8: scales.spread_map(fp8), "SQNR, dB": scales.sqnr_map}


def scale_slider(values):
    """A slider over the scale of `values`, float tensor [n]; below it what clips and what drowns.

    In powers of two times amax / 448, the scale that FP8_DYNAMIC takes.
    """
    import ipywidgets as ui

    best = float(values.abs().max()) / MAX
    powers = [(scale_plots.times(2.0**power), 2.0**power) for power in range(-6, 17)]
    slider = ui.SelectionSlider(options=powers, value=1.0, description="scale",
                                continuous_update=False, layout=ui.Layout(width="40em"))
    words, picture = ui.HTML(), ui.Output()

    def show(_=None):
        scale = slider.value * best
        words.value = (f"scale = {slider.label} amax / 448 = {scale:.3g}: "
                       f"{scale_plots.in_words(values, scale)}")
        picture.clear_output(wait=True)
        with picture:
            scale_plots.clips_and_drowns(values, [scale])

    slider.observe(show, "value")
    show()
    return ui.VBox([slider, words, picture])


def draw(base: Checkpoint, fp8: Checkpoint, module: str, view: str) -> None:
    """Show one view of one module: "scales", "weights" (of its loudest channel) or "error"."""
    scale = scales.of(fp8, module)
    if view == "scales":
        value_plots.channel_scales(module, scale)
    elif view == "weights":
        scales.require_one_model(base, fp8, f"{module}.weight")
        channel = int(scale.argmax())
        before, after = (scales.rows(path, f"{module}.weight", channel, channel + 1)[0]
                         for path in (base, fp8))
        value_plots.weights_on_grid(module, channel, before, after, float(scale[channel]))
    elif view == "error":
        value_plots.channel_error(module, scales.relative_error(base, fp8, module))
    else:
        raise ValueError(f"no view {view!r}: {', '.join(VIEWS)}")


def explorer(base: Checkpoint, fp8: Checkpoint):
    """The explorer: controls for layer, module and view, a map whose cells select, the picture.

    Bad input is a sentence where the picture would be.
    """
    import ipywidgets as ui

    picture, note, grid = ui.Output(), ui.HTML(), ui.VBox()
    try:
        found = {(layer, short): module for layer, short, module in scales.modules(fp8)}
    except WorkbookError as error:
        note.value = _sentence(error)
        return note
    layer = ui.Dropdown(options=sorted({key[0] for key in found}), description="layer")
    short = ui.Dropdown(options=scales.in_run_order(key[1] for key in found), description="module")
    view = ui.Dropdown(options=VIEWS, description="view")
    colour = ui.Dropdown(options=list(MAPS), description="map")

    def update(*_):
        picture.clear_output(wait=True)
        module = found.get((layer.value, short.value))
        try:
            if module is None:
                raise WorkbookError(f"Layer {layer.value} has no FP8 module {short.value}.",
                                    "It was left in the base's type.", "Choose another module.")
            note.value = f"largest scales, by channel: {scales.largest(scales.of(fp8, module))}"
            with picture:
                draw(base, fp8, module, view.value)
        except WorkbookError as error:
            picture.clear_output()  # the last module's picture must not stand under the sentence
            note.value = _sentence(error)

    def select(key):
        layer.value, short.value = key

    def colour_map(*_):
        try:
            table = MAPS[colour.value](base, fp8)
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


def budget_table(config: dict, name: str):
    """What fits on one GPU of `data/gpus.json`: a DataFrame of words, a column for each arm.

    Raises `WorkbookError` for a GPU that is not in the list.
    """
    import pandas as pd

    columns = {}
    gpu = roofline.named(name)
    titles = {"bf16": arm_names.sixteen_bits(hardware.gpu_mode(roofline.listed(gpu)).dtype),
              "fp8": "FP8"}
    for arm, found in roofline.budgets(config, gpu).items():
        columns[titles[arm]] = {
            "weights, GB": f"{found.weights / 1e9:.2f}",
            "left for the KV cache, GB": f"{found.left / 1e9:.2f}" if found.fits else "too little",
            "tokens of KV cache": f"{found.tokens:,}",
            "longest context": f"{found.context:,}",
            "full contexts at once": f"{found.concurrency}",
            "one stream's ceiling, tokens/s": f"{found.ceiling:.1f}" if found.tokens else "none",
        }
    return pd.DataFrame(columns)


def gpu_menu():
    """A menu of GPUs; below it, what of Phi-4 fits on the one chosen: a sentence and a table."""
    import ipywidgets
    from IPython.display import display

    config = roofline.load_config(workspace.data("phi4"))
    menu = ipywidgets.Dropdown(options=[gpu["name"] for gpu in roofline.gpus()], value="A40",
                               description="GPU")
    words, table = ipywidgets.HTML(), ipywidgets.Output()

    def show(_=None):
        words.value = roofline.explain(config, menu.value)
        table.clear_output(wait=True)
        with table:
            display(budget_table(config, menu.value))

    menu.observe(show, names="value")
    show()
    return ipywidgets.VBox([menu, words, table])
