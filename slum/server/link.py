"""The server's line to the ledger process: one connection that comes back by itself, and deadlines on everything.

While the ledger is away each call waits for it until its own deadline and then raises QuorumLost; a proposal that was
under way is sent again under the same request id, which is safe by the ledger's rules. Decides nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import TypeVar

from slum import log
from slum.errors import QuorumLost, SlumError, Unreachable
from slum.ledger.commands import LeaderInfo, Ledger, Member, Proposal, Result
from slum.ledger.status import LedgerStatus

Connect = Callable[[], AbstractAsyncContextManager[Ledger]]
T = TypeVar("T")

RETRY_S = (0.02, 0.05, 0.1, 0.25, 0.5)
"""Pauses between attempts to connect; the last one repeats."""
PROBE_S = 5.0
SILENT_HINT = "it is started again by itself, within some 60 s also when it hangs; services go on, `slum status` tells when it is back"


class Link:
    """A Ledger over a connection that is kept by ``run``."""

    def __init__(self, connect: Connect, last_word: Callable[[], SlumError | None] = lambda: None) -> None:
        """*last_word* gives what a ledger that will not start again has said."""
        self._connect = connect
        self._last_word = last_word
        self._ledger: Ledger | None = None
        self._up = asyncio.Event()
        self._lost = asyncio.Event()
        self._heard_at = time.monotonic()

    @property
    def is_up(self) -> bool:
        return self._ledger is not None

    async def run(self) -> None:
        """Keep a connection until cancelled."""
        attempt = 0
        while True:
            try:
                async with self._connect() as ledger:
                    async with asyncio.timeout(PROBE_S):
                        await ledger.leader()
                    attempt = 0
                    self._lost.clear()
                    self._ledger = ledger
                    self._up.set()
                    log.get().info("ledger_connected")
                    await self._lost.wait()
            except (Unreachable, QuorumLost, OSError, TimeoutError) as error:
                if attempt == len(RETRY_S):
                    log.get().warning("ledger_unreachable", error=str(error))
            finally:
                self._ledger = None
                self._up.clear()
            await asyncio.sleep(RETRY_S[min(attempt, len(RETRY_S) - 1)])
            attempt += 1

    async def propose(self, proposal: Proposal, *, deadline_s: float) -> Result:
        return await self._call(lambda ledger, left_s: ledger.propose(proposal, deadline_s=left_s + 1.0), deadline_s)

    async def barrier(self, *, deadline_s: float) -> int:
        return await self._call(lambda ledger, left_s: ledger.barrier(deadline_s=left_s), deadline_s)

    async def wait(self, seq: int, *, deadline_s: float) -> int:
        return await self._call(lambda ledger, left_s: ledger.wait(seq, deadline_s=left_s), deadline_s, spare_s=5.0)

    async def leader(self, *, deadline_s: float = 2.0) -> LeaderInfo:
        return await self._call(lambda ledger, _left_s: ledger.leader(), deadline_s, spare_s=0.0)

    @property
    def silent_s(self) -> float:
        """How long ago the ledger last answered anything."""
        return time.monotonic() - self._heard_at

    async def status(self, *, deadline_s: float = 2.0) -> LedgerStatus:
        """Return how the ledger stands, as this member sees it."""
        return await self._call(lambda ledger, left_s: ledger.status(deadline_s=left_s), deadline_s)

    async def members(self) -> tuple[Member, ...]:
        return await self._call(lambda ledger, _left_s: ledger.members(), 2.0)

    async def _call(
        self, call: Callable[[Ledger, float], Awaitable[T]], deadline_s: float, *, spare_s: float = 0.5
    ) -> T:
        """Call on the connection of the moment, again on the next one when it breaks, until *deadline_s* has passed."""
        loop = asyncio.get_running_loop()
        end = loop.time() + deadline_s
        try:
            async with asyncio.timeout_at(end + spare_s):
                while True:
                    async with asyncio.timeout_at(end):
                        await self._up.wait()
                    ledger = self._ledger
                    if ledger is None:
                        continue
                    try:
                        answer = await call(ledger, max(0.05, end - loop.time()))
                        self._heard_at = time.monotonic()
                        return answer
                    except Unreachable:
                        if self._ledger is ledger:
                            self._ledger = None
                            self._up.clear()
                            self._lost.set()
        except TimeoutError:
            said = self._last_word()
            if said is not None:
                raise QuorumLost(said.message, hint=said.hint, lasting=True) from None
            raise QuorumLost("the ledger does not answer", hint=SILENT_HINT) from None
