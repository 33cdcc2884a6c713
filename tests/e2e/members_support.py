"""What the tests of several members share: one control plane a file, and questions to it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cluster_provider import Provider, cloud_toml
from cluster_site import Cluster, Host, fleet_toml, missing_tools, until

MARKS = [
    pytest.mark.root,
    pytest.mark.xdist_group("members"),
    pytest.mark.skipif(bool(missing_tools()), reason=f"needs {', '.join(missing_tools())}"),
]


@contextmanager
def members_and_more() -> Iterator[Cluster]:
    """Three members, two of them tenements of the fleet, and a tenement t1 at a provider, each with one service."""
    with Cluster() as made:
        made.make(members=3)
        with Provider(made, [made.hosts[name] for name in made.members]):
            toml = made.base / "slum.toml"
            toml.write_text(fleet_toml(members=["m1", "m2"]) + cloud_toml(["t1"]))
            made.slum(made.hosts["m2"], "apply", str(toml), "--yes", timeout=120)
            yield made


def pid_of_hello(cluster: Cluster, host: Host) -> int:
    """Return the pid of hello on *host*, once a former generation has ended."""

    def only() -> set[int]:
        found = {pid for pid, words in cluster.processes(host) if "serve_forever" in words}
        return found if len(found) == 1 else set()

    (pid,) = until(only, 20, f"one hello on {host.name}")
    return int(pid)


def is_whole(cluster: Cluster) -> bool:
    """Tell whether every member sees every member up and at most one behind, and hears of its agents."""
    for name in cluster.members:
        view = cluster.view(cluster.hosts[name])
        members = {row["id"]: row for row in view["members"]}
        if set(members) != set(cluster.members) or view["leader"] is None:
            return False
        if any(row["role"] not in ("leader", "follower") or not row["followed"] for row in members.values()):
            return False
    return True


def phases(cluster: Cluster, host: Host) -> dict[str, str]:
    """Return the state of hello on each tenement, as *host* tells; unknown for one that is not heard of."""
    rows = cluster.slum(host, "ps", "--json").json
    return {row["tenement"]: "unknown" if row.get("stale_s") is not None else row["report"]["phase"] for row in rows}


def states(cluster: Cluster, host: Host) -> dict[str, str]:
    """Return the state of each machine, as *host* tells."""
    return {row["name"]: row["state"] for row in cluster.slum(host, "status", "--json").json["tenements"]}


ALL_HEALTHY = {"m1": "healthy", "m2": "healthy", "t1": "healthy"}


__all__ = [
    "ALL_HEALTHY",
    "MARKS",
    "Cluster",
    "Host",
    "is_whole",
    "members_and_more",
    "phases",
    "pid_of_hello",
    "states",
    "until",
]
