"""What happens in a run, and when: made from a seed alone, so that the same seed gives the same. Pure.

A schedule is an endless row of steps. A step has something going on (nothing, a member that joins, leaves, or was away so long that it
must catch up) and one or two faults that begin while it does. Which member leads cannot be known here: a fault that is for the leader finds it
when it begins.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

ALONE = 0.4
"""How many steps have one fault only."""
YEAR_S = 31_536_000


@dataclass(frozen=True, slots=True)
class Fault:
    kind: str
    on: str
    """leader, follower, one, majority, all."""
    pick: int
    """Which one of several; also chooses between kinds of the same fault."""
    start_s: float
    hold_s: float

    def __str__(self) -> str:
        return f"{self.start_s:.1f} s: {self.kind} {self.on}#{self.pick % 60} for {self.hold_s:.1f} s"


@dataclass(frozen=True, slots=True)
class Step:
    number: int
    work: str
    """nothing, join, leave, behind."""
    faults: tuple[Fault, ...]

    def __str__(self) -> str:
        return f"{self.number:>3}  {self.work:<8}" + " | ".join(str(fault) for fault in self.faults)


KINDS: dict[str, tuple[tuple[str, ...], tuple[float, float]]] = {
    "kill": (("leader", "one", "majority", "all"), (0.0, 0.0)),
    "off": (("leader", "one", "majority", "all"), (0.2, 4.0)),
    "pause": (("leader",), (10.0, 10.0)),
    "cut": (("leader", "one", "majority"), (1.0, 8.0)),
    "deaf": (("leader", "one"), (1.0, 8.0)),
    "mute": (("leader", "one"), (1.0, 8.0)),
    "partial": (("leader", "one"), (3.0, 8.0)),
    "full": (("leader", "one", "all"), (2.0, 6.0)),
    "brim": (("leader", "one", "all"), (2.0, 6.0)),
    "clock": (("leader", "one"), (5.0, 8.0)),
}
"""By kind: on whom, and for how long. kill: programs; off: whole machines; deaf and mute: one-way cuts; partial: from one other
member only; brim: a disk that is filled again whenever there is room."""
WORKS = ("nothing", "nothing", "behind", "join")
"""A member that has joined leaves in the next step but one at the latest."""
BEGINS_S = {"nothing": 0.5, "behind": 3.0, "join": 6.0, "leave": 2.0}
"""How long after the work began a fault begins at the latest."""


def schedule(seed: int) -> Iterator[Step]:
    """Yield the steps of *seed*, for ever."""
    chance = random.Random(f"chaos {seed}")
    joined = 0
    kinds: list[str] = []
    for number in itertools.count(1):
        work = "leave" if joined and (number - joined > 1 or chance.random() < 0.5) else chance.choice(WORKS)
        if joined and work == "join":
            work = "leave"
        joined = number if work == "join" else 0 if work == "leave" else joined
        faults = []
        for _ in range(1 if chance.random() < ALONE else 2):
            if not kinds:  # each kind comes once before any comes again
                kinds = sorted(KINDS)
                chance.shuffle(kinds)
            faults.append(_fault(chance, kinds.pop(), BEGINS_S[work]))
        yield Step(number, work, tuple(sorted(faults, key=lambda fault: fault.start_s)))


def _fault(chance: random.Random, kind: str, latest_s: float) -> Fault:
    on, (least, most) = KINDS[kind]
    return Fault(
        kind=kind,
        on=chance.choice(on),
        pick=chance.randrange(1 << 16),
        start_s=round(chance.uniform(0, latest_s), 1),
        hold_s=round(chance.uniform(least, most), 1),
    )
