"""What a member puts into the log next, or sends on to whoever leads: its own entries, seals, and batches of proposals.

A leader first says in the log that it leads (LeaderStarted); only then may proposals follow, one batch in flight at a
time. A Seal waits for what is in flight. A member that does not lead sends on, and refuses everything at once where no majority
is in reach. Decides when; what is applied and answered is the member's business. All in the ledger's one thread.
"""

from __future__ import annotations

import contextlib
from typing import Any, Protocol

import msgspec

from slum.errors import Conflict, QuorumLost, SlumError
from slum.ledger import disk
from slum.ledger.changes import Changes
from slum.ledger.commands import (
    PROTOCOL,
    Entry,
    Header,
    LeaderStarted,
    NoteEvent,
    Proposal,
    Record,
    Seal,
    SetProtocol,
    new_request_id,
)
from slum.ledger.commands import Member as MemberRow
from slum.ledger.epoch import Epoch
from slum.ledger.peers import Peers
from slum.ledger.proposer import Proposer
from slum.ledger.relay import Relays
from slum.ledger.schema import Position
from slum.ledger.sealing import due_seal
from slum.ledger.state import State
from slum.ledger.status import NO_LEADER_S
from slum.ledger.world import Config, World

_encode = msgspec.msgpack.Encoder().encode


class Offering(Protocol):
    """The member that offers."""

    state: State

    @property
    def position(self) -> Position: ...

    @property
    def epoch(self) -> Epoch: ...

    @property
    def sealed(self) -> bool:
        """The epoch's Seal is applied: nothing more is offered in it."""
        ...

    @property
    def own_row(self) -> MemberRow | None:
        """Our row as the folder's identity has it."""
        ...

    def let_in(self, row: MemberRow) -> None:
        """Let one that is to become a member connect, as a learner."""
        ...


class Offers:
    def __init__(
        self,
        member: Offering,
        *,
        run: str,
        proposer: Proposer,
        relays: Relays,
        changes: Changes,
        peers: Peers,
        guard: disk.Guard,
        config: Config,
        world: World,
    ) -> None:
        self._member = member
        self._run = run
        self._proposer = proposer
        self._relays = relays
        self._changes = changes
        self._peers = peers
        self._guard = guard
        self._config = config
        self._world = world
        self._settling = self._leaves = False
        self._newer_since: float | None = None
        """Since when this member has seen all members speak a newer protocol, however often an epoch ended meanwhile."""
        self.begin_epoch()

    def begin_epoch(self) -> None:
        self._started_term = self._sealing_term = 0
        self.offered: bytes | None = None
        """The newest entry that was put into this epoch's log from here."""
        self._flight: tuple[str | None, int] = (None, 0)

    def settle_later(self, *, changed: bool, leaves: bool) -> None:
        """An epoch with other members has begun, or one with the same: *leaves* when we are not in it any more."""
        self._settling, self._leaves = changed, leaves

    @property
    def is_ready(self) -> bool:
        """Tell whether this member leads and has said so in the log: only then may others' proposals follow."""
        group = self._member.epoch.group
        return group.leads and group.term == self._member.position.term and not self._member.sealed

    @property
    def has_more(self) -> bool:
        """Tell whether offer() has something to offer at once: nothing that it would wait for is under way."""
        group = self._member.epoch.group
        if not group.leads or self._member.sealed:
            return False
        if not self.is_ready:
            return self._started_term != group.term
        return self._sealing_term != group.term and self._proposer.queued > 0 and not self._proposer.in_flight

    @property
    def leader(self) -> str | None:
        """The other member that leads."""
        return None if self._member.sealed else self._member.epoch.others_leader

    def settled(self) -> bool:
        """The new members have committed something, so nobody needs those that left; tell whether we are one of these."""
        if not self._settling or self._member.position.applied == 0 or self._member.sealed:
            return False
        self._settling = False
        self._changes.finish(self._member.position.members)
        return self._leaves

    def offer(self) -> None:
        """Put into the log, or send on, what is due now."""
        epoch = self._member.epoch
        if self._member.sealed:
            return
        leads, term = epoch.group.leads, epoch.group.term
        flight = (epoch.me if leads else self.leader, term)
        if flight != self._flight:
            # Whatever was under way may never arrive; a request id that does arrive is not done twice.
            self._flight = flight
            self._proposer.put_back()
        if not leads:
            self._offer_elsewhere(flight[0])
            return
        if not self.is_ready:
            if self._started_term != term:
                self._started_term = term
                self._propose_own(LeaderStarted(member=epoch.me, run=self._run))
            return
        if self._sealing_term == term or self._proposer.in_flight:
            return
        seal = self._due_seal()
        if seal is not None:
            self._sealing_term = term
            self._propose_own(seal)
            return
        batch = self._proposer.take_batch(self._refuse)
        if batch:
            self.append(batch)

    def note(self, events: tuple[NoteEvent, ...]) -> None:
        """Queue a record of *events*, which this leader has seen itself; nobody waits for the answer."""
        if events:
            self._queue(Record(events=events))

    def upgrade(self) -> None:
        """Raise the protocol once all members have been there and spoken a newer one for a while; until then each can go back."""
        now, standing = self._world.clock(), self._member.position.protocol
        newest = min(found or 0 for found in self._spoken().values()) if standing < PROTOCOL else 0
        if newest <= standing:
            self._newer_since = None
        elif self._newer_since is None:
            self._newer_since = now
        elif now - self._newer_since >= self._config.upgrade_s and self.is_ready:
            self._newer_since = None
            self._queue(SetProtocol(version=newest))

    def _queue(self, command: Record | SetProtocol) -> None:
        seq = self._member.position.seq
        request_id = new_request_id(seq, f"{self._world.chance.getrandbits(128):032x}")
        made = Proposal(command=command, request_id=request_id, actor=f"ledger@{self._member.epoch.me}")
        with contextlib.suppress(QuorumLost):
            # A full queue: status() shows it all the same, and what is still so is proposed again.
            self._proposer.submit(made, lambda _: None, seq=seq)

    def append(self, proposals: tuple[Proposal, ...]) -> None:
        """Give *proposals*, as one entry, to the group."""
        at, group = self._member.position, self._member.epoch.group
        header = Header(
            generation=at.generation,
            epoch=at.epoch,
            term=group.term,
            member=self._member.epoch.me,
            at=self._world.now(),
        )
        self.offered = _encode(Entry(header=header, proposals=proposals))
        group.offer(self.offered, self._fate)

    def _due_seal(self) -> Seal | None:
        epoch, at = self._member.epoch, self._member.position
        changed = self._changes.due(at.members, epoch.me, self._member.let_in, self._here(at.seq), self._world.clock())
        journal = epoch.journal
        age_s = self._world.clock() - epoch.begun_at
        own = self._member.own_row
        return due_seal(at.members, changed, own, len(journal), journal.size_bytes, age_s, self._config)

    def _here(self, seq: int) -> dict[str, int]:
        """Return how many entries each that is connected and in this epoch is behind."""
        place = self._member.epoch.place
        here = [peer for peer in self._peers.up if self._peers.place_of(peer) == place]
        return {peer: seq - (self._peers.seq_of(peer) or 0) for peer in here}

    def _offer_elsewhere(self, leader: str | None) -> None:
        epoch = self._member.epoch
        if leader is not None and leader in self._peers.up:
            self._relays.send(leader)
            if self._changes.pending is not None and not self._settling:
                self._changes.finish(QuorumLost(f"{epoch.me} does not lead, {leader} does", hint="ask that one"))
        elif epoch.wire is not None:
            names = {row.id for row in self._member.position.members}
            reached = len(names & {epoch.me, *self._peers.up})
            if reached <= len(names) / 2 and self._world.clock() >= epoch.patient_until:
                self._relays.refuse_all(reached, len(names))
            elif epoch.election.silence_s(self._world.clock()) >= NO_LEADER_S:
                self._refuse_leaderless()

    def _refuse_leaderless(self) -> None:
        """Others may well have a leader that only we are cut off from; who asks there is served."""
        self._proposer.put_back()
        if self._proposer.queued:
            error = QuorumLost(
                f"{self._member.epoch.me} has heard no leader for {NO_LEADER_S:g} s",
                hint="ask another member, with the same request id: a majority may be at work there",
            )
            self._proposer.take_batch(lambda _: error)

    def _propose_own(self, command: LeaderStarted | Seal) -> None:
        self.append((Proposal(command=command, request_id="", actor=f"ledger@{self._member.epoch.me}"),))

    def _fate(self, _result: Any, failure: int) -> None:
        """PySyncObj's word on an append. Answers come from apply; this only notices what it would not take."""
        if failure:
            self._proposer.put_back()

    def _refuse(self, proposal: Proposal) -> SlumError | None:
        """Return why *proposal* is not put into the log now, or None."""
        if isinstance(proposal.command, SetProtocol):
            return self._refuse_protocol(proposal.command.version)
        if not self._guard.low or not disk.may_grow(proposal.command, self._member.state.fleet_bytes()):
            return None
        return QuorumLost(
            f"the disk of {self._guard.folder} is almost full ({self._guard.free_bytes >> 20} MiB free): only removals are taken",
            hint="free some space and try again; nothing was changed",
        )

    def _refuse_protocol(self, version: int) -> SlumError | None:
        """A member that cannot follow would end at the entry: all must be there and know the protocol."""
        late = [name for name, found in sorted(self._spoken().items()) if found is None or found < version]
        if not late:
            return None
        return Conflict(
            f"protocol {version} is not known to be spoken by {', '.join(late)}",
            hint="install this slum on every member first, and start those that are down; nothing was changed",
        )

    def _spoken(self) -> dict[str, int | None]:
        """Return the newest protocol of each member; None for one that is not connected."""
        spoken = {row.id: self._peers.sight(row.id).protocol for row in self._member.position.members}
        return {**spoken, self._member.epoch.me: PROTOCOL}
