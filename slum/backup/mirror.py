"""mirror.db: the ledger's state once more, made by applying the committed log again; the one file that Litestream opens.

It is written with sqlite-utils, one transaction a batch, by the same state machine as state.db, so that its chain must
come out the same: a mirror that differs is thrown away and said. Beside the state it keeps every entry with the chain after
it (``_backup_log``), from which any point that lies between two uploads can be made again. Never touches state.db but
by reading; a mirror that was given to Litestream is never swapped for another file.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import msgspec
from sqlite_utils import Database

from slum.ledger import follow, schema
from slum.ledger.commands import Header
from slum.ledger.refusal import Damaged
from slum.ledger.schema import Position
from slum.ledger.state import State

LOG, BLOBS = "_backup_log", "_backup_blobs"
BATCH_ENTRIES = 1000
BATCH_BYTES = 4 << 20
BUSY_MS = 10_000
"""Longer than any checkpoint of Litestream's, which holds the write lock meanwhile."""


class _At(msgspec.Struct):
    header: Header


_header = msgspec.msgpack.Decoder(_At).decode


class Logged(msgspec.Struct, frozen=True):
    """An entry of the log, and the chain after it. *at* is its leader's clock, *mirrored_at* that of this machine."""

    seq: int
    at: float
    mirrored_at: float
    chain: str
    data: bytes


class Mirror:
    """An open mirror; one thread at a time."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self.path = path
        self._connection = connection
        # Its plugins are for a person's command line: nothing else than the library itself may run here.
        self._db = Database(connection, execute_plugins=False)
        self._state = State(connection, path)

    @classmethod
    def make(cls, ledger: Path, path: Path, tell: Callable[[], None] = lambda: None) -> Mirror:
        """Make the mirror at *path* from a copy of the state.db in folder *ledger*; *tell* is called meanwhile."""
        remove(path)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        follow.copy(ledger, path, tell)
        mirror = cls(_connect(path), path)
        mirror._make_tables()
        return mirror

    @classmethod
    def open(cls, path: Path) -> Mirror:
        """Open a mirror that was made before; Damaged when it is not sound."""
        State.open(path).close()
        mirror = cls(_connect(path), path)
        mirror._make_tables()
        return mirror

    def close(self) -> None:
        self._connection.close()

    @property
    def position(self) -> Position:
        return self._state.position

    def apply(self, entries: Sequence[bytes], now: float) -> int:
        """Apply *entries* in one transaction, up to a Seal if there is one among them; return how many."""
        logged: list[dict[str, object]] = []
        was = self._state.position
        try:
            with self._writing():
                for data in entries:
                    applied = self._state.apply_within(data)
                    self._state.position = at = applied.position
                    logged.append(
                        {
                            "seq": at.seq,
                            "at": _header(data).header.at,
                            "mirrored_at": now,
                            "chain": at.chain,
                            "data": data,
                        }
                    )
                    if applied.sealed is not None:
                        break
                self._state.write_position(was)
                self._db.table(LOG).insert_all(logged)
        except BaseException:
            self._state.position = was
            raise
        return len(logged)

    def row_hash(self, tell: Callable[[], None] = lambda: None) -> str:
        return schema.row_hash(self._connection, tell)

    def blobs_named(self) -> set[str]:
        return schema.blobs_named(self._connection)

    def unnamed(self, digests: set[str], now: float, keep_s: float) -> set[str]:
        """Return those of *digests* (what the store has) that no kept revision has named for *keep_s*."""
        named = self.blobs_named()
        table = self._db.table(BLOBS)
        with self._writing():
            since = {row["digest"]: row["unnamed_at"] for row in table.rows}
            for digest in since.keys() - (digests - named):
                table.delete(digest)
            table.insert_all(
                {"digest": digest, "unnamed_at": now} for digest in sorted(digests - named) if digest not in since
            )
        return {digest for digest in digests - named if now - since.get(digest, now) > keep_s}

    def prune(self, before: float) -> None:
        """Forget the entries that were mirrored before that moment."""
        with self._writing():
            self._db.table(LOG).delete_where("mirrored_at < ?", [before])

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Take the write lock first: what only reads and then writes fails at once where Litestream wrote in between."""
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            self._db.rollback()
            raise

    def _make_tables(self) -> None:
        with self._writing():
            self._db.table(LOG).create(
                {"seq": int, "at": float, "mirrored_at": float, "chain": str, "data": bytes},
                pk="seq",
                if_not_exists=True,
            )
            self._db.table(BLOBS).create({"digest": str, "unnamed_at": float}, pk="digest", if_not_exists=True)


class Feed:
    """What the ledger in folder *home* has committed, from where a mirror stands."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._tail: follow.Tail | None = None
        self.seq = 0
        """Where the ledger stood when it was last looked at."""

    def close(self) -> None:
        if self._tail is not None:
            self._tail.close()
            self._tail = None

    def next(self, at: Position) -> list[bytes]:
        """Return entries that follow *at*, a bounded number, none when there are none; Gone, or Damaged when it differs."""
        now = follow.standing(self._home)
        self.seq = now.seq
        if (now.cluster_id, now.generation, now.lineage) != (at.cluster_id, at.generation, at.lineage):
            raise follow.Gone("a new generation began")
        if now.seq < at.seq or (now.seq == at.seq and now.chain != at.chain):
            raise Damaged(f"the mirror at sequence {at.seq} is not what state.db at {now.seq} comes from")
        if now.seq == at.seq:
            return []
        if self._tail is None or (self._tail.epoch.generation, self._tail.epoch.epoch) != (at.generation, at.epoch):
            self.close()
            row = follow.epoch_row(self._home, at.generation, at.epoch)
            if row is None:
                raise follow.Gone(f"epoch {at.epoch} is not known any more")
            self._tail = follow.Tail(self._home, at.cluster_id, row, skip=at.applied)
        # Of an epoch that is sealed all counts up to the Seal, and the mirror stops there by itself.
        upto = now.applied if now.epoch == at.epoch else 1 << 62
        found: list[bytes] = []
        size = 0
        for data in self._tail.entries(upto):
            found.append(data)
            size += len(data)
            if len(found) >= BATCH_ENTRIES or size >= BATCH_BYTES:
                break
        return found


def logged(path: Path, *, seq: int | None = None, at: float | None = None) -> Logged | None:
    """Return the entry with *seq*, or the last one not after *at*, of the log in the file at *path*."""
    where, value = ("seq = ?", seq) if seq is not None else ("at <= ?", at)
    with closing(sqlite3.connect(path)) as db:
        row = db.execute(
            f"SELECT seq, at, mirrored_at, chain, data FROM {LOG} WHERE {where} ORDER BY seq DESC LIMIT 1", (value,)
        ).fetchone()
    return None if row is None else Logged(*row)


def replay(path: Path, log: Path, upto: int) -> Position:
    """Apply to the state at *path* the entries of the log in *log* that follow it, up to *upto*; Damaged if they do not."""
    mirror = Mirror(_connect(path), path)
    with closing(mirror), closing(sqlite3.connect(log)) as db:
        rows = db.execute(
            f"SELECT chain, data FROM {LOG} WHERE seq > ? AND seq <= ? ORDER BY seq", (mirror.position.seq, upto)
        )
        while batch := rows.fetchmany(BATCH_ENTRIES):
            done = 0
            while done < len(batch):
                done += mirror.apply([data for _, data in batch[done:]], time.time())
                if mirror.position.chain != batch[done - 1][0]:
                    raise Damaged(f"the log in the backup does not lead to sequence {mirror.position.seq}")
        if mirror.position.seq != upto:
            raise Damaged(f"the log in the backup ends at sequence {mirror.position.seq}, before {upto}")
        return mirror.position


def strip(path: Path) -> None:
    """Leave in the file at *path* only what a state.db has, and no file beside it."""
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        # Nobody's file yet: half of it is dropped, and a way back would be written for nothing.
        db.execute("PRAGMA journal_mode=MEMORY").close()
        tables = "SELECT name FROM sqlite_schema WHERE type = 'table' AND name LIKE '!_%' ESCAPE '!'"
        for (name,) in db.execute(tables).fetchall():
            db.execute(f'DROP TABLE "{name}"')


def remove(path: Path) -> None:
    """Remove a mirror, what SQLite keeps beside it, and what Litestream does."""
    import shutil

    shutil.rmtree(path.with_name(f".{path.name}-litestream"), ignore_errors=True)
    for suffix in ("", "-wal", "-shm", "-journal"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def backlog_bytes(path: Path) -> int:
    """Return how much lies beside the mirror: its WAL, and what Litestream keeps until it is sent."""
    folder = path.with_name(f".{path.name}-litestream")
    found = 0
    for file in (path.with_name(path.name + "-wal"), *folder.rglob("*")):
        try:
            found += file.stat().st_size
        except FileNotFoundError:
            continue
    return found


def _connect(path: Path) -> sqlite3.Connection:
    db = schema.connect(path)
    # Rebuilt from the ledger when it is lost; Litestream checkpoints, nobody else may.
    for pragma in ("synchronous=NORMAL", "wal_autocheckpoint=0", f"busy_timeout={BUSY_MS}"):
        db.execute(f"PRAGMA {pragma}").close()
    return db
