"""One member of the ledger: opens the folder, runs one Raft group after the other, applies what they commit.

The log is cut into epochs. An epoch is one group with fixed members, a bounded log and no compaction; its last entry is a
Seal, after which nothing counts in that group, and the next epoch is a fresh group with a fresh journal that starts from
the state after the Seal. This is a stoppable state machine (Lamport, Malkhi, Zhou: "Stoppable Paxos", 2008; "Vertical Paxos
and Primary-Backup Replication", 2009): replacing a log wholesale needs no proof about a log that is rewritten in place.
Today a group has one member; with more, the leader would linger at a Seal until its peers have learned it.

Order at a Seal: journal of e+1 made durable, state.db commits with epoch e+1, group e ends outside of any tick, group e+1
starts. A kill between any two leaves either epoch e with its Seal to be applied again, or epoch e+1. All of a Member runs
in one thread (the proposer takes proposals from any).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import msgspec

from slum.errors import InvariantError, QuorumLost, SlumError, invariant
from slum.frozen import Frozen
from slum.ledger import disk, folder, journal
from slum.ledger.beginning import Note, current_or_new
from slum.ledger.commands import (
    RESULTS_KEPT,
    Entry,
    Header,
    LeaderInfo,
    LeaderStarted,
    Proposal,
    Seal,
)
from slum.ledger.commands import Member as MemberRow
from slum.ledger.group import Group, Timing, Wake, command_entry
from slum.ledger.proposer import Proposer
from slum.ledger.refusal import Damaged, Refusal
from slum.ledger.schema import EpochRow, Position
from slum.ledger.state import Applied, State
from slum.ledger.transport import NoPeers

EPOCH_ENTRIES_MIN = 8
"""Below it an epoch would be full of what begins an epoch."""
_encode = msgspec.msgpack.Encoder().encode


class Config(Frozen):
    """An epoch is sealed when its journal holds so many entries or bytes."""

    epoch_entries: int = 200_000
    epoch_bytes: int = 32 << 20
    ballast_bytes: int = 128 << 20
    results_kept: int = RESULTS_KEPT
    """Part of the replicated state: the same on every member, changed in tests only."""
    timing: Timing = Timing()


@contextmanager
def opened(
    home: Path, config: Config, *, run: str, note: Note, now: Callable[[], float] = time.time
) -> Iterator[Member]:
    """Open the ledger in folder *home*, a new one when there is none; Refusal when its files do not agree.

    *run* is random for each start of the process; *now* gives unix seconds.
    """
    invariant(config.epoch_entries >= EPOCH_ENTRIES_MIN, f"an epoch of less than {EPOCH_ENTRIES_MIN} entries")
    with folder.locked(home):
        guard = disk.Guard(home, disk.marks(config.ballast_bytes, config.epoch_bytes + journal.SLACK_BYTES))
        for event in guard.check(time.monotonic()):
            note(event, free_bytes=guard.free_bytes)
        if config.ballast_bytes and not guard.has_ballast:
            note("ballast_is_missing", wanted_bytes=config.ballast_bytes, free_bytes=guard.free_bytes)
        state = State.open(current_or_new(home, config.epoch_bytes, now(), note), results_kept=config.results_kept)
        try:
            member = Member(home, config, state, guard, run=run, note=note, now=now)
            try:
                yield member
            finally:
                member.close()
        finally:
            state.close()


class Member:
    """A running member; step() is its whole life."""

    def __init__(
        self,
        home: Path,
        config: Config,
        state: State,
        guard: disk.Guard,
        *,
        run: str,
        note: Note,
        now: Callable[[], float],
    ) -> None:
        self._home = home
        self._config = config
        self._state = state
        self._guard = guard
        self._run = run
        self._note = note
        self._now = now
        self.proposer = Proposer()
        self.wake = Wake()
        self._failure: BaseException | None = None
        self._next: tuple[EpochRow, journal.Journal] | None = None
        self._started_term = 0
        self._sealing = False
        self._me = _only_member(state.position)
        self._journal = self._open_journal()
        self._skip = state.position.applied
        folder.remove_old_journals(home, state.epochs(2))
        self._group = self._new_group()

    @property
    def position(self) -> Position:
        return self._state.position

    def leader(self) -> LeaderInfo:
        at = self.position
        leads = self._is_ready()
        return LeaderInfo(
            member=self._me.id if leads else None,
            address=self._me.address,
            is_self=leads,
            generation=at.generation,
            epoch=at.epoch,
            term=at.term,
            seq=at.seq,
        )

    def step(self, wait_s: float) -> None:
        """Propose, make durable, commit and apply what there is; then wait at most *wait_s* for more.

        Raises OSError or SlumError when the disk fails or an entry cannot be applied: the member is then dead.
        """
        for event in self._guard.check(time.monotonic()):
            self._note(event, free_bytes=self._guard.free_bytes)
        self._offer()
        self._journal.sync()
        self._group.tick(wait_s)
        if self._failure is not None:
            raise self._failure
        if self._next is not None:
            self._begin_epoch()

    def close(self) -> None:
        self._group.close()
        self._journal.close()
        if self._next is not None:
            self._next[1].close()
        self.wake.close()

    # --- proposing ---------------------------------------------------------------------------------------------------

    def _is_ready(self) -> bool:
        """Tell whether this member leads and has said so in the log: only then may others' proposals follow."""
        return self._group.leads and self._group.term == self.position.term

    def _offer(self) -> None:
        if not self._group.leads:
            return
        if not self._is_ready():
            if self._started_term != self._group.term:
                self._started_term = self._group.term
                self._propose_own(LeaderStarted(member=self._me.id, run=self._run))
            return
        if self._sealing or self.proposer.in_flight:
            return
        if len(self._journal) >= self._config.epoch_entries or self._journal.size_bytes >= self._config.epoch_bytes:
            self._sealing = True
            self._propose_own(Seal(members=self.position.members))
            return
        batch = self.proposer.take_batch(self._refuse_growth if self._guard.low else None)
        if batch:
            self._append(batch)

    def _propose_own(self, command: LeaderStarted | Seal) -> None:
        self._append((Proposal(command=command, request_id="", actor=f"ledger@{self._me.id}"),))

    def _append(self, proposals: tuple[Proposal, ...]) -> None:
        at = self.position
        header = Header(
            generation=at.generation, epoch=at.epoch, term=self._group.term, member=self._me.id, at=self._now()
        )
        self._group.append(_encode(Entry(header=header, proposals=proposals)), callback=self._fate)

    def _fate(self, _result: None, failure: int) -> None:
        """PySyncObj's word on an append. Answers come from apply; this only notices what it would not take."""
        if failure:
            self.proposer.put_back()

    def _refuse_growth(self, proposal: Proposal) -> SlumError | None:
        if not disk.may_grow(proposal.command, self._state.fleet_bytes()):
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
        if self._skip > 0:
            self._skip -= 1
            return
        try:
            self._apply(data)
        except Exception as error:  # noqa: BLE001 - PySyncObj would apply the entry again; step() raises it
            self._failure = error
        self.wake.set()

    def _apply(self, data: bytes) -> None:
        applied = self._state.apply(data, self._before_commit)
        if applied.stale:
            self._note("entry_was_stale", seq=applied.position.seq)
            self.proposer.put_back()
        else:
            self.proposer.applied(applied.proposals, applied.results)

    def _before_commit(self, applied: Applied) -> None:
        if applied.sealed is not None:
            path = folder.journal_path(self._home, applied.sealed)
            identity = folder.journal_id(applied.position.cluster_id, applied.sealed)
            self._next = (applied.sealed, journal.create(path, identity, self._config.epoch_bytes))

    # --- epochs ------------------------------------------------------------------------------------------------------

    def _begin_epoch(self) -> None:
        if self._next is None:
            raise InvariantError("an epoch began without a Seal")
        epoch, fresh = self._next
        # What was proposed behind the Seal took no effect in that group and never will.
        self.proposer.put_back()
        self._group.close()
        self._journal, self._next = fresh, None
        self._sealing, self._started_term, self._skip = False, 0, 0
        folder.remove_old_journals(self._home, self._state.epochs(2))
        self._note("epoch_began", generation=epoch.generation, epoch=epoch.epoch, seq=epoch.seq0)
        self._group = self._new_group()

    def _new_group(self) -> Group:
        group = Group(
            member=self._me.id,
            peers=(),
            journal=self._journal,
            transport=NoPeers(),
            wake=self.wake,
            on_entry=self._on_entry,
            timing=self._config.timing,
        )
        group.stand_now()
        return group

    def _open_journal(self) -> journal.Journal:
        """Open the journal that state.db names and check that state.db is what comes of it."""
        (epoch,) = self._state.epochs(1)
        path = folder.journal_path(self._home, epoch)
        opened_journal = journal.open_journal(path, self._config.epoch_bytes)
        try:
            if opened_journal.torn:
                self._note("torn_frame_was_cut", journal=str(path))
            if opened_journal.identity != folder.journal_id(self.position.cluster_id, epoch):
                raise Damaged(f"{path}: this journal is of another history than state.db")
            replayed = _Regular(opened_journal)
            why = self._state.is_replay_of(islice(replayed, self.position.applied))
            if why:
                raise Damaged(f"{path}: {why}")
            opened_journal.raise_commit(replayed.index)
        except BaseException:
            opened_journal.close()
            raise
        return opened_journal


class _Regular:
    """The entries that append() wrote, without PySyncObj's no-ops; *index* is the log index of the last one given."""

    def __init__(self, log: journal.Journal) -> None:
        self._log = log
        self.index = 1

    def __iter__(self) -> Iterator[bytes]:
        for command, index, _ in self._log[0:]:
            data = command_entry(command)
            if data is not None:
                self.index = index
                yield data


def _only_member(position: Position) -> MemberRow:
    if len(position.members) != 1:
        raise Refusal(
            f"the ledger has {len(position.members)} members, this version of slum runs one",
            hint="install the version of slum that the other members run",
        )
    return position.members[0]
