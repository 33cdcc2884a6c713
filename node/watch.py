"""Watches generations: probes them while they start and every interval afterwards, and tells when one is drained.

One heap of due times instead of a task for each service. A starting generation is asked every 10 ms, then less and less
often; its answer is waited for, since a kept listener holds the question until the service accepts. Connections of all
draining generations are counted by one reading. What is found is folded into the roster; nothing is decided here.
"""

from __future__ import annotations

import asyncio
import heapq
import random

import msgspec

from slum.model import Key, Listen, host_name
from slum.node import observed as seen_of
from slum.node.describe import Describer
from slum.node.hands import Hands
from slum.node.health import Answer, Door, ask
from slum.node.observed import Draining, Generation, Ready, Starting
from slum.node.roster import Clock, Roster
from slum.node.sockets import connections, port_connections
from slum.node.uids import ROUTER_UID

SETTLE_S = 0.5
"""A service without requests counts as running once it has lived so long."""
PROBE_S = 5.0
STARTUP_PAUSE_S, STARTUP_PAUSE_S_MAX, STARTUP_GROWTH = 0.01, 0.5, 1.1
PROBES_MAX = 32
DRAIN_POLL_S, DRAIN_QUIET_S = 0.05, 0.25


class Watch:
    """One agent's; ``run`` keeps asking, the other methods say about whom."""

    def __init__(
        self, roster: Roster, hands: Hands, describer: Describer, clock: Clock, group: asyncio.TaskGroup
    ) -> None:
        self._roster = roster
        self._hands = hands
        self._describer = describer
        self._clock = clock
        self._group = group
        self._due: list[tuple[float, Key, int]] = []
        self._watched: dict[tuple[Key, int], Door] = {}
        self._wake = asyncio.Event()
        self._slots = asyncio.Semaphore(PROBES_MAX)
        self._drains: dict[tuple[Key, int], float] = {}
        """Draining generations, and when they last had a connection."""
        self._draining = asyncio.Event()

    # --- about whom ---------------------------------------------------------------------------------------------------
    def started(self, key: Key, number: int) -> None:
        """Watch a generation from now on, in whatever stage it is. May be repeated."""
        generation = self._roster.seen(key).generation(number)
        if generation is None or (key, number) in self._watched:
            return
        if isinstance(generation.stage, Starting):
            self._watched[key, number] = self._door(key, generation)
            self._group.create_task(self._start_up(key, number), name=f"start-up {key} {number}")
        elif isinstance(generation.stage, Ready) and generation.service.listen is not Listen.NONE:
            self._watched[key, number] = self._door(key, generation)
            interval_s = self._roster.settings.health_check_interval_s
            self._schedule(key, number, random.uniform(0, min(interval_s, 5.0)))

    def draining(self, key: Key, number: int) -> None:
        self._drains[key, number] = self._clock.now()
        self._draining.set()

    # --- asking -------------------------------------------------------------------------------------------------------
    async def run(self) -> None:
        """Probe what is due until cancelled."""
        while True:
            now = self._clock.now()
            while self._due and self._due[0][0] <= now:
                _, key, number = heapq.heappop(self._due)
                self._group.create_task(self._check(key, number), name=f"probe {key} {number}")
            self._wake.clear()
            try:
                async with asyncio.timeout(self._due[0][0] - now if self._due else None):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def run_drains(self) -> None:
        """Count connections of what drains until cancelled; says "quiet" when there were none for a while."""
        while True:
            await self._draining.wait()
            self._count_connections()
            if self._drains:
                await asyncio.sleep(DRAIN_POLL_S)
            else:
                self._draining.clear()

    def _schedule(self, key: Key, number: int, after_s: float) -> None:
        due = self._clock.now() + after_s
        if not self._due or due < self._due[0][0]:
            self._wake.set()
        heapq.heappush(self._due, (due, key, number))

    async def _start_up(self, key: Key, number: int) -> None:
        pause_s = STARTUP_PAUSE_S
        while (generation := self._starting(key, number)) is not None:
            if generation.service.listen is Listen.NONE:
                left_s = generation.started_at + SETTLE_S - self._clock.now()
                if left_s > 0:
                    await asyncio.sleep(left_s)
                    continue
                answer = Answer(ok=True, text="")
            else:
                answer = await self._ask(key, number, generation.service.startup_timeout_s)
            if self._fold(key, number, answer):
                return
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * STARTUP_GROWTH, STARTUP_PAUSE_S_MAX)
        self._watched.pop((key, number), None)

    def _starting(self, key: Key, number: int) -> Generation | None:
        generation = self._roster.seen(key).generation(number)
        return generation if generation is not None and isinstance(generation.stage, Starting) else None

    async def _check(self, key: Key, number: int) -> None:
        generation = self._roster.seen(key).generation(number)
        if generation is None or not isinstance(generation.stage, Ready):
            self._watched.pop((key, number), None)
            return
        async with self._slots:
            interval_s = self._roster.settings.health_check_interval_s
            answer = await self._ask(key, number, min(PROBE_S, max(1.0, interval_s)))
        if not self._fold(key, number, answer):
            self._watched.pop((key, number), None)

    async def _ask(self, key: Key, number: int, timeout_s: float) -> Answer:
        return await ask(self._watched[key, number], timeout_s)

    def _door(self, key: Key, generation: Generation) -> Door:
        service, settings = generation.service, self._roster.settings
        domain = self._roster.desired.domain if self._roster.desired else "localhost"
        host = host_name(service.name, None, domain)
        if service.listen is Listen.PORT:
            return Door(port=service.port, health=service.health, host=host)
        path = self._describer.socket_path(key, service, generation.socket, settings)
        uid = self._describer.uid(service.name)
        return Door(
            path=path,
            base=self._describer.trusted_base(key, path, settings),
            bound=self._hands.bound.get((key, generation.socket), ""),
            uid=uid,
            router_gid=ROUTER_UID if uid is not None else None,
            health=service.health,
            host=host,
        )

    def _fold(self, key: Key, number: int, answer: Answer) -> bool:
        """Fold *answer* into the roster; return whether the generation is to be asked again by the heap."""
        seen = self._roster.seen(key)
        generation = seen.generation(number)
        if generation is None or not isinstance(generation.stage, Starting | Ready):
            return False
        stage = seen_of.probed(generation, answer.ok, self._clock.now())
        entry = self._roster.entries[key]
        was_bad = not isinstance(generation.stage, Ready) or generation.stage.failures > 0
        if stage != generation.stage:
            seen = seen_of.staged(seen, number, stage)
            if isinstance(generation.stage, Starting):
                seen = seen_of.proven(seen, generation)
                took_s = self._clock.now() - generation.started_at
                self._roster.note(
                    "instance_healthy",
                    key,
                    f"{answer.text or 'lives'} ({took_s:.1f} s after its start)",
                    number=number,
                    release=generation.release,
                )
            entry.health = answer.text
            self._roster.fold(seen)
        elif not answer.ok or was_bad:
            if entry.health != answer.text and not isinstance(stage, Starting):
                self._roster.touch(key)
            entry.health = answer.text
        if isinstance(stage, Ready) and generation.service.listen is not Listen.NONE:
            self._schedule(key, number, self._roster.settings.health_check_interval_s)
            return True
        return not isinstance(stage, Starting)

    # --- draining -----------------------------------------------------------------------------------------------------
    def _count_connections(self) -> None:
        now = self._clock.now()
        paths: dict[tuple[Key, int], str] = {}
        ports: dict[tuple[Key, int], int] = {}
        for key, number in list(self._drains):
            generation = self._roster.seen(key).generation(number)
            if generation is None or not isinstance(generation.stage, Draining):
                del self._drains[key, number]
            elif generation.service.listen is Listen.PORT and generation.service.port is not None:
                ports[key, number] = generation.service.port
            else:
                path = self._describer.socket_path(key, generation.service, generation.socket, self._roster.settings)
                paths[key, number] = self._hands.bound.get((key, generation.socket)) or str(path)
        by_path = connections(paths.values()) if paths else {}
        by_port = port_connections(ports.values()) if ports else {}
        for drained in (*paths, *ports):
            count = by_path[paths[drained]] if drained in paths else by_port[ports[drained]]
            if count:
                self._drains[drained] = now
            elif now - self._drains[drained] >= DRAIN_QUIET_S:
                self._quiet(*drained)

    def _quiet(self, key: Key, number: int) -> None:
        del self._drains[key, number]
        seen = self._roster.seen(key)
        generation = seen.generation(number)
        if generation is not None and isinstance(generation.stage, Draining):
            took_s = self._clock.now() - generation.stage.since
            self._roster.note(
                "generation_drained", key, f"in {took_s:.1f} s", number=number, release=generation.release
            )
            self._roster.fold(seen_of.staged(seen, number, msgspec.structs.replace(generation.stage, quiet=True)))
