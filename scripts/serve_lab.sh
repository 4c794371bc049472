#!/bin/sh
# What the Containerfile starts: JupyterLab on a copy of the notebooks in the user's home, which is
# kept when a hub starts the container again. A hub names itself in the environment.
set -eu
mkdir -p "$HOME/notebooks"
cp -rn "$(dirname "$0")/../notebooks/." "$HOME/notebooks/"
if [ -n "${JUPYTERHUB_API_TOKEN:-}" ]; then
    exec jupyterhub-singleuser --ip=0.0.0.0 --notebook-dir="$HOME/notebooks"
fi
# In a container 127.0.0.1 is not reached from outside; JupyterLab makes a token and prints it.
exec jupyter lab --ip=0.0.0.0 --port=8888 --no-browser --notebook-dir="$HOME/notebooks"
