"""The keeper's event loop: descriptors by epoll and one-shot timers, in one thread, with nothing that ticks.

Callbacks must not block and must bear a call for nothing (a descriptor closed and reused within one turn). Standard
library only, and little of it: the keeper's memory is part of what slum costs on every machine.
"""

from __future__ import annotations

import heapq
import select
import time
from collections.abc import Callable

READ = select.EPOLLIN
WRITE = select.EPOLLOUT


class Timer:
    """One call in the future; ``cancel`` makes it do nothing."""

    __slots__ = ("callback", "due", "order")

    def __init__(self, due: float, order: int, callback: Callable[[], None]) -> None:
        self.due = due
        self.order = order
        self.callback: Callable[[], None] | None = callback

    def __lt__(self, other: Timer) -> bool:
        return (self.due, self.order) < (other.due, other.order)

    def cancel(self) -> None:
        self.callback = None


class Loop:
    """Calls back when a descriptor is ready or a moment has come."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callable[[int], None]] = {}
        self._timers: list[Timer] = []
        self._order = 0

    def watch(self, fd: int, callback: Callable[[int], None], mask: int = READ) -> None:
        """Call *callback* with epoll's mask whenever *fd* is ready."""
        self._epoll.register(fd, mask)
        self._callbacks[fd] = callback

    def remask(self, fd: int, mask: int) -> None:
        """Watch *fd* for *mask* from now on; 0 pauses it."""
        self._epoll.modify(fd, mask)

    def unwatch(self, fd: int) -> None:
        """Stop watching *fd*. Always before closing it: a forked child may hold a copy that keeps epoll reporting it."""
        if self._callbacks.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def after(self, seconds: float, callback: Callable[[], None]) -> Timer:
        """Call *callback* once, *seconds* from now."""
        self._order += 1
        timer = Timer(time.monotonic() + seconds, self._order, callback)
        heapq.heappush(self._timers, timer)
        return timer

    def turn(self) -> None:
        """Wait for the next thing to do and do all that is ready, each descriptor once."""
        while self._timers and self._timers[0].callback is None:
            heapq.heappop(self._timers)
        wait = max(0.0, self._timers[0].due - time.monotonic()) if self._timers else -1
        for fd, mask in self._epoll.poll(wait):
            if (callback := self._callbacks.get(fd)) is not None:
                callback(mask)
        now = time.monotonic()
        while self._timers and self._timers[0].due <= now:
            timer = heapq.heappop(self._timers)
            if timer.callback is not None:
                timer.callback()
