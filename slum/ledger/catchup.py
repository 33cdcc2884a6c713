"""How a member that is behind an epoch catches up: first by the tail of the log it has begun, else by a copy of state.db.

Both are asked for, piece by piece, by the one that is behind, so nothing has to be remembered about it and every piece may
be lost. A tail is entries that are certainly committed: up to the commit index of a running epoch, or all of a sealed
one (what lies behind its Seal never counts). A learner, which is in no group yet, follows a running epoch the same way.
A copy is a SQLite backup made apart from the ledger's thread, checked as a whole before it is used (copies.py).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from slum.ledger.beginning import Note
from slum.ledger.copies import Incoming, Outgoing
from slum.ledger.journal import Journal
from slum.ledger.peerwire import LogEntry, Message, Part, Place, Tail, WantCopy, WantTail

TAIL_BYTES = 1 << 20
ASK_AGAIN_S = 1.0
POLL_S = 0.05


class Follower(Protocol):
    """The member that catches up, or helps."""

    @property
    def place(self) -> Place: ...

    @property
    def commit(self) -> int: ...

    @property
    def is_sound(self) -> bool:
        """Nobody's rows differ from ours, as far as we know: others may have a copy of them."""
        ...

    def journal_of(self, place: Place) -> Journal | None: ...

    def stand_in(self, peer: str) -> str:
        """Return who may give *peer* a copy in our stead; empty when it is ours to give."""
        ...

    def reaches(self, peer: str) -> bool: ...

    def feed(self, peer: str, tail: Tail) -> None: ...

    def adopt(self, path: Path) -> bool: ...


class CatchUp:
    def __init__(
        self,
        home: Path,
        follower: Follower,
        *,
        post: Callable[[str, Message], None],
        clock: Callable[[], float],
        apart: Callable[[Callable[[], None]], None],
        note: Note,
    ) -> None:
        self._follower = follower
        self._post = post
        self._clock = clock
        self._note = note
        self._outgoing = Outgoing(home, apart, clock)
        self._incoming = Incoming(home, lambda: follower.place)
        self._source: str | None = None
        self._ask_at = 0.0
        self._unanswered = False
        self._wants_copy = False

    @property
    def busy(self) -> bool:
        return self._source is not None

    def from_peer(self, peer: str) -> None:
        """*peer* has what we miss; begin to ask it, unless another one is being asked."""
        if self._source is None:
            self._source = peer
            self._ask()

    def tick(self) -> None:
        """Ask again for what is late or was not there yet."""
        self._outgoing.tick()
        now = self._clock()
        if self._source is None or now < self._ask_at:
            return
        if self._unanswered:
            # Somebody else may have it; whoever is ahead says so several times a second.
            self._source = None
            self._incoming.reset()
        else:
            self._ask()

    def begin_epoch(self) -> None:
        """We have moved on; whoever is still ahead will say so."""
        self._source, self._wants_copy, self._ask_at = None, False, 0.0
        self._incoming.reset()

    def take(self, peer: str, message: WantTail | Tail | WantCopy | Part) -> None:
        match message:
            case WantTail():
                self._post(peer, self._tail(peer, message))
            case WantCopy():
                part = self._outgoing.part(message, self._follower.place) if self._follower.is_sound else None
                if part is not None:
                    self._post(peer, part)
            case Tail():
                if peer == self._source and message.place == self._follower.place and not self._wants_copy:
                    self._take_tail(peer, message)
            case Part():
                if peer == self._source and self._wants_copy:
                    self._take_part(message)

    def close(self) -> None:
        self._outgoing.close()
        self._incoming.reset()

    # --- helping -----------------------------------------------------------------------------------------------------

    def _tail(self, peer: str, wanted: WantTail) -> Tail:
        place, after = wanted.place, wanted.after
        journal = self._follower.journal_of(place)
        if journal is None or not 1 <= after <= len(journal):
            other = self._follower.stand_in(peer)
            return Tail(place=place, prev_index=max(1, after), prev_term=0, gone=True, other=other)
        end = self._follower.commit if place == self._follower.place else len(journal)
        entries: list[LogEntry] = []
        size = 0
        for index in range(after + 1, end + 1):
            entry = journal.entry(index)
            size += len(entry[0])
            if entries and size > TAIL_BYTES:
                break
            entries.append(entry)
        return Tail(place=place, prev_index=after, prev_term=journal.term_of(after), entries=tuple(entries))

    # --- being helped ------------------------------------------------------------------------------------------------

    def _ask(self) -> None:
        assert self._source is not None
        if self._wants_copy:
            self._ask_for(*self._incoming.wanted())
        else:
            self._ask_for(WantTail(place=self._follower.place, after=self._follower.commit))

    def _ask_for(self, *wanted: WantTail | WantCopy) -> None:
        assert self._source is not None
        self._ask_at = self._clock() + ASK_AGAIN_S
        self._unanswered = True
        for message in wanted:
            self._post(self._source, message)

    def _take_tail(self, peer: str, tail: Tail) -> None:
        if tail.gone:
            self._wants_copy = True
            if self._follower.reaches(tail.other):
                self._source = tail.other
            self._note("asks_for_a_copy", peer=self._source, epoch=self._follower.place[1])
            self._ask()
            return
        if tail.prev_index > self._follower.commit:
            return
        self._unanswered = False
        if tail.entries:
            self._follower.feed(peer, tail)
            # The next piece is asked for after the tick that applies this one.
            self._ask_at = self._clock()
        else:
            self._ask_at = self._clock() + POLL_S

    def _take_part(self, part: Part) -> None:
        taken = self._incoming.take(part)
        if taken is None:
            self._unanswered = False
            self._ask_at = self._clock() + POLL_S
            return
        if not isinstance(taken, Path):
            self._ask_for(*taken)
            return
        source = self._source
        adopted = self._follower.adopt(taken)
        self._note("copy_was_taken" if adopted else "copy_was_refused", peer=source, bytes=part.size)
        self.begin_epoch()
