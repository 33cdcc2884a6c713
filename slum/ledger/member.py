"""One member of the ledger: runs one Raft group after the other and applies what they commit.

The log is cut into epochs. An epoch is one group with fixed members, a bounded log and no compaction; its last entry is a
Seal, after which nothing counts in that group, and the next epoch is a fresh group with a fresh journal that starts from
the state after the Seal. This is a stoppable state machine (Lamport, Malkhi, Zhou: "Stoppable Paxos", 2008; "Vertical Paxos
and Primary-Backup Replication", 2009): replacing a log wholesale needs no proof about a log that is rewritten in place.

Order at a Seal: journal of e+1 made durable, state.db commits with epoch e+1, the leader lingers until peers that are close
have the Seal, group e ends outside of any tick, group e+1 starts, and the old leader stands in it at once. A kill between
any two leaves either epoch e with its Seal to be applied again, or epoch e+1. A member that is not in the list of its epoch
is a learner: it takes part in nothing and follows the committed log. All of a Member runs in one thread.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from slum.errors import InvariantError
from slum.ledger import disk, fence, folder, identity, journal, replay, sealing
from slum.ledger.adopt import adopt, is_our_future, who
from slum.ledger.applying import Applied
from slum.ledger.beginning import Note
from slum.ledger.catchup import CatchUp
from slum.ledger.changes import Change, Changes, Told
from slum.ledger.checkpoints import Checkpoints
from slum.ledger.commands import PROTOCOL, LeaderInfo
from slum.ledger.commands import Member as MemberRow
from slum.ledger.epoch import Epoch
from slum.ledger.offers import Offers
from slum.ledger.peers import Peers
from slum.ledger.peerwire import VERSION, Hello, Part, Place, Relay, RelayRefused, Tail, WantCopy, WantTail
from slum.ledger.proposer import Answer, Proposer, Take
from slum.ledger.relay import Relays
from slum.ledger.rows import Rows
from slum.ledger.schema import EpochRow, Position
from slum.ledger.state import State
from slum.ledger.status import LedgerStatus, Sight, report
from slum.ledger.watch import Watch
from slum.ledger.world import Config, World

TICK_S = 0.02
LEAST_S = 0.001
SHOW_S = 0.01
"""A follower's state.db may be so much older than what it has applied: many small commits become one."""

GIVES_WAY = 64
"""A follower with fewer entries to apply lets other processes of the machine go first after each: nobody waits for it."""


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
        self._failure: BaseException | None = None
        self._next: tuple[EpochRow, journal.Journal] | None = None
        self._linger_until = self._show_at = 0.0
        self._leads_next = False
        self._retained = replay.Retained(home, config.epoch_bytes)
        self._me = who(home, state.position)
        me = identity.load(home)
        self._own_row = identity.row(home, me) if me is not None and me.address else None
        self._history: Mapping[Place, str] = state.history()
        opened_journal, skip = replay.open_epoch(home, state, config.epoch_bytes, note)
        folder.remove_old_journals(home, state.epochs(2))
        self._rows = Rows(home, world.apart, world.rest)
        self._peers = Peers(self._net, self, rows=self._rows, clock=world.clock, now=world.now, note=note)
        self._former = {row.id: row for row in fence.former(home)}
        self._guests: dict[str, MemberRow] = self._former
        self._catch_up = CatchUp(home, self, post=self._net.send, clock=world.clock, apart=world.apart, note=note)
        self._checkpoints = Checkpoints(clock=world.clock, apart=world.apart)
        self._watch = Watch(self._me.id, self._peers, self._rows, guard, clock=world.clock, note=note)
        # What the newest event tells of is the last that is sure to be known.
        known_at = world.clock() - max(0.0, world.now() - state.newest_event_at())
        self._epoch = self._made(opened_journal, skip, known_at)
        self._offers = Offers(
            self,
            run=run,
            proposer=self.proposer,
            relays=self._relays,
            changes=self._changes,
            peers=self._peers,
            guard=guard,
            config=config,
            world=world,
        )
        self._begin()

    # --- what others ask ---------------------------------------------------------------------------------------------

    @property
    def position(self) -> Position:
        return self.state.position

    @property
    def shown(self) -> int:
        """Up to which sequence those who read state.db find what this member has applied."""
        return self.state.shown

    def show(self) -> None:
        """Let them find all of it: somebody is about to be told."""
        if self.shown < self.position.seq:
            self.state.commit()
            self._show_at = self._world.clock() + SHOW_S

    def answers(self) -> list[tuple[Take, Answer]]:
        """Return the answers that may go out now, and to whom; state.db shows what they tell of."""
        answers = self.proposer.release()
        if answers:
            self.show()
        return answers

    @property
    def epoch(self) -> Epoch:
        return self._epoch

    @property
    def place(self) -> Place:
        """The epoch of the running group; state.db is one ahead while the leader lingers."""
        return self._epoch.place

    @property
    def commit(self) -> int:
        return self._epoch.group.commit

    @property
    def sealed(self) -> bool:
        return self._next is not None

    @property
    def own_row(self) -> MemberRow | None:
        return self._own_row

    @property
    def is_ready(self) -> bool:
        """Tell whether this member leads, and others' proposals may follow."""
        return self._offers.is_ready

    def wait_for(self, descriptor: int, ready: Callable[[], None]) -> None:
        """From now on take() also returns when *descriptor* can be read, and calls *ready* then."""
        self._net.wait_for(descriptor, ready)

    def change(self, change: Change, told: Told) -> None:
        """Change the members; *told* hears the new list once it is in force, or why not. From any thread."""
        self._changes.ask(change, told, self._world.clock())
        self.wake.set()

    def leader(self) -> LeaderInfo:
        at = self.position
        leads = self._offers.is_ready
        member = self._me.id if leads else self._offers.leader
        return LeaderInfo(
            member=member,
            address=next((row.address for row in at.members if row.id == member), self._me.address),
            is_self=leads,
            generation=at.generation,
            epoch=at.epoch,
            term=at.term,
            seq=at.seq,
        )

    def status(self) -> LedgerStatus:
        """Return how the ledger stands as this member knows it. By the ledger's thread only."""
        epoch, now = self._epoch, self._world.clock()
        known = self._known()
        leader = self.leader().member
        mine = Sight(up=True, epoch=self.position.epoch, seq=self.position.seq, heard_at=now, protocol=PROTOCOL)
        return report(
            self._me,
            self.position,
            sights={self._me.id: mine, **{name: self._peers.sight(name) for name in known}},
            learners=[row for name, row in known.items() if name not in epoch.rows],
            leader=leader,
            lags={name: epoch.lag_of(name) for name in self._peers.up} if leader == self._me.id else {},
            now=now,
            age_s=0.0 if leader == self._me.id else now - epoch.known_at,
            silence_s=0.0 if leader == self._me.id else epoch.election.silence_s(now),
            queued=self.proposer.queued,
            alarms=self._watch.alarms(),
        )

    # --- the loop ----------------------------------------------------------------------------------------------------

    def step(self, wait_s: float) -> None:
        """Take what peers have sent, waiting at most *wait_s* for the first of it, and work on it."""
        self.take(wait_s)
        self.work()

    def take(self, wait_s: float) -> None:
        """Take in what peers have sent; wait at most *wait_s* for it, and no longer than until something else is due."""
        for got in self._net.receive(self._patience(wait_s)):
            self._peers.handle(got)

    def work(self) -> None:
        """Propose, make durable, commit and apply what there is.

        Raises OSError or SlumError when the disk fails or an entry cannot be applied: the member is then dead.
        """
        self._watch.look(self.position.members)
        self._checkpoints.look(self.state)
        if self._offers.is_ready:
            self._offers.note(self._watch.news(self._world.now()))
        self._offers.upgrade()
        self._relays.tell()
        if self._offers.settled():
            self._note("no_longer_a_member", member=self._me.id)
        self._offers.offer()
        journal = self._epoch.journal
        journal.sync()
        self._tick()
        if journal.dirty and self._failure is None:
            # What a leader has just sent is written while it travels. Alone, it is now committed.
            journal.sync()
            if self._epoch.wire is None:
                self._epoch.tick()
            else:
                self._foresee()
        if self._failure is not None:
            raise self._failure
        self._epoch.group.tell(at_once=self._relays.take_urgent() or self.sealed)
        if self._epoch.wire is not None:
            self._epoch.wire.tick()
        if self._next is not None and not self._lingers():
            self._begin_epoch()

    def _tick(self) -> None:
        # Its times would be wrong in everything that it stamps; another member can lead.
        yields = self._watch.own_clock_is_wrong
        if self._has_company:
            asked = None if self.sealed or yields else self._epoch.asks()
            if asked is not None:
                for peer in self._peers.up:
                    self._net.send(peer, asked)
            self._peers.tick(self.position.seq)
            self._follow()
            self._catch_up.tick()
        follows = self._epoch.wire is not None and not self._epoch.group.leads
        if follows or self._epoch.group.backlog > 1:
            # Who has many to apply, or nobody here who waits for it, commits them together.
            self.state.hold()
        self._epoch.tick(yields=yields)
        if self._failure is None and not (follows and self._world.clock() < self._show_at):
            self.show()

    def _foresee(self) -> None:
        """While others write our newest entry, do what it says, if it is the next one; what remains is to commit it."""
        epoch, offered = self._epoch, self._offers.offered
        if offered is not None and epoch.group.leads and not self.sealed and epoch.group.pending == 1:
            self.state.foresee(offered)

    @property
    def _has_company(self) -> bool:
        return self._epoch.wire is not None or bool(self._guests)

    def _follow(self) -> None:
        """A learner asks for what is committed in the epoch that it is in."""
        if not self._epoch.is_member and not self.sealed and not self._catch_up.busy:
            here = self._here
            if here:
                self._catch_up.from_peer(self._world.chance.choice(here))

    @property
    def _here(self) -> list[str]:
        """The connected that stand in our epoch."""
        return [peer for peer in self._peers.up if self._peers.place_of(peer) == self.place]

    def _patience(self, wait_s: float) -> float:
        epoch = self._epoch
        stands = epoch.is_about_to_stand and not self._watch.own_clock_is_wrong
        if epoch.journal.dirty or stands or self._offers.has_more or epoch.group.backlog > 0:
            return 0.0
        if not self._has_company:
            return wait_s
        now, tell_at = self._world.clock(), epoch.group.tell_at
        if self.shown < self.position.seq:
            wait_s = min(wait_s, self._show_at - now)
        if epoch.wire is not None:
            wait_s = min(wait_s, epoch.wire.due_at - now)
        if self._is_busy:
            return max(0.0, min(wait_s, TICK_S, tell_at - now))
        due = min(self._peers.ping_at, epoch.group.beats_at if epoch.group.leads else epoch.election.deadline)
        return max(0.0, min(wait_s, tell_at - now, max(LEAST_S, due - now)))

    @property
    def _is_busy(self) -> bool:
        """Tell whether something may become due that has no time of its own."""
        proposer, epoch = self.proposer, self._epoch
        return (
            proposer.in_flight
            or proposer.queued > 0
            or self.sealed
            or not epoch.is_member
            or self._catch_up.busy
            or self._changes.pending is not None
            or self._watch.own_clock_is_wrong
        )

    def close(self) -> None:
        self._checkpoints.close()
        self._epoch.group.close()
        self._epoch.journal.close()
        self._retained.close()
        if self._next is not None:
            self._next[1].close()
        self._catch_up.close()

    # --- applying ----------------------------------------------------------------------------------------------------

    def _on_entry(self, data: bytes) -> None:
        """Called by the group for each committed entry, in order. Never raises; step() does it instead."""
        if self._failure is not None or self._next is not None:
            return
        try:
            if not self._epoch.skip.take(data):
                self._apply(data)
                if not self._epoch.group.leads and self._epoch.group.backlog < GIVES_WAY:
                    os.sched_yield()
                # Whoever has much to apply still lives, and says so.
                self._peers.tick(self.position.seq)
        except Exception as error:  # noqa: BLE001 - PySyncObj would apply the entry again; step() raises it
            self._failure = error

    def _apply(self, data: bytes) -> None:
        applied = self.state.apply(data, self._before_commit)
        if applied.stale:
            self._note("entry_was_stale", seq=applied.position.seq)
            self.proposer.put_back()
        else:
            self.proposer.applied(applied.proposals, applied.results)
            self._relays.applied(applied.proposals)

    def _before_commit(self, applied: Applied) -> None:
        if applied.sealed is not None:
            path = folder.journal_path(self._home, applied.sealed)
            identity_ = folder.journal_id(applied.position.cluster_id, applied.sealed)
            self._next = (applied.sealed, journal.create(path, identity_, self._config.epoch_bytes))
            self._leads_next = self._epoch.group.leads
            self._linger_until = self._world.clock() + sealing.LINGER_S

    # --- epochs ------------------------------------------------------------------------------------------------------

    def _lingers(self) -> bool:
        """The leader waits a little for peers that are in this epoch and almost have the Seal."""
        return self._world.clock() < self._linger_until and self._epoch.lacks_a_peer(self._peers.up)

    def _begin_epoch(self) -> None:
        if self._next is None:
            raise InvariantError("an epoch began without a Seal")
        (row, fresh), ended = self._next, self._epoch
        was = {row.id: row for row in (*ended.rows.values(), self._me)}
        members = self.position.members
        # What was proposed behind the Seal took no effect in that group and never will.
        self.proposer.put_back()
        ended.group.close()
        self._retained.close()
        if ended.wire is None:
            ended.journal.close()
        else:
            self._retained.keep(ended.place, ended.journal)
        self._next = None
        self._history = {**self._history, (row.generation, row.epoch): row.chain0}
        folder.remove_old_journals(self._home, self.state.epochs(2))
        self._note("epoch_began", generation=row.generation, epoch=row.epoch, seq=row.seq0)
        left = ended.is_member and all(row.id != self._me.id for row in members)
        self._me = who(self._home, self.position)
        self._offers.settle_later(changed=was.keys() != {row.id for row in members}, leaves=left)
        self._guests = {**self._former, **sealing.guests_after(was, members, self._me.id)}
        self._epoch = self._made(fresh, replay.Skip(self.state, checked=True), ended.known_at)
        self._begin()

    def _made(self, opened_journal: journal.Journal, skip: replay.Skip, known_at: float) -> Epoch:
        """Start the group of the epoch that state.db is in."""
        # Alone, state.db is what there is when the journal is damaged.
        self.state.sync_all(len({row.id for row in self.position.members} | {self._me.id}) == 1)
        leads_next, self._leads_next = self._leads_next, False
        return Epoch(
            me=self._me.id,
            position=self.position,
            journal=opened_journal,
            skip=skip,
            timing=self._config.timing,
            world=self._world,
            post=self._net.send,
            on_entry=self._on_entry,
            stands=leads_next or sealing.begins(self.position, self._me.id),
            known_at=known_at,
        )

    def _begin(self) -> None:
        """Tell everybody here that another epoch runs."""
        if self._config.hash_rows and self.position.applied == 0 and self._epoch.wire is not None:
            self._rows.begin(self.place, self.state.path)
        self._offers.begin_epoch()
        self._catch_up.begin_epoch()
        self._connect()
        self._peers.begin(
            place=self.place, known=self._known(), history=self._history, hello=self._hello, wire=self._epoch.wire
        )

    def let_in(self, row: MemberRow) -> None:
        if self._guests.get(row.id) != row:
            self._guests = {**self._guests, row.id: row}
            self._connect()

    def _known(self) -> dict[str, MemberRow]:
        return {**self._guests, **self._epoch.rows}

    def _connect(self) -> None:
        """Connect to the members; a guest calls by itself, and a learner calls everyone."""
        known = self._known()
        dial = {name for name in self._epoch.rows if self._me.id < name or not self._epoch.is_member}
        # Those of a generation that is over are told so.
        dial |= self._former.keys() & known.keys()
        self._net.set_members(tuple(known.values()), self._hello, dial)
        self._peers.know(known)

    def _hello(self) -> Hello:
        at, (last_term, last_index) = self.position, self._epoch.journal.last
        generation, epoch = self.place
        rows = self._rows.mine
        return Hello(
            version=VERSION,
            cluster=at.cluster_id,
            member=self._me.id,
            incarnation=self._me.incarnation,
            generation=generation,
            epoch=epoch,
            lineage=at.lineage,
            chain0=self._history[self.place],
            last_index=last_index,
            last_term=last_term,
            seq=at.seq,
            protocol=PROTOCOL,
            run=self._run,
            rows_at=rows.place if rows else (0, 0),
            rows=rows.hash if rows else "",
        )

    # --- what peers bring --------------------------------------------------------------------------------------------

    def on_behind(self, peer: str) -> None:
        if self._next is None:
            self._catch_up.from_peer(peer)

    def on_catch_up(self, peer: str, message: WantTail | Tail | WantCopy | Part) -> None:
        self._catch_up.take(peer, message)

    def on_relay(self, peer: str, message: Relay) -> None:
        self._relays.on_relay(peer, message, leads=self._offers.is_ready, seq=self.position.seq)

    def on_relay_refused(self, peer: str, message: RelayRefused) -> None:
        self._relays.on_refused(message)

    def on_fenced(self, peer: str, generation: int) -> None:
        log, mine = self._epoch.journal, self.position.generation
        applied = len(log) if self.sealed else self.position.applied
        raise fence.replaced(self._home, log, applied, by=peer, generation=generation, mine=mine)

    @property
    def is_sound(self) -> bool:
        return self._watch.rows_agree

    def journal_of(self, place: Place) -> journal.Journal | None:
        """Return the journal of *place* if it is this epoch's or the one before."""
        if place == self.place:
            return self._epoch.journal
        return self._retained.journal_of(place, self.state.epochs(2)[1:])

    def stand_in(self, peer: str) -> str:
        """Return a member that stands where we do and does not lead, when we do: copies make much work."""
        if not self._epoch.group.leads:
            return ""
        members = {row.id for row in self.position.members} - {peer}
        here = [other for other in self._here if other in members]
        return self._world.chance.choice(here) if here else ""

    def reaches(self, peer: str) -> bool:
        return peer in self._peers.up

    def feed(self, peer: str, tail: Tail) -> None:
        if self._epoch.wire is not None and not self.sealed:
            self._epoch.wire.feed(peer, tail)

    def adopt(self, path: Path) -> bool:
        """Go on from the copy of a peer's state.db at *path*, which is whole; False when it is not of our future."""
        if not is_our_future(path, self.position, self._history, self._config):
            return False
        self.proposer.put_back()
        self._epoch.group.close()
        self._epoch.journal.close()
        self._retained.close()
        self.state.close()
        self.state = adopt(self._home, path, self._config)
        self._guests = self._former
        self._offers.settle_later(changed=False, leaves=False)
        self._me = who(self._home, self.position)
        self._history = self.state.history()
        opened_journal, skip = replay.open_epoch(self._home, self.state, self._config.epoch_bytes, self._note)
        folder.remove_old_journals(self._home, self.state.epochs(2))
        self._epoch = self._made(opened_journal, skip, self._epoch.known_at)
        self._begin()
        return True
