"""Room to recover on a full disk: a ballast file, and a watermark below which the ledger only shrinks.

Below the watermark growing commands are refused with a clear error, while deletes, seals and outcomes are still taken.
Below the critical mark the ballast is given up, so that those, and the next journal, find room. It is made again when the
space is back. The decisions are pure; Guard does what they say. Nothing here is part of the replicated state.
"""

from __future__ import annotations

import os
from pathlib import Path

from slum.frozen import Frozen
from slum.ledger.commands import (
    AnyCommand,
    Barrier,
    Intent,
    LeaderStarted,
    Outcome,
    RemoveToken,
    Revoke,
    Seal,
    SetDesired,
)

CHECK_PERIOD_S = 1.0


class Marks(Frozen):
    """Bytes. *watermark*: below it only shrinking commands; *critical*: below it the ballast goes."""

    ballast: int
    watermark: int
    critical: int


def marks(ballast: int, journal: int) -> Marks:
    """Return the marks for a ballast and journals of these sizes: a seal needs room for a whole journal."""
    return Marks(ballast=ballast, watermark=3 * journal, critical=journal + journal // 2)


def is_low(free: int, at: Marks) -> bool:
    return free < at.watermark


def wants_ballast(free: int, has_ballast: bool, at: Marks) -> bool:
    """Tell whether there should be a ballast file, with *free* bytes beside what it takes now."""
    return free >= at.critical if has_ballast else free >= at.ballast + at.watermark


def may_grow(command: AnyCommand, fleet_bytes: int) -> bool:
    """Tell whether *command* is refused on a low disk; *fleet_bytes* is the packed size of the fleet of now."""
    match command:
        case Barrier() | LeaderStarted() | Seal() | Outcome() | Revoke() | RemoveToken():
            return False
        case Intent(kind="destroy"):
            return False
        case SetDesired():
            return len(command.fleet_zstd) >= fleet_bytes
        case _:
            return True


class Guard:
    """Watches the disk under *folder*; keeps, gives up and remakes the ballast."""

    def __init__(self, folder: Path, at: Marks) -> None:
        self.folder = folder
        self._path = folder / "ballast"
        self._marks = at
        self._next_check = 0.0
        self.low = False
        self.free_bytes = 0

    def check(self, now: float) -> tuple[str, ...]:
        """Look at the disk, at most once in CHECK_PERIOD_S, and act; return what happened, as names of log events."""
        if now < self._next_check:
            return ()
        self._next_check = now + CHECK_PERIOD_S
        was_low, had = self.low, self._path.exists()
        happened = []
        wanted = self._marks.ballast > 0 and wants_ballast(self._free(), had, self._marks)
        if wanted and not had:
            happened.append("ballast_made" if self._make() else "ballast_not_made")
        elif had and not wanted:
            self._path.unlink()
            happened.append("ballast_given_up")
        self.free_bytes = self._free()
        self.low = is_low(self.free_bytes, self._marks)
        if self.low != was_low:
            happened.append("disk_became_low" if self.low else "disk_has_room_again")
        return tuple(happened)

    @property
    def has_ballast(self) -> bool:
        return self._path.exists()

    def _free(self) -> int:
        found = os.statvfs(self.folder)
        return found.f_bavail * found.f_frsize

    def _make(self) -> bool:
        fresh = self._path.with_name("ballast.new")
        descriptor = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, self._marks.ballast)
        except OSError:
            fresh.unlink()
            return False
        finally:
            os.close(descriptor)
        fresh.rename(self._path)
        return True
