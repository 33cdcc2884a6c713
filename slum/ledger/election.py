"""When to stand for election: only after a majority said that it would vote for us and hears no leader either.

PySyncObj stands as soon as its timer ends. A member that comes back, or that is cut off from the leader alone, would so
depose a leader that works, again and again. Pre-vote (Ongaro's thesis, 2014, section 9.6) asks first, and moves nobody's term.
A member that has just heard a leader, or is one, says no, and so does one whose log is longer. Who loses the connection to its leader
does not wait for the timer: a process that was killed closes its connections, and if only ours broke, the others still hear that leader
and say no. These ask in turn, so that they do not take each other's votes. Holds a timer and a count; takes time and randomness as
arguments, sends nothing itself.
"""

from __future__ import annotations

import random
from collections.abc import Collection

from slum.ledger.peerwire import AskPreVote, Place, PreVote

TURN_S = 0.1
"""Between those that ask after they lost the leader: time enough for one election."""


class Election:
    """One member's part in the elections of one epoch."""

    def __init__(
        self, *, place: Place, peers: Collection[str], min_s: float, max_s: float, chance: random.Random, now: float
    ) -> None:
        self._place = place
        self._peers = frozenset(peers)
        self._min_s = min_s
        self._max_s = max_s
        self._chance = chance
        # As if a leader had just been heard: who restarts must not help to depose one before hearing it.
        self._heard_at = now
        self._deadline = 0.0
        self._round = chance.getrandbits(48)
        self._granted: set[str] | None = None
        self._lost: str | None = None
        """The leader whose connection we lost, and nobody leads since."""
        self.must_stand = False
        """A majority would vote for us: call an election at the next tick."""
        self._restart(now)

    @property
    def deadline(self) -> float:
        return self._deadline

    def heard_leader(self, now: float) -> None:
        self._heard_at = now
        self._lost = None
        self._restart(now)

    def lost_leader(self, leader: str, now: float, rank: int) -> None:
        """The connection to *leader* is gone; *rank* members ask before us."""
        self._lost = leader
        self._deadline = min(self._deadline, now + rank * TURN_S)

    def found_leader(self, leader: str, now: float) -> None:
        """There is a connection to *leader* again."""
        if self._lost == leader:
            self._lost = None
            self._restart(now)

    def voted(self, now: float) -> None:
        self._restart(now)

    def hears_leader(self, now: float) -> bool:
        return self._lost is None and now - self._heard_at < self._min_s

    def silence_s(self, now: float) -> float:
        """Return how long ago a leader was heard, or this member led."""
        return now - self._heard_at

    def tick(self, now: float, *, leads: bool, term: int, last: tuple[int, int]) -> AskPreVote | None:
        """Return the question to all peers when it is time to ask; *last* is (term, index) of the last entry."""
        if leads:
            self._heard_at = now
            self._lost = None
            self._restart(now)
            return None
        if now < self._deadline:
            return None
        self._restart(now)
        self._round += 1
        self._granted = set()
        if not self._peers:
            self.must_stand = True
            return None
        return AskPreVote(place=self._place, term=term, round=self._round, last_index=last[1], last_term=last[0])

    def would_vote(self, asked: AskPreVote, now: float, *, leads: bool, term: int, last: tuple[int, int]) -> bool:
        """Tell whether we would vote for the sender of *asked* now."""
        if leads or self.hears_leader(now) or asked.term < term:
            return False
        return (asked.last_term, asked.last_index) >= last

    def granted(self, peer: str, answer: PreVote) -> None:
        """Count a yes; sets must_stand once a majority, ourselves included, has said it in this round."""
        if self._granted is None or answer.round != self._round or peer not in self._peers:
            return
        self._granted.add(peer)
        if len(self._granted) + 1 > (len(self._peers) + 1) / 2:
            self._granted = None
            self.must_stand = True

    def _restart(self, now: float) -> None:
        self._deadline = now + self._min_s + (self._max_s - self._min_s) * self._chance.random()
        self._granted = None
        self.must_stand = False
