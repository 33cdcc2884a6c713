"""The committed log from outside the ledger process: read from its journals on disk, up to what state.db has applied.

What state.db has applied is committed on a majority, and committed entries are never cut, so a follower that stops there
reads what every member will have. It costs the ledger nothing: no connection, no queue, no memory for a slow reader. The
files are opened read-only while they are written; a frame that is not whole yet ends a reading, and is read again later.
Knows two epochs: who is further behind starts from a copy of state.db (copy()).
"""

from __future__ import annotations

import os
import sqlite3
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

from slum.ledger import folder, frames, schema
from slum.ledger.group import command_entry
from slum.ledger.refusal import Damaged, Refusal
from slum.ledger.schema import EpochRow, Position

CHUNK_BYTES = 1 << 20


class Gone(Exception):
    """The journal that would come next is not there any more, or is of another history: begin from a copy."""


class Tail:
    """Reads one journal from its start, again and again, each time only what is new."""

    def __init__(self, home: Path, cluster: str, epoch: EpochRow, *, skip: int) -> None:
        """*skip* is how many entries of this epoch the reader has already."""
        self.epoch = epoch
        self._path = folder.journal_path(home, epoch)
        try:
            self._descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise Gone(str(self._path)) from error
        self._salt = epoch.salt
        self._frames, self._at = 0, frames.HEAD_BYTES
        self._index = 0
        """Entries in the journal up to here, PySyncObj's own among them."""
        self._given = 0
        self._skip = skip
        self._waiting: deque[tuple[int, bytes]] = deque()
        """(index, entry) that were read and not given yet: they may be cut again while they are not committed."""
        head = os.pread(self._descriptor, frames.HEAD_BYTES, 0)
        if frames.decode_head(head, self._path.name) != folder.journal_id(cluster, epoch):
            self.close()
            raise Gone(f"{self._path} is of another history")

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def entries(self, applied: int) -> Iterator[bytes]:
        """Yield the entries after those that were given, up to the one that is the epoch's number *applied*."""
        while True:
            while self._waiting and self._given < applied:
                _, data = self._waiting.popleft()
                self._given += 1
                if self._given > self._skip:
                    yield data
            if self._given >= applied or not self._read_more():
                return

    def _read_more(self) -> bool:
        """Take in some more whole frames; False when there are none."""
        start = self._at - self._at % frames.SECTOR_BYTES
        size = CHUNK_BYTES
        while True:
            data = os.pread(self._descriptor, size, start)
            view = memoryview(data)
            taken: list[frames.Record] = []
            number, end = frames.whole(view, self._at - start, self._frames, self._salt, self._path.name, taken.append)
            if number > self._frames or len(data) < size or not frames.is_longer(view, self._at - start):
                break
            size *= 2
        for record in taken:
            self._take(record, data)
        advanced = number > self._frames
        self._frames, self._at = number, start + end
        return advanced

    def _take(self, record: frames.Record, data: bytes) -> None:
        match record:
            case frames.EntryAt(_, offset, length):
                self._index += 1
                entry = command_entry(data[offset : offset + length])
                if entry is not None:
                    self._waiting.append((self._index, entry))
            case frames.Truncate(keep):
                self._index = keep
                while self._waiting and self._waiting[-1][0] > keep:
                    self._waiting.pop()
            case _:
                pass


def standing(home: Path) -> Position:
    """Return where the ledger in folder *home* stands by its state.db."""
    with closing(_open(home)) as db:
        return schema.read_position(db)


def epoch_row(home: Path, generation: int, epoch: int) -> EpochRow | None:
    with closing(_open(home)) as db:
        row = db.execute("SELECT * FROM epochs WHERE generation = ? AND epoch = ?", (generation, epoch)).fetchone()
    return None if row is None else EpochRow(**dict(zip(EpochRow.__struct_fields__, row, strict=True)))


def copy(home: Path, to: Path, progress: Callable[[], None] = lambda: None) -> Position:
    """Write a consistent copy of state.db to *to* (new), one file, and return where it stands; the writer goes on."""
    with closing(_open(home)) as source, closing(sqlite3.connect(to)) as target:
        os.chmod(to, 0o600)
        # One transaction over the whole backup: else a busy writer would make it begin again and again.
        source.execute("BEGIN")
        source.execute("SELECT count(*) FROM ledger").fetchone()
        source.backup(target, pages=4096, progress=lambda *_: progress())
        source.execute("ROLLBACK")
        target.execute("PRAGMA journal_mode=DELETE").close()
        return schema.read_position(target)


def _open(home: Path) -> sqlite3.Connection:
    path = folder.current(home)
    if path is None:
        raise Refusal(f"{home} holds no ledger", hint="`slum up` starts one")
    return sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, isolation_level=None, timeout=5.0)


__all__ = ["Damaged", "Gone", "Tail", "copy", "epoch_row", "standing"]
