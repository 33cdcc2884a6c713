"""A plan as people read it: one line an action, field by field, and a last line that counts. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from slum import actions
from slum.actions import Change, Drift, DriftKind, Plan
from slum.render import Paint, clean, quantity

SIGN_STYLE = {"+": "good", "~": "warn", "-": "bad", "!": "warn", " ": ""}
DRIFT_WORDS = {
    DriftKind.MACHINE_MISSING: "machine is missing",
    DriftKind.MACHINE_NOT_READY: "machine is not ready",
    DriftKind.MACHINE_STRAY: "machine is not declared",
    DriftKind.INSTANCE_MISSING: "does not run",
    DriftKind.INSTANCE_FAILING: "is not well",
    DriftKind.INSTANCE_OUTDATED: "runs an older release",
    DriftKind.INSTANCE_STRAY: "is not declared",
}


class Row(NamedTuple):
    """One line: *sign*, how deep, what it is about, and its cells."""

    sign: str
    depth: int
    subject: str
    cells: tuple[str, ...] = ()


def plan_lines(plan: Plan, paint: Paint) -> list[str]:
    """Return the whole plan; for an empty one, the one line that says so."""
    if not plan.changes:
        return [f"fleet {plan.fleet}, revision {plan.revision_from}: nothing to do"]
    moved = f" -> {plan.revision_to}" if plan.revision_to != plan.revision_from else ": nothing to change"
    rows = [*_rows(plan), *map(_drift_row, plan.drift)]
    width = max((2 * row.depth + len(row.subject) for row in rows), default=0)
    added = [row.cells for row in rows if row.sign == "+" and row.depth == 2]
    widths = [max((len(cells[n]) for cells in added), default=0) for n in range(3)]
    lines = [f"fleet {plan.fleet}, revision {plan.revision_from}{moved}"]
    for row in rows:
        aligned = row.sign == "+" and row.depth == 2
        cells = [
            cell.ljust(widths[n]) if aligned else cell for n, cell in enumerate(row.cells) if not aligned or widths[n]
        ]
        gap = width - 2 * row.depth + 3
        line = f"{'  ' * row.depth}{row.sign} {row.subject:<{gap}}{'   '.join(cells)}".rstrip()
        lines.append(paint(clean(line), SIGN_STYLE[row.sign]) if row.sign.strip() else clean(line))
    return [*lines, f"  {_summary(plan)}"]


def _summary(plan: Plan) -> str:
    services = plan.summary.services
    text = f"{quantity(services.add, 'service')} to start, {services.change} to change, {services.remove} to remove"
    return text + (f"; {quantity(plan.summary.drift, 'thing')} not as declared" if plan.drift else "")


def _rows(plan: Plan) -> Iterator[Row]:
    """Return the actions as rows; services stand below their tenement, which has a line also when it stays as it is."""
    used = {action.operator for action in plan.actions if isinstance(action, actions.AddTenement)}
    tenement = ""
    for action in plan.actions:
        if isinstance(action, (actions.AddService, actions.ChangeService, actions.RemoveService)):
            if action.tenement != tenement:
                tenement = action.tenement
                yield Row(" ", 1, f"tenement {tenement}")
            yield from _service_rows(action)
        elif isinstance(action, (actions.AddTenement, actions.ChangeTenement, actions.RemoveTenement)):
            tenement = action.tenement
            yield from _tenement_rows(action)
        elif isinstance(action, actions.ChangeFleet):
            if plan.revision_from:
                yield from _change_rows(1, f"fleet {plan.fleet}", action.changes)
        elif isinstance(action, actions.AddOperator):
            if action.operator not in used:
                yield Row("+", 1, f"operator {action.operator}", (action.type,))
        elif isinstance(action, actions.ChangeOperator):
            yield from _change_rows(1, f"operator {action.operator}", action.changes)
        else:
            yield Row("-", 1, f"operator {action.operator}", (action.type,))


def _tenement_rows(action: actions.AddTenement | actions.ChangeTenement | actions.RemoveTenement) -> Iterator[Row]:
    subject = f"tenement {action.tenement}"
    if isinstance(action, actions.AddTenement):
        several = (quantity(len(action.machines), "machine"),) if len(action.machines) > 1 else ()
        where = action.operator if action.operator == action.type else f"{action.operator} ({action.type})"
        yield Row("+", 1, subject, (where, *several))
    elif isinstance(action, actions.RemoveTenement):
        yield Row("-", 1, subject, (action.operator, "and all that runs there"))
    else:
        machines = _members(action.machines_added, action.machines_removed)
        yield from _change_rows(1, subject, action.changes, machines)


def _service_rows(action: actions.AddService | actions.ChangeService | actions.RemoveService) -> Iterator[Row]:
    subject = f"service {action.service}"
    if isinstance(action, actions.AddService):
        memory = f"{action.memory_limit_mb} MB" if action.memory_limit_mb is not None else ""
        several = f"   {quantity(len(action.instances), 'instance')}" if len(action.instances) > 1 else ""
        yield Row("+", 2, subject, (action.isolation, memory, (action.url or "no route") + several))
    elif isinstance(action, actions.RemoveService):
        yield Row("-", 2, subject, (quantity(len(action.instances), "instance"),))
    else:
        instances = _members(action.instances_added, action.instances_removed)
        calm = () if action.restarts else ("(nothing restarts)",)
        yield from _change_rows(2, subject, action.changes, (*instances, *calm))


def _change_rows(depth: int, subject: str, changes: Iterable[Change], more: Iterable[str] = ()) -> Iterator[Row]:
    cells = [*(_change_text(change) for change in changes), *more]
    for n, cell in enumerate(cells or [""]):
        yield Row("~" if n == 0 else " ", depth, subject if n == 0 else "", (cell,))


def _change_text(change: Change) -> str:
    if change.key == "bundle":
        return f"source  {change.before} -> {change.after}"
    return f"{change.key}  {change.before} -> {change.after}"


def _members(added: tuple[str, ...], removed: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{sign}{', '.join(names)}" for sign, names in (("+ ", added), ("- ", removed)) if names)


def _drift_row(drift: Drift) -> Row:
    if not drift.service:
        return Row("!", 1, f"tenement {drift.machine}", (DRIFT_WORDS[drift.kind] + _detail(drift),))
    return Row("!", 1, f"{drift.machine}/{drift.service}/{drift.id}", (DRIFT_WORDS[drift.kind] + _detail(drift),))


def _detail(drift: Drift) -> str:
    return f": {drift.detail}" if drift.detail else ""
