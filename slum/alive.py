"""How a program of slum tells the keeper that its loop still turns: it touches a file that the keeper looks at.

The keeper names the file, and how long it bears silence, in the environment of a child whose Respawn has a `silent_ms_max`; without
these nothing is told. A file, because it outlives the keeper and costs neither side a descriptor. Standard library only:
the keeper imports this too. Must never tell from a thread that would still turn when the program's own loop does not.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, MutableMapping

FILE, LIMIT = "SLUM_ALIVE_FILE", "SLUM_ALIVE_MS"
LOOKS = 6
"""So often within the limit the keeper looks; it is told twice as often."""
SILENT_MS, SILENT_MS_SLOW = 30_000, 60_000
"""How long slum's own programs may say nothing; the second for those whose one step may take long."""
ASKED = "SLUM_SILENT_MS"
"""Another limit for all of them, from the environment of `slum up`."""


def silent_ms(default: int = SILENT_MS, environ: Mapping[str, str] = os.environ) -> int:
    """Return how long one of slum's own programs may say nothing; what is no number is not heeded."""
    asked = environ.get(ASKED, "")
    return int(asked) if asked.isdecimal() else default


class Alive:
    """One program's word. Takes FILE and LIMIT out of *environ*, so that no program it starts speaks in its name."""

    def __init__(self, environ: MutableMapping[str, str] = os.environ) -> None:
        self._path = environ.pop(FILE, None)
        self._pause_s = int(environ.pop(LIMIT, "0")) / 1000 / LOOKS / 2
        self._next = 0.0

    @property
    def due(self) -> bool:
        return self._path is not None and time.monotonic() >= self._next

    def tell(self) -> None:
        """Tell it when it is due; costs next to nothing when it is not."""
        if self._path is None or not self.due:
            return
        self._next = time.monotonic() + self._pause_s
        try:
            os.utime(self._path)
        except OSError:
            self._begin(self._path)

    async def keep_telling(self) -> None:
        """Tell it from this event loop until cancelled; return at once when nobody listens."""
        import asyncio  # which the keeper does without

        while self._path is not None:
            self.tell()
            await asyncio.sleep(self._pause_s)

    def _begin(self, path: str) -> None:
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
        except OSError:
            return  # no room, or no folder: the keeper does not wait for what was never told
