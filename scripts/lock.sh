#!/usr/bin/env bash
# Writes requirements.lock (everything) and requirements-base.lock (the base install) from pyproject.toml.
# torch is locked to the CPU build of 2.13.0: a range would bring gigabytes of CUDA packages.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
"$python" -m pip install --quiet uv
compile() { "$python" -m uv pip compile --quiet --generate-hashes --no-header --no-annotate --python-version 3.11 "$@"; }
links=()
[ -n "${PIP_FIND_LINKS:-}" ] && links=(--find-links "$PIP_FIND_LINKS")
compile pyproject.toml -o requirements-base.lock
compile "${links[@]}" --extra server --extra train --extra check --extra dev pyproject.toml -o requirements.lock
