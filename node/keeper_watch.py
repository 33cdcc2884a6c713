"""The keeper's watchdog: kills a respawned child that has stopped telling that it lives, so that it starts again.

See slum.alive for how a child tells it and hang.py for what counts. A child that has not told anything since it started is
not waited for: a ledger may read its journal for minutes. Must never kill what another keeper would have heard.
"""

from __future__ import annotations

import os
import time

from slum.alive import FILE, LIMIT, LOOKS
from slum.node.hang import Patience, activity
from slum.node.keeper_log import unlink_if_there
from slum.node.keeper_loop import Loop, Timer
from slum.node.keeper_table import Child, file_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


class Watched:
    """One child that is looked at; *told* is when it last told something, by the file's own time."""

    __slots__ = ("patience", "timer", "told")

    def __init__(self, timer: Timer) -> None:
        self.patience = Patience()
        self.timer = timer
        self.told: int | None = None


class Watchdog:
    """Watches the children that ask for it; *kill* is called with one that hangs, once."""

    def __init__(self, loop: Loop, folder: str, kill: Callable[[Child], None]) -> None:
        self._loop = loop
        self._folder = folder
        self._kill = kill
        self._watched: dict[str, Watched] = {}

    def environment(self, child: Child) -> dict[str, str]:
        """Return what a start of *child* gets beside its own environment, and forget what the last one told."""
        if not limit_ms(child):
            return {}
        unlink_if_there(self._path(child))
        return {FILE: self._path(child), LIMIT: str(limit_ms(child))}

    def watch(self, child: Child) -> None:
        """Watch *child*, which runs, until ``forget``; nothing for one that asks for no watch."""
        self.forget(child)
        if limit_ms(child):
            self._watched[child.name] = Watched(self._later(child))

    def forget(self, child: Child) -> None:
        watched = self._watched.pop(child.name, None)
        if watched is not None:
            watched.timer.cancel()

    def _later(self, child: Child) -> Timer:
        # From now and not from when it was due: after a pause of our own everybody has as long again to speak.
        return self._loop.after(limit_ms(child) / 1000 / LOOKS, lambda: self._look(child))

    def _look(self, child: Child) -> None:
        watched = self._watched[child.name]
        if not limit_ms(child):  # it shall end, and somebody sees to that
            self.forget(child)
            return
        told = self._told(child)
        if told is None or told != watched.told:
            watched.told = told
            watched.patience.heard()
        elif watched.patience.silent(activity(child.pid, time.monotonic())):
            self.forget(child)
            self._kill(child)
            return
        watched.timer = self._later(child)

    def _told(self, child: Child) -> int | None:
        try:
            return os.stat(self._path(child), follow_symlinks=False).st_mtime_ns
        except FileNotFoundError:
            return None

    def _path(self, child: Child) -> str:
        return f"{self._folder}/{file_name(child.name)}"


def limit_ms(child: Child) -> int:
    """Return how long *child* may be silent, 0 when it is not watched."""
    respawn = child.spawn["respawn"]
    return int(respawn["silent_ms_max"]) if respawn else 0
