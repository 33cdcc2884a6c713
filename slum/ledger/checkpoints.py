"""When SQLite's write-ahead log is copied into state.db: once a second or when much is in it, beside the ledger's thread as far
as it goes.

A checkpoint syncs twice, which SQLite left to itself does in the midst of a commit, and at every one while a reader holds a
long WAL. Here another thread copies what there is; what came meanwhile, some commits, the ledger's thread copies itself, so
that the WAL is begun again at its next commit instead of growing as long as there is load. An error of the disk ends the
member, as one of a commit does; for want of space the WAL stays as it is until later.
"""

from __future__ import annotations

import contextlib
import math
import os
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from slum.ledger import schema
from slum.ledger.state import State

PERIOD_S = 1.0
ANSWERS = 5000
"""After so many it is time earlier: the WAL shall not grow long."""
LEAST_S = 0.25


class Checkpoints:
    """look() in every turn of the ledger's thread."""

    def __init__(self, *, clock: Callable[[], float], apart: Callable[[Callable[[], None]], None]) -> None:
        """*apart* runs something beside the caller."""
        self._clock = clock
        self._apart = apart
        self._began_at = -math.inf
        self._seq, self._results = -1, 0
        """Of the state that was copied last."""
        self._path: Path | None = None
        """Of the state.db that is being copied beside us."""
        self._copied = threading.Event()
        self._error: sqlite3.Error | None = None

    def look(self, state: State) -> None:
        """Do what is due; raise StateFailed when the disk failed."""
        if self._copied.is_set():
            path, error = self._path, self._error
            self._path = self._error = None
            self._copied.clear()
            if path == state.path:
                if error is not None:
                    raise state.failed(error)
                state.checkpoint()
            return
        at = state.position
        period_s = LEAST_S if at.results - self._results >= ANSWERS else PERIOD_S
        if self._path is None and at.seq != self._seq and self._clock() >= self._began_at + period_s:
            self._began_at = self._clock()
            self._seq, self._results, self._path = at.seq, at.results, state.path
            self._apart(self._copy)

    def close(self) -> None:
        """Return when nothing runs beside us any more."""
        if self._path is not None:
            self._copied.wait()

    def _copy(self) -> None:
        assert self._path is not None
        try:
            # It may be gone by now, and is not to be made again.
            with closing(
                sqlite3.connect(f"{self._path.absolute().as_uri()}?mode=rw", uri=True, isolation_level=None)
            ) as db:
                if not schema.checkpoint(db):
                    # What a reader keeps from being copied would pile up, until a Seal's commit has to wait for all of it.
                    _sync(Path(f"{self._path}-wal"))
        except sqlite3.Error as error:
            self._error = error
        finally:
            self._copied.set()


def _sync(path: Path) -> None:
    """Make the file at *path* durable; whoever needs it to be does so again, and hears of errors."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fdatasync(descriptor)
        finally:
            os.close(descriptor)
