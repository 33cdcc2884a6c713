"""A counter that tasks can wait on: whatever changed, everybody who watches looks again.

It carries no data, so a slow watcher misses nothing and holds up nobody: it reads the newest state when it wakes.
"""

from __future__ import annotations

import asyncio


class Pulse:
    """Counts beats. One event loop only."""

    def __init__(self) -> None:
        self.count = 0
        self._event = asyncio.Event()

    def beat(self) -> None:
        self.count += 1
        event, self._event = self._event, asyncio.Event()
        event.set()

    async def wait(self, seen: int, deadline_s: float) -> int:
        """Return the count as soon as it is above *seen*, or as it is when *deadline_s* has passed."""
        if self.count <= seen:
            try:
                async with asyncio.timeout(deadline_s):
                    while self.count <= seen:
                        await self._event.wait()
            except TimeoutError:
                pass
        return self.count
