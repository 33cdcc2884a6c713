"""Whose clock is wrong: pure decisions over how far peers' clocks are from ours.

Times in the ledger are for people and deadlines, never for order, so a wrong clock harms nothing; but a leader stamps
everything, so one that is far from the others' median gives the lead up. Of two clocks that differ nobody can say which is wrong.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from statistics import median_low

OFF_S_MAX = 5.0
CLOCKS_MIN = 3
"""So many, our own among them, and the median is one of the right ones while most are right."""
SAMPLES = 4
SPAN_S_MIN = 0.5
"""Words that come all at once may have waited somewhere, for instance while this process was stopped."""


class Offset:
    """How far one peer's clock is from ours, by what it said lately."""

    def __init__(self) -> None:
        self._said: deque[tuple[float, float]] = deque(maxlen=SAMPLES)

    def say(self, now: float, off_s: float) -> None:
        """Take note that its clock minus ours was *off_s* when its word arrived, *now* by the monotonic clock."""
        self._said.append((now, off_s))

    @property
    def seconds(self) -> float | None:
        """The best estimate, None while it is too early: a word that waited on its way only makes it look slow."""
        if not self._said or self._said[-1][0] - self._said[0][0] < SPAN_S_MIN:
            return None
        return max(off_s for _, off_s in self._said)


def wrong(offsets: Mapping[str, float], me: str) -> dict[str, float]:
    """Return whose clock is over OFF_S_MAX from the median of all, and by how much; *offsets* are peers' minus ours."""
    clocks = {me: 0.0, **offsets}
    if len(clocks) < CLOCKS_MIN:
        return {}
    middle = median_low(clocks.values())
    return {name: off - middle for name, off in sorted(clocks.items()) if abs(off - middle) > OFF_S_MAX}


def differ(offsets: Mapping[str, float], me: str) -> dict[str, float]:
    """Return whose clock is over OFF_S_MAX from ours when there are too few clocks to say which of them is wrong."""
    if len({me, *offsets}) >= CLOCKS_MIN:
        return {}
    return {name: off for name, off in sorted(offsets.items()) if abs(off) > OFF_S_MAX}
