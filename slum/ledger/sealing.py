"""When an epoch ends, who begins the next one, and who is still let in after it: pure decisions around a Seal.

What is decided here must come out the same whenever the same things are known; nothing here acts or reads a clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from slum.ledger.commands import Member, Seal
from slum.ledger.schema import Position
from slum.ledger.world import Config

AGE_S_MAX = 86400.0
LINGER_S = 0.05
LINGER_ENTRIES = 20


def due_seal(
    members: tuple[Member, ...],
    changed: tuple[Member, ...] | None,
    own: Member | None,
    entries: int,
    size_bytes: int,
    age_s: float,
    config: Config,
) -> Seal | None:
    """Return the Seal that is due in an epoch of so many *entries*, bytes and seconds.

    *changed* are the next members when a change can be made now, *own* is our row as the folder's identity has it.
    """
    if changed is not None:
        return Seal(members=changed, why="members")
    if own is not None and len(members) == 1 and members[0] != own:
        return Seal(members=(own,), why=f"{own.id} got a key")
    if entries >= config.epoch_entries or size_bytes >= config.epoch_bytes:
        return Seal(members=members)
    if age_s >= AGE_S_MAX and len(members) > 1:
        return Seal(members=members, why="a day has passed: all rows are compared")
    return None


def worth_waiting(end: int, acknowledged: Iterable[int]) -> bool:
    """Tell whether a peer that is up almost has the Seal, which is entry *end*."""
    return any(0 < end - index <= LINGER_ENTRIES for index in acknowledged)


def begins(position: Position, me: str) -> bool:
    """Tell whether *me* stands first, without a timeout: when the leader of the epoch before is no longer among us."""
    gone = position.applied == 0 and position.leader.partition("/")[0] not in {row.id for row in position.members}
    return gone and position.members[0].id == me


def guests_after(was: Mapping[str, Member], members: Iterable[Member], me: str) -> dict[str, Member]:
    """Return who is let in beside *members*: whoever left must see them at work, it may be the only one with the Seal."""
    staying = {row.id for row in members}
    return {name: row for name, row in was.items() if name != me and name not in staying}
