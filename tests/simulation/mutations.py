"""Protections that can be switched off in a simulation, and within how many schedules it must be noticed.

A simulation that stays green without a protection proves nothing about it. Each is switched off by replacing one function of the
real code, in a process of its own: `python -m tests.simulation --without NAME`; `make simulate-mutations` tries all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from slum.ledger import applying, journal, overlap, transport
from slum.ledger.election import Election
from slum.ledger.member import Member
from slum.ledger.overlap import Fitted
from slum.ledger.peerwire import Append, AskPreVote, NextIndex, Vote
from slum.ledger.state import State
from slum.ledger.transport import Wire


@dataclass(frozen=True, slots=True)
class Mutation:
    name: str
    protection: str
    switch_off: Callable[[], None]
    schedules: int
    """Within so many it must be noticed."""
    members: int = 0
    """Of each schedule; 0 for the usual mixture."""
    rolling: bool | None = None
    """Only schedules in which logs differ a lot, or only others; None for the usual mixture."""
    strays: float | None = None
    """So many messages arrive twice; None for the usual mixture."""
    kinds: tuple[str, ...] = ()
    """Nothing but these troubles; the usual ones when empty."""


def _replace(owner: Any, name: str, new: Any) -> None:
    assert hasattr(owner, name), f"{owner} has no {name} any more"
    setattr(owner, name, new)


def _unclamped() -> None:
    fit = overlap.fit

    def fitted(message: Append, log: overlap.Log, committed: int) -> Fitted:
        found = fit(message, log, committed)
        return Fitted(msgspec.structs.replace(found.message, commit=message.commit), found.next, found.matches)

    _replace(transport, "fit", fitted)


def _own_end() -> None:
    fit = overlap.fit

    def fitted(message: Append, log: overlap.Log, committed: int) -> Fitted:
        found = fit(message, log, committed)
        given = found.message
        return Fitted(given, given.prev_index + len(given.entries) + 1 if found.matches else found.next, found.matches)

    _replace(transport, "fit", fitted)


def _unsynced_alone() -> None:
    work = Member.work

    def unsynced(self: Member) -> None:
        log = self.epoch.journal
        if self.epoch.wire is None:
            # One tick late: after what it made durable was counted, applied and answered.
            log.sync()
            log.sync = lambda: None  # type: ignore[method-assign]
        try:
            work(self)
        finally:
            log.__dict__.pop("sync", None)

    _replace(Member, "work", unsynced)


def _unsynced_send() -> None:
    class Lazy:
        """A journal whose sync() does nothing, for whoever sends."""

        def __init__(self, real: journal.Journal) -> None:
            self._real = real

        def sync(self) -> None:
            pass

        def __len__(self) -> int:
            return len(self._real)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._real, name)

    make = Wire.__init__

    def made(self: Wire, **how: Any) -> None:
        make(self, **{**how, "journal": Lazy(how["journal"])})

    _replace(Wire, "__init__", made)


def _unsynced_seal() -> None:
    real = State._set_sync
    _replace(State, "_set_sync", lambda self, full: real(self, self._syncs_all))


def _answered_early() -> None:
    _replace(Member, "answers", lambda self: self.proposer.release())


def _counted_early() -> None:
    sync = journal.Journal.sync
    work = Member.work

    def worked(self: Member) -> None:
        # The leader's own entries reach its disk one step after they were counted; terms and votes do in time.
        def lazy(log: journal.Journal) -> None:
            leads = self.epoch.group.leads and log is self.epoch.journal
            if not leads or log.promises:
                sync(log)

        log = self.epoch.journal
        late = log.dirty and self.epoch.group.leads
        log.sync = lambda: lazy(log)  # type: ignore[method-assign]
        try:
            work(self)
        finally:
            log.__dict__.pop("sync", None)
        if late and log is self.epoch.journal:
            sync(log)

    _replace(Member, "work", worked)


def _votes_without_a_name() -> None:
    def take(self: Wire, peer: str, message: Vote) -> None:
        if message.term == self.group.term:
            self._onMessageReceived(self._nodes[peer], {"type": "response_vote", "term": message.term})

    _replace(Wire, "_take_vote", take)


def _votes_of_any_term() -> None:
    def take(self: Wire, peer: str, message: Vote) -> None:
        self._onMessageReceived(self._nodes[peer], {"type": "response_vote", "term": self.group.term})

    _replace(Wire, "_take_vote", take)


def _answers_of_any_term() -> None:
    take = Wire.take

    def taken(self: Wire, peer: str, message: Any) -> None:
        if isinstance(message, NextIndex):
            message = msgspec.structs.replace(message, term=self.group.term)
        take(self, peer, message)

    _replace(Wire, "take", taken)


def _foreseen_anyway() -> None:
    def take(self: State, data: bytes) -> applying.Applied | None:
        foreseen, self._foreseen = self._foreseen, None
        return foreseen[1] if foreseen is not None else None

    _replace(State, "_take_foreseen", take)


def _stale_headers() -> None:
    _replace(applying, "is_stale", lambda entry, position: False)


def _overlap_cut() -> None:
    fit = overlap.fit

    def fitted(message: Append, log: overlap.Log, committed: int) -> Fitted:
        found = fit(message, log, committed)
        if not found.matches:
            return found
        return Fitted(msgspec.structs.replace(message, commit=found.message.commit), found.next, matches=True)

    _replace(transport, "fit", fitted)


def _no_pre_vote() -> None:
    tick = Election.tick

    def stands(self: Election, *how: Any, **more: Any) -> AskPreVote | None:
        asked = tick(self, *how, **more)
        if asked is not None:
            self._granted = None
            self.must_stand = True
        return None

    _replace(Election, "tick", stands)


ALL = (
    Mutation("commit-clamp", "commit only what the message covers", _unclamped, 300, rolling=True),
    Mutation(
        "own-end",
        "acknowledge only what the message covers, not the log's own end",
        _own_end,
        300,
        rolling=True,
        strays=0.5,
    ),
    Mutation("sync-alone", "sync before a group of one counts its own entries", _unsynced_alone, 300),
    Mutation("sync-before-send", "sync before any message leaves", _unsynced_send, 100),
    Mutation("sync-seal", "sync state.db at a Seal: the next journal's votes hang on it", _unsynced_seal, 300),
    Mutation("show-before-answer", "state.db shows what an answer tells of", _answered_early, 50),
    Mutation("sync-before-count", "a leader's entries are on its disk before it counts itself", _counted_early, 100),
    Mutation("one-vote", "one vote a peer a term", _votes_without_a_name, 100, members=5, strays=0.5),
    Mutation("vote-term", "votes count in their own term only", _votes_of_any_term, 300, rolling=True, strays=0.5),
    Mutation(
        "answer-term",
        "answers to appends count in their own term only",
        _answers_of_any_term,
        300,
        members=5,
        rolling=True,
        strays=1.0,
        kinds=("relapse",),
    ),
    Mutation("stale-headers", "headers of an older leader take no effect", _stale_headers, 100),
    Mutation("foreseen", "only the entry that was foreseen is taken for done", _foreseen_anyway, 100),
    Mutation("overlap", "what is held is not cut and added again", _overlap_cut, 100),
    Mutation("pre-vote", "ask before standing for election", _no_pre_vote, 100),
)
