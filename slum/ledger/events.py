"""The audit trail: every change one event, each hashed together with the one before, and the check of that chain.

The first event is chained to the cluster's id, the last one's hash stands in the ledger row: nobody can change, remove
or add an event in between without the check failing. Bodies are small: what is larger becomes its size and digest.
"""

from __future__ import annotations

import hashlib
import re
import sqlite3
from collections.abc import Iterable
from typing import Any

import msgspec

from slum.ledger.commands import NoteEvent

BODY_BYTES_MAX = 4096
WORD_CHARS_MAX = 200
WHY_CHARS_MAX = 2000
KIND = re.compile(r"[a-z][a-z0-9_]{0,63}")
RECONCILE = "cluster:reconcile"
PAUSED, RESUMED = "reconcile_paused", "reconcile_resumed"
"""Kinds about RECONCILE: the newer of the two says whether machines and services are left as they are."""

Columns = tuple[int, int, float, str, str, str, str, str | None, str | None]
"""(number, seq, at, actor, kind, subject, why, before, after): what an event's hash covers."""


class EventWriter:
    """Appends events within one transaction; *number* and *head* move with each. Written by flush(), many at once."""

    def __init__(self, db: sqlite3.Connection, *, number: int, head: str, seq: int, at: float) -> None:
        self._db = db
        self.number = number
        self.head = head
        self._seq = seq
        self._at = at
        self._rows: list[tuple[Any, ...]] = []

    def flush(self) -> None:
        """Write what was added; whoever reads events in the same transaction calls it first."""
        if self._rows:
            self._db.executemany("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", self._rows)
            self._rows.clear()

    def forget(self, number: int, head: str) -> None:
        """Forget what was added since *number* and *head* were those of the newest, and not written."""
        self._rows.clear()
        self.number, self.head = number, head

    def add(
        self,
        kind: str,
        subject: str,
        *,
        actor: str,
        why: str = "",
        before: Any = None,
        after: Any = None,
        at: float | None = None,
    ) -> None:
        columns: Columns = (
            self.number + 1,
            self._seq,
            # SQLite keeps -0.0 as 0.0, and the hash must be of what it keeps.
            (self._at if at is None else at) + 0.0,
            actor[:WORD_CHARS_MAX],
            kind,
            subject[:WORD_CHARS_MAX],
            why[:WHY_CHARS_MAX],
            body_text(before),
            body_text(after),
        )
        self.head = next_hash(self.head, columns)
        self.number += 1
        number, seq, when, who, what, about, because, was, is_ = columns
        self._rows.append((number, seq, when, who, what, about, service_of(about), because, was, is_, self.head))

    def add_notes(self, notes: Iterable[NoteEvent], actor: str) -> None:
        for note in notes:
            self.add(
                note.kind,
                note.subject,
                actor=actor,
                why=note.why,
                before=note.before,
                after=note.after,
                at=float(note.at),
            )


def first_hash(cluster_id: str) -> str:
    """Return what the first event of a cluster is chained to."""
    return hashlib.sha256(cluster_id.encode()).hexdigest()


def next_hash(head: str, columns: Columns) -> str:
    return hashlib.sha256(head.encode() + msgspec.msgpack.encode(columns)).hexdigest()


def body_text(body: Any) -> str | None:
    """Return *body* as JSON, or its size and digest when that is large; None for no body."""
    if body is None:
        return None
    text = msgspec.json.encode(body, order="deterministic").decode()
    if len(text) <= BODY_BYTES_MAX:
        return text
    digest = hashlib.sha256(text.encode()).hexdigest()
    return msgspec.json.encode({"too_large": len(text), "sha256": digest}).decode()


def service_of(subject: str) -> str | None:
    """Return the service that "service:NAME" or "instance:MACHINE/NAME/ID" is about."""
    kind, _, name = subject.partition(":")
    if kind == "service":
        return name
    if kind == "instance" and name.count("/") == 2:
        return name.split("/")[1]
    return None


def first_bad(db: sqlite3.Connection, cluster_id: str, events: int, events_hash: str) -> tuple[int | None, str]:
    """Return the number of the first event that breaks the chain and why, or (None, "") when all *events* hold.

    Reads every event once (0.15 s for 100,000). Call it inside one read transaction.
    """
    head, number = first_hash(cluster_id), 0
    query = (
        "SELECT number, seq, at, actor, kind, subject, why, before, after, hash, service FROM events ORDER BY number"
    )
    for row in db.execute(query):
        columns, found, service = row[:9], row[9], row[10]
        if columns[0] != number + 1:
            return number + 1, f"event {number + 1} is missing"
        number += 1
        head = next_hash(head, columns)
        if head != found:
            return number, f"event {number} does not match its hash: it, or the hash before it, was changed"
        if service != service_of(columns[5]):
            return number, f"event {number} is filed under another service than its subject"
    if number != events:
        return number + 1, f"the ledger counts {events} events, {number} are there"
    if head != events_hash:
        return number, f"event {number} is not the one that the ledger names as its newest"
    return None, ""
