"""When members whose word is not waited for are sent new entries: a little later, and several in one message.

A majority of three is the leader and one other. Sent to both at once, an entry makes the second as busy as the first, on the
same disk or processor where members share one, for an acknowledgement that decides nothing. So the leader sends to as many as
it needs, and to the others at most LATER_S after. What those it needs have not acknowledged after LAG_S goes to all, and whoever
lags changes places with one that does not (transport.py). To Raft it is a slow network: nothing is lost, doubled or overtaken,
and who is behind gets what is missing as ever.
"""

from __future__ import annotations

import math

LATER_S = 0.02
LAG_S = 0.005
LATER_BYTES = 1 << 16
"""So much is not kept back: sending it as one message saves nothing any more."""


class Later:
    """What the others are owed."""

    def __init__(self) -> None:
        self.settle()

    def settle(self) -> None:
        """They have been sent all."""
        self._first_at = self._newest_at = math.inf
        self._end = self._first_bytes = 0

    def owe(self, end: int, size_bytes: int, now: float) -> None:
        """The newest of the log's *end* entries and *size_bytes* are kept back from now on."""
        if self._first_at == math.inf:
            self._first_at, self._first_bytes = now, size_bytes
        self._newest_at, self._end = now, end

    def is_much(self, size_bytes: int) -> bool:
        """Tell whether a log of *size_bytes* has grown too much since something is owed."""
        return self._first_at < math.inf and size_bytes - self._first_bytes >= LATER_BYTES

    def due_at(self, commit: int) -> float:
        """Return when they must be sent all, while *commit* entries are known to be committed; infinite when nothing is owed."""
        due = self._first_at + LATER_S
        return due if self._end <= commit else min(due, self._newest_at + LAG_S)
