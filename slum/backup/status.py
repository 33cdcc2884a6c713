"""What the backup process says of itself: ``<data>/backup/status.json``, rewritten whole; read by `slum backup status`."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from slum.backup.manifest import Head
from slum.frozen import Frozen
from slum.paths import Home


class Status(Frozen):
    """*state*: "running", "behind" (an alarm is out), "waiting" (for the store, or to be leader), "refused" (see *why*)."""

    state: str
    why: str = ""
    hint: str = ""
    url: str = ""
    at: float = 0.0
    pid: int = 0
    child_pid: int = 0
    ledger_seq: int = 0
    seq: int = -1
    lag_s: float = 0.0
    backlog_bytes: int = 0
    head: Head | None = None

    @property
    def lag(self) -> int | None:
        """Entries that are committed and not in the store; None when nothing is there yet."""
        return None if self.seq < 0 else max(0, self.ledger_seq - self.seq)


def file_of(home: Home) -> Path:
    return home.backup / "status.json"


def write(home: Home, status: Status) -> None:
    file = file_of(home)
    fresh = file.with_name("status.json.new")
    with open(fresh, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as out:
        out.write(msgspec.json.encode(status))
    fresh.rename(file)


def read(home: Home) -> Status | None:
    """Return what was said last; None when nothing was, or it cannot be read."""
    try:
        return msgspec.json.decode(file_of(home).read_bytes(), type=Status)
    except (OSError, msgspec.MsgspecError):
        return None
