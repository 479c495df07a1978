#!/usr/bin/env bash
# Writes the locks from pyproject.toml: requirements.lock (everything), requirements-demo.lock (what `make demo` and a
# board need) and requirements-base.lock (the base install), at the same versions.
# torch is locked to the CPU build of 2.13.0: a range would bring gigabytes of CUDA packages.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
"$python" -m pip install --quiet uv
compile() { "$python" -m uv pip compile --quiet --generate-hashes --no-header --no-annotate --python-version 3.11 "$@"; }
links=()
[ -n "${PIP_FIND_LINKS:-}" ] && links=(--find-links "$PIP_FIND_LINKS")
everything=(--extra server --extra train --extra check --extra postgres --extra ray --extra mcp --extra docs --extra dev)
compile "${links[@]}" "${everything[@]}" pyproject.toml -o requirements.lock
compile "${links[@]}" -c requirements.lock --extra server --extra train pyproject.toml -o requirements-demo.lock
compile -c requirements.lock pyproject.toml -o requirements-base.lock
