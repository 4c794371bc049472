"""Faults of publishing: what must not leave the machine, and a hub that refuses."""

import json
import shutil
import subprocess
import sys

import pytest
from local_hub import Hub, serve
from test_download import SHA, settings

from helpers import WorkbookError, checkpoint, publish, workspace

REPO = workspace.repo()
PROGRAM = """
import sys, pathlib
from huggingface_hub import ModelCard
from helpers import WorkbookError, checkpoint, publish
folder, public, token = sys.argv[1:]
card = ModelCard("---\\nlicense: mit\\n---\\nmine")
try:
    print("sent", publish.publish(checkpoint.verified(pathlib.Path(folder)), card, "me/mine",
                                  really=True, token=token, public=bool(public)))
except WorkbookError as error:
    print(error)
"""


@pytest.fixture
def hub():
    with serve(Hub("some/model", SHA, {})) as server:
        yield server


@pytest.fixture
def folder(tmp_path, tiny_fp8):
    return shutil.copytree(tiny_fp8.path, tmp_path / "phi-4-fp8-dynamic")


def publish_it(hub, folder, public="", token="hf_secret") -> str:
    done = subprocess.run([sys.executable, "-c", PROGRAM, folder, public, token], cwd=REPO,
                          capture_output=True, text=True,
                          env=settings(hub, folder.parent / "home"))
    assert "Traceback" not in done.stderr, done.stderr
    assert token not in done.stdout + done.stderr
    return done.stdout


@pytest.mark.fault("files in the checkpoint's folder that are nobody's business")
def test_files_that_no_manifest_names(hub, folder, happened):
    for name in (".env", "notes", "id_rsa"):
        (folder / name).write_text("PASSWORD=secret")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("url = https://user:secret@example.org")
    said = publish_it(hub, folder)
    assert said.startswith("sent ") and hub.repos == {"me/mine": True}
    (sent,) = hub.commits
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    assert sent.keys() == {"README.md", *manifest}
    assert all(sent[name] == (folder / name).read_bytes() for name in manifest)
    assert b"mine" in sent["README.md"] and b"secret" not in b"".join(sent.values())
    happened(f"sent were {', '.join(sorted(sent))}")


@pytest.mark.fault("a link out of the checkpoint's folder")
@pytest.mark.parametrize("linked", ["a file", "a folder"])
def test_a_link_out_of_the_folder(folder, tmp_path, linked, happened):
    """Its sum is right and the manifest names it: only the link tells."""
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "tokenizer.extra").write_text("PASSWORD=secret")
    name = "tokenizer.extra" if linked == "a file" else "sub/tokenizer.extra"
    if linked == "a file":
        (folder / name).symlink_to(secret / "tokenizer.extra")
    else:
        (folder / "sub").symlink_to(secret, target_is_directory=True)
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    manifest[name] = {"bytes": 15, "sha256": workspace.sha256(folder / name)}
    (folder / "MANIFEST.json").write_text(json.dumps(manifest))
    with pytest.raises(WorkbookError, match="leads out of the folder") as said:
        publish.files(checkpoint.verified(folder))
    happened(said.value)


@pytest.mark.fault("a manifest whose names lead out of the folder")
@pytest.mark.parametrize("name", ["../secret", "/etc/hostname"])
def test_a_name_out_of_the_folder(folder, tmp_path, name, happened):
    (tmp_path / "secret").write_text("PASSWORD=secret")
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    place = folder / name
    manifest[name] = {"bytes": place.stat().st_size, "sha256": workspace.sha256(place)}
    (folder / "MANIFEST.json").write_text(json.dumps(manifest))
    with pytest.raises(WorkbookError, match="leads out of the folder|is no size and sum") as said:
        publish.files(checkpoint.verified(folder))
    happened(said.value)


@pytest.mark.fault("a repository of that name is public already")
def test_an_existing_public_repository(hub, folder, happened):
    hub.repos = {"me/mine": False}
    said = publish_it(hub, folder)
    assert "does not call me/mine private" in said and "public=True" in said
    assert hub.commits == []
    happened(said)
    assert publish_it(hub, folder, public="yes").startswith("sent ")


@pytest.mark.fault("a hub that makes the repository public although it was asked not to")
def test_a_repository_that_turns_out_public(hub, folder, happened):
    hub.makes_public = True
    said = publish_it(hub, folder)
    assert "does not call me/mine private" in said and hub.commits == []
    happened(said)


@pytest.mark.fault("a private repository that is there already")
def test_an_existing_private_repository(hub, folder, happened):
    hub.repos = {"me/mine": True}
    said = publish_it(hub, folder)
    assert said.startswith("sent ") and "/api/repos/create" not in hub.asked
    happened("it got one more commit")


@pytest.mark.fault("a hub that refuses")
@pytest.mark.parametrize(("change", "says"), [
    ({"read_only": True}, "the hub does not allow it (HTTP 403)"),
    ({"fault": "unknown"}, "the hub does not allow it (HTTP 401)"),
    ({"fault": "busy"}, "the hub asks for a pause (HTTP 429)"),
    ({"fault": "broken"}, "the hub answered HTTP 503"),
    ({"page": b"<html>Log in</html>"}, "what answers there is not a hub"),
], ids=["a token that may only read", "a wrong token", "busy", "broken", "a login page"])
def test_a_hub_that_refuses(hub, folder, change, says, happened):
    for name, value in change.items():
        setattr(hub, name, value)
    said = publish_it(hub, folder)
    assert "could not be published as me/mine: " in said
    assert says in said
    assert hub.commits == []
    happened(said)


@pytest.mark.fault("a hub that is not there")
def test_a_hub_that_is_not_there(hub, folder, happened):
    hub.url = "http://127.0.0.1:9"
    said = publish_it(hub, folder)
    assert "the hub did not answer" in said
    happened(said)


@pytest.mark.fault("a repository without an owner, or no name at all")
@pytest.mark.parametrize("repo", ["mine", "", "me/mine/more", "../mine", "me/mine\n"])
def test_a_name_that_is_none(folder, repo, happened):
    with pytest.raises(WorkbookError, match="does not name a repository") as said:
        publish.publish(checkpoint.verified(folder), None, repo)
    happened(said.value)
