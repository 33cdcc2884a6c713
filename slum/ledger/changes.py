"""Changing who the members are: each change is one Seal whose next epoch has one member more, or one less.

Because an epoch's members are fixed and the next epoch starts only from a committed Seal, no two majorities of different
lists ever decide about one log (compare joint consensus, Ongaro and Ousterhout 2014, section 6, which this avoids). A
change waits until a majority of the next members is in reach and the new one, a learner so far, is close behind. One
change at a time, on the leader. The decisions are pure; Changes remembers what was asked.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from slum.errors import ConfigError, Conflict, QuorumLost, SlumError
from slum.ledger.commands import Member

MEMBERS_MAX = 7
NEAR_ENTRIES = 100
PATIENCE_S = 60.0

Told = Callable[[tuple[Member, ...] | SlumError], None]


@dataclass(frozen=True, slots=True)
class Change:
    add: Member | None = None
    remove: str | None = None


def problem(change: Change, members: Collection[Member]) -> str:
    """Return why *change* makes no sense for *members*, or ""."""
    ids = {member.id for member in members}
    if (change.add is None) == (change.remove is None):
        return "a change adds one member or removes one"
    if change.add is not None:
        if change.add.id in ids:
            return f"{change.add.id} is a member already"
        if len(ids) >= MEMBERS_MAX:
            return f"{MEMBERS_MAX} members are the most"
        if not (change.add.public_key and change.add.address and change.add.incarnation):
            return f"{change.add.id} needs a key, an address and an incarnation"
        keyless = [member.id for member in members if not member.public_key or not member.address]
        if keyless:
            return f"{keyless[0]} has no key and address of its own yet"
    elif change.remove not in ids:
        return f"{change.remove} is no member"
    elif len(ids) == 1:
        return "the last member cannot be removed"
    return ""


def after(change: Change, members: tuple[Member, ...]) -> tuple[Member, ...]:
    """Return the members of the next epoch."""
    if change.add is not None:
        return (*members, change.add)
    return tuple(member for member in members if member.id != change.remove)


def obstacle(change: Change, members: tuple[Member, ...], reached: Collection[str], behind: int | None) -> str:
    """Return why *change* cannot be made now, or "".

    *reached* are the members, ourselves included, that are connected and in our epoch; *behind* is how many entries the new
    one still lacks, None while it is not connected.
    """
    if change.add is not None:
        if behind is None:
            return f"{change.add.id} has not connected yet"
        if behind > NEAR_ENTRIES:
            return f"{change.add.id} is {behind} entries behind"
        reached = {*reached, change.add.id}
    ids = {member.id for member in after(change, members)}
    if len(ids & set(reached)) * 2 <= len(ids):
        return f"of the next {len(ids)} members only {len(ids & set(reached))} are in reach"
    return ""


class Changes:
    """The change that is under way on this leader. ask() may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pending: tuple[Change, Told, float] | None = None

    def ask(self, change: Change, told: Told, now: float) -> None:
        """Begin *change*; *told* hears the new members or why not. Raise Conflict while another one is under way."""
        with self._lock:
            if self._pending is not None:
                raise Conflict("another change of the members is under way", hint="repeat when it is done")
            self._pending = (change, told, now + PATIENCE_S)

    @property
    def pending(self) -> Change | None:
        pending = self._pending
        return pending[0] if pending is not None else None

    def due(
        self,
        members: tuple[Member, ...],
        me: str,
        let_in: Callable[[Member], None],
        behind: Mapping[str, int],
        now: float,
    ) -> tuple[Member, ...] | None:
        """Return the next members when the change that was asked for can be made now.

        *let_in* is called with the new one, so that it can connect; *behind* says how many entries each peer in this epoch lacks.
        """
        pending = self._pending
        if pending is None:
            return None
        change, _, until = pending
        why = problem(change, members)
        if why:
            self.finish(ConfigError(f"the members are not changed: {why}", hint="`slum status --cluster` shows them"))
            return None
        if change.add is not None:
            let_in(change.add)
        lag = behind.get(change.add.id) if change.add is not None else None
        why = obstacle(change, members, {me, *behind}, lag)
        if not why:
            return after(change, members)
        if now > until:
            self.finish(QuorumLost(f"the members were not changed: {why}", hint="nothing was changed; ask again"))
        return None

    def finish(self, answer: tuple[Member, ...] | SlumError) -> None:
        """Tell whoever asked, and forget the change."""
        with self._lock:
            pending, self._pending = self._pending, None
        if pending is not None:
            pending[1](answer)
