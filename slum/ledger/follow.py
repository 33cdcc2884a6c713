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
from slum.ledger.applying import replayed_chain
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


def after(home: Path, generation: int, seq: int) -> tuple[int, float | None]:
    """Return how many entries the ledger in *home* has beyond *seq* of *generation*, and when the first event among them was.

    All of a later generation is beyond; of what has replaced this ledger nothing is.
    """
    with closing(_open(home)) as db:
        now = schema.read_position(db)
        if now.generation < generation or (now.generation == generation and now.seq <= seq):
            return 0, None
        if now.generation > generation:
            found = db.execute(
                "SELECT number FROM events WHERE kind = 'generation_began' ORDER BY number DESC LIMIT 1"
            ).fetchone()
            number = found[0] if found else now.events
        else:
            found = db.execute(
                "SELECT number FROM events WHERE seq <= ? ORDER BY number DESC LIMIT 1", (seq,)
            ).fetchone()
            number = found[0] + 1 if found else 1
        when = db.execute("SELECT at FROM events WHERE number = ?", (number,)).fetchone()
        return max(1, now.seq - seq), when[0] if when else None


def chain_at(home: Path, seq: int) -> str | None:
    """Return the chain after entry *seq*, if it is of this epoch or ended one; None when the ledger does not keep it.

    Reads the epoch's journal up to there.
    """
    with closing(_open(home)) as db:
        db.execute("BEGIN")
        now, epoch = schema.read_position(db), schema.last_epochs(db, 1)[0]
        found = db.execute(
            "SELECT chain0 FROM epochs WHERE generation = ? AND seq0 = ?", (now.generation, seq)
        ).fetchone()
        if found is not None:
            return str(found[0])
        if not epoch.seq0 < seq <= now.seq:
            return None
        count = seq - epoch.seq0
        answers = db.execute("SELECT number, results_hash FROM entries WHERE number <= ? ORDER BY number", (count,))
        with closing(Tail(home, now.cluster_id, epoch, skip=0)) as tail:
            chain, number = replayed_chain(epoch.chain0, tail.entries(count), answers)
        return chain if number == count else None


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


__all__ = ["Damaged", "Gone", "Tail", "after", "chain_at", "copy", "epoch_row", "standing"]
