"""What the API shows: the ledger's desire and the agents' reports put side by side. Pure.

Inputs are a World (ledger), Seen by machine (agents) and the time; outputs are the types of slum.api.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import msgspec

from slum import api, wire
from slum.model import Tenement
from slum.server.decide import key_of
from slum.server.view import World

if TYPE_CHECKING:
    from slum.server.agents import Seen
    from slum.server.control import Sight

JOIN_S = 15.0
"""For so long after this server started, an agent that has not dialled yet counts as joining."""


def tenements(
    world: World, seen: Mapping[str, Seen], troubles: Mapping[str, str], now: float, started: float
) -> tuple[api.TenementView, ...]:
    """Return one view a machine, declared or still existing, sorted by name; *now* and *started* are monotonic."""
    return tuple(
        _tenement(
            world, machine, world.declared.get(machine), seen.get(machine), troubles.get(machine, ""), now, started
        )
        for machine in sorted(world.declared.keys() | world.machines.keys())
    )


def machines(
    world: World, sights: Mapping[str, Sight], troubles: Mapping[str, str], now: float
) -> tuple[api.MachineView, ...]:
    """Return what the ledger says exists and what operators have seen, by operator and name; strays last."""
    found: list[api.MachineView] = []
    states = {key_of(row.machine, row.incarnation): row.state for row in world.rows}
    for name in sorted(sights.keys() | {row.operator for row in world.machines.values()}):
        sight = sights.get(name)
        there = {machine.key: machine for machine in (sight.machines or ())} if sight else {}
        seen_s = round(now - sight.at, 3) if sight and sight.machines is not None else None
        for row in sorted(world.machines.values(), key=lambda row: row.machine):
            if row.operator != name:
                continue
            machine = there.get(key_of(row.machine, row.incarnation))
            found.append(
                api.MachineView(
                    name=row.machine,
                    tenement=row.tenement,
                    operator=name,
                    id=row.machine_id,
                    incarnation=row.incarnation,
                    state=row.state,
                    drift="gone" if row.state == "created" and machine is None and seen_s is not None else "",
                    created_at=machine.created_at if machine else None,
                    seen_s=seen_s,
                    detail=troubles.get(row.machine, ""),
                )
            )
        found += [
            api.MachineView(
                name=machine.machine,
                tenement=machine.tenement,
                operator=name,
                id=machine.id,
                drift="left" if machine.key in states else "stray",
                created_at=machine.created_at,
                seen_s=seen_s,
                detail="destroyed, and still there"
                if machine.key in states
                else "never asked for by this control plane; slum does not touch it",
            )
            for machine in ((sight.machines or ()) if sight else ())
            if states.get(machine.key, "destroyed") == "destroyed"
        ]
    return tuple(found)


def instances(world: World, seen: Mapping[str, Seen], now: float) -> tuple[api.InstanceView, ...]:
    """Return every instance that is declared or reported, sorted by tenement, service and id."""
    views: dict[tuple[str, str, str], api.InstanceView] = {}
    for machine, _tenement, service, instance in world.placed():
        report = wire.InstanceReport(
            service=service.name,
            id=instance,
            phase=wire.Phase.PENDING,
            detail=_waiting(world, seen.get(machine), machine),
        )
        views[machine, service.name, instance] = api.InstanceView(
            tenement=machine, isolation=service.isolation, report=report
        )
    for machine, known in seen.items():
        stale_s = None if known.is_connected(now) else now - known.contact
        for (service_name, instance), report in known.instances.items():
            view = views.get((machine, service_name, instance))
            views[machine, service_name, instance] = api.InstanceView(
                tenement=machine, isolation=view.isolation if view else "", report=report, stale_s=stale_s
            )
    return tuple(views[key] for key in sorted(views))


def counts(views: Iterable[api.InstanceView]) -> dict[str, int]:
    """Return how many instances are in each phase."""
    return dict(sorted(Counter(str(view.report.phase) for view in views).items()))


def _tenement(
    world: World,
    machine: str,
    tenement: Tenement | None,
    seen: Seen | None,
    trouble: str,
    now: float,
    started: float,
) -> api.TenementView:
    row = world.machines.get(machine)
    state, detail = _state(world, machine, tenement, seen, now, started)
    base = api.TenementView(
        name=machine,
        tenement=tenement.name if tenement else (row.tenement if row else machine),
        operator=tenement.operator if tenement else (row.operator if row else ""),
        state=state,
        machine=row.machine_id if row else "",
        detail=trouble or detail,
    )
    if seen is None:
        return base
    return msgspec.structs.replace(
        base,
        stamp=seen.stamp,
        version=seen.hello.version,
        host=seen.hello.host,
        contact_s=round(now - seen.contact, 3),
        levels=seen.hello.levels,
        limits=seen.hello.limits,
        cpus=seen.hello.cpus,
        memory_bytes=seen.hello.memory_bytes,
        load=seen.load,
        memory_available_bytes=seen.memory_available_bytes,
        agent_rss_bytes=seen.rss_bytes,
        instances=len(seen.instances),
    )


def _state(
    world: World, machine: str, tenement: Tenement | None, seen: Seen | None, now: float, started: float
) -> tuple[str, str]:
    """Return the state of *machine* as api.TenementView names it, and one line about it."""
    row = world.machines.get(machine)
    if row is None:
        return "pending", "waits to be created"
    if row.state == "creating":
        return "creating", ""
    if row.state == "failed":
        return "pending", "its creation failed; it is tried again"
    if row.state == "destroying":
        return "destroying", ""
    if tenement is None:
        return "draining", "not declared any more: its services are being stopped"
    if seen is not None and seen.is_connected(now):
        if machine in world.drained:
            return "drained", f"runs nothing until `slum drain {machine} --undo`"
        return "ready", seen.refused
    if seen is None and now - started < JOIN_S:
        return "joining", "waits for its agent"
    return "unknown", "its agent is not connected; what it runs goes on"


def _waiting(world: World, seen: Seen | None, machine: str) -> str:
    """Say why an instance of *machine* has no report."""
    if seen is not None and seen.refused:
        return seen.refused
    if machine not in world.machines:
        return f"waits for the machine {machine}"
    return "waits for its agent to report" if seen is not None and seen.session else "waits for its agent"
