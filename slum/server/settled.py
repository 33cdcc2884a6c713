"""How far a fleet has come towards what was committed, step by step, and whether it has arrived. Pure.

An instance has arrived when its agent acts on the pushed config and the instance is settled on its desired release (or
stopped, where that was asked); a restarted one additionally with a newer generation than it had. A machine that the
fleet no longer declares has arrived when it is gone. Silence is waited for: the client has the deadline.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from msgspec.structs import replace

from slum import api, wire
from slum.model import Fleet, Service, release_of
from slum.server.view import World
from slum.wire import Phase

if TYPE_CHECKING:
    from slum.server.agents import Seen

Releases = Mapping[tuple[str, str], str]
"""Digest of each service's desired release, by (tenement, service)."""


def releases_of(fleet: Fleet) -> Releases:
    return {(t.name, service.name): release_of(service) for t in fleet.tenements for service in t.services}


def steps(
    world: World,
    seen: Mapping[str, Seen],
    desired: Mapping[str, wire.Desired],
    troubles: Mapping[str, str],
    releases: Releases,
    *,
    since: float,
) -> tuple[api.Progress, ...]:
    """Return one step for each machine and instance, in a stable order; *since* is when the wait's cause was committed."""
    found: list[api.Progress] = []
    for machine in sorted(world.declared.keys() | world.machines.keys()):
        if machine not in world.declared:
            found.append(api.Progress(what="tenement", name=machine, state="leaving", detail=troubles.get(machine, "")))
            continue
        tenement, known = world.declared[machine], seen.get(machine)
        is_current = _is_current(known, desired.get(machine))
        found.append(_machine_step(world, machine, known, troubles, is_current=is_current, since=since))
        overrides = {(o.service, o.id): o for o in world.overrides.get(machine, ())}
        for service in tenement.services:
            for instance in service.instances:
                key = (service.name, instance)
                step = api.Progress(what="instance", name=f"{machine}/{service.name}/{instance}", service=service.name)
                if known is None or not is_current:
                    found.append(replace(step, state="pending"))
                elif known.refused:
                    found.append(replace(step, state="failed", detail=known.refused, ok=False, final=True))
                elif key not in known.instances:
                    found.append(replace(step, state="pending"))
                else:
                    release, above = releases[tenement.name, service.name], known.restarted.get(key, 0)
                    report = known.instances[key]
                    found.append(_instance_step(step, report, release, overrides.get(key), above=above, since=since))
        if known is not None and is_current:
            found += _leftovers(machine, known, tenement.services)
    return tuple(found)


def done(found: tuple[api.Progress, ...]) -> api.Progress | None:
    """Return the last step when every one of *found* is final, else None."""
    if not all(step.final for step in found):
        return None
    failed = tuple(step.name for step in found if not step.ok)
    return api.Progress(what="done", ok=not failed, failed=failed, final=True)


def _is_current(known: Seen | None, desired: wire.Desired | None) -> bool:
    """Tell whether the agent acts on what was last pushed to it."""
    return known is not None and known.session is not None and desired is not None and known.acts_on(desired)


def _machine_step(
    world: World, machine: str, known: Seen | None, troubles: Mapping[str, str], *, is_current: bool, since: float
) -> api.Progress:
    step = api.Progress(what="tenement", name=machine)
    row = world.machines.get(machine)
    if known is not None and is_current:
        took_s = max(0.0, round(known.stamp_at - since, 3))
        if known.refused:
            return replace(step, state="refused", detail=known.refused, took_s=took_s, ok=False, final=True)
        return replace(step, state="agent ready", took_s=took_s, final=True)
    if row is None or row.state != "created":
        return replace(step, state="creating", detail=troubles.get(machine, ""))
    if known is None or known.session is None:
        return replace(step, state="waiting", detail="for its agent to connect")
    return replace(step, state="telling its agent")


def _instance_step(
    step: api.Progress,
    report: wire.InstanceReport,
    release: str,
    override: wire.Override | None,
    *,
    above: int,
    since: float,
) -> api.Progress:
    """Return the step of an instance whose agent is up to date; *above* is the generation that it had when restarted."""
    is_stopped = override is not None and override.stopped
    if is_stopped:
        is_final = report.phase in (Phase.STOPPED, Phase.EXITED)
    else:
        newest = max((generation.number for generation in report.generations), default=0)
        is_settled = report.phase in wire.SETTLED - {Phase.STOPPED} and report.release == release
        is_final = is_settled and (newest > above or report.phase in (Phase.FAILED, Phase.EXITED))
    return replace(
        step,
        state=str(report.phase),
        detail=report.detail,
        took_s=max(0.0, round(report.since - since, 3)),
        ok=not is_final or is_stopped or _is_well(report),
        final=is_final,
        serving=report.serving,
    )


def _is_well(report: wire.InstanceReport) -> bool:
    if report.phase is Phase.EXITED:
        return not report.exits or report.exits[-1].status == 0
    return report.phase in (Phase.RUNNING, Phase.HEALTHY)


def _leftovers(machine: str, known: Seen, services: tuple[Service, ...]) -> list[api.Progress]:
    """Return a step for each instance that still is there and shall not be."""
    wanted = {(service.name, instance) for service in services for instance in service.instances}
    return [
        api.Progress(what="instance", name=f"{machine}/{service}/{instance}", service=service, state="leaving")
        for service, instance in sorted(known.instances.keys() - wanted)
    ]
