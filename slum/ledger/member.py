"""One member of the ledger: opens the folder, runs one Raft group after the other, applies what they commit.

The log is cut into epochs. An epoch is one group with fixed members, a bounded log and no compaction; its last entry is a
Seal, after which nothing counts in that group, and the next epoch is a fresh group with a fresh journal that starts from
the state after the Seal. This is a stoppable state machine (Lamport, Malkhi, Zhou: "Stoppable Paxos", 2008; "Vertical Paxos
and Primary-Backup Replication", 2009): replacing a log wholesale needs no proof about a log that is rewritten in place.

Order at a Seal: journal of e+1 made durable, state.db commits with epoch e+1, the leader lingers until peers that are close
have the Seal, group e ends outside of any tick, group e+1 starts, and the old leader stands in it at once. A kill between
any two leaves either epoch e with its Seal to be applied again, or epoch e+1. A member that is not in the list of its epoch
is a learner: it takes part in nothing and follows the committed log. All of a Member runs in one thread (the proposer
takes proposals from any).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import msgspec

from slum.errors import InvariantError, QuorumLost, SlumError, invariant
from slum.ledger import disk, folder, identity, journal, replay
from slum.ledger.adopt import adopt, is_our_future, who
from slum.ledger.beginning import Note, current_or_new
from slum.ledger.catchup import CatchUp
from slum.ledger.changes import Change, Changes, Told
from slum.ledger.commands import PROTOCOL, Entry, Header, LeaderInfo, LeaderStarted, Proposal, Seal
from slum.ledger.commands import Member as MemberRow
from slum.ledger.election import Election
from slum.ledger.group import Group
from slum.ledger.net import Alone
from slum.ledger.peers import Peers
from slum.ledger.peerwire import VERSION, Hello, Part, Place, Relay, RelayRefused, Tail, WantCopy, WantTail
from slum.ledger.proposer import Proposer
from slum.ledger.relay import Relays
from slum.ledger.schema import EpochRow, Position
from slum.ledger.state import Applied, State
from slum.ledger.transport import NoPeers, Wire
from slum.ledger.world import Config, World, real_world

EPOCH_ENTRIES_MIN = 8
"""Below it an epoch would be full of what begins an epoch."""
LINGER_S = 0.05
LINGER_ENTRIES = 20
TICK_S = 0.02
__all__ = ["Config", "Member", "World", "opened", "real_world"]
_encode = msgspec.msgpack.Encoder().encode


@contextmanager
def opened(
    home: Path,
    config: Config,
    *,
    run: str,
    note: Note,
    now: Callable[[], float] = time.time,
    world: World | None = None,
) -> Iterator[Member]:
    """Open the ledger in folder *home*, a new one when there is none; Refusal when its files do not agree.

    *run* is random for each start of the process; *now* gives unix seconds. Without a *world* there are no peers; the
    network of one that is given is closed at the end.
    """
    invariant(config.epoch_entries >= EPOCH_ENTRIES_MIN, f"an epoch of less than {EPOCH_ENTRIES_MIN} entries")
    own = real_world(Alone(), now) if world is None else world
    try:
        with folder.locked(home):
            guard = disk.Guard(home, disk.marks(config.ballast_bytes, config.epoch_bytes + journal.SLACK_BYTES))
            for event in guard.check(time.monotonic()):
                note(event, free_bytes=guard.free_bytes)
            if config.ballast_bytes and not guard.has_ballast:
                note("ballast_is_missing", wanted_bytes=config.ballast_bytes, free_bytes=guard.free_bytes)
            path = current_or_new(home, config.epoch_bytes, now(), note)
            state = State.open(path, results_kept=config.results_kept)
            try:
                member = Member(home, config, state, guard, run=run, note=note, world=own)
                try:
                    yield member
                finally:
                    member.close()
                    state = member.state
            finally:
                state.close()
    finally:
        own.net.close()


class Member:
    """A running member; step() is its whole life."""

    def __init__(
        self, home: Path, config: Config, state: State, guard: disk.Guard, *, run: str, note: Note, world: World
    ) -> None:
        self._home = home
        self._config = config
        self.state = state
        self._guard = guard
        self._run = run
        self._note = note
        self._world = world
        self._net = world.net
        self.wake = world.net.wake
        self.proposer = Proposer()
        self._relays = Relays(self.proposer, post=self._net.send, clock=world.clock)
        self._changes = Changes()
        self._guests: dict[str, MemberRow] = {}
        self._settling = self._leaves = False
        self._failure: BaseException | None = None
        self._next: tuple[EpochRow, journal.Journal] | None = None
        self._linger_until = 0.0
        self._started_term = 0
        self._sealing_term = 0
        self._flight: tuple[str | None, int] = (None, 0)
        self._leads_next = False
        self._retained: tuple[Place, journal.Journal] | None = None
        self._me = who(home, state.position)
        me = identity.load(home)
        self._own_row = identity.row(home, me) if me is not None and me.address else None
        self._history: Mapping[Place, str] = state.history()
        self._journal, self._skip = replay.open_epoch(home, state, config.epoch_bytes, note)
        folder.remove_old_journals(home, state.epochs(2))
        self._peers = Peers(self._net, self, clock=world.clock, now=world.now, note=note)
        self._catch_up = CatchUp(home, self, post=self._net.send, clock=world.clock, apart=world.apart, note=note)
        self._begin_group()

    # --- what others ask ---------------------------------------------------------------------------------------------

    @property
    def position(self) -> Position:
        return self.state.position

    @property
    def place(self) -> Place:
        """The epoch of the running group; state.db is one ahead while the leader lingers."""
        return self._place

    @property
    def commit(self) -> int:
        return self._group.commit

    def change(self, change: Change, told: Told) -> None:
        """Change the members; *told* hears the new list once it is in force, or why not. From any thread."""
        self._changes.ask(change, told, self._world.clock())
        self.wake.set()

    def leader(self) -> LeaderInfo:
        at = self.position
        leads = self._is_ready()
        member = self._me.id if leads else self._others_leader()
        return LeaderInfo(
            member=member,
            address=next((row.address for row in at.members if row.id == member), self._me.address),
            is_self=leads,
            generation=at.generation,
            epoch=at.epoch,
            term=at.term,
            seq=at.seq,
        )

    # --- the loop ----------------------------------------------------------------------------------------------------

    def step(self, wait_s: float) -> None:
        """Propose, make durable, commit and apply what there is; then wait at most *wait_s* for more.

        Raises OSError or SlumError when the disk fails or an entry cannot be applied: the member is then dead.
        """
        for event in self._guard.check(time.monotonic()):
            self._note(event, free_bytes=self._guard.free_bytes)
        self._relays.tell()
        self._settle_change()
        self._offer()
        self._journal.sync()
        self._tick()
        if self._failure is not None:
            raise self._failure
        if self._next is not None and not self._lingers():
            self._begin_epoch()
        for got in self._net.receive(self._patience(wait_s)):
            self._peers.handle(got)

    def _tick(self) -> None:
        if self._wire is not None or self._guests:
            now = self._world.clock()
            asked = None
            if self._wire is not None and self._is_member and self._next is None:
                asked = self._election.tick(
                    now, leads=self._group.leads, term=self._group.term, last=self._journal.last
                )
            if asked is not None:
                for peer in self._peers.up:
                    self._net.send(peer, asked)
            self._peers.tick(self.position.seq)
            self._follow()
            self._catch_up.tick()
        stand = self._election.must_stand and (self._wire is None or self._wire.reaches_majority)
        if stand:
            self._election.must_stand = False
        self._group.tick(stand=stand)

    def _follow(self) -> None:
        """A learner asks for what is committed in the epoch that it is in."""
        if not self._is_member and self._next is None and not self._catch_up.busy:
            here = [peer for peer in self._peers.up if self._peers.place_of(peer) == self.place]
            if here:
                self._catch_up.from_peer(self._world.chance.choice(here))

    def _patience(self, wait_s: float) -> float:
        if self._journal.dirty or (self._next is not None and self._wire is None):
            return 0.0
        return min(wait_s, TICK_S) if self._wire is not None or self._guests else wait_s

    def close(self) -> None:
        self._group.close()
        self._journal.close()
        if self._retained is not None:
            self._retained[1].close()
        if self._next is not None:
            self._next[1].close()
        self._catch_up.close()

    # --- proposing ---------------------------------------------------------------------------------------------------

    def _is_ready(self) -> bool:
        """Tell whether this member leads and has said so in the log: only then may others' proposals follow."""
        return self._group.leads and self._group.term == self.position.term and self._next is None

    def _others_leader(self) -> str | None:
        """Return the member that leads, as far as this one has heard lately."""
        leader = self._group.leader
        if leader is None or leader == self._me.id or self._next is not None:
            return None
        return leader if self._election.hears_leader(self._world.clock()) else None

    def _offer(self) -> None:
        if self._next is not None:
            return
        flight = (self._me.id if self._group.leads else self._others_leader(), self._group.term)
        if flight != self._flight:
            # Whatever was under way may never arrive; a request id that does arrive is not done twice.
            self._flight = flight
            self.proposer.put_back()
        if not self._group.leads:
            self._offer_elsewhere(flight[0])
            return
        if not self._is_ready():
            if self._started_term != self._group.term:
                self._started_term = self._group.term
                self._propose_own(LeaderStarted(member=self._me.id, run=self._run))
            return
        if self._sealing_term == self._group.term or self.proposer.in_flight:
            return
        seal = self._due_seal()
        if seal is not None:
            self._sealing_term = self._group.term
            self._propose_own(seal)
            return
        batch = self.proposer.take_batch(self._refuse_growth if self._guard.low else None)
        if batch:
            self._append(batch)

    def _due_seal(self) -> Seal | None:
        members = self.position.members
        changed = self._changes.due(members, self._me.id, self._guest, self._here(), self._world.clock())
        if changed is not None:
            return Seal(members=changed, why="members")
        if self._own_row is not None and len(members) == 1 and members[0] != self._own_row:
            return Seal(members=(self._own_row,), why=f"{self._me.id} got a key")
        if len(self._journal) >= self._config.epoch_entries or self._journal.size_bytes >= self._config.epoch_bytes:
            return Seal(members=members)
        return None

    def _here(self) -> dict[str, int]:
        """Return how many entries each that is connected and in this epoch is behind."""
        here = [peer for peer in self._peers.up if self._peers.place_of(peer) == self._place]
        return {peer: self.position.seq - (self._peers.seq_of(peer) or 0) for peer in here}

    def _guest(self, row: MemberRow) -> None:
        """Let one that is to become a member connect, as a learner."""
        if row.id not in self._guests:
            self._guests = {**self._guests, row.id: row}
            self._connect()

    def _offer_elsewhere(self, leader: str | None) -> None:
        if leader is not None and leader in self._peers.up:
            self._relays.send(leader)
            if self._changes.pending is not None and not self._settling:
                self._changes.finish(QuorumLost(f"{self._me.id} does not lead, {leader} does", hint="ask that one"))
        elif self._wire is not None:
            names = {row.id for row in self.position.members}
            reached = len(names & {self._me.id, *self._peers.up})
            if reached <= len(names) / 2 and self._world.clock() >= self._patient_until:
                self._relays.refuse_all(reached, len(names))

    def _propose_own(self, command: LeaderStarted | Seal) -> None:
        self._append((Proposal(command=command, request_id="", actor=f"ledger@{self._me.id}"),))

    def _append(self, proposals: tuple[Proposal, ...]) -> None:
        at = self.position
        header = Header(
            generation=at.generation, epoch=at.epoch, term=self._group.term, member=self._me.id, at=self._world.now()
        )
        self._group.append(_encode(Entry(header=header, proposals=proposals)), callback=self._fate)

    def _fate(self, _result: None, failure: int) -> None:
        """PySyncObj's word on an append. Answers come from apply; this only notices what it would not take."""
        if failure:
            self.proposer.put_back()

    def _refuse_growth(self, proposal: Proposal) -> SlumError | None:
        if not disk.may_grow(proposal.command, self.state.fleet_bytes()):
            return None
        return QuorumLost(
            f"the disk of {self._home} is almost full ({self._guard.free_bytes >> 20} MiB free): only removals are taken",
            hint="free some space and try again; nothing was changed",
        )

    # --- applying ----------------------------------------------------------------------------------------------------

    def _on_entry(self, data: bytes) -> None:
        """Called by the group for each committed entry, in order. Never raises; step() does it instead."""
        if self._failure is not None or self._next is not None:
            return
        try:
            if not self._skip.take(data):
                self._apply(data)
        except Exception as error:  # noqa: BLE001 - PySyncObj would apply the entry again; step() raises it
            self._failure = error
        self.wake.set()

    def _apply(self, data: bytes) -> None:
        applied = self.state.apply(data, self._before_commit)
        if applied.stale:
            self._note("entry_was_stale", seq=applied.position.seq)
            self.proposer.put_back()
        else:
            self.proposer.applied(applied.proposals, applied.results)

    def _before_commit(self, applied: Applied) -> None:
        if applied.sealed is not None:
            path = folder.journal_path(self._home, applied.sealed)
            identity_ = folder.journal_id(applied.position.cluster_id, applied.sealed)
            self._next = (applied.sealed, journal.create(path, identity_, self._config.epoch_bytes))
            self._leads_next = self._group.leads
            self._linger_until = self._world.clock() + LINGER_S

    # --- epochs ------------------------------------------------------------------------------------------------------

    def _lingers(self) -> bool:
        """The leader waits a little for peers that are in this epoch and almost have the Seal."""
        if not self._group.leads or self._wire is None or self._world.clock() >= self._linger_until:
            return False
        end = len(self._journal)
        missing = (end - self._group.acknowledged(peer) for peer in self._peers.up if peer in self._rows)
        return any(0 < behind <= LINGER_ENTRIES for behind in missing)

    def _begin_epoch(self) -> None:
        if self._next is None:
            raise InvariantError("an epoch began without a Seal")
        epoch, fresh = self._next
        was = {row.id: row for row in (*self._rows.values(), self._me)}
        changes = was.keys() != {row.id for row in self.position.members}
        # What was proposed behind the Seal took no effect in that group and never will.
        self.proposer.put_back()
        self._group.close()
        if self._retained is not None:
            self._retained[1].close()
        self._retained = None
        if self._wire is None:
            self._journal.close()
        else:
            self._retained = (self._place, self._journal)
        self._journal, self._next = fresh, None
        self._history = {**self._history, (epoch.generation, epoch.epoch): epoch.chain0}
        self._skip = replay.Skip(self.state, checked=True)
        folder.remove_old_journals(self._home, self.state.epochs(2))
        self._note("epoch_began", generation=epoch.generation, epoch=epoch.epoch, seq=epoch.seq0)
        self._leaves = self._is_member and all(row.id != self._me.id for row in self.position.members)
        self._me = who(self._home, self.position)
        self._settling = changes
        # Whoever leaves is let in until it has seen the new members at work: it may be the only one with the Seal.
        self._guests = {name: row for name, row in was.items() if name != self._me.id}
        for row in self.position.members:
            self._guests.pop(row.id, None)
        self._begin_group()

    def _settle_change(self) -> None:
        """The new members have committed something, so nobody needs those that left."""
        if self._settling and self.position.applied > 0 and self._next is None:
            self._settling = False
            self._changes.finish(self.position.members)
            if self._leaves:
                self._note("no_longer_a_member", member=self._me.id)

    def _begin_group(self) -> None:
        """Start the group of the epoch that state.db is in."""
        now, timing, at = self._world.clock(), self._config.timing, self.position
        self._place: Place = (at.generation, at.epoch)
        self._started_term = self._sealing_term = 0
        self._flight = (None, 0)
        self._patient_until = now + timing.election_max_s + timing.fallback_s
        self._rows = {row.id: row for row in at.members if row.id != self._me.id}
        self._is_member = any(row.id == self._me.id for row in at.members)
        peers = tuple(self._rows)
        self._election = Election(
            place=self.place,
            peers=peers,
            min_s=timing.election_min_s,
            max_s=timing.election_max_s,
            chance=self._world.chance,
            now=now,
        )
        self._wire: Wire | None = None
        if peers:
            self._wire = Wire(
                place=self.place,
                peers=peers,
                journal=self._journal,
                election=self._election,
                post=self._net.send,
                clock=self._world.clock,
            )
        self._group = Group(
            member=self._me.id,
            peers=peers,
            journal=self._journal,
            transport=NoPeers() if self._wire is None else self._wire,
            on_entry=self._on_entry,
            timing=timing,
        )
        if self._wire is not None:
            self._wire.attach(self._group)
        leads_next, self._leads_next = self._leads_next, False
        gone = at.applied == 0 and at.leader.partition("/")[0] not in {row.id for row in at.members}
        # When the old leader is no longer among us, the first of the list need not wait for a timeout.
        leads_next = leads_next or (gone and at.members[0].id == self._me.id)
        self._election.must_stand = self._is_member and (leads_next or not peers)
        self._catch_up.begin_epoch()
        self._connect()
        self._peers.begin(
            place=self.place, known=self._known(), history=self._history, hello=self._hello, wire=self._wire
        )

    def _known(self) -> dict[str, MemberRow]:
        return {**self._rows, **self._guests}

    def _connect(self) -> None:
        """Connect to the members; a guest calls by itself, and a learner calls everyone."""
        known = self._known()
        dial = {name for name in self._rows if self._me.id < name or not self._is_member}
        self._net.set_members(tuple(known.values()), self._hello, dial)
        self._peers.know(known)

    def _hello(self) -> Hello:
        at, (last_term, last_index) = self.position, self._journal.last
        return Hello(
            version=VERSION,
            cluster=at.cluster_id,
            member=self._me.id,
            incarnation=self._me.incarnation,
            generation=self._place[0],
            epoch=self._place[1],
            lineage=at.lineage,
            chain0=self._history[self.place],
            last_index=last_index,
            last_term=last_term,
            seq=at.seq,
            protocol=PROTOCOL,
            run=self._run,
        )

    # --- what peers bring --------------------------------------------------------------------------------------------

    def on_behind(self, peer: str) -> None:
        if self._next is None:
            self._catch_up.from_peer(peer)

    def on_catch_up(self, peer: str, message: WantTail | Tail | WantCopy | Part) -> None:
        self._catch_up.take(peer, message)

    def on_relay(self, peer: str, message: Relay) -> None:
        self._relays.on_relay(peer, message, leads=self._is_ready(), seq=self.position.seq)

    def on_relay_refused(self, peer: str, message: RelayRefused) -> None:
        self._relays.on_refused(message)

    def journal_of(self, place: Place) -> journal.Journal | None:
        """Return the journal of *place* if it is this epoch's or the one before."""
        if place == self.place:
            return self._journal
        if self._retained is None:
            self._retained = self._open_retained()
        return self._retained[1] if self._retained is not None and self._retained[0] == place else None

    def _open_retained(self) -> tuple[Place, journal.Journal] | None:
        for row in self.state.epochs(2)[1:]:
            path = folder.journal_path(self._home, row)
            if path.exists():
                return ((row.generation, row.epoch), journal.open_journal(path, self._config.epoch_bytes))
        return None

    def feed(self, peer: str, tail: Tail) -> None:
        if self._wire is not None and self._next is None:
            self._wire.feed(peer, tail)

    def adopt(self, path: Path) -> bool:
        """Go on from the copy of a peer's state.db at *path*, which is whole; False when it is not of our future."""
        if not is_our_future(path, self.position, self._history, self._config):
            return False
        self.proposer.put_back()
        self._group.close()
        self._journal.close()
        if self._retained is not None:
            self._retained[1].close()
            self._retained = None
        self.state.close()
        self.state = adopt(self._home, path, self._config)
        self._guests, self._settling = {}, False
        self._me = who(self._home, self.position)
        self._history = self.state.history()
        self._journal, self._skip = replay.open_epoch(self._home, self.state, self._config.epoch_bytes, self._note)
        folder.remove_old_journals(self._home, self.state.epochs(2))
        self._begin_group()
        return True
