"""The agent's part in renewing its certificate: when, and in a child, since what signs requests is large.

At two thirds of its life, or when a member says that it has expired. Services never depend on it: an expired certificate only
keeps the line down, and once a member can be reached again the renewal is the first thing that is done.
"""

from __future__ import annotations

import asyncio
import random
import time

from slum import log
from slum.errors import Unreachable
from slum.node import home as homes
from slum.node.doors import Far, first_open
from slum.node.trees import child_command, last_words
from slum.paths import Home

CHECK_S = 3600.0
"""The clock may jump: it is looked at so often."""
SPREAD_S = 3600.0
"""Machines that were made together do not renew in the same minute."""
DIAL_S, CHILD_S = 5.0, 60.0
KNOCK_S = 3.0
"""Between two looks whether anybody is there, when the certificate has expired."""
PAUSE_MIN_S, PAUSE_MAX_S, PAUSE_EXPIRED_MAX_S = 5.0, 600.0, 60.0


def next_pause_s(told: homes.HomeFile, before_s: float, *, renewed: bool, now: float) -> float:
    """Return how long to wait after a renewal, which *told* may be the outcome of, when it was *before_s* the last time.

    A certificate that is due again at once counts as a failure: the clocks of member and machine are far apart then, and each
    renewal is noted in the ledger.
    """
    if renewed and told.renew_at > now:
        return 0.0
    most_s = PAUSE_EXPIRED_MAX_S if told.not_after < now else PAUSE_MAX_S
    return min(max(before_s * 2, PAUSE_MIN_S), most_s)


class Renewal:
    """One agent's."""

    def __init__(self, home: Home, far: Far) -> None:
        self._home = home
        self._far = far
        self._spread_s = random.uniform(0.0, min(SPREAD_S, (far.told.not_after - far.told.not_before) / 100))

    async def run(self) -> None:
        """Keep the certificate valid, for ever."""
        pause_s = 0.0
        while True:
            await self._due()
            if not await self._somebody():
                await asyncio.sleep(KNOCK_S * random.uniform(0.5, 1.0))
                continue
            renewed = await self._renewed()
            pause_s = next_pause_s(self._far.told, pause_s, renewed=renewed, now=time.time())
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))

    async def _due(self) -> None:
        while (left_s := self._far.told.renew_at + self._spread_s - time.time()) > 0 and not self._far.expiry.is_set():
            try:
                async with asyncio.timeout(min(left_s, CHECK_S)):
                    await self._far.expiry.wait()
            except TimeoutError:
                continue

    async def _somebody(self) -> bool:
        """Tell whether any member's address takes connections: asking costs less than a child that cannot."""
        for doors in self._far.doors():
            try:
                _, caller = await first_open(doors, lambda door: _knock(door.name))
            except Unreachable:
                continue
            await caller.close()
            return True
        return False

    async def _renewed(self) -> bool:
        argv, env = child_command("slum.node.renew", "--data-dir", self._home.data, "--run-dir", self._home.run)
        null, pipe = asyncio.subprocess.DEVNULL, asyncio.subprocess.PIPE
        child = await asyncio.create_subprocess_exec(*argv, env=env, stdin=null, stdout=null, stderr=pipe)
        try:
            async with asyncio.timeout(CHILD_S):
                _, said = await child.communicate()
        except TimeoutError:
            said = f"not done within {CHILD_S:g} s".encode()
        finally:
            if child.returncode is None:
                child.kill()
                await child.communicate()
        if child.returncode:
            why = last_words(said.decode(errors="replace"), child.returncode)
            log.get().warning("certificate_not_renewed", why=why, not_after=self._far.told.not_after)
            return False
        self._far.renewed()
        log.get().info("certificate_renewed", not_after=self._far.told.not_after)
        return True


class _Caller:
    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer

    async def close(self) -> None:
        self._writer.close()


async def _knock(url: str) -> _Caller:
    host, port = homes.address_of(url)
    try:
        async with asyncio.timeout(DIAL_S):
            _, writer = await asyncio.open_connection(host, port)
    except (OSError, TimeoutError) as error:
        raise Unreachable(f"nobody answers at {url}") from error
    return _Caller(writer)
