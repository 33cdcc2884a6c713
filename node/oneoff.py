"""Children that run once, behind a service's wall: builds, pre_deploy, `slum run` and `slum exec`.

A build or pre_deploy is named after what it is for, so that a new agent finds the one that its predecessor started, or how it
ended, instead of a second one being started. A run or exec belongs to a stream and dies with it, at the latest when
the next agent lists the children. Must never be used for what shall live on.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Collection, Iterable

from slum import log
from slum.errors import SlumError, Unreachable
from slum.node.keeperclient import Child, KeeperClient, KeeperError
from slum.node.types import Spawn

RUN, PRE_DEPLOY, BUILD = "x/run-", "x/pre-", "b/"


class Oneoffs:
    """Those of one agent. *keeper* is set while there is a connection."""

    def __init__(self) -> None:
        self.keeper: KeeperClient | None = None
        self._waiting: dict[str, asyncio.Future[int | None]] = {}

    @property
    def busy(self) -> bool:
        return bool(self._waiting)

    async def run(
        self, spawn: Spawn, stdio: tuple[int, int, int] | None = None, spawned: Callable[[], None] | None = None
    ) -> int | None:
        """Run *spawn* to its end and return its exit status (None: nobody saw it); one of that name is joined.

        A build or pre_deploy that ended while there was no agent is not run again: its status is taken.

        *spawned* is called once it runs and has its own copies of *stdio*.

        Cancelling kills it when it is a run or exec. SlumError when it cannot be started, Unreachable when the keeper is
        lost meanwhile (safe to repeat for a build or pre_deploy).
        """
        keeper = self.keeper
        if keeper is None:
            raise Unreachable("the keeper is gone")
        ended: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()
        self._waiting[spawn.name] = ended
        try:
            if not spawn.name.startswith(RUN) and (status := await _how_it_ended(keeper, spawn.name)) is not None:
                ended.set_result(status)
                return status
            try:
                await keeper.spawn(spawn, stdio)
            except KeeperError as error:
                if error.kind != "exists":
                    raise
                # Begun by an agent before us; its exit may have been told already.
                self.listed(await keeper.list_children(), {spawn.name})
            if spawned is not None:
                spawned()
            return await ended
        finally:
            self._waiting.pop(spawn.name, None)
            unfinished = ended.cancelled() or not ended.done()
            await self._clear(keeper, spawn.name, kill=unfinished and spawn.name.startswith(RUN))

    async def exists(self, name: str) -> bool:
        """Tell whether there is a child of that name, running or ended but not forgotten."""
        if self.keeper is None:
            raise Unreachable("the keeper is gone")
        return any(child.name == name for child in await self.keeper.list_children())

    async def signal(self, name: str, signum: int) -> None:
        """Signal a one-off; that it is gone already is fine."""
        if self.keeper is not None:
            try:
                await self.keeper.signal(name, signum)
            except KeeperError as error:
                if error.kind != "missing":
                    raise

    async def exited(self, child: Child) -> None:
        """Take note of an exit that the keeper told; a run that nobody waits for any more is forgotten."""
        ended = self._waiting.get(child.name)
        if ended is not None and not ended.done():
            ended.set_result(child.status)
        elif ended is None and self.keeper is not None and child.name.startswith(RUN):
            await self._clear(self.keeper, child.name, kill=False)

    def lost(self) -> None:
        """Fail what is waited for: the keeper is gone. Builds and pre_deploys are joined again later."""
        for ended in self._waiting.values():
            if not ended.done():
                ended.set_exception(Unreachable("the keeper was lost meanwhile"))

    def listed(self, children: Iterable[Child], names: Collection[str] | None = None) -> list[Child]:
        """Compare with the keeper's list (of *names* only, when given); return children that nobody waits for."""
        known = {child.name: child for child in children}
        for name, ended in self._waiting.items():
            if (names is None or name in names) and not ended.done():
                child = known.get(name)
                if child is None:
                    ended.set_result(None)
                elif not child.running:
                    ended.set_result(child.status)
        return [
            c for c in known.values() if c.name.startswith((RUN, PRE_DEPLOY, BUILD)) and c.name not in self._waiting
        ]

    async def sweep(self, stray: Iterable[Child], kept: Collection[str]) -> None:
        """End children that nobody waits for and nobody will join: all of *stray* but those named in *kept*."""
        keeper = self.keeper
        if keeper is None:
            return
        for child in stray:
            if child.name not in kept and child.name not in self._waiting:
                await self._clear(keeper, child.name, kill=child.running)

    async def _clear(self, keeper: KeeperClient, name: str, *, kill: bool) -> None:
        try:
            if kill:
                await keeper.signal(name, signal.SIGKILL)
            else:
                await keeper.forget(name)
        except Unreachable:
            return  # the next list tells
        except SlumError as error:
            if not isinstance(error, KeeperError) or error.kind not in ("missing", "invalid"):
                log.get().warning("oneoff_not_cleared", name=name, why=str(error))


async def _how_it_ended(keeper: KeeperClient, name: str) -> int | None:
    """Return the status of a child that has ended and that nobody has forgotten yet; None when there is none, or none known."""
    children = await keeper.list_children()
    return next((child.status for child in children if child.name == name and not child.running), None)
