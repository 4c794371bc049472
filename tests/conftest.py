"""What the tests share: a workspace of their own, the bundled model, its FP8 twin, two servers."""

import os
from pathlib import Path

import pytest

from helpers import compiler

REPO = Path(__file__).resolve().parent.parent

# A participant's servers and a reader's choice of numerics are no part of what is tested. Their
# modules need packages that the browser tests' environment has not (a test compares the names).
READERS = ("PHI4_FP8_SERVERS", "PHI4_FP8_KEY_FILE", "PHI4_FP8_CPU_NUMERICS")
for variable in READERS:
    os.environ.pop(variable, None)


# Files that take longest: they begin, so that no worker ends alone with one of them.
LONGEST = ("test_serving", "test_streaming", "test_servers", "test_cpu_kernels", "test_gpu_memory",
           "test_bench_cpu", "test_layer_trace")


def pytest_collection_modifyitems(items) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture
def tmp_workspace(tmp_path, monkeypatch) -> Path:
    """A fresh, empty workspace for one test."""
    monkeypatch.setenv("PHI4_FP8_WORKSPACE", str(tmp_path / "workspace"))
    return tmp_path / "workspace"


@pytest.fixture
def a_compiler(monkeypatch) -> None:
    """Skip where there is no C compiler, or no Python.h: the README asks for them with a GPU alone.
    """
    monkeypatch.delenv("CC", raising=False)
    if why := compiler.fault():
        pytest.skip(why)


@pytest.fixture(scope="session")
def tiny_base():
    """The bundled model, a `Checkpoint`."""
    from helpers import models

    return models.tiny().checkpoint


@pytest.fixture(scope="session")
def tiny_fp8(tmp_path_factory, tiny_base):
    """The bundled model's FP8 checkpoint, made once by the real LLM Compressor."""
    from helpers import models, quantize

    before = os.environ.get("PHI4_FP8_WORKSPACE")
    os.environ["PHI4_FP8_WORKSPACE"] = str(tmp_path_factory.mktemp("fp8"))
    try:
        return quantize.fp8_checkpoint(models.tiny(), tiny_base)
    finally:
        if before is None:
            del os.environ["PHI4_FP8_WORKSPACE"]
        else:
            os.environ["PHI4_FP8_WORKSPACE"] = before


def _server(model):
    from on_a_gpu import server_flags

    from helpers import serving

    return serving.VllmServer(model, server_flags())


@pytest.fixture(scope="session")
def fp8_server(tiny_fp8):
    with _server(tiny_fp8) as server:
        yield server


@pytest.fixture(scope="session")
def bf16_server(tiny_base):
    with _server(tiny_base) as server:
        yield server
