"""The other end of the ledger's unix socket: a commands.Ledger over one connection.

Many calls share the connection. When it breaks, every call on it raises Unreachable, and the next call dials again. A
caller may repeat a proposal under the same request id as often as it likes: it happens at most once.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar, cast

import msgspec

from slum.errors import InvariantError, QuorumLost, Unreachable
from slum.ledger import rpc
from slum.ledger.commands import LeaderInfo, Ledger, Member, Proposal, Rejected, Result, size_problem
from slum.ledger.status import LedgerStatus

DIAL_S = 2.0
SPARE_S = 2.0
"""How much longer than its own deadline a wait's answer may take."""
T = TypeVar("T")
_encode = msgspec.msgpack.Encoder().encode


@asynccontextmanager
async def connect(path: Path) -> AsyncIterator[Ledger]:
    """Yield the ledger that listens at *path*; dials at once, and raises Unreachable when nobody answers."""
    client = _Client(path)
    try:
        async with asyncio.timeout(DIAL_S):
            await client.dial()
    except TimeoutError:
        client.close()
        raise Unreachable(f"the ledger at {path} does not answer") from None
    try:
        yield client
    finally:
        client.close()


async def change_members(
    path: Path, *, add: Member | None = None, remove: str | None = None, deadline_s: float
) -> tuple[Member, ...]:
    """Add or remove one member at the leader that listens at *path*; return the members once they are in force.

    Raises QuorumLost, naming the leader, when another member leads, ConfigError when the change makes no sense.
    """
    client = _Client(path)
    try:
        return await client.change(rpc.AskChange(add=add, remove=remove), deadline_s)
    finally:
        client.close()


async def status(path: Path, *, deadline_s: float = DIAL_S) -> LedgerStatus:
    """Return how the ledger stands as the member that listens at *path* knows it; raise Unreachable when none does."""
    client = _Client(path)
    try:
        return await client.status(deadline_s=deadline_s)
    finally:
        client.close()


class _Client:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._numbers = itertools.count(1)
        self._line: _Line | None = None
        self._dialling = asyncio.Lock()

    async def propose(self, proposal: Proposal, *, deadline_s: float) -> Result:
        why = size_problem(len(_encode(proposal)))
        if why:
            return Rejected(seq=0, code="invalid", why=why)
        reply = await self._call(rpc.Propose(proposal=proposal), deadline_s)
        result: Result | None = reply.result
        if result is None:
            raise InvariantError("the ledger's reply does not fit the call")
        return result

    async def barrier(self, *, deadline_s: float) -> int:
        return _given((await self._call(rpc.TakeBarrier(), deadline_s)).seq)

    async def wait(self, seq: int, *, deadline_s: float) -> int:
        operation = rpc.WaitFor(seq=seq, deadline_s=deadline_s)
        return _given((await self._call(operation, deadline_s + SPARE_S)).seq)

    async def leader(self) -> LeaderInfo:
        return _given((await self._call(rpc.AskLeader(), DIAL_S)).leader)

    async def members(self) -> tuple[Member, ...]:
        return _given((await self._call(rpc.AskMembers(), DIAL_S)).members)

    async def status(self, *, deadline_s: float = DIAL_S) -> LedgerStatus:
        return _given((await self._call(rpc.AskStatus(), deadline_s)).status)

    async def change(self, operation: rpc.AskChange, deadline_s: float) -> tuple[Member, ...]:
        return _given((await self._call(operation, deadline_s)).members)

    async def dial(self) -> _Line:
        """Return the live connection, made if there is none."""
        async with self._dialling:
            if self._line is None or self._line.is_closed:
                loop = asyncio.get_running_loop()
                try:
                    _, self._line = await loop.create_unix_connection(_Line, str(self._path))
                except OSError as error:
                    raise Unreachable(f"nobody answers at {self._path}: {error.strerror or error}") from error
            return self._line

    def close(self) -> None:
        if self._line is not None:
            self._line.close()

    async def _call(self, operation: rpc.Operation, deadline_s: float) -> rpc.Reply:
        try:
            async with asyncio.timeout(deadline_s):
                line = await self.dial()
                reply = await line.ask(rpc.Call(id=next(self._numbers), operation=operation))
        except TimeoutError:
            raise QuorumLost(
                f"the ledger did not answer within {deadline_s:g} s",
                hint="it may still have committed: repeat the request with the same request id",
            ) from None
        if reply.failure is not None:
            raise rpc.to_error(reply.failure)
        return reply


class _Line(asyncio.Protocol):
    """One connection and the calls that wait on it."""

    def __init__(self) -> None:
        self._splitter = rpc.Splitter()
        self._transport: asyncio.Transport | None = None
        self._waiting: dict[int, asyncio.Future[rpc.Reply]] = {}
        self.is_closed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Not by isinstance: uvloop's transports are none of asyncio's classes.
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        try:
            replies = [rpc.unpack_reply(frame) for frame in self._splitter.feed(data)]
        except rpc.BadFrame:
            self.close()
            return
        for reply in replies:
            waiting = self._waiting.get(reply.id)
            if waiting is not None and not waiting.done():
                waiting.set_result(reply)

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_closed = True
        self._transport = None
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(Unreachable("the ledger closed the connection", hint="repeat with the same id"))

    def close(self) -> None:
        self.is_closed = True
        if self._transport is not None:
            self._transport.abort()

    async def ask(self, call: rpc.Call) -> rpc.Reply:
        """Send *call* and return its reply; the caller sets the deadline."""
        if self._transport is None:
            raise Unreachable("the ledger closed the connection", hint="repeat with the same id")
        waiting: asyncio.Future[rpc.Reply] = asyncio.get_running_loop().create_future()
        self._waiting[call.id] = waiting
        try:
            self._transport.write(rpc.pack(call))
            return await waiting
        finally:
            del self._waiting[call.id]


def _given(value: T | None) -> T:
    if value is None:
        raise InvariantError("the ledger's reply does not fit the call")
    return value
