"""What one member makes of another's hello: same epoch, behind, ahead, or to be refused, and why.

Pure functions over what both know. A refused hello ends that connection and nothing else: it never brings down the side
that is healthy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from slum.ledger.commands import Member
from slum.ledger.peerwire import VERSION, Hello, Place
from slum.ledger.status import REPLACED


@dataclass(frozen=True, slots=True)
class Same:
    """Both are in one epoch."""


@dataclass(frozen=True, slots=True)
class Behind:
    """The other is in an earlier epoch of our history and can be helped."""


@dataclass(frozen=True, slots=True)
class Ahead:
    """The other is in a later epoch; it judges whether our history is a part of its own."""


@dataclass(frozen=True, slots=True)
class Fenced:
    """The other, whom we know, is of a later generation: ours is over, and so are we."""

    generation: int


@dataclass(frozen=True, slots=True)
class Refuse:
    why: str


Verdict = Same | Behind | Ahead | Fenced | Refuse


def judge(
    mine: Hello,
    theirs: Hello,
    *,
    known: Member | None,
    history: Mapping[Place, str],
    acknowledged: int,
) -> Verdict:
    """Return what *theirs* means to us.

    *known* is the row of the other in our members list (None: a stranger, or a learner that was not announced); *history* the
    chain0 of each epoch that we have been through, by place; *acknowledged* the highest committed index that the
    other said to hold in this epoch.
    """
    if theirs.version != VERSION:
        return Refuse(f"it speaks version {theirs.version} of the members' protocol, this is {VERSION}")
    if theirs.cluster != mine.cluster:
        return Refuse(f"it is of cluster {theirs.cluster[:8]}, this is {mine.cluster[:8]}")
    if known is None:
        return Refuse(f"{theirs.member!r} is no member")
    if theirs.member == mine.member:
        return Refuse(f"it calls itself {mine.member!r}, as we do")
    if theirs.incarnation != known.incarnation:
        return Refuse(f"{theirs.member} has lost its disk, or is another machine: it must join as new")
    if theirs.epoch == 0:
        return Behind()
    if theirs.generation != mine.generation:
        if theirs.generation < mine.generation:
            return Refuse(f"{theirs.member} is of generation {theirs.generation}, which {mine.generation} {REPLACED}")
        return Fenced(theirs.generation)
    if theirs.lineage != mine.lineage:
        return Refuse(f"{theirs.member} has another history: generation {mine.generation} began twice")
    if theirs.epoch > mine.epoch:
        return Ahead()
    began = mine.chain0 if theirs.epoch == mine.epoch else history.get(theirs.place)
    if began is not None and began != theirs.chain0:
        return Refuse(f"{theirs.member} has another history before epoch {theirs.epoch}")
    if theirs.epoch < mine.epoch:
        return Behind()
    if theirs.last_index < acknowledged:
        return Refuse(
            f"{theirs.member} held entry {acknowledged} of this epoch and now ends at {theirs.last_index}: "
            "it forgot what it acknowledged and must join as new"
        )
    return Same()
