"""Keeps the router as the config wants it: running while anything is routed, listening where it is asked to.

That changes seldom (routes are links that the router reads by itself), so it is a task that makes it true again after each
change and each new keeper, and tries again while that fails. A failure is the config's trouble, told in the agent's report; services
run on meanwhile. Another task ends a router that hangs (caddywatch.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from slum import log
from slum.alive import silent_ms
from slum.errors import SlumError, Unreachable
from slum.model import Listen
from slum.node import caddywatch, router
from slum.node.describe import Describer
from slum.node.keeperclient import KeeperClient
from slum.node.roster import Roster
from slum.paths import Home

CALM_S = 0.02
RETRY_S = 5.0


class Routing:
    """One agent's. *keeper* is set while there is a connection; *trouble* is called with "" when all is well."""

    def __init__(self, home: Home, roster: Roster, describer: Describer, trouble: Callable[[str], None]) -> None:
        self.keeper: KeeperClient | None = None
        self._home = home
        self._roster = roster
        self._describer = describer
        self._trouble = trouble
        self._wake = asyncio.Event()
        self._made: router.Wanted | None = None
        """What the router is, as far as is known; None while there is none."""

    def poke(self) -> None:
        """Look again: the config or the keeper is new."""
        self._wake.set()

    async def run(self) -> None:
        """Keep the router until cancelled."""
        delay_s: float | None = None
        made_by: KeeperClient | None = None
        while True:
            try:
                async with asyncio.timeout(delay_s):
                    await self._wake.wait()
                await asyncio.sleep(CALM_S)
            except TimeoutError:
                log.get().info("router_retried")
            self._wake.clear()
            keeper, wanted = self.keeper, self._wanted()
            if keeper is None or self._roster.desired is None or (wanted == self._made and keeper is made_by):
                delay_s = None
                continue
            try:
                await self._make(keeper, wanted)
                self._made, made_by, delay_s = wanted, keeper, None
                self._trouble("")
            except Unreachable:
                delay_s = RETRY_S
            except (SlumError, OSError) as error:
                log.get().warning("router_not_made", why=str(error))
                self._trouble(f"the router: {error}")
                delay_s = RETRY_S

    async def watch(self) -> None:
        """End a router that hangs, until cancelled."""
        await caddywatch.watch(
            self._home,
            router.NAME,
            lambda: self.keeper is not None and self._made is not None,
            lambda seconds: router.answer(self._home, seconds),
            silent_ms() / 1000,
        )

    async def _make(self, keeper: KeeperClient, wanted: router.Wanted | None) -> None:
        if wanted is None:
            await router.stop(keeper)
        else:
            await router.ensure(keeper, self._home, wanted)

    def _wanted(self) -> router.Wanted | None:
        """Return what the router shall be; None when nothing here is routed."""
        desired = self._roster.desired
        if desired is None or not any(service.listen is not Listen.NONE for service in desired.services):
            return None
        folders = {
            self._describer.socket_path(key, want.service, 0, desired.settings).parent
            for key, want in self._roster.wants.items()
            if want.service.socket is not None
        }
        return router.Wanted(
            listen=desired.routing_listen,
            domain=desired.domain,
            folders=tuple(sorted(folders)),
        )
