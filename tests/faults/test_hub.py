"""Faults of fetching: hubs and mirrors that lie, login pages, caches that are full or closed."""

import os
import subprocess
import sys
import time

import pytest
from local_hub import Hub, etag, serve
from small_disk import mounted
from test_download import PROGRAM, SHA, obtain, settings, snapshot

from helpers import workspace

REPO = workspace.repo()
SUM = "a" * 64


@pytest.fixture
def hub(tiny_base):
    names = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
    with serve(Hub("some/model", SHA, {
            n: (tiny_base.path / n).read_bytes() for n in names})) as server:
        yield server


def everything(folder) -> set[str]:
    return {str(place.relative_to(folder)) for place in folder.rglob("*")}


def lfs(total, size=10) -> dict:
    return {"lfs": {"oid": total, "size": size, "pointerSize": 134}}


@pytest.mark.fault("a hub whose checksum is a path")
@pytest.mark.parametrize("listed", [
    {"model.safetensors": lfs("../../../../stolen")},
    {"model.safetensors": lfs("/tmp/phi4-fp8-stolen")},
    {"model.safetensors": lfs(SUM.upper())},
    {"config.json": {"oid": "../../../../stolen"}},
], ids=["relative", "absolute", "capitals", "of a small file"])
def test_a_checksum_that_is_a_path(hub, tmp_path, listed, happened):
    hub.listed = listed
    said = obtain(hub, tmp_path / "home")
    assert "which is no file's name or sum" in said and "do not use this hub" in said.lower()
    assert hub.fetched == [] and "stolen" not in str(everything(tmp_path))
    assert not os.path.exists("/tmp/phi4-fp8-stolen")
    happened(said)


@pytest.mark.fault("a hub that changes its ETag into a path after its listing was checked")
def test_an_etag_that_is_a_path(hub, tmp_path, monkeypatch, happened):
    import local_hub

    honest = local_hub.etag
    monkeypatch.setattr(local_hub, "large", lambda path, content: {} if path != "model.safetensors"
                        else lfs(honest(content, path), len(content)))
    # what the headers of every file say, and the tree does not
    monkeypatch.setattr(local_hub, "etag", lambda content, path: honest(content, path)
                        if path == "" else "../../../../stolen")
    hub.listed = {n: {"oid": honest(c, "")} for n, c in hub.files.items()}
    said = obtain(hub, tmp_path / "home")
    assert said == f"path {snapshot(tmp_path / 'home')}\n"
    assert "stolen" not in str(everything(tmp_path))
    happened("fetched under the sums that were listed")


@pytest.mark.fault("a hub whose file names lead elsewhere")
@pytest.mark.parametrize("name", ["../stolen.json", "/tmp/phi4-fp8-stolen.json", "a/../b.json",
                                  "sub/folder.json", "new\nline.json"])
def test_a_file_name_that_leads_elsewhere(hub, tmp_path, name, happened):
    hub.files["x.json"] = b"{}"
    hub.listed = {"x.json": {"path": name}}
    said = obtain(hub, tmp_path / "home")
    assert "which is no file's name or sum" in said and hub.fetched == []
    assert "stolen" not in str(everything(tmp_path))
    happened(said)


@pytest.mark.fault("a hub whose sizes are no sizes")
@pytest.mark.parametrize("size", [-1, "12", True])
def test_a_size_that_is_none(hub, tmp_path, size, happened):
    hub.listed = {"model.safetensors": lfs(SUM, size)}
    said = obtain(hub, tmp_path)
    assert "it gives model.safetensors a size of" in said and hub.fetched == []
    happened(said)


@pytest.mark.fault("a hub that sends more than it announced")
def test_more_than_was_announced(hub, tmp_path, happened):
    hub.more = {"model.safetensors": b"\0" * 50_000_000}
    said = obtain(hub, tmp_path)
    assert "it sends more of model.safetensors than" in said
    largest = max(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file())
    assert largest < 7_000_000
    happened(said)


@pytest.mark.fault("a network's login page answers instead of the hub")
def test_a_login_page(hub, tmp_path, happened):
    hub.page = b"<html><title>Welcome to our guest network</title></html>"
    said = obtain(hub, tmp_path)
    assert "what answers there is not a hub: a network's login page" in said
    happened(said)


@pytest.mark.fault("a login page answers in the middle of a download")
def test_a_login_page_instead_of_a_file(hub, tmp_path, happened):
    content = hub.files["model.safetensors"]
    hub.listed = {"model.safetensors": lfs(etag(content, "model.safetensors"), len(content))}
    hub.files["model.safetensors"] = b"<html>Please log in</html>"
    said = obtain(hub, tmp_path)
    assert "model.safetensors arrived damaged" in said
    hub.files["model.safetensors"] = content  # nothing of the page is left in what is taken up
    assert obtain(hub, tmp_path).startswith("path ")
    happened(said)


@pytest.mark.fault("JSON of another form instead of the hub's")
@pytest.mark.parametrize("page", [b'{"error": "x"}', b'[{"type": "file"}]', b"[1, 2]", b"null"])
def test_json_of_another_form(hub, tmp_path, page, happened):
    hub.page = page
    said = obtain(hub, tmp_path)
    assert "could not be downloaded" in said
    happened(said)


@pytest.mark.fault("a piece in the cache longer than its file")
def test_a_piece_that_is_too_long(hub, tmp_path, happened):
    blobs = tmp_path / "hub" / "models--some--model" / "blobs"
    blobs.mkdir(parents=True)
    total = etag(hub.files["model.safetensors"], "model.safetensors")
    (blobs / f"{total}.workbook.incomplete").write_bytes(b"\0" * 8_000_000)
    (blobs / total).write_bytes(b"cut off")  # and a blob that another program left half-written
    assert obtain(hub, tmp_path).startswith("path ")
    happened("it was fetched anew")


@pytest.mark.fault("another program has fetched config.json alone")
def test_a_snapshot_that_another_program_began(hub, tmp_path, happened):
    """As `AutoConfig.from_pretrained` leaves it; the client takes that for the whole."""
    program = ("import sys; from huggingface_hub import hf_hub_download\n"
               "hf_hub_download('some/model', 'config.json', revision=sys.argv[1])")
    subprocess.run([sys.executable, "-c", program, SHA], check=True, env=settings(hub, tmp_path))
    assert obtain(hub, tmp_path).startswith("path ")
    assert (snapshot(tmp_path) / "model.safetensors").exists()
    happened("the rest was fetched")


@pytest.mark.fault("a disk too small for the download")
def test_a_disk_that_is_too_small(hub, tmp_path, happened):
    with mounted(tmp_path / "disk", "size=4m") as disk:
        said = obtain(hub, disk)
    assert "0.01 GB are to come, and 0.00 GB of disk are free" in said and "HF_HOME" in said
    assert hub.fetched == []  # told before the first byte
    happened(said)


@pytest.mark.fault("the disk fills up during the download")
def test_a_disk_that_fills_up(hub, tmp_path, happened):
    with mounted(tmp_path / "disk", "size=10m") as disk:
        hub.hold["model.safetensors"] = 1_000_000
        environment = settings(hub, disk) | {"HF_HUB_DOWNLOAD_TIMEOUT": "1"}
        running = subprocess.Popen([sys.executable, "-c", PROGRAM, SHA], cwd=REPO, text=True,
                                   stdout=subprocess.PIPE, env=environment)
        while "model.safetensors" not in hub.fetched and running.poll() is None:
            time.sleep(0.05)
        (disk / "another").write_bytes(b"\0" * 6_000_000)
        said = running.communicate(timeout=60)[0]  # the hub hangs; the client asks once more
    assert "could not be downloaded: the disk is full" in said
    happened(said)


@pytest.mark.fault("a cache that cannot be written to")
def test_a_file_where_the_cache_should_be(hub, tmp_path, happened):
    (tmp_path / "hub").write_text("a file")
    said = obtain(hub, tmp_path)
    assert "the hub's cache cannot be written to" in said and "HF_HOME" in said
    happened(said)


@pytest.mark.fault("no HOME and no entry in /etc/passwd")
def test_no_home_for_the_cache(hub, tmp_path, happened):
    someone = ["unshare", "--user", "--map-user=54321"]
    if subprocess.run([*someone, "true"], capture_output=True).returncode:
        pytest.skip("this machine does not allow user namespaces")
    environment = {k: v for k, v in settings(hub, "").items()
                   if k not in ("HOME", "HF_HOME", "XDG_CACHE_HOME")}
    done = subprocess.run([*someone, sys.executable, "-c", PROGRAM, SHA], cwd=tmp_path,
                          env=environment | {"PYTHONPATH": str(REPO)}, capture_output=True,
                          text=True)
    assert "the hub's cache has no place of its own" in done.stdout, done.stderr
    assert everything(tmp_path) == set()  # no folder called ~
    happened(done.stdout)


@pytest.mark.fault("an address or a token that cannot be one")
@pytest.mark.parametrize("environment", [
    {"HF_ENDPOINT": "huggingface.co"}, {"HF_ENDPOINT": "http://[bad"},
    {"HF_TOKEN": "ключ"},
    {"HTTPS_PROXY": "nonsense", "HF_ENDPOINT": "https://127.0.0.1:9"}],
    ids=["no scheme", "no host", "not ASCII", "proxy"])
def test_settings_of_no_form(hub, tmp_path, environment, happened):
    said = obtain(hub, tmp_path, **environment)
    assert "could not be downloaded" in said
    assert "HF_TOKEN" not in environment or "no token has" in said
    happened(said)


@pytest.mark.fault("a cache on a read-only disk that holds the model")
def test_a_whole_cache_that_is_read_only(hub, tmp_path, happened):
    with mounted(tmp_path / "disk", "size=16m") as disk:
        assert obtain(hub, disk).startswith("path ")
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        hub.asked.clear()
        assert obtain(hub, disk) == f"path {snapshot(disk)}\n"
    assert hub.asked == []
    happened("it was used as it is")


@pytest.mark.fault("two notebooks that download the same model at once")
def test_two_downloads_at_once(hub, tmp_path, happened):
    both = [subprocess.Popen([sys.executable, "-c", PROGRAM, SHA], cwd=REPO, text=True,
                             stdout=subprocess.PIPE, env=settings(hub, tmp_path)) for _ in "12"]
    said = [each.communicate(timeout=60)[0] for each in both]
    assert said == [f"path {snapshot(tmp_path)}\n"] * 2
    assert sorted(hub.fetched) == sorted(hub.files)  # each file once
    happened("one fetched, the other waited")
