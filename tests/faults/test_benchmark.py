"""Faults of the benchmark: its process, its server, its log, and who can listen."""

import contextlib
import os
import subprocess
import sys
import threading
import time

import psutil
import pytest
import stand_in

from helpers import WorkbookError, throughput, workspace
from helpers.throughput import Work

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="a disk of one's own needs root to mount")


@pytest.fixture(autouse=True)
def own_workspace(tmp_workspace):
    """Every fault has a workspace of its own."""


def benchmark_process() -> psutil.Process:
    """The process of the benchmark that this one has started."""
    (worker,) = (child for child in psutil.Process().children()
                 if "helpers.serve_side.bench_worker" in child.cmdline())
    return worker


@pytest.mark.slow
@pytest.mark.fault("a benchmark with HTTP_PROXY and a ~/.netrc set")
def test_nothing_of_a_benchmark_goes_to_a_proxy(fp8_server, tmp_path, monkeypatch, happened):
    (tmp_path / ".netrc").write_text("default login reader password theirs\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    with stand_in.proxy(monkeypatch) as leaked, throughput.benchmark() as measure:
        result = measure(fp8_server, Work(streams=2, generated_tokens=4))
    assert leaked == [] and result.output_tokens == [4, 4]
    happened("both requests were answered with the server's own key; none went to the proxy")


@pytest.mark.slow
@pytest.mark.fault("the benchmark's process is killed")
def test_a_benchmark_that_dies(happened):
    with (stand_in.vllm(lambda request: time.sleep(60) or (200, b"")) as server,
          throughput.benchmark() as measure):
        def kill():
            while not server.asked:
                time.sleep(0.05)
            benchmark_process().kill()

        threading.Thread(target=kill).start()
        with pytest.raises(WorkbookError, match="did not run") as said:
            measure(server, Work(generated_tokens=4))
        # and once more, when it is known to be dead
        with pytest.raises(WorkbookError, match="its process died"):
            measure(server, Work(generated_tokens=4))
    happened(said.value)


@pytest.mark.slow
@pytest.mark.fault("the server dies during a benchmark")
def test_a_server_that_dies_under_a_benchmark(happened):
    with stand_in.vllm() as server:
        pass  # nobody listens at its port any more
    with (throughput.benchmark() as measure,
          pytest.raises(WorkbookError, match="2 of 2 requests failed") as said):
        measure(server, Work(streams=2, generated_tokens=4))
    assert "server is still up" in said.value.remedy
    assert "figures are not used" in said.value.meaning
    happened(said.value)


@pytest.mark.fault("the benchmark's answer is cut off")
@pytest.mark.parametrize("said", ['{"result": {"output_thr', "", "Segmentation fault\n"])
def test_half_an_answer_of_the_benchmark(said, monkeypatch, happened):
    with (stand_in.vllm() as server, contextlib.ExitStack() as stack):
        dying = stack.enter_context(subprocess.Popen(
            [sys.executable, "-c", f"input(); print({said!r}, end='')"], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        with pytest.raises(WorkbookError, match="did not run") as error:
            throughput._measure(dying, server, Work(), ())
    happened(error.value)


@pytest.mark.fault("a serving environment in which vLLM cannot be imported")
def test_a_benchmark_that_cannot_start(monkeypatch, happened):
    # The notebook's environment has no vLLM.
    monkeypatch.setattr(throughput.serving, "serve_python", lambda: sys.executable)
    with stand_in.vllm() as server, throughput.benchmark() as measure:
        with pytest.raises(WorkbookError, match="its process died") as said:
            measure(server, Work())
        time.sleep(1)  # its pipe outlives its last word by a moment
        with pytest.raises(WorkbookError, match="its process died"):
            measure(server, Work())
    log = (workspace.root() / "logs" / "benchmark.log").read_text()
    assert "No module named 'vllm'" in log and "benchmark.log" in said.value.remedy
    happened(said.value)


@as_root
@pytest.mark.fault("the benchmark's log cannot be written")
def test_a_read_only_workspace(tmp_workspace, happened):
    tmp_workspace.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", tmp_workspace], check=True)
    try:
        with (pytest.raises(WorkbookError, match="cannot be written: Read-only") as said,
              throughput.benchmark()):
            pass
    finally:
        subprocess.run(["umount", "--lazy", tmp_workspace], check=True)
    happened(said.value)


@pytest.mark.fault("a file where the logs' folder should be")
def test_a_file_in_place_of_the_logs(happened):
    (workspace.root() / "logs").write_text("mine")
    with (pytest.raises(WorkbookError, match="should be a folder|something else should") as said,
          throughput.benchmark()):
        pass
    happened(said.value)


@pytest.mark.fault("work of no streams, tokens or rounds")
@pytest.mark.parametrize("what", ["streams", "prompt_tokens", "generated_tokens", "rounds"])
def test_work_that_is_none(what, happened):
    with pytest.raises(WorkbookError, match="is no work") as said:
        Work(**{what: 0})
    happened(said.value)
