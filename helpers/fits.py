"""A widget: pick a GPU, see what of Phi-4 fits on it, and why."""

from helpers import hardware, roofline, workspace


def explain(config: dict, name: str) -> str:
    """One sentence for a GPU of `data/gpus.json`: its path, and which of bf16 and FP8 it can serve.

    Raises `WorkbookError` for a GPU that is not in the list.
    """
    table = roofline.fits_table(config, name)  # says so when there is no such GPU
    gpu = next(gpu for gpu in roofline.gpus() if gpu["name"] == name)
    mode = hardware.gpu_mode(roofline.listed(gpu))
    if mode.key == "none":
        return f"{mode.why}."
    arms = [arm for arm in table if table.loc["tokens of KV cache", arm] != "0"]
    verdict = {0: "Neither bf16 nor FP8 weights fit.",
               1: "FP8 fits and bf16 does not: quantize on the CPU, serve FP8 alone.",
               2: "Both fit, so they can be compared on this GPU."}[len(arms)]
    return f"{mode.title}. {verdict}"


def explorer():
    """A menu of GPUs with the sentence and the table of what fits below it."""
    import ipywidgets
    from IPython.display import display

    config = roofline.load_config(workspace.data("phi4"))
    menu = ipywidgets.Dropdown(options=[gpu["name"] for gpu in roofline.gpus()], value="A40",
                               description="GPU")
    words, table = ipywidgets.HTML(), ipywidgets.Output()

    def show(_=None):
        words.value = explain(config, menu.value)
        table.clear_output(wait=True)
        with table:
            display(roofline.fits_table(config, menu.value))

    menu.observe(show, names="value")
    show()
    return ipywidgets.VBox([menu, words, table])
