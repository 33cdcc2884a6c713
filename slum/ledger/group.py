"""One epoch's Raft group: PySyncObj 0.3.17 with the parts replaced that lose data, and proof that the replacement took.

The only module that reaches inside PySyncObj. It takes from it elections, replication and the order of commits, and gives
it our journal instead of its own, msgpack instead of pickle, and our clock and randomness (which a simulation replaces).
Fixed members, no dump, no compaction, no thread of its own: the owner calls tick(), and says when to stand for election.
Whoever leads counts its own entries in the tick after they were appended, so the owner must sync the journal before each
tick; the transport syncs before messages. What is called back (*on_entry*) must never raise: PySyncObj would apply the entry
again, for ever.
"""

from __future__ import annotations

import math
import os
import random
import sys
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import msgspec

from slum.errors import InvariantError, invariant
from slum.ledger.journal import Journal

VERSION = "0.3.17"
BATCH_BYTES = 4 << 20
"""Of one append_entries. Larger than any entry: one that is larger would be sent in parts, by a path that is wrong."""
FOLLOWER = 0
"""PySyncObj's state of a member that follows."""
COMMIT_S = 0.004
"""So long the news that entries are committed waits for new entries to ride with."""
TURN_ENTRIES = 256
"""So many are applied in one tick, so that who is far behind still looks at what else there is."""
REGULAR = 0
"""PySyncObj's tag of a command that is applied; entries of other types never reach on_entry."""


def _import_engine() -> tuple[Any, Any]:
    """Import PySyncObj without its optional import of cryptography: we never use its passwords, and it takes 9 MB."""
    absent = "cryptography" not in sys.modules
    if absent:
        sys.modules["cryptography"] = None  # type: ignore[assignment]  # makes its import fail, as documented for sys.modules
    try:
        import pysyncobj
        import pysyncobj.syncobj
    finally:
        if absent:
            del sys.modules["cryptography"]
    return pysyncobj, pysyncobj.syncobj


_package, _engine = _import_engine()

from pysyncobj.node import Node  # noqa: E402 - after the guarded import
from pysyncobj.syncobj import SyncObj  # noqa: E402
from pysyncobj.transport import Transport  # noqa: E402
from pysyncobj.version import VERSION as ENGINE_VERSION  # noqa: E402

__all__ = ["Group", "Node", "Timing", "Transport", "Wake", "check_engine", "command_entry"]

_Call = tuple[int, tuple[bytes]]
_call_decoder = msgspec.msgpack.Decoder(_Call)


class _Codec:
    """Stands in for PySyncObj's pickle module: only (method number, (bytes,)) can be written or read."""

    @staticmethod
    def dumps(value: Any, protocol: int | None = None) -> bytes:
        return msgspec.msgpack.encode(value)

    @staticmethod
    def loads(data: bytes) -> _Call:
        call: _Call = _call_decoder.decode(data)
        return call

    @staticmethod
    def to_bytes(data: bytes) -> bytes:
        return data


def _journal_given(journal: Any) -> Journal:
    """Stands in for createJournal: the configuration carries an open journal instead of a file name."""
    if not isinstance(journal, Journal):
        raise InvariantError("PySyncObj asked for a journal of its own")
    return journal


class _Chance:
    """Stands in for PySyncObj's random module."""

    source: random.Random = random.Random()

    @classmethod
    def random(cls) -> float:
        return cls.source.random()


class _Clock:
    """PySyncObj's own clock is MONOTONIC_RAW, which nothing else here is compared with."""

    source: Callable[[], float] = time.monotonic

    @classmethod
    def now(cls) -> float:
        return cls.source()


_now = _Clock.now


class _NoPoller:
    """Stands in for PySyncObj's poller: it has nothing of its own to wait for."""

    def poll(self, timeout: float) -> None:
        pass


def _no_poller(_kind: str) -> _NoPoller:
    return _NoPoller()


def simulate(clock: Callable[[], float], chance: random.Random) -> None:
    """Give every group of this process another clock and other dice: for simulations, which are one process each."""
    _Clock.source = clock
    _Chance.source = chance


def _replace_parts() -> None:
    _engine.pickle = _Codec
    _engine.createJournal = _journal_given
    _engine.monotonicTime = _now
    _engine.random = _Chance
    _engine.createPoller = _no_poller


_replace_parts()


def check_engine() -> None:
    """Raise InvariantError unless this is exactly the PySyncObj that was examined, and our parts are in it."""
    invariant(ENGINE_VERSION == VERSION, f"PySyncObj {ENGINE_VERSION} is installed, the ledger needs exactly {VERSION}")
    invariant(_engine._RAFT_STATE.FOLLOWER == FOLLOWER, "PySyncObj numbers its states otherwise")
    known = SyncObj.__init__.__globals__
    for name, ours in (
        ("pickle", _Codec),
        ("createJournal", _journal_given),
        ("monotonicTime", _now),
        ("random", _Chance),
        ("createPoller", _no_poller),
    ):
        invariant(known[name] is ours, f"PySyncObj does not use our {name}")
    for function, name in (
        (SyncObj.__init__, "createJournal"),
        (SyncObj.__init__, "_SyncObj__raftElectionDeadline"),
        (SyncObj.__init__, "createPoller"),
        (SyncObj._onTick, "_SyncObj__newAppendEntriesTime"),
        (SyncObj._SyncObj__sendAppendEntries, "_SyncObj__connectedNodes"),
        (SyncObj._onTick, "_SyncObj__sendAppendEntries"),
        (SyncObj._onTick, "monotonicTime"),
        (SyncObj._onTick, "_SyncObj__raftElectionDeadline"),
        (SyncObj._onTick, "_SyncObj__setState"),
        (SyncObj._onTick, "_SyncObj__raftLeader"),
        (SyncObj._SyncObj__generateRaftTimeout, "random"),
    ):
        invariant(name in function.__code__.co_names, f"PySyncObj's {function.__qualname__} does not use {name}")


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds. The fallback is near the election timeout, so that an isolated leader stops thinking it leads."""

    election_min_s: float = 0.4
    election_max_s: float = 0.8
    fallback_s: float = 0.8
    heartbeat_s: float = 0.1


class Wake:
    """Ends a tick's waiting from any thread. Outlives groups, so that nobody writes to a descriptor that was reused."""

    def __init__(self) -> None:
        self.descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def set(self) -> None:
        if self.descriptor >= 0:
            os.eventfd_write(self.descriptor, 1)

    def clear(self) -> None:
        try:
            os.eventfd_read(self.descriptor)
        except BlockingIOError:
            return

    def close(self) -> None:
        """Close it; only when no other thread can call set() any more."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


class Group(SyncObj):  # type: ignore[misc]  # PySyncObj has no types
    """The running group of one epoch; every call but Wake.set belongs to one thread."""

    _SyncObj__connectedNodes: set[Node]

    def __init__(
        self,
        *,
        member: str,
        peers: Sequence[str],
        journal: Journal,
        transport: Transport,
        on_entry: Callable[[bytes], None],
        timing: Timing,
        spares: Callable[[], Collection[str]] = tuple,
    ) -> None:
        """*spares* names those who are not sent new entries at once; it is asked whenever there are some."""
        check_engine()
        self._on_entry = on_entry
        self._spares = spares
        self._ended = False
        self._log = journal
        self._told = (0, 0)
        self._tell_at = math.inf
        forever = sys.maxsize
        super().__init__(
            Node(member),
            [Node(peer) for peer in peers],
            conf=_package.SyncObjConf(
                autoTick=False,
                journalFile=journal,
                fullDumpFile=None,
                useFork=False,
                dynamicMembershipChange=False,
                appendEntriesUseBatch=True,
                appendEntriesBatchSizeBytes=BATCH_BYTES,
                logCompactionMinEntries=forever,
                logCompactionMinTime=forever,
                raftMinTimeout=timing.election_min_s,
                raftMaxTimeout=timing.election_max_s,
                appendEntriesPeriod=timing.heartbeat_s,
                leaderFallbackTimeout=timing.fallback_s,
                connectionTimeout=max(1.2, timing.election_max_s),
            ),
            transport=transport,
        )
        invariant(self._SyncObj__raftLog is journal, "PySyncObj runs on another journal than ours")

    @_package.replicated  # type: ignore[untyped-decorator]  # PySyncObj has no types
    def append(self, data: bytes) -> None:
        self._on_entry(data)

    def offer(self, data: bytes, refused: Callable[[Any, int], None]) -> None:
        """Append *data* at the next tick, if we lead then; *refused* hears a reason other than 0 when we do not."""
        invariant(len(data) < BATCH_BYTES - 64, f"an entry of {len(data)} bytes would be sent in parts")
        self.append(data, callback=refused)

    def tick(self, *, stand: bool = False) -> None:
        """Do what is due, send what is new in the log, and stand for election only when told to. Never waits.

        Of a long backlog it applies TURN_ENTRIES.

        PySyncObj, told not to batch, sends after every commit and after every command. We send once for both.
        """
        self._SyncObj__raftElectionDeadline = 0.0 if stand else math.inf
        before = self._SyncObj__newAppendEntriesTime
        end, commit = len(self._log), self.commit
        if self.backlog > TURN_ENTRIES:
            self._SyncObj__raftCommitIndex = commit - self.backlog + TURN_ENTRIES
        self.doTick(0.0)
        self._SyncObj__raftCommitIndex = max(commit, self.commit)
        if not self.leads:
            self._told, self._tell_at = (0, 0), math.inf
            return
        if self._SyncObj__newAppendEntriesTime != before:
            self._told, self._tell_at = (end, self.commit), math.inf
        if len(self._log) > self._told[0]:
            self._tell(self._spares())
        elif self.commit > max(commit, self._told[1]):
            self._tell_at = min(self._tell_at, _now() + COMMIT_S)

    @property
    def backlog(self) -> int:
        """How many entries are known to be committed and not applied yet."""
        return self.commit - int(self.raftLastApplied)

    @property
    def pending(self) -> int:
        """How many entries of the log are not applied yet."""
        return len(self._log) - int(self.raftLastApplied)

    @property
    def beats_at(self) -> float:
        """When a leader sends its next heartbeat."""
        # PySyncObj looks at all that a group has, before it has this.
        return float(getattr(self, "_SyncObj__newAppendEntriesTime", 0.0))

    @property
    def tell_at(self) -> float:
        """When tell() has something to say; infinite while it has not."""
        return self._tell_at

    def tell(self, *, at_once: bool = False) -> None:
        """Tell the others what is committed, if that did not ride with new entries for a while, or *at_once*."""
        if self._tell_at < math.inf and (at_once or _now() >= self._tell_at):
            self._tell(())

    def _tell(self, spares: Collection[str]) -> None:
        if self.leads:
            connected = self._SyncObj__connectedNodes
            self._send_to({node for node in connected if node.id not in spares} if spares else connected)
            self._told, self._tell_at = (len(self._log), self.commit), math.inf

    def send_missing(self) -> None:
        """Send entries to those who have not been sent all."""
        if self.leads:
            end, sent = len(self._log), self._SyncObj__raftNextIndex
            self._send_to({node for node in self._SyncObj__connectedNodes if sent[node] <= end})

    def _send_to(self, nodes: set[Node]) -> None:
        connected = self._SyncObj__connectedNodes
        self._SyncObj__connectedNodes = nodes
        try:
            self._SyncObj__sendAppendEntries()
        finally:
            self._SyncObj__connectedNodes = connected

    def resign(self) -> None:
        """Stop leading, as PySyncObj does when its followers are silent; the term stays."""
        self._SyncObj__setState(FOLLOWER)
        self._SyncObj__raftLeader = None

    @property
    def leads(self) -> bool:
        return bool(self._isLeader())

    @property
    def leader(self) -> str | None:
        node = self._getLeader()
        return node.id if node is not None else None

    @property
    def term(self) -> int:
        return int(self.raftCurrentTerm)

    @property
    def commit(self) -> int:
        return int(self.raftCommitIndex)

    def acknowledged(self, peer: str) -> int:
        """Return the highest index that *peer* has said to hold; of meaning on the leader only."""
        found: int = self._SyncObj__raftMatchIndex.get(Node(peer), 0)
        return found

    def next_of(self, peer: str) -> int:
        """Return the index of the first entry that *peer* is sent next; of meaning on the leader only."""
        found: int = self._SyncObj__raftNextIndex.get(Node(peer), 0)
        return found

    def go_on_from(self, peer: str, index: int) -> None:
        """Send *peer* what begins at *index* next: all before it is on its way."""
        self._SyncObj__raftNextIndex[Node(peer)] = index

    def close(self) -> None:
        """End the group. Never call it from inside a tick."""
        if not self._ended:
            self._ended = True
            self.destroy()


def command_entry(command: bytes) -> bytes | None:
    """Return the bytes that were given to append(), from a journal's command; None for PySyncObj's own no-ops."""
    if command[0] != REGULAR:
        return None
    try:
        _, (data,) = _Codec.loads(command[1:])
    except msgspec.MsgspecError as error:
        raise InvariantError(f"the journal holds a command that append() never wrote: {error}") from error
    return data
