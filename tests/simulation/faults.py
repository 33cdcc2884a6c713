"""Crashes at exact points: before and after a journal's sync, a journal's making, a commit of state.db.

Installed once in the process of a simulation, around the real functions.
"""

from __future__ import annotations

import random
from typing import Any

from slum.ledger import journal
from slum.ledger.state import State


class Crash(BaseException):
    """The power went."""


class Faults:
    current: Faults | None = None

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.moved = False
        self.last = ""
        self._armed: tuple[str, int] | None = None
        Faults.current = self
        _install()

    def arm(self) -> None:
        """Crash whichever member comes to some point for the n-th time from now."""
        point = self.chance.choice(["sync", "make", "apply", "seal", "close"]) + self.chance.choice(
            ["-before", "-after"]
        )
        self._armed = (point, self.chance.choice([1, 1, 2, 5]))

    def disarm(self) -> None:
        self._armed = None

    def passes(self, point: str) -> None:
        self.moved = True
        if self._armed is not None and self._armed[0] == point:
            left = self._armed[1] - 1
            self._armed = (point, left) if left else None
            if not left:
                self.last = point
                raise Crash(point)


_installed = False


def _install() -> None:
    global _installed
    if _installed:
        return
    _installed = True
    # Four megabytes of zeros would be allocated and read for each little journal.
    journal.SLACK_BYTES = 1 << 18
    sync, create, apply = journal.Journal.sync, journal.create, State.apply

    def passes(point: str) -> None:
        assert Faults.current is not None
        Faults.current.passes(point)

    def synced(self: journal.Journal) -> None:
        if self.dirty:
            passes("sync-before")
            sync(self)
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

    def applied(self: State, *how: Any) -> Any:
        passes("apply-before")
        done = apply(self, *how)
        passes("apply-after")
        if done.sealed:
            passes("seal-after")
        return done

    journal.Journal.sync = synced  # type: ignore[method-assign]  # the power goes here
    journal.create = created
    State.apply = applied  # type: ignore[method-assign]  # and here
