"""The answers given to request ids, kept so that a repeated command gets its first answer and happens once.

A request id is 128 random bits and the ledger seq that its client had last seen. The newest answers are kept; an id from
before the oldest of them is refused, because it can no longer be told from a repeat. So no clock decides correctness
(compare the client sessions of Ongaro's thesis, 2014, section 6.3). Runs inside state.apply's transaction.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from slum.ledger.commands import Result

_REQUEST_ID = re.compile(r"([0-9a-f]{32}):([0-9]{1,18})")
TOGETHER = 32
"""So many are looked for in one query."""
_FIND_SOME = f"SELECT id, result FROM results WHERE id IN ({', '.join('?' * TOGETHER)})"
_decode = msgspec.msgpack.Decoder(Result).decode
_encode = msgspec.msgpack.Encoder().encode


class ResultBook:
    """The kept answers: *number* counts them for ever, *floor* is the highest seq of a dropped one.

    Made for one entry with the requests that are in it; what is kept is written by flush().
    """

    def __init__(self, db: sqlite3.Connection, number: int, floor: int, requests: Sequence[bytes]) -> None:
        self._db = db
        self.number = number
        self.floor = floor
        self._known = self._found(requests)
        self._rows: list[tuple[int, bytes, int, bytes]] = []

    def find(self, request: bytes) -> Result | None:
        """Return the answer that was given to *request*, which is one of those of this entry."""
        return self._known.get(request)

    def keep(self, request: bytes, seq: int, result: Result) -> None:
        self.number += 1
        self._known[request] = result
        self._rows.append((self.number, request, seq, _encode(result)))

    def flush(self, kept: int) -> None:
        """Write the new answers, and drop all but the newest *kept*."""
        self._db.executemany("INSERT INTO results VALUES (?, ?, ?, ?)", self._rows)
        self._rows.clear()
        last = self.number - kept
        if last <= 0:
            return
        (newest,) = self._db.execute("SELECT max(seq) FROM results WHERE number <= ?", (last,)).fetchone()
        if newest is not None:
            self.floor = newest
            self._db.execute("DELETE FROM results WHERE number <= ?", (last,))

    def _found(self, requests: Sequence[bytes]) -> dict[bytes, Result]:
        if len(requests) == 1:
            rows = self._db.execute("SELECT id, result FROM results WHERE id = ?", requests)
            return {request: _decode(result) for request, result in rows}
        found = {}
        for at in range(0, len(requests), TOGETHER):
            some = requests[at : at + TOGETHER]
            for request, result in self._db.execute(_FIND_SOME, (*some, *(None,) * (TOGETHER - len(some)))):
                found[request] = _decode(result)
        return found


class RequestId(NamedTuple):
    key: bytes
    """*seen*, then the random bits: new ones lie beside each other in the index, so that an entry touches few pages."""
    seen: int
    """The ledger seq that the client had last seen."""


def parse_request_id(text: str) -> RequestId | None:
    """Return what *text* says, or None when it is not a request id."""
    parsed = _REQUEST_ID.fullmatch(text)
    if parsed is None:
        return None
    seen = int(parsed[2])
    return RequestId(seen.to_bytes(8, "big") + bytes.fromhex(parsed[1]), seen)
