"""How an append_entries message meets the log: what is already held is skipped, only a real conflict truncates.

PySyncObj (0.3.17, syncobj.py, append_entries) drops everything behind prevLogIdx without comparing, answers with its own
log's end, and takes the leader's commit index up to that end. All three are unsafe when messages overlap or when an old
leader's tail survives. So each message is fitted first (Ongaro and Ousterhout 2014, figure 2, AppendEntries, steps 2 to 5),
and the answer is corrected after. Pure: reads the log, changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import msgspec

from slum.errors import invariant
from slum.ledger.peerwire import Append, LogEntry


class Log(Protocol):
    def __len__(self) -> int: ...

    def term_of(self, index: int) -> int: ...

    def entry(self, index: int) -> LogEntry: ...


@dataclass(frozen=True, slots=True)
class Fitted:
    """*message* may be given to PySyncObj; whatever it answers, *next* is what the leader is told."""

    message: Append
    next: int
    matches: bool
    """The log agrees with the leader's up to *next* - 1."""


def fit(message: Append, log: Log, committed: int) -> Fitted:
    """Return what of *message* is new to *log*; InvariantError when it contradicts what is committed.

    *committed* is the highest index that this member knows to be committed or has applied.
    """
    end = len(log)
    previous = message.prev_index
    if previous > end:
        # Not our end: what lies there may be another leader's. Of messages that came together the last answer decides where the
        # leader goes on, and would send it back to our end for ever.
        return Fitted(_without_entries(message), next=committed + 1, matches=False)
    if log.term_of(previous) != message.prev_term:
        invariant(previous > committed, f"a leader contradicts entry {previous}, {committed} are committed")
        # One answer instead of one step back a heartbeat: what is committed is the leader's too.
        return Fitted(_without_entries(message), next=committed + 1, matches=False)
    held = _held(message, log, end)
    verified = previous + len(message.entries)
    commit = min(message.commit, verified)
    if held == len(message.entries):
        # PySyncObj would cut what lies behind; given the log's own end it has nothing to cut.
        message = msgspec.structs.replace(
            message, prev_index=end, prev_term=log.term_of(end), entries=(), commit=commit
        )
        return Fitted(message, next=verified + 1, matches=True)
    first = previous + held + 1
    invariant(first > committed or first > end, f"a leader replaces entry {first}, {committed} are committed")
    message = msgspec.structs.replace(
        message,
        prev_index=first - 1,
        prev_term=log.term_of(first - 1),
        entries=message.entries[held:],
        commit=commit,
    )
    return Fitted(message, next=verified + 1, matches=True)


def _held(message: Append, log: Log, end: int) -> int:
    """Return how many of the first entries the log holds already; the same index and term must be the same entry."""
    for held, (command, index, term) in enumerate(message.entries):
        if index > end or log.term_of(index) != term:
            return held
        invariant(log.entry(index)[0] == command, f"two different entries are number {index} of term {term}")
    return len(message.entries)


def _without_entries(message: Append) -> Append:
    return msgspec.structs.replace(message, entries=())
