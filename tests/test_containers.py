"""The development container and the Containerfile: what can be held without building them."""

import json
import re

from conftest import REPO

SECRET = re.compile(r"token|passw|secret|api_?key|credential", re.I)


def instructions() -> list[tuple[str, str]]:
    """The Containerfile's instructions, each on one line: (name, rest)."""
    text = re.sub(r"\\\n\s*", " ", (REPO / "Containerfile").read_text())
    return [(name, rest.strip()) for name, _, rest in
            (line.partition(" ") for line in text.splitlines() if line and line[0] != "#")]


def targets() -> set[str]:
    return set(re.findall(r"^([a-z0-9-]+):", (REPO / "Makefile").read_text(), re.M))


def test_the_development_container_ends_in_a_jupyterlab_that_is_set_up():
    text = (REPO / ".devcontainer" / "devcontainer.json").read_text()
    found = json.loads(re.sub(r"^\s*//.*$", "", text, flags=re.M))
    assert found["hostRequirements"] == {"cpus": 2, "memory": "8gb", "storage": "32gb"}
    assert found["postCreateCommand"].endswith(" libnuma1 && make setup")
    assert found["postAttachCommand"] == "make lab"
    assert {"setup", "lab"} <= targets() and found["waitFor"] == "postCreateCommand"
    assert found["remoteUser"] not in ("", "root") and 8888 in found["forwardPorts"]
    assert not SECRET.search(re.sub(r"//.*", "", text))


def test_the_container_runs_without_root_and_holds_no_secret():
    found = instructions()
    users = [rest for name, rest in found if name == "USER"]
    assert users == ["1000"]  # a number, so that a hub can see that it is not root
    assert [name for name, _ in found].index("USER") < [rest for _, rest in found].index(
        next(rest for _, rest in found if "setup.py" in rest))
    assert not any(SECRET.search(rest) for name, rest in found if name in ("ARG", "ENV", "COPY"))
    assert not any(name == "ADD" for name, _ in found)


def test_the_image_has_what_vllm_loads_from_the_system():
    assert any(" libnuma1 " in rest for name, rest in instructions() if name == "RUN")


def test_whatever_the_image_is_made_from_is_there_and_nothing_that_was_made():
    for name, rest in instructions():
        if name == "COPY":
            *sources, _ = (word for word in rest.split() if not word.startswith("--"))
            assert all((REPO / source).exists() for source in sources)
        if name == "CMD":
            assert (REPO / json.loads(rest)[-1].removeprefix("/opt/phi4-fp8-workbook/")).is_file()
    left_out = set((REPO / ".dockerignore").read_text().replace("**/", "").split())
    made = {line.rstrip("/") for line in (REPO / ".gitignore").read_text().split()}
    assert made - {".pytest_cache", ".ruff_cache"} <= left_out
    assert ".git" in left_out
