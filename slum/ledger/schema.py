"""The tables of state.db, its one row that says where the ledger stands, and hashes over all of it.

state.db is SQLite in WAL mode with synchronous=FULL: a commit that returned survives a power cut. Every row is the same on
every member, so row_hash() of two members at the same seq is the same; nothing local may be stored here. The ledger row
carries a check of its own, because SQLite's pages have none.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable
from pathlib import Path

import msgspec

from slum.frozen import Frozen
from slum.ledger.commands import Member
from slum.ledger.refusal import RESTORE, Damaged, Refusal

HASHED_ROWS = 200
_LATER = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})
WAL_PAGES = 131072
"""128 MiB: from here on SQLite makes a checkpoint in the midst of a commit; before, checkpoints.py does, beside them."""
SCHEMA = 2
"""2 keeps the members beside the ledger row, which is written with every entry, instead of in it."""

_TABLES = """
CREATE TABLE ledger (
  id INTEGER PRIMARY KEY CHECK (id = 1),
  cluster_id TEXT NOT NULL, generation INTEGER NOT NULL, epoch INTEGER NOT NULL, lineage TEXT NOT NULL,
  term INTEGER NOT NULL, applied INTEGER NOT NULL, seq INTEGER NOT NULL, chain TEXT NOT NULL,
  protocol INTEGER NOT NULL, leader TEXT NOT NULL, revision INTEGER NOT NULL, events INTEGER NOT NULL,
  events_hash TEXT NOT NULL, results INTEGER NOT NULL, results_floor INTEGER NOT NULL, own_hash TEXT NOT NULL
) STRICT;
CREATE TABLE members (id INTEGER PRIMARY KEY CHECK (id = 1), members BLOB NOT NULL) STRICT;
CREATE TABLE epochs (
  generation INTEGER NOT NULL, epoch INTEGER NOT NULL, lineage TEXT NOT NULL, salt BLOB NOT NULL, chain0 TEXT NOT NULL,
  seq0 INTEGER NOT NULL, PRIMARY KEY (generation, epoch)
) STRICT;
CREATE TABLE entries (number INTEGER PRIMARY KEY, results_hash BLOB NOT NULL) STRICT;
CREATE TABLE results (number INTEGER PRIMARY KEY, id BLOB NOT NULL UNIQUE, seq INTEGER NOT NULL, result BLOB NOT NULL) STRICT;
CREATE TABLE events (
  number INTEGER PRIMARY KEY, seq INTEGER NOT NULL, at REAL NOT NULL, actor TEXT NOT NULL, kind TEXT NOT NULL,
  subject TEXT NOT NULL, service TEXT, why TEXT NOT NULL, before TEXT, after TEXT, hash TEXT NOT NULL
) STRICT;
CREATE INDEX events_by_service ON events (service, number) WHERE service IS NOT NULL;
CREATE INDEX events_by_kind ON events (kind, number);
CREATE TABLE revisions (
  revision INTEGER PRIMARY KEY, digest TEXT NOT NULL, name TEXT NOT NULL, at REAL NOT NULL, actor TEXT NOT NULL,
  why TEXT NOT NULL, summary TEXT NOT NULL, seq INTEGER NOT NULL, fleet BLOB NOT NULL
) STRICT;
CREATE TABLE blobs (revision INTEGER NOT NULL, digest TEXT NOT NULL, PRIMARY KEY (revision, digest)) STRICT, WITHOUT ROWID;
CREATE TABLE overrides (
  machine TEXT NOT NULL, service TEXT NOT NULL, instance TEXT NOT NULL, stopped INTEGER NOT NULL, restarts INTEGER NOT NULL,
  PRIMARY KEY (machine, service, instance)
) STRICT, WITHOUT ROWID;
CREATE TABLE machines (
  machine TEXT NOT NULL, incarnation INTEGER NOT NULL, tenement TEXT NOT NULL, operator TEXT NOT NULL, state TEXT NOT NULL,
  machine_id TEXT NOT NULL, action TEXT NOT NULL, deadline_at REAL NOT NULL, PRIMARY KEY (machine, incarnation)
) STRICT, WITHOUT ROWID;
CREATE TABLE intents (
  action TEXT PRIMARY KEY, kind TEXT NOT NULL, machine TEXT NOT NULL, tenement TEXT NOT NULL, operator TEXT NOT NULL,
  incarnation INTEGER NOT NULL, machine_id TEXT NOT NULL, deadline_at REAL NOT NULL, leader TEXT NOT NULL,
  seq INTEGER NOT NULL, state TEXT NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX intents_by_machine ON intents (machine) WHERE state IN ('open', 'superseded');
"""
_ACCESS_TABLES = """
CREATE TABLE IF NOT EXISTS authority (
  id INTEGER PRIMARY KEY CHECK (id = 1), certificate TEXT NOT NULL, box BLOB NOT NULL, recovery TEXT NOT NULL,
  recipients TEXT NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS tokens (
  id TEXT PRIMARY KEY, hash BLOB NOT NULL UNIQUE, kind TEXT NOT NULL, subject TEXT NOT NULL, role TEXT NOT NULL,
  expires_at REAL NOT NULL, made_at REAL NOT NULL, made_by TEXT NOT NULL, used_at REAL NOT NULL, key_hash TEXT NOT NULL,
  serial TEXT NOT NULL, certificate TEXT NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS certificates (
  serial TEXT PRIMARY KEY, subject TEXT NOT NULL, role TEXT NOT NULL, key_hash TEXT NOT NULL, not_after REAL NOT NULL,
  made_at REAL NOT NULL, revoked_at REAL NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS certificates_by_subject ON certificates (subject);
CREATE INDEX IF NOT EXISTS certificates_revoked ON certificates (serial) WHERE revoked_at > 0;
"""
"""Made on opening too where they are missing: a state.db from before them is the same as one where they are empty."""
_HOSTS_TABLE = """
CREATE TABLE IF NOT EXISTS hosts (
  host TEXT PRIMARY KEY, key TEXT NOT NULL, at REAL NOT NULL, actor TEXT NOT NULL
) STRICT, WITHOUT ROWID
"""
HOSTS_PROTOCOL = 2
"""From which protocol on there is that table: members of an older slum would have other rows."""


class Position(Frozen):
    """The ledger row: which cluster and epoch this is, how far it has come, and what the whole history hashes to."""

    cluster_id: str
    generation: int
    epoch: int
    lineage: str
    term: int
    applied: int
    """Entries applied in this epoch."""
    seq: int
    """Entries applied for ever."""
    chain: str
    """sha256 over every entry and its results, in order."""
    members: tuple[Member, ...]
    protocol: int
    leader: str
    """Who leads by what is committed: member and run of its process, so that a restart is another leader."""
    revision: int
    events: int
    events_hash: str
    results: int
    results_floor: int
    """The highest seq of a result that was dropped; a request id that is older cannot be told from a repeat."""

    @property
    def fence(self) -> tuple[int, int, int]:
        """(generation, epoch, term): what is older than this never takes effect."""
        return (self.generation, self.epoch, self.term)


class EpochRow(Frozen):
    generation: int
    epoch: int
    lineage: str
    salt: bytes
    """Of its journal; from the chain, so that every member and every replay of the Seal makes the same one."""
    chain0: str
    """The chain before its first entry."""
    seq0: int


_COLUMNS = tuple(name for name in Position.__struct_fields__ if name != "members")
_WRITE_POSITION = (
    f"INSERT OR REPLACE INTO ledger (id, {', '.join(_COLUMNS)}, own_hash)"
    f" VALUES (1, {', '.join('?' * len(_COLUMNS))}, ?)"
)


def connect(path: Path) -> sqlite3.Connection:
    """Open state.db for its one writer; statements outside BEGIN ... COMMIT commit by themselves."""
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, cached_statements=256)
    for pragma in (
        "page_size=1024",
        "journal_mode=WAL",
        "synchronous=FULL",
        f"wal_autocheckpoint={WAL_PAGES}",
        "journal_size_limit=8388608",
        "temp_store=MEMORY",
    ):
        db.execute(f"PRAGMA {pragma}").close()
    return db


def checkpoint(db: sqlite3.Connection) -> bool:
    """Copy of the WAL what can be copied without waiting for anybody, and tell whether that was all.

    Raises sqlite3.Error when the disk fails.
    """
    try:
        _, pages, copied = db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
    except sqlite3.Error as error:
        if error.sqlite_errorcode & 0xFF not in _LATER:
            raise
        return False
    return bool(pages == copied)


def create_tables(db: sqlite3.Connection, protocol: int) -> None:
    for statement in _TABLES.split(";\n"):
        db.execute(statement)
    complete(db)
    create_tables_of(db, protocol)
    db.execute(f"PRAGMA user_version={SCHEMA}")


def complete(db: sqlite3.Connection) -> None:
    """Make the tables that a state.db of this schema may lack."""
    for statement in _ACCESS_TABLES.split(";\n"):
        db.execute(statement)


def create_tables_of(db: sqlite3.Connection, protocol: int) -> None:
    """Make the tables that came with *protocol* or before; at the entry that raises it, so at the same one everywhere."""
    if protocol >= HOSTS_PROTOCOL:
        db.execute(_HOSTS_TABLE)


def check_version(db: sqlite3.Connection, name: str) -> None:
    """Raise Refusal when state.db was written by another schema."""
    (found,) = db.execute("PRAGMA user_version").fetchone()
    if found != SCHEMA:
        raise Refusal(
            f"{name} has schema {found}, this slum knows {SCHEMA}",
            hint="install the version of slum that last ran here",
        )


def read_position(db: sqlite3.Connection, name: str = "state.db") -> Position:
    """Return the ledger row; raise Damaged when it does not match its own check."""
    row = db.execute(f"SELECT {', '.join(_COLUMNS)}, own_hash, members FROM ledger JOIN members USING (id)").fetchone()
    if row is None:
        raise Damaged(f"{name} has no ledger row", hint=RESTORE)
    try:
        *values, own, members = row
        fields = dict(zip(_COLUMNS, values, strict=True))
        position = Position(**fields, members=msgspec.msgpack.decode(members, type=tuple[Member, ...]))
    except msgspec.MsgspecError as error:
        raise Damaged(f"{name}: the ledger row cannot be read: {error}", hint=RESTORE) from error
    if own_hash(position) != own:
        raise Damaged(f"{name}: the ledger row does not match its own hash", hint=RESTORE)
    return position


def write_position(db: sqlite3.Connection, position: Position, was: Position | None = None) -> None:
    """Write the ledger row, and the members where they are not those of *was*, which was written before."""
    if was is None or position.members is not was.members:
        db.execute("INSERT OR REPLACE INTO members VALUES (1, ?)", (msgspec.msgpack.encode(position.members),))
    db.execute(_WRITE_POSITION, (*(getattr(position, name) for name in _COLUMNS), own_hash(position)))


def own_hash(position: Position) -> str:
    return hashlib.sha256(msgspec.msgpack.encode(position)).hexdigest()


def new_epoch(position: Position, number: int) -> EpochRow:
    """Return the row of epoch *number*, which begins at *position*."""
    salt = hashlib.sha256(f"{position.chain}/{position.generation}/{number}".encode()).digest()[:8]
    return EpochRow(
        generation=position.generation,
        epoch=number,
        lineage=position.lineage,
        salt=salt,
        chain0=position.chain,
        seq0=position.seq,
    )


def write_epoch(db: sqlite3.Connection, row: EpochRow) -> None:
    db.execute(
        "INSERT INTO epochs VALUES (?, ?, ?, ?, ?, ?)",
        (row.generation, row.epoch, row.lineage, row.salt, row.chain0, row.seq0),
    )


def last_epochs(db: sqlite3.Connection, count: int) -> tuple[EpochRow, ...]:
    """Return the newest epochs, newest first."""
    rows = db.execute("SELECT * FROM epochs ORDER BY generation DESC, epoch DESC LIMIT ?", (count,))
    return tuple(EpochRow(**dict(zip(EpochRow.__struct_fields__, row, strict=True))) for row in rows)


def blobs_named(db: sqlite3.Connection) -> set[str]:
    """Return the digests of the bundles that any kept revision names."""
    return {row[0] for row in db.execute("SELECT DISTINCT digest FROM blobs")}


def row_hash(db: sqlite3.Connection, rest: Callable[[], None] = lambda: None) -> str:
    """Return one hash over every row of every table, in primary key order; equal on all members.

    *rest* is called after every HASHED_ROWS rows, by whom it shall not keep from other work.

    SQLite's own tables are left out, and those that begin with "_": a backup keeps things of its own in its copy.
    """
    digest = hashlib.sha256()
    names = db.execute(
        "SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite!_%' ESCAPE '!'"
        " AND name NOT LIKE '!_%' ESCAPE '!'"
    )
    for name in sorted(row[0] for row in names.fetchall()):
        keys = [r[1] for r in sorted(db.execute(f"PRAGMA table_info({name})"), key=lambda r: r[5]) if r[5]]
        digest.update(f"{name}\n".encode())
        rows = db.execute(f"SELECT * FROM {name} ORDER BY {', '.join(keys)}")
        # Some at a time: beside a thread that must not wait long for the interpreter.
        while some := rows.fetchmany(HASHED_ROWS):
            digest.update(msgspec.msgpack.encode(some))
            rest()
    return digest.hexdigest()
