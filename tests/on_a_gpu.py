"""What the tests need to know where they run on a GPU, which they share with each other."""

import pytest

from helpers import hardware, models, serving

# On a GPU two servers of the fixtures stay up while other tests start theirs, and vLLM refuses to
# start where less is free than the share it is asked to keep to. With a KV cache of a given size it
# takes no more than it needs (`Worker.determine_available_memory`).
BESIDE_OTHERS = ["--gpu-memory-utilization", "0.05", "--kv-cache-memory-bytes", str(2**28)]


def server_flags(mode=None) -> list[str]:
    """The bundled model's flags, for a server that is up beside others; by default of this machine.
    """
    mode = mode or hardware.serving_mode(hardware.detect())
    return [*serving.default_flags(models.tiny(), mode), *beside_others(mode)]


def beside_others(mode) -> list[str]:
    """What follows a server's own flags in a mode, of which vLLM takes the last; none on a CPU."""
    return BESIDE_OTHERS if mode.device == "cuda" else []


def require_gpus(count: int) -> None:
    """Skip a test that needs so many GPUs, on a machine that serves on fewer."""
    machine = hardware.detect()
    if hardware.serving_mode(machine).device == "cuda" and len(machine.gpus) < count:
        pytest.skip(f"this needs {count} GPUs, and there is one" if len(machine.gpus) == 1 else
                    f"this needs {count} GPUs, and there are {len(machine.gpus)}")
