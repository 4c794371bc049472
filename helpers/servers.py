"""The arms' servers: side by side where memory holds them all, else one after the other."""

import contextlib
from collections.abc import Iterable, Iterator

from helpers import checkpoint, hardware, serving
from helpers.checkpoint import Checkpoint
from helpers.hardware import ServingMode
from helpers.serving import VllmServer

MEMORY = 4 * 2**30  # bytes that a server on a CPU takes beside its weights, its KV cache included


def fit_together(models: Iterable[Checkpoint], mode: ServingMode) -> bool:
    """Whether servers of all these models can be up at once.

    On a CPU that is a question of the RAM that is free. On a GPU it is not done: vLLM takes 90 % of
    its memory, and measures what is free while it starts, which a second server would disturb.
    """
    needed = [checkpoint.total_bytes(model.tensors) + MEMORY for model in models]
    return mode.device == "cpu" and sum(needed) < hardware.available_ram()


@contextlib.contextmanager
def running(arms: dict[str, Checkpoint], flags: list[str],
            mode: ServingMode) -> Iterator[Iterator[tuple[str, VllmServer]]]:
    """A context manager over (arm, server), each server up while it is its arm's turn.

    Where all fit in memory they are started side by side, and all are up until the end. At the end,
    an error or an interruption none is left.
    """
    servers = {arm: VllmServer(model, flags) for arm, model in arms.items()}
    try:
        if fit_together(arms.values(), mode):
            serving.start_together(list(servers.values()))
        yield _in_turn(servers)
    finally:
        serving.stop_together(servers.values())


def _in_turn(servers: dict[str, VllmServer]) -> Iterator[tuple[str, VllmServer]]:
    for arm, server in servers.items():
        if server.is_running:
            yield arm, server
        else:
            with server:
                yield arm, server
