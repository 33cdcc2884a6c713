"""This member's server as the others' client: one feed from each of them, and errands that only another can do.

Every server dials every other one's front and follows what its agents say (elsewhere.py merges it), so that each member knows
of all agents and can answer for the whole fleet, leader or not, also when there is none. An errand is one connection:
a stream to an agent that dialled another member, a local machine that another member is, a bundle, a change of the members.
How to dial is given from outside. Bounded: one feed a member, deadlines on everything.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import msgspec

from slum import log
from slum.answers import raised
from slum.errors import QuorumLost, SlumError, Unreachable
from slum.ledger.commands import Member
from slum.node.websocket import WebSocket
from slum.server import memberwire
from slum.server.elsewhere import Elsewhere
from slum.server.guard import NO_MEMBER, REVOKED
from slum.server.link import Link
from slum.server.pulse import Pulse

Dial = Callable[[Member], Coroutine[Any, Any, WebSocket]]
"""Open a WebSocket to memberwire.PATH at that member's front, with our certificate; Unreachable when it cannot be had."""

SILENCE_S = 4.0
"""A feed says something every second."""
AGAIN_S = 0.3
ERRAND_S = 10.0
LOOK_S = 5.0
T = TypeVar("T")


class Relay:
    def __init__(
        self, me: str, link: Link, committed: Pulse, elsewhere: Callable[[Relay], Elsewhere], dial: Dial
    ) -> None:
        self.me = me
        self._link = link
        self._committed = committed
        self._dial = dial
        self._members: dict[str, Member] = {}
        self.up: set[str] = set()
        """Members whose feed is heard."""
        self.refusing: set[str] = set()
        """Members that take us for none, as they last said."""
        self.elsewhere = elsewhere(self)

    @property
    def others(self) -> tuple[str, ...]:
        """The other members, as last read."""
        return tuple(name for name in self._members if name != self.me)

    def knows(self, member: str) -> bool:
        """Tell whether *member* is one; also as long as the members were not read yet."""
        return not self._members or member in self._members

    async def run(self) -> None:
        """Follow every other member until cancelled."""
        feeds: dict[str, tuple[Member, asyncio.Task[None]]] = {}
        async with asyncio.TaskGroup() as group:
            while True:
                seen = self._committed.count
                try:
                    self._members = {row.id: row for row in await self._link.members()}
                except QuorumLost:
                    log.get().debug("members_not_read")
                wanted = {name: row for name, row in self._members.items() if name != self.me and row.api}
                for name, (row, task) in list(feeds.items()):
                    if wanted.get(name) != row:
                        task.cancel()
                        self.refusing.discard(name)
                        del feeds[name]
                for name in wanted.keys() - feeds.keys():
                    feeds[name] = (wanted[name], group.create_task(self._follow(wanted[name]), name=f"feed {name}"))
                await self._committed.wait(seen, LOOK_S)
                await asyncio.sleep(AGAIN_S)

    async def _follow(self, member: Member) -> None:
        """Keep a feed from *member* until cancelled; what it tells is merged, its silence is noticed."""
        while True:
            why = ""
            try:
                async with await self._dial(member) as socket:
                    await socket.send(memberwire.encode(memberwire.Feed()))
                    while True:
                        async with asyncio.timeout(SILENCE_S):
                            told = memberwire.told.decode(await socket.receive())
                        if member.id not in self.up:
                            self.up.add(member.id)
                            self.refusing.discard(member.id)
                            log.get().info("member_followed", member=member.id)
                        self.elsewhere.take(member.id, told)
            except TimeoutError:
                why = f"silent for {SILENCE_S:g} s"
            except (Unreachable, msgspec.DecodeError) as error:
                why = str(error)
                if NO_MEMBER in why or REVOKED in why:
                    self.refusing.add(member.id)
            finally:
                self._lose(member.id, why)
            await asyncio.sleep(AGAIN_S * random.uniform(0.5, 1.5))

    def _lose(self, member: str, why: str) -> None:
        if member in self.up:
            self.up.discard(member)
            self.elsewhere.gone(member)
            log.get().info("member_not_followed", member=member, why=why)

    @asynccontextmanager
    async def opened(
        self, member: str, asked: memberwire.AnyAsk, deadline_s: float = ERRAND_S
    ) -> AsyncIterator[WebSocket]:
        """Yield a connection on which *member* has answered *asked* well; what it answered badly is raised."""
        async with self.asking(member, asked, deadline_s) as socket:
            async with asyncio.timeout(deadline_s):
                await read_answer(socket, member)
            yield socket

    @asynccontextmanager
    async def asking(
        self, member: str, asked: memberwire.AnyAsk, deadline_s: float = ERRAND_S
    ) -> AsyncIterator[WebSocket]:
        """Yield a connection on which *asked* was said to *member*; Unreachable when it does not answer in time."""
        row = self._members.get(member)
        if row is None or not row.api:
            raise Unreachable(f"{member} is no member that can be reached", hint="`slum status --cluster`")
        try:
            async with asyncio.timeout(deadline_s):
                socket = await self._dial(row)
        except TimeoutError:
            raise Unreachable(f"{member} does not answer within {deadline_s:g} s") from None
        async with socket:
            await socket.send(memberwire.encode(asked))
            try:
                yield socket
            except TimeoutError:
                raise Unreachable(f"{member} does not answer within {deadline_s:g} s") from None

    async def call(self, member: str, asked: memberwire.AnyAsk, deadline_s: float) -> memberwire.Answer:
        """Return *member*'s answer; the error that it answers is raised here."""
        async with self.asking(member, asked, deadline_s) as socket, asyncio.timeout(deadline_s):
            return await read_answer(socket, member)

    async def of_leader(self, what: str, kind: type[T]) -> T | None:
        """Return what the leader says of *what* (see memberwire.Read); None when we lead, or nobody who answers does."""
        try:
            leader = await self._link.leader()
            if leader.is_self or leader.member is None:
                return None
            answer = await self.call(leader.member, memberwire.Read(what=what), ERRAND_S)
            return msgspec.json.decode(answer.body, type=kind)
        except (SlumError, msgspec.DecodeError) as error:
            log.get().info("leader_not_asked", what=what, why=str(error))
            return None


async def read_answer(socket: WebSocket, member: str) -> memberwire.Answer:
    """Return the Answer that comes next; the problem in it is raised as the error that it stands for."""
    try:
        answer = memberwire.answer.decode(await socket.receive())
    except msgspec.DecodeError as error:
        raise SlumError(f"{member}'s answer is not understood: {error}", hint="are the versions neighbours?") from error
    if answer.problem is not None:
        raise raised(answer.problem)
    return answer
