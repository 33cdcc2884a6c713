"""Are our rows those of the others? A hash over all of state.db at the beginning of each epoch, compared between members.

SQLite's pages carry no checksums and entries are applied by each member for itself, so a flipped bit, or a fault in apply, shows only
here. The hash is made beside the ledger's thread, on a snapshot taken before the epoch's first entry. Who differs from what a majority of
the members agrees on must not serve any more; without such a majority nobody can tell who is right, and it is an alarm. Keeps
the newest hash in a file, because the state that it is of is gone after a restart. The verdict is pure.
"""

from __future__ import annotations

import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import msgspec

from slum.frozen import Frozen
from slum.ledger import schema
from slum.ledger.peerwire import Place

FILE = "rows.json"
REST_S = 0.005
"""After every few rows: at a Seal all members hash at once, while all of them have an election to hold."""


class _Superseded(Exception):
    """Another epoch has begun; this hash is of no use any more."""


@dataclass(frozen=True, slots=True)
class Differ:
    """Somebody's rows are others than ours. *certain*: those of a majority are, so ours are wrong."""

    peers: tuple[str, ...]
    certain: bool


class RowsAt(Frozen):
    """The hash of all rows at the beginning of epoch *place*."""

    place: Place
    hash: str


def compare(mine: RowsAt | None, theirs: Mapping[str, RowsAt], members: Collection[str]) -> Differ | None:
    """Return whose rows differ from ours at the same place; None when nobody's do. Only *members* count."""
    if mine is None:
        return None
    same = {name: rows.hash for name, rows in theirs.items() if rows.place == mine.place and name in members}
    others = {name: found for name, found in same.items() if found != mine.hash}
    if not others:
        return None
    most = max(Counter(others.values()).values())
    return Differ(tuple(sorted(others)), certain=most * 2 > len(members))


class Rows:
    """Of one member. begin() at each epoch's beginning; *mine* appears some time later."""

    def __init__(
        self, home: Path, apart: Callable[[Callable[[], None]], None], rest: Callable[[float], None] = time.sleep
    ) -> None:
        """*apart* runs the hashing beside the caller, which *rest* interrupts for some seconds."""
        self._home = home
        self._apart = apart
        self._rest = rest
        self._wanted: Place = (0, 0)
        self._mine = _read(home)
        self.theirs: dict[str, RowsAt] = {}

    @property
    def mine(self) -> RowsAt | None:
        return self._mine

    def begin(self, place: Place, state: Path) -> None:
        """Hash the rows of *state* as they are now: nothing of epoch *place* has been applied to it."""
        self._wanted = place
        db = sqlite3.connect(f"{state.as_uri()}?mode=ro", uri=True, check_same_thread=False, isolation_level=None)
        try:
            # The first read fixes the snapshot, whatever is written meanwhile.
            db.execute("BEGIN").close()
            db.execute("SELECT seq FROM ledger").fetchone()
        except sqlite3.Error:
            db.close()
            raise
        self._apart(lambda: self._hash(place, db))

    def heard(self, peer: str, place: Place, found: str) -> None:
        if found:
            self.theirs[peer] = RowsAt(place=place, hash=found)

    def differ(self, members: Collection[str]) -> Differ | None:
        return compare(self._mine, self.theirs, members)

    def _hash(self, place: Place, db: sqlite3.Connection) -> None:
        def rest() -> None:
            if place != self._wanted:
                raise _Superseded
            self._rest(REST_S)

        with closing(db):
            try:
                found = RowsAt(place=place, hash=schema.row_hash(db, rest))
            except _Superseded:
                return
        if place == self._wanted:
            fresh = self._home / (FILE + ".new")
            fresh.write_bytes(msgspec.json.encode(found))
            fresh.rename(self._home / FILE)
            self._mine = found


def _read(home: Path) -> RowsAt | None:
    """Return the hash that was made before a restart; one that cannot be read is made again at the next Seal."""
    try:
        return msgspec.json.decode((home / FILE).read_bytes(), type=RowsAt)
    except (FileNotFoundError, msgspec.MsgspecError):
        return None
