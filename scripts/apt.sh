#!/usr/bin/env bash
# Installs Debian packages: `apt.sh demo` what the demo uses, `apt.sh test` also the real components that the tests run.
# Asks for nothing when they are all there.
set -euo pipefail
packages=(python3-venv fortunes-zh procps)
if [ "${1:-demo}" = test ]; then
  packages+=(bubblewrap chromium faketime fonts-noto-cjk iproute2 mariadb-server munge postgresql-15)
  packages+=(slurm-client slurm-wlm-basic-plugins slurm-wlm-jwt-plugin slurmctld slurmd slurmdbd slurmrestd)
fi
missing=()
for package in "${packages[@]}"; do
  dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'install ok installed' || missing+=("$package")
done
[ ${#missing[@]} -eq 0 ] && exit 0
run=()
if [ "$(id -u)" -ne 0 ]; then
  command -v sudo >/dev/null || { echo "setup: needs root or sudo to install: ${missing[*]}" >&2; exit 1; }
  run=(sudo)
fi
echo "setup: installing from apt: ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
# No service is started by the installation: the tests start private instances on loopback.
"${run[@]}" bash -c '
  policy=/usr/sbin/policy-rc.d
  [ -e "$policy" ] || { printf "#!/bin/sh\nexit 101\n" > "$policy"; chmod +x "$policy"; trap "rm -f $policy" EXIT; }
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends "$@" >/dev/null
' apt "${missing[@]}"
