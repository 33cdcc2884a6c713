"""One epoch's Raft log on disk, in the shape that PySyncObj expects of its journal, and durable when it says so.

Calls of PySyncObj only collect records; ``sync()`` writes them as one frame and fdatasyncs it. Whoever lets anything
leave (a message, or a commit counted) syncs first: Raft's rule that term, vote and log are on stable
storage before a server answers (Ongaro and Ousterhout 2014, figure 2), and group commit for free. Only a leader's new
entries may leave before (transport.py). Commands are read back from the file; only the newest stay in memory. Never compacts (an epoch's log is bounded, see member.py), and after one
failed write never writes again: a failed fsync tells nothing about what is on the disk.
"""

from __future__ import annotations

import mmap
import os
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import overload

from slum.errors import invariant
from slum.ledger import frames
from slum.ledger.frames import JournalId
from slum.ledger.refusal import RECOVER, Damaged, Refusal

TAIL_BYTES = 1 << 20
AHEAD_BYTES = 1 << 17
"""So far zeros are written ahead of the frames: a sync of what was only allocated costs the file system a commit of its own."""
SLACK_BYTES = 4 << 20
"""Allocated beyond the size at which an epoch is sealed: what is still on its way, the Seal itself, frame headers."""

LogEntry = tuple[bytes, int, int]
"""(command, index from 1, term), as PySyncObj passes them around."""


class Journal:
    """An open journal. Made by create() or open(); used by one thread."""

    def __init__(self, path: Path, descriptor: int, identity: JournalId) -> None:
        self.path = path
        self.identity = identity
        self.torn = False
        """An unsynced frame was found behind the last whole one (and cut) when this journal was opened."""
        self._descriptor = descriptor
        self._frames = 0
        self._end = self._zeroed = frames.HEAD_BYTES
        self._terms = array("Q")
        self._offsets = array("Q")
        self._lengths = array("I")
        self._vote = frames.Vote(0, None)
        self._commit = 1
        self._tail: dict[int, bytes] = {}
        self._tail_bytes = 0
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._dirty = False
        self._promised = False
        self._failed = False
        self._first: LogEntry | None = None
        self._last: LogEntry | None = None

    # --- what a group's owner calls ----------------------------------------------------------------------------------

    @property
    def dirty(self) -> bool:
        """Tell whether something waits for sync() that must be durable before anything is answered."""
        return self._dirty

    @property
    def promises(self) -> bool:
        """Tell whether a term, a vote or a cut is among what waits: then not even a leader's own entries may leave."""
        return self._promised

    @property
    def size_bytes(self) -> int:
        return self._end + self._pending_bytes

    def sync(self) -> None:
        """Make all that was recorded durable, or raise OSError; after an error the journal is dead."""
        if not self._dirty:
            return
        invariant(not self._failed, "a journal was used after a failed write")
        body = b"".join((*self._pending, frames.commit_record(self._commit)))
        frame = frames.encode_frame(self._frames + 1, body, self.identity.salt)
        try:
            _write_all(self._descriptor, frame, self._end)
            self._write_ahead(self._end + len(frame))
            os.fdatasync(self._descriptor)
        except OSError:
            self._failed = True
            raise
        self._frames += 1
        self._end += len(frame)
        self._pending.clear()
        self._pending_bytes = 0
        self._dirty = self._promised = False
        self._trim_tail()

    def raise_commit(self, index: int) -> None:
        """Say that entries up to *index* are known to be committed (state.db has applied them)."""
        self._commit = max(self._commit, min(index, len(self._terms)))

    def term_of(self, index: int) -> int:
        """Return the term of the entry with *index*, which counts from 1."""
        return self._terms[index - 1]

    def entry(self, index: int) -> LogEntry:
        return self._read(index - 1)

    @property
    def last(self) -> tuple[int, int]:
        """(term, index) of the last entry: what elections compare."""
        return (self._terms[-1], len(self._terms)) if self._terms else (0, 0)

    def close(self) -> None:
        """Close the file; safe to repeat. What was not synced is lost, as it would be in a crash."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    # --- what PySyncObj calls ----------------------------------------------------------------------------------------

    def add(self, command: bytes, idx: int, term: int) -> None:
        position = len(self._terms)
        invariant(idx == position + 1, f"entry {idx} does not follow {position}")
        record = frames.entry_record(term, command)
        at = frames.body_at(self._end) + self._pending_bytes
        self._remember(record)
        self._terms.append(term)
        self._offsets.append(frames.entry_command_at(at))
        self._lengths.append(len(command))
        self._tail[position] = command
        self._tail_bytes += len(command)
        self._last = (command, idx, term)
        self._first = self._first or self._last

    def deleteEntriesFrom(self, entryFrom: int) -> None:  # noqa: N802, N803 - PySyncObj's name
        self._remember(frames.truncate_record(entryFrom))
        self._promised = True
        self._cut(entryFrom)
        self._mark_ends()

    def setCurrentTerm(self, term: int, votedForNodeId: str | None) -> None:  # noqa: N802, N803 - PySyncObj's name
        self._vote = frames.Vote(term, votedForNodeId)
        self._remember(frames.vote_record(self._vote))
        self._promised = True

    def getCurrentTerm(self) -> int:  # noqa: N802 - PySyncObj's name
        return self._vote.term

    def getVotedForNodeId(self) -> str | None:  # noqa: N802 - PySyncObj's name
        return self._vote.voted_for

    def setRaftCommitIndex(self, raftCommitIndex: int) -> None:  # noqa: N802, N803 - PySyncObj's name
        """Rides in the next frame: it may be old after a crash, which Raft allows, so it costs no sync of its own."""
        self._commit = raftCommitIndex

    def getRaftCommitIndex(self) -> int:  # noqa: N802 - PySyncObj's name
        return self._commit

    def onOneSecondTimer(self) -> None:  # noqa: N802 - PySyncObj's name
        """PySyncObj's own journal stores its metadata here; ours goes with each frame."""

    def clear(self) -> None:
        invariant(False, "PySyncObj tried to clear a journal: an epoch is never compacted")

    def deleteEntriesTo(self, entryTo: int) -> None:  # noqa: N802, N803 - PySyncObj's name
        invariant(False, f"PySyncObj tried to compact a journal to {entryTo}: an epoch is never compacted")

    def _destroy(self) -> None:
        """A group has ended; its journal is still read by members that are behind, and closed by its owner."""

    def __len__(self) -> int:
        return len(self._terms)

    @overload
    def __getitem__(self, item: int) -> LogEntry: ...
    @overload
    def __getitem__(self, item: slice) -> Entries: ...
    def __getitem__(self, item: int | slice) -> LogEntry | Entries:
        if isinstance(item, slice):
            return Entries(self, range(len(self._terms))[item])
        if item == -1 and self._last is not None:
            return self._last
        if item == 0 and self._first is not None:
            return self._first
        return self._read(range(len(self._terms))[item])

    # --- inside ------------------------------------------------------------------------------------------------------

    def _write_ahead(self, end: int) -> None:
        """Write zeros over zeros behind *end*, when it comes near to what was written so."""
        if end > self._zeroed:
            room = os.fstat(self._descriptor).st_size
            upto = min(end + AHEAD_BYTES, room)
            if upto > end:
                _write_all(self._descriptor, bytes(upto - end), end)
            self._zeroed = max(upto, end)

    def _remember(self, record: bytes) -> None:
        self._pending.append(record)
        self._pending_bytes += len(record)
        self._dirty = True

    def _read(self, position: int) -> LogEntry:
        command = self._tail.get(position)
        if command is None:
            length = self._lengths[position]
            command = os.pread(self._descriptor, length, self._offsets[position])
            if len(command) != length:
                raise Damaged(f"{self.path.name}: shorter than it was at offset {self._offsets[position]}")
        return (command, position + 1, self._terms[position])

    def _load(self, bytes_max: int) -> None:
        """Read the whole file, checking all of it; then cut a torn frame."""
        size = os.fstat(self._descriptor).st_size
        with mmap.mmap(self._descriptor, size, prot=mmap.PROT_READ) as data, memoryview(data) as view:
            scanned = frames.scan(view, self.identity.salt, str(self.path), self._take)
        self._frames, self._end, self.torn = scanned
        self._zeroed = self._end
        if self.torn:
            os.ftruncate(self._descriptor, self._end)
            os.posix_fallocate(self._descriptor, 0, max(bytes_max + SLACK_BYTES, self._end))
        # A killed process may have left a whole frame that is in the page cache only.
        os.fsync(self._descriptor)
        self._mark_ends()

    def _mark_ends(self) -> None:
        self._first = self._read(0) if self._terms else None
        self._last = self._read(len(self._terms) - 1) if self._terms else None

    def _take(self, record: frames.Record) -> None:
        match record:
            case frames.EntryAt(term, offset, length):
                self._terms.append(term)
                self._offsets.append(offset)
                self._lengths.append(length)
            case frames.Truncate(keep):
                self._cut(keep)
            case frames.Vote():
                self._vote = record
            case frames.Commit(upto):
                self._commit = upto

    def _cut(self, keep: int) -> None:
        for column in (self._terms, self._offsets, self._lengths):
            del column[keep:]
        for position in [position for position in self._tail if position >= keep]:
            self._tail_bytes -= len(self._tail.pop(position))

    def _trim_tail(self) -> None:
        while self._tail_bytes > TAIL_BYTES:
            oldest = next(iter(self._tail))
            self._tail_bytes -= len(self._tail.pop(oldest))


class Entries(Sequence[LogEntry]):
    """A run of a journal's entries, read when they are looked at, so that replaying a long epoch stays small."""

    def __init__(self, journal: Journal, positions: range) -> None:
        self._journal = journal
        self._positions = positions

    def __len__(self) -> int:
        return len(self._positions)

    @overload
    def __getitem__(self, item: int) -> LogEntry: ...
    @overload
    def __getitem__(self, item: slice) -> Entries: ...
    def __getitem__(self, item: int | slice) -> LogEntry | Entries:
        if isinstance(item, slice):
            return Entries(self._journal, self._positions[item])
        return self._journal[self._positions[item]]

    def __iter__(self) -> Iterator[LogEntry]:
        return (self._journal[position] for position in self._positions)


def create(path: Path, identity: JournalId, bytes_max: int) -> Journal:
    """Make an empty journal with room for *bytes_max*, durable with its name; replaces a leftover that nothing names."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        _write_all(descriptor, frames.encode_head(identity), 0)
        os.posix_fallocate(descriptor, 0, bytes_max + SLACK_BYTES)
        os.fsync(descriptor)
        sync_folder(path.parent)
    except OSError:
        os.close(descriptor)
        raise
    return Journal(path, descriptor, identity)


def open_journal(path: Path, bytes_max: int) -> Journal:
    """Open and check the journal at *path*, cut a torn last frame; raise Refusal or Damaged, having changed nothing."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise Refusal(
            f"{path}: state.db names this journal, but it is gone; starting without it could forget a vote",
            hint=RECOVER,
        ) from error
    try:
        identity = frames.decode_head(os.pread(descriptor, frames.HEAD_BYTES, 0), str(path))
        journal = Journal(path, descriptor, identity)
        journal._load(bytes_max)
    except BaseException:
        os.close(descriptor)
        raise
    return journal


def sync_file(descriptor: int) -> None:
    """Make an open file durable."""
    os.fsync(descriptor)


def sync_folder(folder: Path) -> None:
    """Make names in *folder* durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view = view[written:]
        offset += written
