#!/usr/bin/env bash
# Makes .venv and installs what requirements.lock pins, with hashes.  Does nothing when the lock has not changed.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/apt.sh
stamp=.venv/.lock-installed
if [ -f "$stamp" ] && cmp -s requirements.lock "$stamp"; then exit 0; fi
python3 -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "qipan needs Python 3.11 or newer")'
[ -x .venv/bin/python ] || python3 -m venv .venv
pip=".venv/bin/python -m pip --disable-pip-version-check"
echo "setup: installing $(grep -c == requirements.lock) pinned packages into .venv"
if ! $pip install --quiet --require-hashes -r requirements.lock; then
  # The lock names torch's CPU build; where only the general build is served, take that one at the same version.
  echo "setup: the locked CPU build of torch was not found; installing torch==2.13.0 as it is served here"
  without_torch=$(mktemp)
  awk '/^torch==/ {skip=1; next} /^[a-zA-Z]/ {skip=0} !skip' requirements.lock > "$without_torch"
  $pip install --quiet --require-hashes -r "$without_torch"
  $pip install --quiet torch==2.13.0
  rm -f "$without_torch"
fi
$pip install --quiet --no-deps --no-build-isolation --editable . 2>/dev/null || {
  $pip install --quiet hatchling editables
  $pip install --quiet --no-deps --no-build-isolation --editable .
}
cp requirements.lock "$stamp"
