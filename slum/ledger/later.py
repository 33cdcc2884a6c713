"""New entries for members whose word is not waited for: a little later, and several in one message.

A majority of three is the leader and one other. Sent to both at once, an entry makes the second as busy as the first, on the
same disk or processor where members share one, for an acknowledgement that decides nothing. So the leader sends to as many as
it needs, and to the others at most LATER_S after; whoever is needed and lags changes places with one that does not. To Raft
it is a slow network: nothing is lost, doubled or overtaken, and who is behind gets what is missing as ever.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import msgspec

from slum.ledger.peerwire import Append

LATER_S = 0.005
LATER_BYTES = 1 << 16
"""So much is not kept back: sending it as one message saves nothing any more."""


class Later:
    def __init__(self, send: Callable[[str, Append], None], clock: Callable[[], float]) -> None:
        self._send = send
        self._clock = clock
        self._kept: dict[str, Append] = {}
        self._bytes: dict[str, int] = {}
        self.due_at = math.inf
        """When something must be sent."""

    def keep(self, peer: str, append: Append) -> None:
        """Send *append*, behind what is kept for *peer* already, within LATER_S."""
        joined = self._joined(peer, append)
        size = self._bytes.get(peer, 0) + sum(len(entry[0]) for entry in append.entries)
        if size >= LATER_BYTES:
            self.send(peer, joined)
            return
        self._kept[peer], self._bytes[peer] = joined, size
        self.due_at = min(self.due_at, self._clock() + LATER_S)

    def send(self, peer: str, append: Append) -> None:
        """Send *append* now, and before it what is kept for *peer*."""
        joined = self._joined(peer, append)
        self.forget(peer)
        self._send(peer, joined)

    def send_all(self) -> None:
        """Send all that is kept."""
        kept, self.due_at = self._kept, math.inf
        self._kept, self._bytes = {}, {}
        for peer, append in kept.items():
            self._send(peer, append)

    def forget(self, peer: str) -> None:
        """*peer* is gone, or has just been sent all."""
        self._kept.pop(peer, None)
        self._bytes.pop(peer, None)
        if not self._kept:
            self.due_at = math.inf

    def _joined(self, peer: str, append: Append) -> Append:
        """Return what is kept for *peer* and *append* as one; what cannot be joined to it is sent by itself.

        Both are of one log, so where they overlap they are the same.
        """
        kept = self._kept.get(peer)
        if kept is None:
            return append
        held = append.prev_index - kept.prev_index
        if append.term == kept.term and 0 <= held <= len(kept.entries):
            return msgspec.structs.replace(kept, entries=kept.entries[:held] + append.entries, commit=append.commit)
        self.forget(peer)
        self._send(peer, kept)
        return append
