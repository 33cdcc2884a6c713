#!/usr/bin/env bash
# Install slum from this checkout into a virtual environment: install.sh run|dev VENV. Quick when all is there.
set -euo pipefail
cd "$(dirname "$0")/.."
what=${1:?run or dev} venv=${2:?folder of the virtual environment}

packages=(python3 python3-venv bubblewrap ca-certificates curl nftables)
[ "$what" = dev ] && packages+=(supervisor wrk git)
# The peer of benchmarks/backup.py.
[ "$what" = dev ] && packages+=(etcd-server etcd-client)
# Hosts to bootstrap: tests/ssh_hosts.py.
[ "$what" = dev ] && packages+=(openssh-server sudo iproute2 util-linux systemd-container)
# Members with a wrong clock: tests/cluster_site.py.
[ "$what" = dev ] && packages+=(libfaketime)
# For prism, which holds what the cloud operators say and hear against the providers' own descriptions.
[ "$what" = dev ] && for tool in nodejs:node npm:npm; do command -v "${tool#*:}" >/dev/null || packages+=("${tool%:*}"); done

missing=()
for package in "${packages[@]}"; do
  dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
if [ ${#missing[@]} -gt 0 ]; then
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    # A service that a package starts by itself (supervisor) is not wanted: it is only a benchmark's peer.
    policy=/usr/sbin/policy-rc.d made=
    if [ ! -e $policy ]; then printf '#!/bin/sh\nexit 101\n' >$policy && chmod 755 $policy && made=1; fi
    trap '[ -z "$made" ] || rm -f $policy' EXIT
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
  else
    echo "not installed: ${missing[*]}" >&2
    echo "  as root: apt install ${missing[*]}    (or run this as root once)" >&2
    python3 -c 'import ensurepip' 2>/dev/null || exit 2
  fi
fi

python=${PYTHON:-}
if [ -z "$python" ]; then
  for candidate in /usr/bin/python3 python3; do
    if "$candidate" -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      python=$candidate
      break
    fi
  done
fi
if [ -z "$python" ]; then
  echo "slum needs Python 3.11 or newer with venv; found $(python3 --version 2>&1 || echo none)" >&2
  echo "  on Debian 12: apt install python3 python3-venv; elsewhere set PYTHON=/path/to/python3.11" >&2
  exit 2
fi

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
extra=""
[ "$what" = dev ] && extra="[dev]"
echo "installing slum and its Python packages into $venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".$extra"

prism=5.14.2
if [ "$what" = dev ] && ! grep -qs "\"version\": \"$prism\"" "$venv/prism/node_modules/@stoplight/prism-cli/package.json"; then
  echo "installing prism $prism into $venv/prism"
  npm install --silent --no-audit --no-fund --prefix "$venv/prism" "@stoplight/prism-cli@$prism" ||
    echo "prism is not there: the tests that need it are skipped" >&2
fi

hcl2json=0.21.0 # HashiCorp's own HCL parser, a judge of exported Terraform files
if [ "$what" = dev ] && ! grep -qs "\"version\": \"$hcl2json\"" "$venv/npm/node_modules/@cdktf/hcl2json/package.json"; then
  echo "installing hcl2json $hcl2json into $venv/npm"
  npm install --silent --no-audit --no-fund --prefix "$venv/npm" "@cdktf/hcl2json@$hcl2json" ||
    echo "hcl2json is not there: the tests that need it are skipped" >&2
fi
