"""What a plan is made of, as plain frozen data: changes, actions, drift, counts, and the Plan itself.

They travel as JSON (`slum plan --json`, docs/plan.md): names of fields and tags are an interface. Actions never run
themselves. Texts in them are for people and hold no secret: slum.changes makes them.
"""

from __future__ import annotations

from enum import StrEnum

from slum.frozen import Frozen


class Change(Frozen):
    """One field, in the files' words ("memory_limit_mb", "env.DEBUG"), as text for people; "none" where there is none."""

    key: str
    before: str
    after: str


class Action(Frozen, tag_field="action"):
    """One step of a plan."""


class ChangeFleet(Action, tag="change_fleet"):
    changes: tuple[Change, ...]


class AddOperator(Action, tag="add_operator"):
    operator: str
    type: str


class ChangeOperator(Action, tag="change_operator"):
    operator: str
    changes: tuple[Change, ...]


class RemoveOperator(Action, tag="remove_operator"):
    operator: str
    type: str


class AddTenement(Action, tag="add_tenement"):
    tenement: str
    operator: str
    type: str
    machines: tuple[str, ...]


class ChangeTenement(Action, tag="change_tenement"):
    tenement: str
    changes: tuple[Change, ...]
    machines_added: tuple[str, ...] = ()
    machines_removed: tuple[str, ...] = ()


class RemoveTenement(Action, tag="remove_tenement"):
    tenement: str
    operator: str
    machines: tuple[str, ...]


class AddService(Action, tag="add_service"):
    tenement: str
    service: str
    isolation: str
    listen: str
    memory_limit_mb: int | None
    instances: tuple[str, ...]
    url: str
    """Where the router of each of its machines answers for it; empty without HTTP."""


class ChangeService(Action, tag="change_service"):
    """*restarts* tells whether its instances start anew; changes of *instances* alone touch only those."""

    tenement: str
    service: str
    changes: tuple[Change, ...]
    restarts: bool
    instances_added: tuple[str, ...] = ()
    instances_removed: tuple[str, ...] = ()


class RemoveService(Action, tag="remove_service"):
    tenement: str
    service: str
    instances: tuple[str, ...]


AnyAction = (
    ChangeFleet
    | AddOperator
    | ChangeOperator
    | RemoveOperator
    | AddTenement
    | ChangeTenement
    | RemoveTenement
    | AddService
    | ChangeService
    | RemoveService
)


class DriftKind(StrEnum):
    MACHINE_MISSING = "machine_missing"
    MACHINE_NOT_READY = "machine_not_ready"
    MACHINE_STRAY = "machine_stray"
    INSTANCE_MISSING = "instance_missing"
    INSTANCE_FAILING = "instance_failing"
    INSTANCE_OUTDATED = "instance_outdated"
    INSTANCE_STRAY = "instance_stray"


class Drift(Frozen):
    """Something that is not as the last revision asks. *service* and *id* are empty for a machine."""

    kind: DriftKind
    machine: str
    service: str = ""
    id: str = ""
    detail: str = ""


class Counts(Frozen):
    add: int = 0
    change: int = 0
    remove: int = 0
    same: int = 0


class Summary(Frozen):
    """Instances are counted on every machine; one counts as changed when it starts anew."""

    operators: Counts
    tenements: Counts
    services: Counts
    instances: Counts
    drift: int


class Plan(Frozen):
    """What turns *revision_from* into *revision_to* (the same when only drift is left to repair, or nothing)."""

    fleet: str
    revision_from: int
    revision_to: int
    changes: bool
    """False when there is nothing to do: `slum plan` exits 0, else 10."""
    summary: Summary
    actions: tuple[AnyAction, ...] = ()
    drift: tuple[Drift, ...] = ()
