"""How long a fleet of 1,000 tenements takes to export: files in memory, median of some runs.

    python benchmarks/exports.py [--tenements 1000] [--runs 5]

Claim: under 2 s for each export; exits 1 when a median is over it. There is no peer: nobody else exports a fleet.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

from slum.exports.base import Site
from slum.exports.registry import EXPORTS
from slum.model import (
    EnvVar,
    Fleet,
    FlyOperator,
    HetznerOperator,
    Listen,
    LocalOperator,
    Operator,
    Secret,
    Service,
    SshHost,
    SshOperator,
    Tenement,
)

LIMIT_S = 2.0


def fleet_of(count: int) -> Fleet:
    """Return *count* tenements over all operator types, three services each: a web app, a worker, a cache."""
    operators: tuple[Operator, ...] = (
        FlyOperator(name="fly", org="my-org", region="iad"),
        HetznerOperator(name="hetzner", location="fsn1", server_type="cx23", ssh_keys=("ops",)),
        LocalOperator(name="local"),
        SshOperator(name="vps", hosts=tuple(SshHost(host=f"10.0.{n // 250}.{n % 250}") for n in range(count // 3 + 1))),
    )
    names = ("fly", "hetzner", "vps")
    tenements = [
        Tenement(name=f"t{n:04}", operator="local" if n == 0 else names[n % 3], services=_services(n))
        for n in range(count)
    ]
    return Fleet(name="bench", domain="example.com", operators=operators, tenements=tuple(tenements))


def _services(number: int) -> tuple[Service, ...]:
    env = (EnvVar(name="CUSTOMER", value=f"c{number} ${{{{x}}}}"), EnvVar(name="DB", value="{data_dir}/db.sqlite"))
    secrets = (Secret(name="KEY", source="file:/etc/slum/key"),)
    return (
        Service(name="cache", command=("redis-server", "--port", "{port}"), listen=Listen.PORT, port=6379),
        Service(name="web", command=("python3", "app.py"), source="web", env=env, secrets=secrets, health="/healthz"),
        Service(name="worker", command=("python3", "worker.py"), source="web", env=env, listen=Listen.NONE),
    )


def main() -> int:
    """Print a line an export; 1 when a median is over the limit."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    arguments.add_argument("--tenements", type=int, default=1000)
    arguments.add_argument("--runs", type=int, default=5)
    given = arguments.parse_args()
    fleet = fleet_of(given.tenements)
    late = False
    for name, export in EXPORTS.items():
        times = []
        for _ in range(given.runs):
            begun = time.perf_counter()
            rendered = export(fleet, Site(version="1"))
            times.append(time.perf_counter() - begun)
        median = statistics.median(times)
        size = sum(len(file.text) for file in rendered.files)
        late = late or median >= LIMIT_S
        verdict = "ok" if median < LIMIT_S else "TOO SLOW"
        print(
            f"{name:<10} {given.tenements} tenements: {median:.2f} s (limit {LIMIT_S:g} s, {verdict}), "
            f"{len(rendered.files)} files, {size >> 10} KB, {len(rendered.losses)} losses"
        )
    return 1 if late else 0


if __name__ == "__main__":
    sys.exit(main())
