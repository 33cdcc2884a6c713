"""How Intent and Outcome change state.db: which machines may exist, and who may act on them.

An intent is committed before an operator is called, its outcome after; so any later leader knows what may be under way.
Clouds know no fencing: a paused leader's call may still arrive. Hence two rules. An intent that contradicts another
leader's open one is refused until that one's deadline has passed; the same verb on the same incarnation contradicts
nothing, as operators make each call safe to repeat, so a new leader goes on at once. And a destroy intent is irrevocable:
the machine's incarnation is dead from then on, only a higher one can be created. Runs inside state.apply's transaction.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from slum.ledger.commands import Intent, Outcome, Result
from slum.ledger.turn import Turn

KINDS = ("create", "destroy")


class _Row(NamedTuple):
    machine: str
    incarnation: int
    tenement: str
    operator: str
    state: str
    machine_id: str
    action: str
    deadline_at: float


def apply_intent(turn: Turn, intent: Intent) -> Result:
    """Note that an operator is about to be called, unless a rule of fencing forbids it."""
    if intent.kind not in KINDS:
        return turn.rejected("invalid", f"{intent.kind!r} is none of {', '.join(KINDS)}")
    if turn.db.execute("SELECT 1 FROM intents WHERE action = ?", (intent.action,)).fetchone():
        return turn.rejected("invalid", f"action {intent.action} is known already")
    row = _machine(turn, intent.machine, intent.incarnation)
    refusal = _holder(turn, intent) or (
        _why_not_create(turn, intent, row) if intent.kind == "create" else _why_not_destroy(intent, row)
    )
    if refusal is not None:
        return turn.rejected("fenced" if row is not None or intent.kind == "create" else "missing", refusal)
    machine_id = intent.machine_id or (row.machine_id if row else "")
    turn.db.execute(
        "UPDATE intents SET state = 'superseded' WHERE machine = ? AND incarnation = ? AND state = 'open'",
        (intent.machine, intent.incarnation),
    )
    turn.db.execute(
        "INSERT INTO intents VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 'open')",
        (
            intent.action,
            intent.kind,
            intent.machine,
            intent.tenement,
            intent.operator,
            intent.incarnation,
            machine_id,
            intent.deadline_at,
            turn.leader,
            turn.seq,
        ),
    )
    _put(
        turn,
        _Row(
            intent.machine,
            intent.incarnation,
            intent.tenement,
            intent.operator,
            "creating" if intent.kind == "create" else "destroying",
            machine_id,
            intent.action,
            intent.deadline_at,
        ),
    )
    _event(turn, f"machine_{intent.kind}_intended", intent.machine, intent.incarnation, machine_id, intent.action)
    return turn.done()


def apply_outcome(turn: Turn, outcome: Outcome) -> Result:
    """Note how the call of an intent ended. The same outcome again changes nothing."""
    found = turn.db.execute(
        "SELECT kind, machine, incarnation, machine_id, state FROM intents WHERE action = ?", (outcome.action,)
    ).fetchone()
    if found is None:
        return turn.rejected("missing", f"no intent has action {outcome.action}")
    kind, machine, incarnation, known_id, state = found
    ended = "done" if outcome.ok else "failed"
    if state in ("done", "failed"):
        return turn.done() if state == ended else turn.rejected("invalid", f"action {outcome.action} has {state}")
    machine_id = outcome.machine_id or known_id
    turn.db.execute(
        "UPDATE intents SET state = ?, machine_id = ? WHERE action = ?", (ended, machine_id, outcome.action)
    )
    row = _machine(turn, machine, incarnation)
    if row is not None:
        _put(turn, _after(row, outcome, kind, machine_id))
    past = "created" if kind == "create" else "destroyed"
    event = f"machine_{past}" if outcome.ok else f"machine_{kind}_failed"
    _event(turn, event, machine, incarnation, machine_id, outcome.action, outcome.error)
    return turn.done()


def _after(row: _Row, outcome: Outcome, kind: str, machine_id: str) -> _Row:
    """Return the machine's row after *outcome*; a late one of a superseded action can only add the machine's id."""
    row = row._replace(machine_id=row.machine_id or machine_id)
    if row.action != outcome.action:
        return row
    if kind == "create":
        return row._replace(state="created" if outcome.ok else "failed", machine_id=machine_id)
    return row._replace(state="destroyed") if outcome.ok else row


def _holder(turn: Turn, intent: Intent) -> str | None:
    """Return why *intent* must wait: a contrary call of another leader may still be on its way.

    A superseded intent counts too: it was repeated by a later leader, but its own call may arrive all the same.
    """
    held = turn.db.execute(
        "SELECT action, kind, deadline_at FROM intents WHERE machine = ? AND state IN ('open', 'superseded')"
        " AND leader <> ? AND deadline_at > ? AND NOT (kind = ? AND incarnation = ?)"
        " ORDER BY deadline_at DESC, action LIMIT 1",
        (intent.machine, turn.leader, turn.at, intent.kind, intent.incarnation),
    ).fetchone()
    if held is None:
        return None
    action, kind, deadline_at = held
    return f"{intent.machine}: {kind} {action} of an earlier leader may still arrive for {deadline_at - turn.at:.1f} s"


def _why_not_create(turn: Turn, intent: Intent, row: _Row | None) -> str | None:
    (newest,) = turn.db.execute(
        "SELECT coalesce(max(incarnation), 0) FROM machines WHERE machine = ?", (intent.machine,)
    ).fetchone()
    if intent.incarnation < newest:
        return f"{intent.machine}: incarnation {intent.incarnation} is over, the newest is {newest}"
    if row is not None and row.state in ("destroying", "destroyed"):
        return f"{intent.machine}: incarnation {intent.incarnation} is dead, a destroy was committed"
    return None


def _why_not_destroy(intent: Intent, row: _Row | None) -> str | None:
    if row is None:
        return f"{intent.machine}: no intent ever created incarnation {intent.incarnation}"
    if row.state == "destroyed":
        return f"{intent.machine}: incarnation {intent.incarnation} is destroyed"
    if intent.machine_id and row.machine_id and intent.machine_id != row.machine_id:
        return f"{intent.machine}: its machine is {row.machine_id}, not {intent.machine_id}"
    return None


def _machine(turn: Turn, machine: str, incarnation: int) -> _Row | None:
    row = turn.db.execute(
        "SELECT machine, incarnation, tenement, operator, state, machine_id, action, deadline_at FROM machines"
        " WHERE machine = ? AND incarnation = ?",
        (machine, incarnation),
    ).fetchone()
    return _Row(*row) if row else None


def _put(turn: Turn, row: _Row) -> None:
    turn.db.execute("INSERT OR REPLACE INTO machines VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)


def _event(
    turn: Turn, kind: str, machine: str, incarnation: int, machine_id: str, action: str, error: str = ""
) -> None:
    after: dict[str, Any] = {"incarnation": incarnation, "machine": machine_id, "action": action}
    turn.events.add(kind, f"tenement:{machine}", actor=turn.actor, why=error, after=after)
