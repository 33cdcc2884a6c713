"""How SetDesired and SetOverride change state.db: revisions of the fleet, and what `slum stop` and `restart` asked.

Runs inside state.apply's transaction, the same on every member. The last REVISIONS_KEPT fleets are kept; of older ones
the events stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from slum.ledger.commands import REVISIONS_KEPT, Result, SetDesired, SetOverride, unpack_fleet
from slum.ledger.diff import Change, describe, diff_fleets, summary
from slum.ledger.events import WHY_CHARS_MAX
from slum.ledger.turn import Turn
from slum.model import Fleet

DETAILS_MAX = 20
STOPPED_BY = {"stop": 1, "start": 0, "restart": 0, "drain": 1, "undrain": 0}
FLEET_KINDS = tuple(f"{n}_{v}" for n in ("service", "tenement", "operator") for v in ("added", "changed", "removed"))


def apply_desired(turn: Turn, command: SetDesired) -> Result:
    """Store a new revision and one event for each change; the digest of the newest revision again changes nothing."""
    newest = turn.db.execute(
        "SELECT revision, digest, name, fleet FROM revisions ORDER BY revision DESC LIMIT 1"
    ).fetchone()
    revision, digest, name, packed = newest or (0, "", "", b"")
    if newest is not None and command.digest == digest:
        return turn.done(revision)
    try:
        fleet = unpack_fleet(command.fleet_zstd)
    except ValueError as error:
        return turn.rejected("invalid", str(error)[:WHY_CHARS_MAX])
    if name and fleet.name != name:
        return turn.rejected("conflict", f"this control plane holds fleet {name!r}, not {fleet.name!r}")
    if command.base_revision != revision:
        why = f"revision is {revision}, your plan was made on {command.base_revision}"
        return turn.rejected("conflict", why, _changes_since(turn, command.base_revision))
    changes = diff_fleets(unpack_fleet(packed) if packed else Fleet(), fleet)
    _store(turn, command, fleet, revision + 1, changes)
    turn.revision = revision + 1
    return turn.done(turn.revision)


def apply_override(turn: Turn, command: SetOverride) -> Result:
    """Set what was asked of each instance, all or none; one event each."""
    if command.verb not in STOPPED_BY:
        return turn.rejected("invalid", f"{command.verb!r} is none of {', '.join(STOPPED_BY)}")
    of_machines = command.verb in ("drain", "undrain")
    desired = {key for key in _instances(turn) if (key[1] == "") == of_machines}
    missing = tuple("/".join(key) for key in command.instances if key not in desired)
    if missing:
        return turn.rejected("missing", f"not in the fleet: {', '.join(missing[:DETAILS_MAX])}", missing[:DETAILS_MAX])
    for machine, service, instance in dict.fromkeys(command.instances):
        key = (machine, service, instance)
        found = turn.db.execute(
            "SELECT stopped, restarts FROM overrides WHERE machine = ? AND service = ? AND instance = ?", key
        ).fetchone()
        stopped, restarts = found or (0, 0)
        now_stopped = STOPPED_BY[command.verb]
        now_restarts = restarts + (command.verb == "restart")
        if (now_stopped, now_restarts) == (stopped, restarts):
            continue
        turn.db.execute("INSERT OR REPLACE INTO overrides VALUES (?, ?, ?, ?, ?)", (*key, now_stopped, now_restarts))
        turn.events.add(
            f"tenement_{command.verb}ed" if of_machines else "override_set",
            f"tenement:{machine}" if of_machines else f"instance:{machine}/{service}/{instance}",
            actor=turn.actor,
            why=command.verb,
            before={"stopped": bool(stopped), "restarts": restarts},
            after={"stopped": bool(now_stopped), "restarts": now_restarts},
        )
    return turn.done()


def _store(turn: Turn, command: SetDesired, fleet: Fleet, revision: int, changes: tuple[Change, ...]) -> None:
    db, why = turn.db, command.why[:WHY_CHARS_MAX]
    db.execute(
        "INSERT INTO revisions VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            revision,
            command.digest,
            fleet.name,
            turn.at,
            turn.actor,
            why,
            summary(changes),
            turn.seq,
            command.fleet_zstd,
        ),
    )
    blobs = {service.bundle for tenement in fleet.tenements for service in tenement.services if service.bundle}
    db.executemany("INSERT INTO blobs VALUES (?, ?)", [(revision, digest) for digest in sorted(blobs)])
    for table in ("revisions", "blobs"):
        db.execute(f"DELETE FROM {table} WHERE revision <= ?", (revision - REVISIONS_KEPT,))
    turn.events.add(
        "fleet_applied",
        f"fleet:{fleet.name}",
        actor=turn.actor,
        why=why,
        before={"revision": revision - 1},
        after={"revision": revision, "digest": command.digest, "summary": summary(changes)},
    )
    for change in changes:
        turn.events.add(
            change.kind, change.subject, actor=turn.actor, why=why, before=change.before, after=change.after
        )
    _drop_overrides(turn, set(_instances_of(fleet)))


def _drop_overrides(turn: Turn, desired: set[tuple[str, str, str]]) -> None:
    """Forget what was asked of instances that the fleet no longer has."""
    held = turn.db.execute("SELECT machine, service, instance FROM overrides ORDER BY 1, 2, 3").fetchall()
    turn.db.executemany(
        "DELETE FROM overrides WHERE machine = ? AND service = ? AND instance = ?",
        [key for key in held if key not in desired],
    )


def _instances(turn: Turn) -> Iterator[tuple[str, str, str]]:
    row = turn.db.execute("SELECT fleet FROM revisions ORDER BY revision DESC LIMIT 1").fetchone()
    return _instances_of(unpack_fleet(row[0])) if row else iter(())


def _instances_of(fleet: Fleet) -> Iterator[tuple[str, str, str]]:
    """Yield what can be stopped and started: (machine, service, id), and (machine, "", "") for each machine as a whole."""
    for tenement in fleet.tenements:
        for machine in tenement.machine_names:
            yield (machine, "", "")
            for service in tenement.services:
                for instance in service.instances:
                    yield (machine, service.name, instance)


def _changes_since(turn: Turn, base_revision: int) -> tuple[str, ...]:
    """Return in words who changed what after *base_revision*, newest last, at most DETAILS_MAX lines."""
    row = turn.db.execute("SELECT max(seq) FROM revisions WHERE revision <= ?", (base_revision,)).fetchone()
    marks = ", ".join("?" * len(FLEET_KINDS))
    turn.events.flush()
    newest = turn.db.execute(
        f"SELECT actor, kind, subject, before, after FROM events WHERE seq > ? AND kind IN ({marks})"
        " ORDER BY number DESC LIMIT ?",
        (row[0] or 0, *FLEET_KINDS, DETAILS_MAX),
    ).fetchall()
    lines = [
        f"{actor} {words}"
        for actor, kind, subject, before, after in reversed(newest)
        for words in describe(kind, subject, _body(before), _body(after))
    ]
    return tuple(lines[-DETAILS_MAX:])


def _body(text: str | None) -> dict[str, Any] | None:
    return msgspec.json.decode(text, type=dict[str, Any]) if text is not None else None
