"""What the machine and its instances use: for hellos and heartbeats. Reads /proc and cgroups; changes nothing."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from slum import __version__
from slum.model import Key, Level, Listen, Stamp
from slum.node.describe import cgroup_name
from slum.node.limits.groups import Limits
from slum.node.observed import Starting
from slum.node.roster import Entry, Roster
from slum.node.router import access_log
from slum.node.store import Identity
from slum.node.traffic import RequestCounter
from slum.node.types import Available, Unavailable
from slum.paths import Home
from slum.wire import PROTOCOL, Heartbeat, Hello, InstanceStats, LevelStatus

STATS_A_BEAT = 50
"""So many instances are measured each time, in turn: reading their cgroups is what a heartbeat costs."""
CPU_STEP_S = 0.01
MEMORY_STEP = 0.02


class Figures:
    """One agent's; remembers what it last told, so that a heartbeat holds what moved."""

    def __init__(self, home: Home, roster: Roster, limits: Limits) -> None:
        self._roster = roster
        self._limits = limits
        self._counter = RequestCounter(access_log(home))
        self._requests: dict[Key, int] = {}
        self._turn = 0

    def close(self) -> None:
        self._counter.close()

    def heartbeat(self, now: float) -> Heartbeat:
        """Return the machine's figures, and those of instances that moved since the last call."""
        self._count_requests()
        moved = []
        for key, entry in self._next():
            stats = self._stats(key)
            if stats is not None and _moved(entry.stats, stats):
                entry.stats = stats
                moved.append(stats)
        return Heartbeat(
            at=now,
            load=os.getloadavg()[0],
            memory_available_bytes=_meminfo("MemAvailable"),
            rss_bytes=rss_bytes(),
            stats=tuple(moved),
        )

    def _next(self) -> list[tuple[Key, Entry]]:
        entries = list(self._roster.entries.items())
        begin = self._turn if self._turn < len(entries) else 0
        self._turn = begin + STATS_A_BEAT
        return entries[begin : self._turn]

    def _stats(self, key: Key) -> InstanceStats | None:
        seen = self._roster.seen(key)
        living = seen.living
        serving = next((g for g in living if g.socket == seen.serving and not isinstance(g.stage, Starting)), None)
        generation = serving or (living[-1] if living else None)
        if generation is None:
            return None
        stats = self._limits.stats(cgroup_name(key, generation.number))
        return InstanceStats(
            service=key.service,
            id=key.id,
            memory_bytes=stats.memory_bytes if stats else None,
            cpu_s=stats.cpu_s if stats else None,
            requests=self._requests.get(key, 0) if generation.service.listen is not Listen.NONE else None,
        )

    def _count_requests(self) -> None:
        desired = self._roster.desired
        if desired is None:
            return
        services = {s.name: s.instances for s in desired.services if s.listen is not Listen.NONE}
        for (service, instance), count in self._counter.read(desired.domain, services).items():
            key = Key(tenement=desired.tenement, service=service, id=instance or services[service][0])
            self._requests[key] = self._requests.get(key, 0) + count


def hello(identity: Identity, stamp: Stamp, levels: Mapping[Level, Available | Unavailable], limits: Limits) -> Hello:
    """Return who and what this machine is."""
    return Hello(
        protocol=PROTOCOL,
        version=__version__,
        machine=identity.machine,
        tenement=identity.tenement,
        stamp=stamp,
        boot_id=Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        host=socket.gethostname(),
        cpus=len(os.sched_getaffinity(0)),
        memory_bytes=_meminfo("MemTotal"),
        levels=tuple(_level_status(level, state) for level, state in levels.items()),
        limits=limits.how,
        dialled_at=time.time(),
    )


def rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _level_status(level: Level, state: Available | Unavailable) -> LevelStatus:
    if isinstance(state, Available):
        return LevelStatus(level=level, available=True, detail=state.how)
    return LevelStatus(level=level, available=False, detail=state.why, fix=state.fix)


def _meminfo(name: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0


def _moved(before: InstanceStats | None, now: InstanceStats) -> bool:
    if before is None or before.requests != now.requests:
        return True
    if (before.memory_bytes is None) != (now.memory_bytes is None):
        return True
    if abs((now.memory_bytes or 0) - (before.memory_bytes or 0)) > MEMORY_STEP * (before.memory_bytes or 1):
        return True
    return abs((now.cpu_s or 0.0) - (before.cpu_s or 0.0)) >= CPU_STEP_S
