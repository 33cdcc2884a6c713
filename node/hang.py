"""Does a process that has gone silent hang? Patience that ends only with one that could have spoken.

A look that finds it silent counts, unless it waits for a disk, is held by a debugger, or wants a CPU and gets little of one:
an overloaded machine is no reason to kill. Looks are counted, not time: whoever looks may itself have been stopped, together
with all that it looks at, or the machine may have slept. Standard library only; the keeper imports this.
"""

from __future__ import annotations

import os

from slum.alive import LOOKS
from slum.node import keeper_proc as proc

EXCUSED = frozenset("DtZX")
"""Waits for a disk, is traced, is gone."""
STARVED_SHARE = 0.5
"""Of a CPU. A program that spins takes all that it can get."""
TICKS_S = os.sysconf("SC_CLK_TCK")


class Activity:
    """What a process and its descendants were doing at *at* (monotonic): their threads' states, CPU seconds so far."""

    __slots__ = ("at", "cpu_s", "states")

    def __init__(self, states: str, cpu_s: float, at: float) -> None:
        self.states = states
        self.cpu_s = cpu_s
        self.at = at


def activity(pid: int, at: float) -> Activity:
    """Return what *pid* and all below it are doing; no states when it is gone."""
    states, ticks = "", 0
    for each in proc.tree(pid):
        stat = proc.read_stat(each)
        ticks += stat.cpu_ticks if stat else 0
        states += "".join(proc.thread_states(each))
    return Activity(states, ticks / TICKS_S, at)


def excused(before: Activity | None, now: Activity) -> bool:
    """Return whether silence between *before* and *now* proves nothing. Pure."""
    if not now.states or not EXCUSED.isdisjoint(now.states):
        return True
    if "R" not in now.states or before is None:
        return False
    return now.cpu_s - before.cpu_s < STARVED_SHARE * (now.at - before.at)


class Patience:
    """With one process. Every look is either ``heard`` or ``silent``."""

    __slots__ = ("_before", "_looks", "_missed")

    def __init__(self, looks: int = LOOKS) -> None:
        self._looks = looks
        self._missed = 0
        self._before: Activity | None = None

    def heard(self) -> None:
        self._missed = 0
        self._before = None

    def silent(self, now: Activity) -> bool:
        """Take one more look that heard nothing; True when that was the last one."""
        if not excused(self._before, now):
            self._missed += 1
        self._before = now
        return self._missed >= self._looks
