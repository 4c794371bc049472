"""A machine that has nothing beside what the set-up asks for."""

import pytest

from helpers import hardware, models, serving


@pytest.mark.slow
@pytest.mark.fault("a CPU server that is asked for logprobs where there is no C++ compiler")
def test_logprobs_without_a_compiler(tmp_workspace, tmp_path, tiny_fp8, happened):
    mode = hardware.serving_mode(hardware.detect())
    if mode.device != "cpu":
        pytest.skip("on a GPU the set-up asks for a compiler")
    bare = {"CXX": "/nonexistent/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    flags = serving.default_flags(models.tiny(), mode)
    with serving.VllmServer(tiny_fp8, flags, env=bare) as server:
        answer = server.post("/v1/completions", {"prompt": "Question:", "max_tokens": 4,
                                                 "temperature": 0, "logprobs": 2})
        assert len(answer["choices"][0]["logprobs"]["token_logprobs"]) == 4
        assert server.complete("Question:", max_tokens=4)
    happened("the server answered, and went on answering")
