"""Drift: where the world differs from the last revision without anybody having asked for it. Pure.

Right after a healthy apply there is none. What is on its way (starting, stopping) is not drift, nor is what was stopped
on purpose; of a machine that does not answer only that is said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from slum.actions import Drift, DriftKind
from slum.api import State
from slum.frozen import Frozen
from slum.model import Fleet, Service, release_of
from slum.wire import InstanceReport, Phase

Seat = tuple[str, str, str]
"""(machine, service, id): where an instance runs."""

READY = "ready"
"""TenementView.state of a machine whose agent answers."""
FAILING = frozenset({Phase.FAILED, Phase.BACKOFF, Phase.UNHEALTHY})
CONVERGING = frozenset({Phase.PENDING, Phase.STARTING, Phase.STOPPING})


class SeenInstance(Frozen):
    phase: Phase
    release: str | None
    detail: str = ""


class Observed(Frozen):
    """What the control plane knows to be there: machines by state, instances, and those stopped on purpose."""

    machines: Mapping[str, str]
    instances: Mapping[Seat, SeenInstance]
    stopped: frozenset[Seat] = frozenset()


def observed_of(state: State) -> Observed:
    """Return what *state* says is there."""
    return Observed(
        machines={view.name: view.state for view in state.tenements},
        instances={
            (view.tenement, view.report.service, view.report.id): _seen(view.report) for view in state.instances
        },
        stopped=frozenset(
            (machine, override.service, override.id)
            for machine, overrides in state.overrides.items()
            for override in overrides
            if override.stopped
        ),
    )


def _seen(report: InstanceReport) -> SeenInstance:
    return SeenInstance(phase=report.phase, release=report.serving_release or report.release, detail=report.detail)


def drift_of(
    desired: Fleet, current: Fleet, observed: Observed, untouched: Callable[[str, str], bool]
) -> tuple[Drift, ...]:
    """Return how *observed* differs from *current*, ordered by machine, service and id.

    *desired* says what is about to go or to come anyway; *untouched* tells which (tenement, service) stay as they are:
    only their instances are looked at.
    """
    found = [*_machine_drift(desired, current, observed), *_strays(desired, current, observed)]
    leaving = _machines(current) - _machines(desired)
    for tenement in current.tenements:
        machines = [m for m in tenement.machine_names if m not in leaving and observed.machines.get(m) == READY]
        for service in tenement.services if machines else ():
            if untouched(tenement.name, service.name):
                release = release_of(service)
                for machine in machines:
                    found += _instance_drift(machine, service, release, observed)
    return tuple(sorted(found, key=lambda drift: (drift.machine, drift.service, drift.id, drift.kind)))


def _machines(fleet: Fleet) -> set[str]:
    return {name for tenement in fleet.tenements for name in tenement.machine_names}


def _seats(fleet: Fleet) -> set[Seat]:
    return {
        (machine, service.name, name)
        for tenement in fleet.tenements
        for machine in tenement.machine_names
        for service in tenement.services
        for name in service.instances
    }


def _machine_drift(desired: Fleet, current: Fleet, observed: Observed) -> Iterator[Drift]:
    wanted, asked = _machines(desired), _machines(current)
    for machine in wanted & asked:
        state = observed.machines.get(machine)
        if state is None:
            yield Drift(kind=DriftKind.MACHINE_MISSING, machine=machine)
        elif state != READY:
            yield Drift(kind=DriftKind.MACHINE_NOT_READY, machine=machine, detail=state)
    for machine in observed.machines.keys() - wanted - asked:
        yield Drift(kind=DriftKind.MACHINE_STRAY, machine=machine, detail=observed.machines[machine])


def _strays(desired: Fleet, current: Fleet, observed: Observed) -> Iterator[Drift]:
    known = _seats(current)
    if desired != current:
        known |= _seats(desired)
    for machine, service, name in observed.instances.keys() - known:
        phase = observed.instances[machine, service, name].phase
        if phase not in CONVERGING and observed.machines.get(machine) == READY:
            kind = DriftKind.INSTANCE_STRAY
            yield Drift(kind=kind, machine=machine, service=service, id=name, detail=phase)


def _instance_drift(machine: str, service: Service, release: str, observed: Observed) -> Iterator[Drift]:
    for name in service.instances:
        seat = (machine, service.name, name)
        if seat in observed.stopped:
            continue
        seen = observed.instances.get(seat)
        if seen is None:
            yield Drift(kind=DriftKind.INSTANCE_MISSING, machine=machine, service=service.name, id=name)
        elif seen.phase in FAILING:
            detail = f"{seen.phase}: {seen.detail}" if seen.detail else str(seen.phase)
            kind = DriftKind.INSTANCE_FAILING
            yield Drift(kind=kind, machine=machine, service=service.name, id=name, detail=detail)
        elif seen.phase not in CONVERGING and seen.release != release:
            detail = f"runs release {(seen.release or 'none')[:12]}, not {release[:12]}"
            kind = DriftKind.INSTANCE_OUTDATED
            yield Drift(kind=kind, machine=machine, service=service.name, id=name, detail=detail)
