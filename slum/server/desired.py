"""What each machine is told to run: one Desired a machine, made from the ledger's state. Pure.

A machine that the fleet no longer declares but that still exists is told to run nothing, so that its services stop in
an orderly way before it is destroyed.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from slum.model import Settings, Stamp, Tenement
from slum.server.view import World
from slum.wire import Desired


def desired_of(world: World, machine: str, tenement: Tenement | None) -> Desired:
    """Return what *machine*, of *tenement* if any, shall run in *world*, stamped with the world's (generation, seq)."""
    stamp = Stamp(generation=world.cluster.generation, seq=world.seq)
    if tenement is None:
        return Desired(
            stamp=stamp,
            cluster=world.cluster.cluster_id,
            revision=world.revision,
            fleet=world.fleet.name,
            tenement=machine,
            domain=world.fleet.domain,
            settings=Settings(),
        )
    return Desired(
        stamp=stamp,
        cluster=world.cluster.cluster_id,
        revision=world.revision,
        fleet=world.fleet.name,
        tenement=machine,
        domain=world.fleet.domain,
        settings=tenement.settings,
        services=tenement.services,
        routing_listen=tenement.routing_listen,
        overrides=world.overrides.get(machine, ()),
    )


def advance(old: Mapping[str, Desired], world: World) -> dict[str, Desired]:
    """Return each machine's Desired in *world*; one whose content did not change keeps its old stamp, and is the same."""
    new = {}
    for machine in sorted(world.declared.keys() | world.machines.keys()):
        now, before = desired_of(world, machine, world.declared.get(machine)), old.get(machine)
        same = before is not None and msgspec.structs.replace(now, stamp=before.stamp) == before
        new[machine] = before if same and before is not None else now
    return new
