#!/usr/bin/env bash
# Apply examples/quickstart on this machine, then ask each URL once and print what it answered.
set -euo pipefail
cd "$(dirname "$0")/.."
slum=${VENV:-.venv}/bin/slum

doctor=$("$slum" doctor) || { echo "$doctor"; echo "slum cannot run here yet: see the lines marked 'no' above" >&2; exit 8; }
echo "$doctor"
echo
fleet=examples/quickstart
if grep -q '^no *limits' <<<"$doctor"; then
  # A config that asks for limits is refused where none work (without root, mostly): run a copy without them.
  fleet=build/quickstart
  mkdir -p build && rm -rf $fleet && cp -r examples/quickstart $fleet
  sed -i '/_limit/d' $fleet/slum.toml
  echo "no limits work here (see doctor above), so $fleet is examples/quickstart without memory_limit_mb and pids_limit"
  echo
fi
"$slum" apply $fleet/slum.toml --yes
echo
"$slum" ps
echo
status=0
for service in notes hello; do
  # Not every resolver knows *.localhost, so the address is given; a browser and a newer curl need no --resolve.
  if answer=$(curl --silent --show-error --fail --max-time 5 --resolve "$service.localhost:8080:127.0.0.1" "http://$service.localhost:8080/"); then
    echo "http://$service.localhost:8080/  answers:  $answer"
  else
    echo "http://$service.localhost:8080/  does not answer: $slum explain $service" >&2
    status=8
  fi
done
echo
echo "next: $slum logs ticker -f    $slum explain hello    $slum status    stop all: $slum down --services"
exit $status
