"""The answers given to request ids, kept so that a repeated command gets its first answer and happens once.

A request id is 128 random bits and the ledger seq that its client had last seen. The newest answers are kept; an id from
before the oldest of them is refused, because it can no longer be told from a repeat. So no clock decides correctness
(compare the client sessions of Ongaro's thesis, 2014, section 6.3). Runs inside state.apply's transaction.
"""

from __future__ import annotations

import re
import sqlite3

import msgspec

from slum.ledger.commands import Result

_REQUEST_ID = re.compile(r"([0-9a-f]{32}):([0-9]{1,18})")
_decode = msgspec.msgpack.Decoder(Result).decode
_encode = msgspec.msgpack.Encoder().encode


class ResultBook:
    """The kept answers: *number* counts them for ever, *floor* is the highest seq of a dropped one."""

    def __init__(self, db: sqlite3.Connection, number: int, floor: int) -> None:
        self._db = db
        self.number = number
        self.floor = floor

    def find(self, request: bytes) -> Result | None:
        row = self._db.execute("SELECT result FROM results WHERE id = ?", (request,)).fetchone()
        return _decode(row[0]) if row else None

    def keep(self, request: bytes, seq: int, result: Result) -> None:
        self.number += 1
        self._db.execute("INSERT INTO results VALUES (?, ?, ?, ?)", (self.number, request, seq, _encode(result)))

    def prune(self, kept: int) -> None:
        """Drop all but the newest *kept* answers."""
        last = self.number - kept
        if last <= 0:
            return
        (newest,) = self._db.execute("SELECT max(seq) FROM results WHERE number <= ?", (last,)).fetchone()
        if newest is not None:
            self.floor = newest
            self._db.execute("DELETE FROM results WHERE number <= ?", (last,))


def parse_request_id(text: str) -> tuple[bytes, int] | None:
    """Return the random bits and the seq that *text* names, or None when it is not a request id."""
    parsed = _REQUEST_ID.fullmatch(text)
    return (bytes.fromhex(parsed[1]), int(parsed[2])) if parsed else None
