"""Serve the arms for a room, until Ctrl-C: `serve.py bf16,fp8 127.0.0.1 8001`, by `make serve`.

Each server listens on this machine alone unless another address is named, and asks for one key on
every route. The key is in a file of the workspace that only its owner can read.
"""

import os
import secrets
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path

from helpers import (
    WorkbookError,
    address,
    capacity,
    checkpoint,
    course,
    models,
    servers,
    serving,
    workspace,
)
from helpers.models import Profile
from helpers.serve_side import about

SHARE = 0.88  # of a GPU's memory, for all servers together
ABOUT = ["--middleware", "helpers.serve_side.about.About"]
SAID = ("Selected", "Marlin kernel", "KV cache size")  # what of a log is shown to others


def key_file() -> Path:
    """The file with the key, made if it is not there: mode 600, also when it was another before."""
    place = workspace.root() / "serve.key"
    with workspace.writing(place):
        try:
            new = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(new, "w") as file:
                file.write(secrets.token_urlsafe(24) + "\n")
        except FileExistsError:
            place.chmod(0o600)
    return place


def flags(phi4: course.Course, arms: dict[str, checkpoint.Checkpoint], arm: str) -> list[str]:
    """vLLM's flags for one of several servers: on a GPU each gets its weights' place and a part.

    Raises `WorkbookError` where they do not fit the GPU together, or the RAM.
    """
    own = [*serving.default_flags(phi4.profile, phi4.mode), *ABOUT]
    if phi4.mode.device == "cpu":
        if len(arms) > 1 and not servers.fit_together(arms.values(), phi4.mode):
            raise WorkbookError("This machine's free memory does not hold both servers.",
                                "Each takes its weights and 4 GiB.", "Serve one: ARMS=fp8.")
        return own
    memory, gpus = models.memory(phi4.machine), models.gpus(phi4.profile, phi4.machine)
    weights = {each: checkpoint.total_bytes(model.tensors) / gpus for each, model in arms.items()}
    # of the free memory `gpu_share` leaves one server's CONTEXT; each further one takes its own
    more = (len(arms) - 1) * capacity.CONTEXT / memory
    share = min(SHARE, models.gpu_share(phi4.profile, phi4.machine) - more)
    rest = (share * memory - sum(weights.values())) / len(arms)
    if rest < (least := capacity.REST + phi4.profile.kv_bytes / gpus):
        raise WorkbookError(f"This GPU does not hold {' and '.join(arms)}.",
                            f"Of {memory / 1e9:.0f} GB {share:.0%} are for servers, and each needs "
                            f"{least / 1e9:.1f} GB beside its weights.",
                            "Serve one: ARMS=fp8." if len(arms) > 1 else
                            "End what else holds memory of the GPU: `nvidia-smi` names it.")
    return [*own, "--gpu-memory-utilization", f"{(weights[arm] + rest) / memory:.3f}"]


def describe(phi4: course.Course, arm: str, server: serving.VllmServer, file: Path) -> None:
    """Write what `helpers.serve_side.about` tells about a server that is up."""
    profile = {each.name: getattr(phi4.profile, each.name)
               for each in fields(Profile) if each.name != "checkpoint"}
    gpus = ", ".join(gpu.name for gpu in phi4.machine.gpus)
    log = [line for line in server.log().splitlines() if any(word in line for word in SAID)]
    workspace.write_json(file, {
        "arm": arm, "model": server.model_name, "profile": profile, "mode": asdict(phi4.mode),
        "kernel": server.kernel, "checkpoint": server.checkpoint.fingerprint,
        "config": server.checkpoint.config, "log": "\n".join(log),
        "runs on": gpus or f"{phi4.machine.cpu_model}, {phi4.machine.cores} cores",
        "files": [name for name in about.FILES if (server.model / name).is_file()],
        "folder": str(server.model)})


def main(wanted: str, host: str, port: str) -> None:
    """Serve until interrupted; the first arm at `port`, the next one at the next."""
    if not port.isdecimal():
        raise WorkbookError(f"There is no port {port!r}.", "Ports are numbered from 1 to 65535.",
                            "Give a number, such as PORT=8001.")
    phi4 = course.open_course()
    every = phi4.arms()
    chosen = [arm for arm in wanted.replace(" ", "").split(",") if arm]
    if not chosen or not set(chosen) <= every.keys():
        raise WorkbookError(f"ARMS={wanted} cannot be served.",
                            f"This machine serves {' and '.join(every)}.",
                            f"Name one or both, with a comma: ARMS={','.join(every)}.")
    arms, key = {arm: every[arm] for arm in chosen}, key_file()
    first, pairs = int(port), []
    for at, (arm, model) in enumerate(arms.items()):
        file = workspace.folder("shared") / f"about-{first + at}.json"
        file.unlink(missing_ok=True)  # of an earlier server: this one is not ready
        pairs.append((arm, file, serving.VllmServer(
            model, flags(phi4, arms, arm), port=first + at, host=host,
            key=key.read_text().strip(), env={about.VARIABLE: str(file)})))
    every_server = [server for _, _, server in pairs]
    try:
        if phi4.mode.device == "cpu":
            serving.start_together(every_server)
        else:  # vLLM measures the free memory when it starts
            for server in every_server:
                server.start()
        for arm, file, server in pairs:
            describe(phi4, arm, server, file)
        print(words(pairs, key, host), flush=True)
        while True:
            for server in every_server:
                server.require_alive()
            time.sleep(1)
    finally:
        serving.stop_together(every_server)


def words(pairs: list, key: Path, host: str) -> str:
    """What those who are to use the servers need."""
    ports = {arm: server.port for arm, _, server in pairs}
    tunnel = " ".join(f"-L {port}:127.0.0.1:{port}" for port in ports.values())
    named = ",".join(f"{arm}=http://127.0.0.1:{port}" for arm, port in ports.items())
    lines = [f"Serving {' and '.join(ports)} at {host} until Ctrl-C.",
             f"The key is in {key}: give the file to those who may ask, and nobody else."]
    if host == address.LOOPBACK:
        lines.append(f"From another machine, through a tunnel: ssh -N {tunnel} USER@THIS-MACHINE")
    else:
        named = named.replace("127.0.0.1", "THIS-MACHINE" if host == "0.0.0.0" else host)
        lines.append("Others can reach this address, and what they send is not encrypted: a tunnel "
                     "to the default address is safer.")
    lines.append(f"Then: export PHI4_FP8_SERVERS={named} PHI4_FP8_KEY_FILE=THE-KEY-FILE")
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except WorkbookError as error:
        sys.exit(f"\n{error}")
    except KeyboardInterrupt:
        print("\nStopped; no server is left.")
