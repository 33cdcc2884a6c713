"""The running group of one epoch: PySyncObj, its journal, its wire to the peers and its election timer, made together.

Made for a position of state.db, whose members stay the same until the epoch's Seal; ends when the member says so, never from
inside a tick. What commits goes to *on_entry*. Knows nothing of the epochs before and after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from slum.ledger.election import Election
from slum.ledger.group import Group, Timing
from slum.ledger.journal import Journal
from slum.ledger.peerwire import AskPreVote, Message, Place
from slum.ledger.replay import Skip
from slum.ledger.schema import Position
from slum.ledger.sealing import worth_waiting
from slum.ledger.transport import NoPeers, Wire
from slum.ledger.world import World


class Epoch:
    """One group and what belongs to it. *stands* makes it call an election as soon as a majority is there.

    *known_at* is when this member last had applied all that a leader had committed: how old what it shows may be.
    """

    def __init__(
        self,
        *,
        me: str,
        position: Position,
        journal: Journal,
        skip: Skip,
        timing: Timing,
        world: World,
        post: Callable[[str, Message], None],
        on_entry: Callable[[bytes], None],
        stands: bool,
        known_at: float,
    ) -> None:
        now = world.clock()
        self.begun_at = now
        self.known_at = known_at
        self.place: Place = (position.generation, position.epoch)
        self.journal = journal
        self.skip = skip
        self.me = me
        self.rows = {row.id: row for row in position.members if row.id != me}
        self.is_member = any(row.id == me for row in position.members)
        self.patient_until = now + timing.election_max_s + timing.fallback_s
        """Before it, nobody has had the time to be elected."""
        self._clock = world.clock
        peers = tuple(self.rows)
        self.election = Election(
            place=self.place,
            peers=peers,
            min_s=timing.election_min_s,
            max_s=timing.election_max_s,
            chance=world.chance,
            now=now,
        )
        self.wire: Wire | None = None
        if peers:
            self.wire = Wire(
                place=self.place, peers=peers, journal=journal, election=self.election, post=post, clock=world.clock
            )
        self.group = Group(
            member=me,
            peers=peers,
            journal=journal,
            transport=NoPeers() if self.wire is None else self.wire,
            on_entry=on_entry,
            timing=timing,
            spares=tuple if self.wire is None else self.wire.spares,
        )
        if self.wire is not None:
            self.wire.attach(self.group)
        self.election.must_stand = self.is_member and (stands or not peers)

    @property
    def others_leader(self) -> str | None:
        """The member that leads, as far as this one has heard lately."""
        leader = self.group.leader
        if leader is None or leader == self.me:
            return None
        return leader if self.election.hears_leader(self._clock()) else None

    def asks(self) -> AskPreVote | None:
        """Return the question for all peers when it is time to ask who would vote for us."""
        if self.wire is None or not self.is_member:
            return None
        return self.election.tick(self._clock(), leads=self.group.leads, term=self.group.term, last=self.journal.last)

    @property
    def is_about_to_stand(self) -> bool:
        return self.election.must_stand and (self.wire is None or self.wire.reaches_majority)

    def tick(self, *, yields: bool = False) -> None:
        """Do what is due; *yields*: neither lead nor stand, others will."""
        if yields and self.group.leads:
            self.group.resign()
        stand = self.is_about_to_stand and not yields
        if stand:
            self.election.must_stand = False
        self.group.tick(stand=stand)
        if self.group.leads:
            self.known_at = self._clock()
        elif self.wire is not None and self.wire.told is not None and self.group.backlog == 0:
            told_at, commit = self.wire.told
            if self.group.commit >= commit:
                self.known_at, self.wire.told = told_at, None

    def lag_of(self, peer: str) -> int | None:
        """Return how many entries of this epoch *peer* has not acknowledged to us, its leader; None for a learner."""
        return len(self.journal) - self.group.acknowledged(peer) if peer in self.rows else None

    def lacks_a_peer(self, up: Iterable[str]) -> bool:
        """Tell whether we lead and one of those that are *up* almost has all of the log."""
        if not self.group.leads or self.wire is None:
            return False
        acknowledged = (self.group.acknowledged(peer) for peer in up if peer in self.rows)
        return worth_waiting(len(self.journal), acknowledged)
