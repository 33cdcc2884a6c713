"""The pure difference between the fleet that is asked for, the one that was asked for last, and what is seen to run.

Three values in, one Plan out: typed actions in a fixed order, and drift. Equal inputs give equal bytes. Nothing here
runs an action, reads a clock or a file, or shows a secret: plans are printed, sent and stored. docs/plan.md describes
the JSON; the types are slum.actions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

from slum.actions import (
    AddOperator,
    AddService,
    AddTenement,
    AnyAction,
    Change,
    ChangeFleet,
    ChangeOperator,
    ChangeService,
    ChangeTenement,
    Counts,
    Plan,
    RemoveOperator,
    RemoveService,
    RemoveTenement,
    Summary,
)
from slum.changes import changes_of, text_of
from slum.drift import Observed, drift_of, observed_of
from slum.model import Fleet, Listen, Operator, Service, Tenement, host_name, operator_type

__all__ = ["Observed", "Plan", "observed_of", "plan", "url_of"]


def plan(desired: Fleet, current: Fleet, observed: Observed | None = None, *, revision: int = 0) -> Plan:
    """Return what turns *current* (the fleet of *revision*) into *desired*, and how *observed* differs from *current*.

    Without *observed* no drift is looked for. Drift of what the plan changes or removes anyway is left out.
    """
    tally = _Tally()
    actions = tuple(_plan_fleet(desired, current, tally))
    untouched = tally.untouched
    drift = () if observed is None else drift_of(desired, current, observed, lambda *service: service in untouched)
    return Plan(
        fleet=desired.name,
        revision_from=revision,
        revision_to=revision + 1 if desired != current else revision,
        changes=desired != current or bool(drift),
        summary=tally.summary(len(drift)),
        actions=actions,
        drift=drift,
    )


class _Tally:
    """Counts of one planning, and the services that it leaves alone."""

    def __init__(self) -> None:
        self.counts = {
            (what, how): 0
            for what in ("operators", "tenements", "services", "instances")
            for how in ("add", "change", "remove", "same")
        }
        self.untouched: set[tuple[str, str]] = set()

    def add(self, what: str, how: str, count: int = 1) -> None:
        self.counts[what, how] += count

    def summary(self, drift: int) -> Summary:
        def counts(what: str) -> Counts:
            return Counts(**{how: self.counts[what, how] for how in ("add", "change", "remove", "same")})

        return Summary(
            operators=counts("operators"),
            tenements=counts("tenements"),
            services=counts("services"),
            instances=counts("instances"),
            drift=drift,
        )


def _plan_fleet(desired: Fleet, current: Fleet, tally: _Tally) -> Iterator[AnyAction]:
    is_first = current == Fleet() and bool(desired.operators or desired.tenements)
    if (desired.name, desired.domain) != (current.name, current.domain) and not is_first:
        yield ChangeFleet(changes=changes_of(current, desired, skip=("operators", "tenements")))
    yield from _plan_operators(_by_name(desired.operators), _by_name(current.operators), tally)
    operators = {operator.name: operator_type(operator) for operator in desired.operators}
    after, before = _by_name(desired.tenements), _by_name(current.tenements)
    for name in sorted({*after, *before}):
        new, old = after.get(name), before.get(name)
        if new is not None:
            yield from _plan_tenement(new, old, operators.get(new.operator, ""), tally)
        elif old is not None:
            tally.add("tenements", "remove")
            yield RemoveTenement(tenement=name, operator=old.operator, machines=old.machine_names)
        yield from _plan_services(new, old, desired.domain, tally)


def _plan_operators(
    after: Mapping[str, Operator], before: Mapping[str, Operator], tally: _Tally
) -> Iterator[AnyAction]:
    for name in sorted({*after, *before}):
        new, old = after.get(name), before.get(name)
        if new is None and old is not None:
            tally.add("operators", "remove")
            yield RemoveOperator(operator=name, type=operator_type(old))
        elif new is not None and old is None:
            tally.add("operators", "add")
            yield AddOperator(operator=name, type=operator_type(new))
        elif new is not None and old is not None and new != old:
            tally.add("operators", "change")
            yield ChangeOperator(operator=name, changes=_operator_changes(old, new))
        else:
            tally.add("operators", "same")


def _operator_changes(old: Operator, new: Operator) -> tuple[Change, ...]:
    if type(old) is type(new):
        return changes_of(old, new)
    return (Change(key="type", before=operator_type(old), after=operator_type(new)),)


def _plan_tenement(new: Tenement, old: Tenement | None, type_: str, tally: _Tally) -> Iterator[AnyAction]:
    if old is None:
        tally.add("tenements", "add")
        yield AddTenement(tenement=new.name, operator=new.operator, type=type_, machines=new.machine_names)
        return
    changes = changes_of(old, new, skip=("services",)) if new is not old else ()
    tally.add("tenements", "change" if changes else "same")
    if changes:
        added, removed = _added_removed(new.machine_names, old.machine_names)
        yield ChangeTenement(tenement=new.name, changes=changes, machines_added=added, machines_removed=removed)


def _plan_services(new: Tenement | None, old: Tenement | None, domain: str, tally: _Tally) -> Iterator[AnyAction]:
    after = _by_name(new.services) if new is not None else {}
    before = _by_name(old.services) if old is not None else {}
    machines = new.count if new is not None else 0
    kept = len({*new.machine_names} & {*old.machine_names}) if new is not None and old is not None else 0
    for name in sorted({*after, *before}):
        service, was = after.get(name), before.get(name)
        if service is not None and new is not None:
            tally.add("instances", "add", (machines - kept) * len(service.instances))
        if was is not None and old is not None:
            tally.add("instances", "remove", (old.count - kept) * len(was.instances))
        if service is None and was is not None and (old is not None):
            tally.add("services", "remove")
            tally.add("instances", "remove", kept * len(was.instances))
            yield RemoveService(tenement=old.name, service=name, instances=was.instances)
        elif service is not None and was is None and new is not None:
            tally.add("services", "add")
            tally.add("instances", "add", kept * len(service.instances))
            yield _add_service(new, service, domain)
        elif service is not None and was is not None and new is not None:
            yield from _plan_service(new.name, service, was, kept, tally)


def _add_service(tenement: Tenement, service: Service, domain: str) -> AddService:
    return AddService(
        tenement=tenement.name,
        service=service.name,
        isolation=service.isolation,
        listen=service.listen,
        memory_limit_mb=service.memory_limit_mb,
        instances=service.instances,
        url=url_of(service, tenement.routing_listen, domain),
    )


def url_of(service: Service, routing_listen: tuple[str, ...], domain: str) -> str:
    """Return the address by which the router answers for *service*, or "" when it takes no requests."""
    if service.listen is Listen.NONE or not routing_listen:
        return ""
    port = routing_listen[0].rpartition(":")[2]
    host = host_name(service.name, None, domain)
    return {"80": f"http://{host}", "443": f"https://{host}"}.get(port, f"http://{host}:{port}")


def _plan_service(tenement: str, new: Service, old: Service, machines: int, tally: _Tally) -> Iterator[AnyAction]:
    if new == old:
        tally.untouched.add((tenement, new.name))
        tally.add("services", "same")
        tally.add("instances", "same", machines * len(new.instances))
        return
    added, removed = _added_removed(new.instances, old.instances)
    changes = changes_of(old, new, skip=("instances",))
    if not added and not removed and new.instances != old.instances:  # the first id takes the service's own name
        changes = (*changes, Change(key="instances", before=text_of(old.instances), after=text_of(new.instances)))
    restarts = any(
        getattr(new, field) != getattr(old, field)
        for field in new.__struct_fields__
        if field not in ("instances", "source")
    )
    stay = len(new.instances) - len(added)
    tally.add("services", "change")
    tally.add("instances", "change" if restarts else "same", machines * stay)
    tally.add("instances", "add", machines * len(added))
    tally.add("instances", "remove", machines * len(removed))
    yield ChangeService(
        tenement=tenement,
        service=new.name,
        changes=changes,
        restarts=restarts,
        instances_added=added,
        instances_removed=removed,
    )


Named = TypeVar("Named", Operator, Tenement, Service)


def _by_name(items: Iterable[Named]) -> dict[str, Named]:
    return {item.name: item for item in items}


def _added_removed(after: tuple[str, ...], before: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    had, has = set(before), set(after)
    return tuple(name for name in after if name not in had), tuple(name for name in before if name not in has)
