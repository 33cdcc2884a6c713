"""Copies of state.db on their way between members: made by SQLite's backup, sent in parts, checked by digest.

Outgoing makes at most one copy at a time, apart from the ledger's thread, and forgets it a while after the last question.
Incoming collects one into a file of its own; nobody else looks at it before it is whole.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from slum.ledger import folder
from slum.ledger.peerwire import Part, Place, WantCopy

PART_BYTES = 1 << 20
AHEAD = 2
"""So many parts are asked for before the first of them has come: one travels while another one is written."""
KEPT_S = 30.0
FRESH_S = 5.0
"""Whoever begins to ask gets a copy that was ready at most so long ago."""
_OUT, _IN = "outgoing.db", "incoming.db"


class Outgoing:
    def __init__(self, home: Path, apart: Callable[[Callable[[], None]], None], clock: Callable[[], float]) -> None:
        self._home = home
        self._path = home / _OUT
        self._apart = apart
        self._clock = clock
        self._name = ""
        self._made: tuple[str, int] | None = None
        """(name, size); set by whoever makes the copy, once it is whole."""
        self._digest = ("", "")
        """(name, sha256); set after that, while the first parts are given out already."""
        self._failed = False
        self._asked_at = self._made_at = 0.0
        self._place: Place = (0, 0)
        """Where we stood when it was begun: it is of there, or further."""
        folder.remove_state_file(self._path)

    def part(self, wanted: WantCopy, place: Place) -> Part | None:
        """Return the part of the copy that *wanted* names, or begin to make one; None when none could be made.

        *place* is where we stand. Who asks and has come as far as the copy that is there gets another one.
        """
        now = self._clock()
        if self._failed:
            self._name, self._failed = "", False
            return None
        old = now - self._made_at > FRESH_S or wanted.place >= self._place
        if not wanted.name and old and self._digest[0] == self._name:
            self._name = ""
        self._asked_at = now
        if not self._name:
            self._made, self._place = None, place
            self._name = secrets.token_hex(8)
            self._apart(self._make)
        made = self._made
        if made is None or wanted.name not in ("", made[0]):
            return Part(name="", offset=0, size=0, sha256="", data=b"")
        name, size = made
        of, digest = self._digest
        with self._path.open("rb") as file:
            file.seek(wanted.offset)
            data = file.read(PART_BYTES)
        if of != name:
            digest = ""
            if wanted.offset + len(data) >= size:
                data = b""
        return Part(name=name, offset=wanted.offset, size=size, sha256=digest, data=data)

    def tick(self) -> None:
        if self._made is not None and self._clock() - self._asked_at > KEPT_S:
            self._made, self._name = None, ""
            folder.remove_state_file(self._path)

    def close(self) -> None:
        folder.remove_state_file(self._path)

    def _make(self) -> None:
        name = self._name
        try:
            folder.remove_state_file(self._path)
            current = folder.current(self._home)
            if current is None:
                raise FileNotFoundError(self._home)
            with (
                closing(sqlite3.connect(f"{current.as_uri()}?mode=ro", uri=True)) as source,
                closing(sqlite3.connect(self._path)) as copy,
            ):
                # It goes to others, who check it, and is nothing after a crash.
                copy.execute("PRAGMA synchronous=OFF").close()
                source.backup(copy)
                # One file, so that its bytes are all of it.
                copy.execute("PRAGMA journal_mode=DELETE").close()
            with self._path.open("rb") as file:
                self._made, self._made_at = (name, os.fstat(file.fileno()).st_size), self._clock()
                self._digest = (name, hashlib.file_digest(file, "sha256").hexdigest())
        except (OSError, sqlite3.Error):
            # Whoever asks hears nothing and asks another; asked again, it is tried again.
            self._failed = True


class Incoming:
    def __init__(self, home: Path, place: Callable[[], Place]) -> None:
        """*place* tells where the member stands that collects."""
        self._path = home / _IN
        self._place = place
        self.name = ""
        self.size = 0
        """What has been collected."""
        self._step = self._total = self._asked = 0
        self._file: int = -1
        self._digest = hashlib.sha256()

    def wanted(self) -> list[WantCopy]:
        """Return all to ask for, from where the collected ends: the first part alone, which tells how large they are."""
        if not self.name:
            return [WantCopy(name="", offset=0, place=self._place())]
        self._asked = self.size
        return self._more()

    def take(self, part: Part) -> Path | list[WantCopy] | None:
        """Add *part*, and return what more to ask for, or the path of the copy once it is whole, durable, and its digest right.

        None: the other side has it not yet, or has another copy by now, which is asked for from its beginning.
        """
        if not part.name or (self.name and part.name != self.name):
            self.reset()
            return None
        if part.offset != self.size:
            return []  # asked for twice
        if not part.data:
            return None
        if self._file < 0:
            folder.remove_state_file(self._path)
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            self.name, self._step, self._total, self._asked = part.name, len(part.data), part.size, len(part.data)
        os.write(self._file, part.data)
        self._digest.update(part.data)
        self.size += len(part.data)
        if self.size < part.size:
            return self._more()
        os.fsync(self._file)
        right = self._digest.hexdigest() == part.sha256
        os.close(self._file)
        self._file = -1
        if right:
            return self._path
        self.reset()
        return self.wanted()

    def _more(self) -> list[WantCopy]:
        end = min(self._total, self.size + AHEAD * self._step)
        starts = range(max(self._asked, self.size), end, self._step)
        self._asked = starts[-1] + self._step if starts else self._asked
        return [WantCopy(name=self.name, offset=offset) for offset in starts]

    def reset(self) -> None:
        """Forget what was collected."""
        if self._file >= 0:
            os.close(self._file)
        self._file, self.name, self.size, self._digest = -1, "", 0, hashlib.sha256()
        folder.remove_state_file(self._path)
