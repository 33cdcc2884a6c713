"""One machine's agent, whole: what it is made of, and the loops that keep it going.

    link ──desired──► Roster ──plan──► Hands ──► keeper, routes, folders
      ◄──reports──────  ▲ ◄── folds ── Watch (probes, drains), Takeover (keeper's list), Preparer (bundles, builds)

It compares what the control plane wants of this machine with what runs, decides (supervise.py) and acts (hands.py), again
after every observation, and only while the keeper is there and taken over. Without a control plane it acts on the config
that it has on disk. Must never stop a service because it cannot reach anybody.
"""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import Mapping

from slum import log
from slum.errors import SlumError, Unreachable
from slum.model import Key, Level
from slum.node import metadata
from slum.node.adopt import key_of
from slum.node.describe import Describer
from slum.node.doors import Door, Far, Near, way_of
from slum.node.figures import Figures, hello
from slum.node.hands import Hands
from slum.node.home import write_line
from slum.node.keeperclient import Event, KeeperClient, start_detached
from slum.node.limits.detect import detect
from slum.node.limits.groups import Limits
from slum.node.link import Link
from slum.node.oneoff import Oneoffs
from slum.node.prepare import Preparer
from slum.node.renewal import Renewal
from slum.node.roster import Clock, Roster
from slum.node.routing import Routing
from slum.node.runners.registry import probe_levels, runners
from slum.node.shell import Shells
from slum.node.store import Store
from slum.node.streams import Streams
from slum.node.takeover import Takeover
from slum.node.types import Available, Runner, Unavailable
from slum.node.watch import Watch
from slum.paths import Home
from slum.wire import Desired, Heartbeat, Hello, OpenStream, Report

IDENTITY_POLL_S, LOCK_POLL_S = 0.2, 1.0
KEEPER_PATIENCE_S, KEEPER_POLL_S = 1.0, 0.05
HOUSEKEEPING_S = 60.0
ROUNDS_MAX = 1000
RETRY_S = 1.0
"""After an action that this machine could not do at all, say for want of space."""
UNKEPT_RETRY_S = 3.0
Levels = Mapping[Level, Available | Unavailable]


class Agent:
    """One machine's agent; ``run`` is its life."""

    def __init__(
        self,
        home: Home,
        way: Near | Far,
        group: asyncio.TaskGroup,
        store: Store,
        table: dict[Level, Runner],
        limits: Limits,
        levels: Levels,
    ) -> None:
        self._home = home
        self._group = group
        self._store = store
        self._limits = limits
        self._runners = table
        self._levels = levels
        self._wake = asyncio.Event()
        self._steady = False
        """Whether the keeper is there and taken over: only then is anything decided."""
        self._unkept: Desired | None = None
        """The newest config, while the disk has no room for it."""
        self._wakes: dict[Key, float] = {}
        self._clock = Clock()
        self._way = way
        self._link = Link(way, self, self._tell_line)
        self._roster = Roster(store, self._clock, self._link.note, self._changed)
        self._describer = describer = Describer(home, limits, os.environ)
        self._hands = Hands(self._roster, describer, table, limits, self._clock, group)
        self._watch = Watch(self._roster, self._hands, describer, self._clock, group)
        self._oneoffs = Oneoffs()
        self._preparer = Preparer(
            home, way, store, self._roster, describer, table, limits, self._oneoffs, self._clock, group
        )
        self._routing = Routing(home, self._roster, describer, self._roster.trouble)
        self._hands.watch, self._hands.preparer = self._watch, self._preparer
        self._takeover = Takeover(
            home, self._roster, self._hands, self._watch, self._preparer, self._oneoffs, limits, self._clock
        )
        shells = Shells(self._roster, describer, self._preparer, self._oneoffs, table, limits)
        self._streams = Streams(home, self._roster, shells, group)
        self._figures = Figures(home, self._roster, limits)

    def begin(self) -> None:
        """Take up what was kept, and start every task."""
        unreadable = self._roster.remember(rebooted=self._store.first_since_boot())
        if unreadable:
            log.get().warning("history_unreadable", lines=unreadable)
        kept = self._store.desired()
        if kept is not None:
            self._roster.desire(kept)
        for run, name in (
            (self._keep(), "keeper"),
            (self._decide(), "decide"),
            (self._watch.run(), "probes"),
            (self._watch.run_drains(), "drains"),
            (self._routing.run(), "router"),
            (self._routing.watch(), "router watch"),
            (self._link.run(), "link"),
            (self._keep_house(), "housekeeping"),
        ):
            self._group.create_task(run, name=name)
        if isinstance(self._way, Far):
            self._group.create_task(Renewal(self._home, self._way).run(), name="renewal")

    # --- what the link asks -------------------------------------------------------------------------------------------
    def hello(self) -> Hello:
        identity = self._store.identity()
        if identity is None:
            raise Unreachable(f"{self._home.identity} is gone: this machine has no name")
        return hello(identity, self._roster.stamp, self._levels, self._limits)

    def report(self, *, full: bool) -> Report | None:
        return self._roster.report(full=full)

    def heartbeat(self) -> Heartbeat:
        return self._figures.heartbeat(self._clock.now())

    def desire(self, desired: Desired) -> None:
        """Act on *desired* from now on, unless it is older than what is known or this machine cannot."""
        known = self._roster.desired
        if known is not None and known.cluster == desired.cluster and desired.stamp < known.stamp:
            return
        if desired == known and not self._roster.refused:
            return
        why = self._obstacle(desired)
        self._unkept = None
        if why:
            log.get().warning("config_refused", revision=desired.revision, why=why)
            self._roster.refuse(desired.stamp, why)
            return
        try:
            self._store.keep_desired(desired)
            self._describer.give_uids(service.name for service in desired.services)
        except (SlumError, OSError) as error:
            log.get().warning("config_not_kept", revision=desired.revision, why=str(error))
            self._roster.refuse(desired.stamp, f"the config cannot be kept: {error}")
            self._unkept = desired
            self._group.create_task(self._desire_again(desired), name="desire again")
            return
        log.get().info("config_received", revision=desired.revision, services=len(desired.services))
        self._roster.desire(desired)
        for entry in self._roster.entries.values():
            for generation in entry.seen.living:
                if self._steady and generation.socket == entry.seen.serving:
                    self._hands.point(entry.seen.key, generation)
        self._routing.poke()

    def open_stream(self, request: OpenStream, door: Door) -> None:
        self._streams.open(request, door)

    def _tell_line(self, server: str, why: str) -> None:
        """Leave word of the line for `slum status` and `slum join` on this machine."""
        try:
            write_line(self._home, server=server, why=why)
        except OSError as error:
            log.get().warning("line_not_told", why=str(error))

    async def _desire_again(self, desired: Desired) -> None:
        """Try a config that the disk had no room for; nobody sends it again."""
        await asyncio.sleep(UNKEPT_RETRY_S)
        if self._unkept is desired:
            self.desire(desired)

    def _obstacle(self, desired: Desired) -> str:
        """Return what *desired* asks for and this machine lacks, in words; empty when there is nothing."""
        needed = {service.isolation for service in desired.services}
        if any(isinstance(self._levels.get(level), Unavailable) for level in needed):
            self._levels = probe_levels(self._runners)
        for service in desired.services:
            level = self._levels[service.isolation]
            if isinstance(level, Unavailable):
                return f"service {service.name}: level {service.isolation} is not available here: {level.why} ({level.fix})"
            asked = {
                "memory": service.memory_limit_mb,
                "cpu": service.cpu_shares,
                "pids": service.pids_limit,
            }
            missing = [
                name for name, value in asked.items() if value is not None and name not in self._limits.controllers
            ]
            if missing:
                why = f"service {service.name}: limits on {', '.join(missing)} do not work here: {self._limits.why}"
                return f"{why} ({self._limits.fix})"
        return self._describer.misplaced((service.name for service in desired.services), desired.settings)

    # --- deciding -----------------------------------------------------------------------------------------------------
    def _changed(self) -> None:
        self._wake.set()
        self._link.poke()

    async def _decide(self) -> None:
        """Decide and act whenever something changed or is due, while the keeper is there."""
        while True:
            due = min(self._wakes.values(), default=None)
            try:
                async with asyncio.timeout(None if due is None else max(0.0, due - self._clock.now())):
                    await self._wake.wait()
            except TimeoutError:
                now = self._clock.now()
                for key in [key for key, at in self._wakes.items() if at <= now]:
                    del self._wakes[key]
                    self._roster.touch(key)
            self._wake.clear()
            if self._steady:
                self._settle()

    def _settle(self) -> None:
        for _ in range(ROUNDS_MAX):
            keys = set(self._roster.dirty)
            if not keys:
                return
            plan = self._roster.plan()
            for key in keys:
                self._wakes.pop(key, None)
            self._wakes.update(plan.wakes)
            for action in plan.actions:
                try:
                    self._hands.perform(action)
                except (SlumError, OSError) as error:
                    log.get().error("action_failed", action=type(action).__name__, key=str(action.key), why=str(error))
                    self._wakes[action.key] = self._clock.now() + RETRY_S
        log.get().error("decisions_do_not_settle", keys=[str(key) for key in self._roster.dirty][:10])

    # --- the keeper ---------------------------------------------------------------------------------------------------
    async def _keep(self) -> None:
        """Stay connected to the keeper; when it is gone for KEEPER_PATIENCE_S, start the next one."""
        while True:
            try:
                async with await self._connected() as keeper:
                    await keeper.subscribe()
                    self._hands.keeper = self._oneoffs.keeper = self._routing.keeper = keeper
                    async with asyncio.TaskGroup() as group:
                        group.create_task(self._follow(keeper), name="keeper events")
                        group.create_task(self._take_over(keeper), name="keeper list")
            except* Unreachable as lost:
                log.get().warning("keeper_lost", why=str(lost.exceptions[0]))
            finally:
                self._steady = False
                self._hands.keeper = self._oneoffs.keeper = self._routing.keeper = None
            self._oneoffs.lost()
            await self._hands.quiesce()

    async def _connected(self) -> KeeperClient:
        loop = asyncio.get_running_loop()
        patience_ends = loop.time() + KEEPER_PATIENCE_S
        while True:
            try:
                return await KeeperClient.connect(self._home, timeout_s=KEEPER_PATIENCE_S * 5)
            except Unreachable:
                if loop.time() > patience_ends:
                    started = await asyncio.to_thread(start_detached, self._home)
                    log.get().info("keeper_started", pid=started.pid)
            await asyncio.sleep(KEEPER_POLL_S)

    async def _take_over(self, keeper: KeeperClient) -> None:
        """List and adopt, now and whenever an action's outcome is in doubt."""
        while True:
            self._steady = False
            await self._hands.quiesce()
            self._hands.doubt.clear()
            await self._takeover.run(keeper)
            self._steady = True
            self._roster.dirty.update(self._roster.entries)
            self._wake.set()
            self._routing.poke()
            await self._hands.doubt.wait()

    async def _follow(self, keeper: KeeperClient) -> None:
        async for event in keeper.events():
            await self._observe(event)

    async def _observe(self, event: Event) -> None:
        child = event.child
        key = key_of(child)
        if key is None:
            if event.event == "exit":
                await self._oneoffs.exited(child)
            return
        number = int(str(child.meta["number"]))
        if event.event == "exit":
            self._hands.ended(key, number, child.status, child.exited_at or self._clock.now())
        elif self._roster.seen(key).generation(number) is None:
            self._hands.doubt.set()

    # --- now and then -------------------------------------------------------------------------------------------------
    async def _keep_house(self) -> None:
        """Compress rotated logs and remove bundles that nothing needs, every minute."""
        while True:
            await asyncio.sleep(HOUSEKEEPING_S)
            from slum.node import logs

            await self._probe_again()
            try:
                await logs.compress_rotated(self._home)
                if self._steady:
                    self._takeover.sweep_cgroups()
                    await self._preparer.collect()
            except (SlumError, OSError) as error:
                log.get().warning("housekeeping_failed", why=str(error))

    async def _probe_again(self) -> None:
        """Prove again what did not work: a full disk or a missing program may have been mended meanwhile."""
        if all(isinstance(self._levels.get(level), Available) for level in self._runners):
            return
        before, self._levels = self._levels, await asyncio.to_thread(probe_levels, self._runners)
        if [level for level in self._runners if type(before.get(level)) is not type(self._levels.get(level))]:
            self._link.introduce()


def make_folders(home: Home) -> None:
    """Make the folders that the agent and its services stand on, with the modes that paths.Home describes."""
    root = os.geteuid() == 0
    home.agent.mkdir(mode=0o700, parents=True, exist_ok=True)
    home.services.mkdir(mode=0o711 if root else 0o700, exist_ok=True)
    home.bundles.mkdir(mode=0o711 if root else 0o700, exist_ok=True)
    run = home.run / "i"
    run.mkdir(mode=0o710 if root else 0o700, exist_ok=True)
    if root:
        run.chmod(0o711)


async def live(home: Home) -> None:
    """Be the agent of *home* until cancelled."""
    make_folders(home)
    store = Store(home)
    while not store.lock():
        log.get().warning("another_agent_runs")
        await asyncio.sleep(LOCK_POLL_S)
    while store.identity() is None:  # noqa: ASYNC110 - another process writes the file
        await asyncio.sleep(IDENTITY_POLL_S)
    table = runners(home)
    limits = await asyncio.to_thread(detect, home)
    levels = await asyncio.to_thread(probe_levels, table)
    if os.geteuid() == 0:
        guarded = await asyncio.to_thread(metadata.install)
        if isinstance(guarded, Unavailable):
            log.get().warning("metadata_address_open", why=guarded.why, fix=guarded.fix)
    async with asyncio.TaskGroup() as group:
        Agent(home, way_of(home), group, store, table, limits, levels).begin()
        gc.collect()
        gc.freeze()
