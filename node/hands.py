"""Performs what supervise.py decided: through the keeper, the routes and the instance's folders.

Each action changes the roster at once, so that the next decision counts on it, and does its slow part in a task; those of
one instance run one after the other, in order. What fails becomes part of what is observed. When the keeper is gone nothing
is guessed: its next list tells. Must never signal but by a child's name, which the keeper proves to be ours.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any, Protocol

import msgspec

from slum import log
from slum.errors import SlumError, Unreachable
from slum.model import Key, Level, Listen
from slum.node import observed as seen_of
from slum.node.actions import (
    Action,
    CloseSocket,
    Drain,
    Forget,
    GiveUp,
    Kill,
    PreDeploy,
    Prepare,
    Publish,
    Reap,
    Start,
    Terminate,
    Unpublish,
)
from slum.node.adopt import child_name, listener_name, meta_of
from slum.node.describe import Describer, cgroup_name
from slum.node.failures import cause
from slum.node.keeperclient import KeeperClient, KeeperError
from slum.node.limits.groups import Limits
from slum.node.observed import Draining, Generation, Ready, Starting, Stopping, routed
from slum.node.roster import Clock, Roster
from slum.node.routes import Routes
from slum.node.sockets import remove_folder, remove_socket
from slum.node.types import Runner, Spawn
from slum.node.uids import ROUTER_UID

CLEAR_TRIES, CLEAR_PAUSE_S = 20, 0.05


class Watching(Protocol):
    """Who probes and drains (watch.py)."""

    def started(self, key: Key, number: int) -> None: ...

    def draining(self, key: Key, number: int) -> None: ...


class Preparing(Protocol):
    """Who fetches, builds and runs pre_deploy (prepare.py)."""

    def prepare(self, key: Key, release: str) -> None: ...

    def pre_deploy(self, key: Key, release: str) -> None: ...

    def folder(self, release: str) -> Path | None:
        """Return where the unpacked or built bundle of a prepared release lies; None when it has none."""
        ...


async def clear(limits: Limits, name: str) -> None:
    """Kill what is left in the cgroup *name* and remove it once its processes are gone; what resists is swept later."""
    limits.kill(name)
    for _ in range(CLEAR_TRIES):
        if limits.remove(name):
            return
        await asyncio.sleep(CLEAR_PAUSE_S)


class Hands:
    """One agent's. *keeper* is set while there is a connection."""

    def __init__(
        self,
        roster: Roster,
        describer: Describer,
        runners: Mapping[Level, Runner],
        limits: Limits,
        clock: Clock,
        group: asyncio.TaskGroup,
    ) -> None:
        self.keeper: KeeperClient | None = None
        self.doubt = asyncio.Event()
        """Set when an action had no clear outcome: the keeper's list has to tell."""
        self.bound: dict[tuple[Key, int], str] = {}
        """The name that the kernel shows for a listener that the keeper holds."""
        self.watch: Watching
        self.preparer: Preparing
        self.routes = Routes(describer.home)
        self._roster = roster
        self._describer = describer
        self._runners = runners
        self._limits = limits
        self._clock = clock
        self._group = group
        self._locks: dict[Key, asyncio.Lock] = {}
        self._busy: set[asyncio.Task[None]] = set()

    def perform(self, action: Action) -> None:
        """Begin *action*; the roster already shows it when this returns."""
        roster, key = self._roster, action.key
        seen = roster.seen(key)
        match action:
            case Prepare(release=release):
                self.preparer.prepare(key, release)
            case PreDeploy(release=release):
                self.preparer.pre_deploy(key, release)
            case Start():
                self._start(action)
            case Publish(number=number):
                self._publish(key, number)
            case Unpublish():
                self.routes.unpublish(key.service, key.id)
                roster.fold(seen_of.unpublished(seen))
            case Drain(number=number):
                generation = seen.generation(number)
                if generation is not None and isinstance(generation.stage, Ready):
                    stage = Draining(since=self._clock.now(), ready_since=generation.stage.since)
                    roster.fold(seen_of.staged(seen, number, stage))
                    self.watch.draining(key, number)
            case Terminate(number=number, why=why):
                self._terminate(key, number, why)
            case Kill(number=number):
                generation = seen.generation(number)
                if generation is not None and isinstance(generation.stage, Stopping):
                    roster.fold(seen_of.staged(seen, number, msgspec.structs.replace(generation.stage, killed=True)))
                    self._do(key, self._signal(key, number, signal.SIGKILL), "kill")
            case Reap(number=number):
                roster.fold(seen_of.reaped(seen, number))
                self._do(key, self._reap(key, number), "reap")
            case CloseSocket(socket=socket):
                roster.fold(seen_of.socket_closed(seen, socket))
                self._do(key, self._close_socket(key, socket), "close socket")
            case GiveUp(mark=mark):
                roster.fold(seen_of.given_up(seen, mark))
                roster.note("instance_failed", key, mark.why, release=mark.release)
            case Forget():
                self._forget(key)

    def ended(self, key: Key, number: int, status: int | None, at: float, why: str = "") -> None:
        """Take note that a generation's process is gone, or could not be started (*why*). May be repeated."""
        seen = self._roster.seen(key)
        generation = seen.generation(number)
        if generation is None or not generation.alive:
            return
        stats = self._limits.stats(cgroup_name(key, number))
        oom = bool(stats and stats.oom_kills)
        known = any(past.generation == number for past in seen.past)
        seen = seen_of.ended(seen, number, status, at, oom=oom, why=why)
        self._roster.fold(seen)
        if known:
            return
        past = seen.past[-1]
        if past.asked and not past.why:
            want = self._roster.wants.get(key)
            if want is None or want.stopped:
                self._roster.note("instance_stopped", key, cause(past), number=number, release=past.release)
            return
        text = f"{cause(past)} after {past.ran_s:.1f} s"
        self._roster.note("instance_exited", key, text, number=number, release=past.release)

    async def quiesce(self) -> None:
        """Return when no begun action is under way; for when the keeper is gone, so that each of them fails soon."""
        while self._busy:
            await asyncio.wait(tuple(self._busy))

    async def settle_listener(self, key: Key, generation: Generation) -> None:
        """Learn (and make sure) which listener of the keeper *generation* serves on."""
        if generation.service.listen is Listen.FD and self.keeper is not None:
            settings = self._roster.settings
            path = self._describer.socket_path(key, generation.service, generation.socket, settings)
            base = self._describer.trusted_base(key, path, settings)
            name = listener_name(key, generation.socket)
            listening = await self.keeper.listen(name, path=path, base=base, gid=self._router_gid, mode=0o660)
            self.bound[key, generation.socket] = listening.bound

    # --- one action each ----------------------------------------------------------------------------------------------
    def _start(self, action: Start) -> None:
        now = self._clock.now()
        generation = Generation(
            number=action.number,
            socket=action.socket,
            release=action.release,
            restarts=action.restarts,
            service=action.service,
            started_at=now,
            stage=Starting(since=now),
        )
        self._roster.fold(seen_of.started(self._roster.seen(action.key), generation))
        self._do(action.key, self._spawn(action.key, generation), "start")

    async def _spawn(self, key: Key, generation: Generation) -> None:
        if self.keeper is None:
            return
        try:
            spawn = self._described(key, generation)
            await self.settle_listener(key, generation)
            child = await self.keeper.spawn(spawn)
        except Unreachable:
            raise
        except (SlumError, OSError) as error:
            if isinstance(error, KeeperError) and error.kind == "exists":
                raise Unreachable(f"{child_name(key, generation.number)} is there already") from error
            log.get().warning("generation_not_started", key=str(key), number=generation.number, why=str(error))
            self.ended(key, generation.number, None, self._clock.now(), why=f"cannot start: {error}")
            self._release_cgroup(key, generation.number)
            return
        seen = self._roster.seen(key)
        here = seen.generation(generation.number)
        if here is not None:
            running = msgspec.structs.replace(here, pid=child.pid, started_at=child.started_at)
            self._roster.fold(seen_of.started(seen, running))
        self._roster.note(
            "generation_started", key, f"pid {child.pid}", number=generation.number, release=generation.release
        )
        self.watch.started(key, generation.number)

    def _described(self, key: Key, generation: Generation) -> Spawn:
        service, settings = generation.service, self._roster.settings
        runner = self._runners.get(service.isolation)
        if runner is None:
            raise SlumError(f"level {service.isolation} is not available on this machine", hint="slum doctor")
        bundle = self.preparer.folder(generation.release)
        instance = self._describer.describe(key, generation, settings, bundle)
        path = self._describer.socket_path(key, service, generation.socket, settings)
        if service.listen is Listen.SOCKET and service.socket is not None:
            remove_socket(path, self._describer.trusted_base(key, path, settings))
        return msgspec.structs.replace(runner.spawn(instance), meta=meta_of(key, generation))

    def _publish(self, key: Key, number: int) -> None:
        seen = seen_of.published(self._roster.seen(key), number)
        generation = seen.generation(number)
        if generation is None:
            return
        self.point(key, generation)
        self._roster.fold(seen)
        if routed(generation.service):
            detail = self._roster.url(key) or ""
            self._roster.note("generation_serving", key, detail, number=number, release=generation.release)

    def point(self, key: Key, generation: Generation) -> None:
        """Lead the route of *key* to *generation*; the same again changes nothing."""
        service, first = generation.service, self._roster.is_first(key)
        if service.listen is Listen.PORT and service.port is not None:
            self.routes.publish_port(key.service, key.id, service.port, first)
        elif routed(service):
            path = self._describer.socket_path(key, service, generation.socket, self._roster.settings)
            self.routes.publish(key.service, key.id, path, first)

    def _terminate(self, key: Key, number: int, why: str) -> None:
        seen = self._roster.seen(key)
        generation = seen.generation(number)
        if generation is None or not generation.alive:
            return
        ready_since = None
        if isinstance(generation.stage, Ready):
            ready_since = generation.stage.since
        elif isinstance(generation.stage, Draining):
            ready_since = generation.stage.ready_since
        stage = Stopping(since=self._clock.now(), ready_since=ready_since, why=why)
        self._roster.fold(seen_of.staged(seen, number, stage))
        if why:
            entry = self._roster.entries[key]
            detail = f"{why}: {entry.health}" if entry.health else why
            self._roster.note("instance_unhealthy", key, detail, number=number, release=generation.release)
        self._do(key, self._signal(key, number, signal.SIGTERM), "terminate")

    async def _signal(self, key: Key, number: int, signum: int) -> None:
        if self.keeper is not None:
            try:
                await self.keeper.signal(child_name(key, number), signum)
            except KeeperError as error:
                if error.kind != "missing":
                    raise

    async def _reap(self, key: Key, number: int) -> None:
        if self.keeper is not None:
            try:
                await self.keeper.forget(child_name(key, number))
            except KeeperError as error:
                if error.kind != "missing":
                    raise
        self._release_cgroup(key, number)

    def _release_cgroup(self, key: Key, number: int) -> None:
        """Kill what the generation left behind, and remove its cgroup."""
        name = cgroup_name(key, number)
        self._group.create_task(clear(self._limits, name), name=f"clear {name}")

    async def _close_socket(self, key: Key, socket: int) -> None:
        self.bound.pop((key, socket), None)
        if self.keeper is not None:
            try:
                await self.keeper.close_listener(listener_name(key, socket))
            except KeeperError as error:
                if error.kind != "missing":
                    raise
        home = self._describer.home
        remove_socket(home.generation_socket(str(key), socket), home.instance_run(str(key)))

    def _forget(self, key: Key) -> None:
        self.routes.unpublish(key.service, key.id)
        self._roster.forget(key)
        remove_folder(self._describer.home.instance_run(str(key)))
        self._locks.pop(key, None)

    @property
    def _router_gid(self) -> int | None:
        return ROUTER_UID if self._describer.uids is not None else None

    def _do(self, key: Key, slow: Coroutine[Any, Any, None], what: str) -> None:
        """Run *slow* after what was begun before for the same instance."""
        task = self._group.create_task(self._in_turn(key, slow, what), name=f"{what} {key}")
        self._busy.add(task)
        task.add_done_callback(self._busy.discard)

    async def _in_turn(self, key: Key, slow: Coroutine[Any, Any, None], what: str) -> None:
        async with self._locks.setdefault(key, asyncio.Lock()):
            try:
                await slow
            except Unreachable as error:
                log.get().info("action_unanswered", what=what, key=str(key), why=str(error))
                self.doubt.set()
            except SlumError as error:
                log.get().error("action_refused", what=what, key=str(key), why=str(error))
