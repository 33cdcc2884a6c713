"""What one command sees and may move while it is applied: the transaction, who asks and when, the events it writes.

Everything in it comes from the entry or from state.db; apply functions take nothing from the machine they run on.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass

from slum.ledger.commands import Done, Header, Member, Rejected
from slum.ledger.events import EventWriter


@dataclass(slots=True, kw_only=True)
class Turn:
    """One entry's application. *revision*, *leader*, *protocol* and *members* go into the next ledger row."""

    db: sqlite3.Connection
    header: Header
    seq: int
    events: EventWriter
    revision: int
    leader: str
    protocol: int
    members: tuple[Member, ...]
    actor: str = ""
    """Of the proposal being applied."""
    sealed: bool = False

    @property
    def at(self) -> float:
        """The leader's clock when it proposed: for people and deadlines, never for order."""
        return self.header.at

    def done(self, value: int | None = None) -> Done:
        return Done(seq=self.seq, value=value)

    def rejected(self, code: str, why: str, details: tuple[str, ...] = ()) -> Rejected:
        return Rejected(seq=self.seq, code=code, why=why, details=details)
