"""`make test-browser`: a Chromium and .venv-browser where they are missing, then tests/browser."""

import os
import shutil
import subprocess
import sys

import environments
from environments import GB, REPO, Environment
from one_set_up import SetupError, locked, say

ENVIRONMENT = Environment(REPO / ".venv-browser", REPO / "requirements/browser.txt",
                          REPO / "requirements/constraints/browser.txt", None, int(0.2 * GB))
REMEDY = "Install it (on Debian: apt install chromium) and run the same command again."


def set_up() -> None:
    """Make .venv-browser unless it is whole; for Playwright, which no notebook uses."""
    if environments.is_whole(ENVIRONMENT):
        return
    with locked(REPO):
        uv, environ = environments.bootstrap_uv()
        environments.run_uv([uv, "venv", "--quiet", "--clear", "--python", sys.executable,
                             ENVIRONMENT.folder], environ, ENVIRONMENT.folder.name)
        environments.install(ENVIRONMENT, uv, environ, [])


def chromium() -> str:
    """The path of Debian's Chromium, installed if it is not there and this is root.

    Playwright would download a browser of its own; this one comes from the distribution.
    """
    if found := shutil.which("chromium"):
        return found
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise SetupError(f"There is no Chromium, and the browser's tests need it. {REMEDY}")
    say("      chromium, from the distribution's packages")
    for command in (["apt-get", "update"],
                    ["apt-get", "install", "-y", "--no-install-recommends", "chromium"]):
        ran = subprocess.run(command, capture_output=True, text=True,
                             env=dict(os.environ, DEBIAN_FRONTEND="noninteractive"))
    if ran.returncode or not (found := shutil.which("chromium")):
        raise SetupError(f"Chromium could not be installed ({environments.last_line(ran.stderr)}). "
                         f"{REMEDY}")
    return found


def main() -> int:
    try:
        set_up()
        os.environ["CHROMIUM"] = chromium()
    except SetupError as error:
        print(f"\nSet-up stopped: {error}", file=sys.stderr)
        return 1
    return subprocess.run([ENVIRONMENT.python, "-m", "pytest", "tests/browser"],
                          cwd=REPO).returncode


if __name__ == "__main__":
    sys.exit(main())
