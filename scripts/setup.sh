#!/usr/bin/env bash
# Makes .venv and installs what a lock pins, with hashes: `setup.sh demo` requirements-demo.lock, `setup.sh test`
# requirements.lock (everything).  Does nothing when that lock, or the larger one at the same state, is installed.
set -euo pipefail
cd "$(dirname "$0")/.."
what=${1:-demo}
bash scripts/apt.sh "$what"
lock=requirements-demo.lock
[ "$what" = test ] && lock=requirements.lock
installed() { [ -f ".venv/.installed-$1" ] && cmp -s "$1" ".venv/.installed-$1"; }
if installed "$lock" || installed requirements.lock; then exit 0; fi
python3 -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "qipan needs Python 3.11 or newer")'
[ -x .venv/bin/python ] || python3 -m venv .venv
pip=".venv/bin/python -m pip --disable-pip-version-check"
echo "setup: installing $(grep -c == "$lock") pinned packages into .venv"
if ! $pip install --quiet --require-hashes -r "$lock"; then
  # The lock names torch's CPU build; where only the general build is served, take that one at the same version.
  echo "setup: the locked CPU build of torch was not found; installing torch==2.13.0 as it is served here"
  without_torch=$(mktemp)
  awk '/^torch==/ {skip=1; next} /^[a-zA-Z]/ {skip=0} !skip' "$lock" > "$without_torch"
  $pip install --quiet --require-hashes -r "$without_torch"
  $pip install --quiet torch==2.13.0
  rm -f "$without_torch"
fi
$pip install --quiet --no-deps --no-build-isolation --editable . 2>/dev/null || {
  $pip install --quiet hatchling editables
  $pip install --quiet --no-deps --no-build-isolation --editable .
}
cp "$lock" ".venv/.installed-$lock"
