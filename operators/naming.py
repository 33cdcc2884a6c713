"""How a machine is named and labelled at a provider, so that its name alone says whose it is. Pure.

A name is made of the cluster's uuid and the machine's key (its name with its incarnation), so it is unique where the
provider holds names unique, and asking for the same key again can give no second machine. Labels say the same at length;
they may get lost, a name cannot. Nothing that is not named so is ever touched.
"""

from __future__ import annotations

import re

from slum.operators.base import MachineSpec

CLUSTER = "slum-cluster"
KEY = "slum-key"
MACHINE = "slum-machine"
TENEMENT = "slum-tenement"

_NAME = re.compile(r"slum-(?P<cluster>[0-9a-z]{1,12})-(?P<machine>[a-z0-9-]+)-(?P<incarnation>[1-9][0-9]*)")


def prefix_of(cluster: str) -> str:
    """Return what the names of all machines of *cluster* begin with."""
    return f"slum-{re.sub('[^0-9a-z]', '', cluster.lower())[:12]}-"


def name_of(cluster: str, key: str) -> str:
    """Return the name of the machine of *key*: at most 63 letters, digits and dashes, a host name."""
    return prefix_of(cluster) + key.replace(".", "-")


def key_in(name: str) -> tuple[str, str] | None:
    """Return (key, machine) of a name that name_of made, None for any other."""
    found = _NAME.fullmatch(name)
    return (f"{found['machine']}.{found['incarnation']}", found["machine"]) if found else None


def labels_of(spec: MachineSpec) -> dict[str, str]:
    return {CLUSTER: spec.cluster, KEY: spec.key, MACHINE: spec.machine, TENEMENT: spec.tenement}
