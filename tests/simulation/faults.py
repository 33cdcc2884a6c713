"""Crashes and full disks at exact points: around a journal's sync, a journal's making, a commit of state.db.

Installed once in the process of a simulation, around the real functions. What is torn by a crash is decided here too.
"""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

from simulation import power
from simulation.witness import Witness
from slum.ledger import frames, group, journal
from slum.ledger.applying import Applied
from slum.ledger.state import State

POINTS = ("sync", "sync", "sync", "make", "apply", "seal")


class Crash(BaseException):
    """The power went."""


class Faults:
    """Of the schedule that runs now; its *witness* hears what becomes durable and what is applied."""

    current: Faults | None = None

    def __init__(self, chance: random.Random, witness: Witness) -> None:
        self.chance = chance
        self.witness = witness
        self.moved = False
        self.last = ""
        self.full = False
        """The fault that came last was a full disk: the process ends in an orderly way."""
        self._armed: tuple[str, int, bool] | None = None
        Faults.current = self
        _install()

    def arm(self) -> None:
        """Whichever member comes to some point for the n-th time from now crashes, or finds its disk full."""
        point = self.chance.choice(POINTS) + self.chance.choice(["-before", "-after"])
        full = point in ("sync-before", "make-before", "apply-before") and self.chance.random() < 0.4
        self._armed = (point, self.chance.choice([1, 1, 2, 5]), full)

    def disarm(self) -> None:
        self._armed = None

    def passes(self, point: str) -> None:
        self.moved = True
        if self._armed is not None and self._armed[0] == point:
            _, left, full = self._armed
            self._armed = (point, left - 1, full) if left > 1 else None
            if left == 1:
                self.last, self.full = point, full
                if not full:
                    raise Crash(point)
                if point == "apply-before":
                    raise sqlite3.OperationalError("database or disk is full")
                raise OSError(28, "No space left on device")


def torn_write(log: journal.Journal, chance: random.Random) -> tuple[Path, int, bytes] | None:
    """Return what a power cut leaves of the frame that *log* has not synced: where, and which bytes; None for nothing."""
    if not log._pending or chance.random() < 0.4:
        return None
    body = b"".join((*log._pending, frames.commit_record(log._commit)))
    frame = frames.encode_frame(log._frames + 1, body, log.identity.salt)
    kind = chance.randrange(3)
    if kind == 0:
        frame = frame[: chance.randrange(len(frame))]
    elif kind == 1:
        # Sectors reach the disk in any order: one of them did not.
        first, last = log._end // frames.SECTOR_BYTES, (log._end + len(frame) - 1) // frames.SECTOR_BYTES
        lost = chance.randint(first, last) * frames.SECTOR_BYTES
        low, high = max(0, lost - log._end), min(len(frame), lost + frames.SECTOR_BYTES - log._end)
        frame = frame[:low] + bytes(high - low) + frame[high:]
    return (log.path, log._end, frame)


_installed = False


def _install() -> None:
    global _installed
    if _installed:
        return
    _installed = True
    # Four megabytes of zeros would be allocated and read for each little journal.
    journal.SLACK_BYTES = 1 << 14
    # So that catching up takes several messages, as a long log does.
    group.BATCH_BYTES = 1500
    sync, create, open_, apply = journal.Journal.sync, journal.create, journal.open_journal, State.apply

    def passes(point: str) -> None:
        assert Faults.current is not None
        Faults.current.passes(point)

    def synced(self: journal.Journal) -> None:
        if self.dirty:
            passes("sync-before")
            sync(self)
            assert Faults.current is not None
            Faults.current.witness.synced(self)
            passes("sync-after")

    def created(*how: Any) -> journal.Journal:
        passes("make-before")
        made = create(*how)
        try:
            passes("make-after")
        except Crash:
            made.close()
            raise
        return made

    def opened(*how: Any) -> journal.Journal:
        found = open_(*how)
        assert Faults.current is not None
        # A frame that nobody waited for may have reached the disk all the same.
        Faults.current.witness.synced(found)
        return found

    def applied(self: State, data: bytes, before_commit: Callable[[Applied], None]) -> Applied:
        synced = False

        def before(done: Applied) -> None:
            nonlocal synced
            passes("apply-before")
            before_commit(done)
            synced = power.syncs(self._db)

        done = apply(self, data, before)
        if synced:
            power.note_synced(self.path)
        assert Faults.current is not None
        Faults.current.witness.applied(done)
        passes("apply-after")
        if done.sealed:
            passes("seal-after")
        return done

    journal.Journal.sync = synced  # type: ignore[method-assign]  # the power goes here
    journal.create = created
    journal.open_journal = opened
    State.apply = applied  # type: ignore[assignment,method-assign]  # and here
