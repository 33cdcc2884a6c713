"""state.db and its transactions: apply(entry) is one, several together when they are held, or one that was foreseen.

What an entry does is applying.py's business; here is when it is begun, seen by others, and durable. Only a disk that fails, or an
entry of a newer slum, raises: then the process must end, for going on would diverge.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from slum.errors import SlumError
from slum.ledger import schema
from slum.ledger.applying import Applied, apply_entry, may_seal, read_entry, replayed_chain
from slum.ledger.commands import (
    RESULTS_KEPT,
    Member,
)
from slum.ledger.events import PAUSED, RECONCILE, EventWriter, first_bad
from slum.ledger.perform import StateFailed
from slum.ledger.refusal import RESTORE, Damaged, Refusal
from slum.ledger.schema import EpochRow, Position


class State:
    """The one writer of a state.db. Used by one thread at a time."""

    def __init__(self, db: sqlite3.Connection, path: Path, *, results_kept: int = RESULTS_KEPT) -> None:
        self._db = db
        self._path = path
        self._results_kept = results_kept
        self._syncs_all = True
        self._holds = False
        self.position = schema.read_position(db, str(path))
        self._committed = self.position
        """As it was when the open transaction began, and is in the file."""
        self._written: Position | None = None
        """The position that the open transaction has written last."""
        self._foreseen: tuple[bytes, Applied] | None = None
        """An entry that was applied in the open transaction, and nothing else in it; *position* is before it."""

    @classmethod
    def open(cls, path: Path, *, results_kept: int = RESULTS_KEPT, pages: bool = True) -> State:
        """Open and check an existing state.db; raise Refusal. Without *pages* its pages have been checked just now."""
        if not path.exists():
            raise Refusal(f"{path}: CURRENT names this file, but it is gone", hint=RESTORE)
        db = None
        try:
            db = schema.connect(path)
            schema.check_version(db, str(path))
            (verdict,) = db.execute("PRAGMA quick_check(1)").fetchone() if pages else ("ok",)
            if verdict != "ok":
                raise Damaged(f"{path}: SQLite finds it damaged: {verdict}", hint=RESTORE)
            schema.complete(db)
            state = cls(db, path, results_kept=results_kept)
            state._check_heads()
        except BaseException as error:
            if db is not None:
                db.close()
            if isinstance(error, sqlite3.DatabaseError):
                raise Damaged(f"{path}: SQLite cannot read it: {error}", hint=RESTORE) from error
            raise
        return state

    @property
    def path(self) -> Path:
        return self._path

    @property
    def shown(self) -> int:
        """Up to which sequence others find in the file what was applied; behind *position* while something is held."""
        return self._committed.seq if self._db.in_transaction else self.position.seq

    def close(self) -> None:
        self._db.close()

    def sync_all(self, wanted: bool) -> None:
        """Make every commit durable before apply() returns, or only that of a Seal.

        The second is for members of a group of several: what they apply is durable in the journals of a majority, their own among
        them, and is applied again from there when a power cut takes the newest commits. SQLite syncs before each checkpoint, so
        what is left is a state that was. A Seal's must stay: the votes and entries of the next epoch's journal hang on it.
        """
        self._syncs_all = wanted
        self._set_sync(wanted)

    def hold(self) -> None:
        """From now on apply() leaves what it did in one open transaction, until commit(), or until a Seal is applied."""
        self._holds = True

    def commit(self) -> None:
        """Commit what was held."""
        self._holds = False
        try:
            if self._settled.in_transaction:
                self._commit()
        except sqlite3.Error as error:
            raise self.failed(error) from error

    def _begin(self) -> None:
        self._committed, self._written = self.position, None
        self._db.execute("BEGIN IMMEDIATE")

    def _commit(self) -> None:
        if self._written is not self.position:
            self.write_position(self._committed)
        self._db.execute("COMMIT")

    def write_position(self, was: Position) -> None:
        """Write where this is inside of the open transaction, which began at *was*."""
        schema.write_position(self._db, self.position, was)

    def _take_foreseen(self, data: bytes) -> Applied | None:
        """Return what was done when *data* was foreseen; undo what was done for another entry."""
        foreseen, self._foreseen = self._foreseen, None
        if foreseen is not None and foreseen[0] != data:
            self._roll_back()
            return None
        return foreseen[1] if foreseen is not None else None

    @property
    def _settled(self) -> sqlite3.Connection:
        """The database without what was only foreseen."""
        if self._foreseen is not None:
            self._foreseen = None
            self._roll_back()
        return self._db

    def _roll_back(self) -> None:
        # SQLite ends a transaction by itself after some errors.
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")

    def checkpoint(self) -> None:
        """Copy the WAL into state.db as far as no reader holds it; commits what was held."""
        self.commit()
        try:
            schema.checkpoint(self._db)
        except sqlite3.Error as error:
            raise self.failed(error) from error

    def _set_sync(self, full: bool) -> None:
        self._settled.execute(f"PRAGMA synchronous={'FULL' if full else 'NORMAL'}").close()

    def is_replay_of(self, entries: Iterable[bytes]) -> str:
        """Return "" when *entries*, those of this epoch's journal, lead to this state, else why they do not."""
        position = self.position
        answers = self._settled.execute("SELECT number, results_hash FROM entries ORDER BY number")
        chain, number = replayed_chain(self.epochs(1)[0].chain0, entries, answers)
        if number != position.applied:
            return f"state.db has applied {position.applied} entries of this epoch, the journal accounts for {number}"
        if chain != position.chain:
            return f"the chain of its first {number} entries is {chain[:16]}, state.db has {position.chain[:16]}"
        return ""

    def epochs(self, count: int) -> tuple[EpochRow, ...]:
        return schema.last_epochs(self._settled, count)

    def history(self) -> dict[tuple[int, int], str]:
        """Return the chain before each epoch, by (generation, epoch)."""
        rows = self._settled.execute("SELECT generation, epoch, chain0 FROM epochs")
        return {(generation, epoch): chain0 for generation, epoch, chain0 in rows}

    def results_hash(self, number: int) -> bytes:
        """Return the hash of the results of entry *number* of this epoch."""
        row = self._settled.execute("SELECT results_hash FROM entries WHERE number = ?", (number,)).fetchone()
        if row is None:
            raise Damaged(f"{self._path}: entry {number} of this epoch has no results on record", hint=RESTORE)
        found: bytes = row[0]
        return found

    def row_hash(self) -> str:
        """Return schema.row_hash; commits what was held."""
        self.commit()
        return schema.row_hash(self._db)

    def newest_event_at(self) -> float:
        """Return the time of the newest event (unix seconds)."""
        (at,) = self._settled.execute("SELECT at FROM events ORDER BY number DESC LIMIT 1").fetchone()
        return float(at)

    def fleet_bytes(self) -> int:
        """Return the packed size of the newest fleet."""
        row = self._settled.execute("SELECT length(fleet) FROM revisions ORDER BY revision DESC LIMIT 1").fetchone()
        return row[0] if row else 0

    def foresee(self, data: bytes) -> None:
        """Do all that apply(*data*) will do but its commit: for a leader that waits for others to have the entry too.

        Nobody sees it, and anything but that apply() undoes it first. What goes wrong here is for apply() to find.
        """
        entry = read_entry(data, self.position.seq + 1)
        if self._db.in_transaction or may_seal(entry):
            return
        try:
            self._begin()
            applied = apply_entry(self._db, self.position, entry, data, self._results_kept)
            schema.write_position(self._db, applied.position, self._committed)
        except (sqlite3.Error, SlumError):
            self._roll_back()
        else:
            self._foreseen, self._written = (data, applied), applied.position

    def apply(self, data: bytes, before_commit: Callable[[Applied], None] | None = None) -> Applied:
        """Apply one entry and commit. *before_commit* runs inside the transaction, when all is known but not durable."""
        seals = False
        try:
            applied = self._take_foreseen(data)
            if applied is None:
                entry = read_entry(data, self.position.seq + 1)
                seals = may_seal(entry)
                if seals:
                    self.commit()
                    self._set_sync(True)
                if not self._db.in_transaction:
                    self._begin()
                applied = apply_entry(self._db, self.position, entry, data, self._results_kept)
            if before_commit is not None:
                before_commit(applied)
            self.position = applied.position
            if not self._holds:
                self._commit()
            if seals:
                self._set_sync(self._syncs_all)
        except sqlite3.Error as error:
            raise self.failed(error) from error
        return applied

    def failed(self, error: sqlite3.Error) -> StateFailed:
        """Return what ends the member after *error*."""
        return StateFailed(
            f"{self._path}: {error} while applying entries after {self._committed.seq}",
            hint="free space on its disk or replace it, then start again; nothing acknowledged is lost",
        )

    def apply_within(self, data: bytes) -> Applied:
        """Apply one entry inside the transaction of the caller, who sets *position*, and writes it before the end."""
        entry = read_entry(data, self.position.seq + 1)
        return apply_entry(self._db, self.position, entry, data, self._results_kept)

    def check_events(self) -> None:
        """Check every event's hash; raise Damaged. Takes 1.5 s for a million."""
        position = self.position
        _, why = first_bad(self._settled, position.cluster_id, position.events, position.events_hash)
        if why:
            raise Damaged(f"{self._path}: {why}", hint=RESTORE)

    def begin_generation(
        self,
        generation: int,
        lineage: str,
        *,
        actor: str,
        at: float,
        make: Callable[[EpochRow], None],
        members: tuple[Member, ...] | None = None,
        paused: str = "",
        also: Callable[[sqlite3.Connection, EventWriter], None] | None = None,
    ) -> Position:
        """Leave the old log behind and begin epoch 1 of *generation*; *make* makes its journal inside the transaction.

        With *members* these are its members from now on. *paused* is why nothing shall be done to machines for now. *also*
        changes more rows in the same transaction, and says so in events.
        """
        was = self.position
        self._settled.execute("BEGIN IMMEDIATE")
        events = EventWriter(self._db, number=was.events, head=was.events_hash, seq=was.seq, at=at)
        events.add(
            "generation_began",
            f"cluster:{was.cluster_id}",
            actor=actor,
            before={"generation": was.generation, "epoch": was.epoch},
            after={"generation": generation, "epoch": 1},
        )
        if paused:
            events.add(PAUSED, RECONCILE, actor=actor, why=paused)
        if also is not None:
            also(self._db, events)
        events.flush()
        chain = hashlib.sha256(f"{was.chain}/{generation}/{lineage}".encode()).hexdigest()
        position = msgspec.structs.replace(
            was,
            generation=generation,
            epoch=1,
            lineage=lineage,
            term=0,
            applied=0,
            chain=chain,
            members=was.members if members is None else members,
            events=events.number,
            events_hash=events.head,
        )
        epoch = schema.new_epoch(position, 1)
        schema.write_epoch(self._db, epoch)
        self._db.execute("DELETE FROM entries")
        schema.write_position(self._db, position)
        make(epoch)
        self._db.execute("COMMIT")
        self.position = position
        return position

    def _check_heads(self) -> None:
        """Compare cheap things that a flipped bit or a mixed-up file would break; raise Damaged."""
        position = self.position
        row = self._db.execute("SELECT number, hash FROM events ORDER BY number DESC LIMIT 1").fetchone()
        if row != (position.events, position.events_hash):
            raise Damaged(f"{self._path}: its newest event is not the one that the ledger row names", hint=RESTORE)
        epochs = self.epochs(1)
        if not epochs or (epochs[0].generation, epochs[0].epoch) != (position.generation, position.epoch):
            raise Damaged(f"{self._path}: its newest epoch is not the one that the ledger row names", hint=RESTORE)


def bootstrap(path: Path, position: Position, *, actor: str, at: float) -> None:
    """Make the state.db of a new cluster at *path*, closed and durable."""
    db = schema.connect(path)
    try:
        db.execute("BEGIN IMMEDIATE")
        schema.create_tables(db, position.protocol)
        events = EventWriter(db, number=0, head=position.events_hash, seq=0, at=at)
        members = [member.id for member in position.members]
        after = {"generation": position.generation, "members": members}
        events.add("cluster_created", f"cluster:{position.cluster_id}", actor=actor, after=after)
        events.flush()
        position = msgspec.structs.replace(position, events=events.number, events_hash=events.head)
        schema.write_epoch(db, schema.new_epoch(position, position.epoch))
        schema.write_position(db, position)
        db.execute("COMMIT")
    finally:
        db.close()
