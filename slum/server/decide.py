"""Which machines to make, destroy or recognise: the pure decision of the reconcile loop.

Inputs are what the fleet wants, what the ledger remembers (one row a machine: its newest incarnation) and what each
operator that answered has seen. An operator that did not answer gets no action. Rules: an intent whose outcome is unknown
is settled by what is observed before anything is done again; a machine is destroyed only when it is not wanted any more,
is drained if it is there, and no call to make it can still arrive; a destroyed incarnation stays dead, its name comes back as a higher one; a host that holds one machine (a
local one) is left before it is taken. Same inputs, same actions, ordered by machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from slum.operators.base import Machine


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    machine: str
    tenement: str
    operator: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """A machine as the ledger remembers it: its newest incarnation."""

    machine: str
    tenement: str
    operator: str
    incarnation: int
    state: str
    """"creating", "created", "failed", "destroying", "destroyed"."""
    machine_id: str
    action: str
    arrives_until: float
    """Until when a call to create it, whose answer nobody has heard, may still arrive."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    wanted: tuple[Wanted, ...]
    known: tuple[Known, ...]
    observed: Mapping[str, tuple[Machine, ...]]
    """What each operator that answered has, by the operator's name."""
    settled_at: Mapping[str, float] = field(default_factory=dict)
    """By operator: a call that ended before this moment shows in what was observed."""
    hosts: Mapping[str, str] = field(default_factory=dict)
    """The host of each operator that holds only one machine; two operators may share one."""
    drained: frozenset[str] = frozenset()
    """Machines whose services have stopped, or had all the time for it."""
    resting: frozenset[str] = frozenset()
    """Machines with an action under way, or waiting to be tried again."""
    held: frozenset[str] = frozenset()
    """Machines that are gone and not to be made again now: see vanished.py."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Create:
    machine: str
    tenement: str
    operator: str
    incarnation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Destroy:
    """Destroy *machine_id*; "" when no machine ever came of the incarnation."""

    machine: str
    tenement: str
    operator: str
    incarnation: int
    machine_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Recognise:
    """The machine of an intent without an outcome is there: the outcome can be committed."""

    machine: str
    action: str
    machine_id: str


Action = Create | Destroy | Recognise
Ids = Mapping[tuple[str, str], str]
"""By (operator, key) the id of the machine that was observed; of two with one key the first."""


def decide(situation: Situation) -> tuple[Action, ...]:
    """Return what to do now, at most one action a machine."""
    wanted = {one.machine: one for one in situation.wanted}
    known = {one.machine: one for one in situation.known}
    observed = [(name, machine) for name, machines in situation.observed.items() for machine in machines]
    ids = {(name, machine.key): machine.id for name, machine in reversed(observed)}
    actions: list[Action] = []
    for machine in sorted(wanted.keys() | known.keys()):
        if machine in situation.resting:
            continue
        action = _for_one(wanted.get(machine), known.get(machine), known, situation, ids)
        if action is not None:
            actions.append(action)
    return tuple(actions)


def key_of(machine: str, incarnation: int) -> str:
    """Return the name that an operator knows this incarnation by."""
    return f"{machine}.{incarnation}"


def _for_one(
    want: Wanted | None, row: Known | None, known: Mapping[str, Known], situation: Situation, ids: Ids
) -> Action | None:
    if row is None or row.state == "destroyed":
        if want is None or want.operator not in situation.observed or not _is_free(want, known, situation):
            return None
        return _create(want, row.incarnation + 1 if row else 1)
    if row.operator not in situation.observed:
        return None
    if row.state == "destroying":
        return _destroy(row, row.machine_id or _found(row, ids))
    if want is None or want.operator != row.operator or want.tenement != row.tenement:
        return _leave(row, situation, ids)
    return _keep(want, row, situation, ids)


def _keep(want: Wanted, row: Known, situation: Situation, ids: Ids) -> Action | None:
    found = _found(row, ids)
    if row.state == "created":
        return None if found or row.machine in situation.held else _create(want, row.incarnation)
    if row.state == "creating" and found:
        return Recognise(machine=row.machine, action=row.action, machine_id=found)
    return _create(want, row.incarnation)


def _leave(row: Known, situation: Situation, ids: Ids) -> Action | None:
    if row.arrives_until and row.arrives_until >= situation.settled_at.get(row.operator, 0.0):
        # A destroy that overtakes the call would find nothing, and the call would leave a machine behind.
        return None
    found = _found(row, ids)
    return _destroy(row, row.machine_id or found) if not found or row.machine in situation.drained else None


def _is_free(want: Wanted, known: Mapping[str, Known], situation: Situation) -> bool:
    """Tell whether no other machine is on the one-machine host that *want* needs."""
    host = situation.hosts.get(want.operator)
    return host is None or not any(
        row.machine != want.machine and row.state != "destroyed" and situation.hosts.get(row.operator) == host
        for row in known.values()
    )


def _found(row: Known, ids: Ids) -> str:
    """Return the id of the machine that its operator has seen for this incarnation, or ""."""
    return ids.get((row.operator, key_of(row.machine, row.incarnation)), "")


def _create(want: Wanted, incarnation: int) -> Create:
    return Create(machine=want.machine, tenement=want.tenement, operator=want.operator, incarnation=incarnation)


def _destroy(row: Known, machine_id: str) -> Destroy:
    return Destroy(
        machine=row.machine,
        tenement=row.tenement,
        operator=row.operator,
        incarnation=row.incarnation,
        machine_id=machine_id,
    )
