"""The agent's line to the control plane: one WebSocket to any member, dialled again when it breaks, and never needed.

Up go a hello, reports of what changed (all of them on a new connection), notes and a heartbeat every 5 s; down come the
desired config and requests to open streams, which are handed to the agent. While nobody answers, notes wait, bounded:
the oldest are dropped and counted. Must never make the agent wait, nor stop anything because the line is down.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable
from typing import NamedTuple, Protocol

import msgspec

from slum import log
from slum.errors import Unreachable
from slum.node.doors import Door, Way, first_open
from slum.node.websocket import WebSocket, connect
from slum.wire import Desired, Heartbeat, Hello, Message, Note, OpenStream, Refused, Report, Servers, encoder, to_agent

DIAL_S = 5.0
SEND_S = 15.0
HEARTBEAT_S = 5.0
SILENT_S, REMOTE_SILENT_S = 45.0, 12.0
"""A member elsewhere that says nothing for so long is given up for another; two pings went unanswered by then."""
BACKOFF_MIN_S, BACKOFF_MAX_S = 0.1, 5.0
SPREAD_S = 1.0
"""All agents of a member that dies dial the others within so long, not in the same instant."""
REFUSED_S = 60.0
"""Before dialling again after a refusal for good: somebody may have changed their mind, but not soon."""
EXPIRED = "CERTIFICATE_EXPIRED"
"""In what OpenSSL says when a member refuses our certificate for its age (RFC 8446, alert 45)."""
NOTES_MAX, NOTES_A_TIME = 1000, 100
CALM_S = 0.005
"""So long after a change before telling it: changes come in bursts."""


class Agent(Protocol):
    """What the link asks of the agent; none of it waits."""

    def hello(self) -> Hello: ...

    def report(self, *, full: bool) -> Report | None:
        """Return some of what changed since the last call (of all when *full*), None when nothing did."""
        ...

    def heartbeat(self) -> Heartbeat: ...

    def desire(self, desired: Desired) -> None: ...

    def open_stream(self, request: OpenStream, door: Door) -> None:
        """Dial the stream that the member behind *door* asks for."""
        ...


class Link:
    """Runs for the agent's whole life. ``poke`` after anything changed that may be worth a report."""

    def __init__(self, way: Way, agent: Agent, tell: Callable[[str, str], None] = lambda server, why: None) -> None:
        """*tell* hears at each change to which member the line is, or "" and why to none."""
        self.connected = False
        self._way = way
        self._agent = agent
        self._tell = tell
        self._told: tuple[str, str] | None = None
        self._silent_s = REMOTE_SILENT_S if way.remote else SILENT_S
        self._notes: deque[Note] = deque()
        self._dropped = 0
        self._wake = asyncio.Event()
        self._outdated = False

    def poke(self) -> None:
        self._wake.set()

    def introduce(self) -> None:
        """Dial again, so that the member hears a new Hello."""
        self._outdated = True
        self._wake.set()

    def note(self, note: Note) -> None:
        """Queue *note*; when NOTES_MAX wait already, the oldest goes and is counted."""
        if len(self._notes) >= NOTES_MAX:
            self._notes.popleft()
            self._dropped += 1
        self._notes.append(note)
        self._wake.set()

    async def run(self) -> None:
        """Keep the line until cancelled."""
        delay_s = BACKOFF_MIN_S
        while True:
            try:
                door, socket = await self._dial()
            except Unreachable as error:
                why = str(error)
                if EXPIRED in why:
                    why = "this machine's certificate has expired, says the member"
                    self._way.expired()
                self._say("", why)
                await asyncio.sleep(delay_s * random.uniform(0.5, 1.0))
                delay_s = min(delay_s * 2, BACKOFF_MAX_S)
                continue
            delay_s = BACKOFF_MIN_S
            async with socket:
                ended = await self._converse(socket, door)
            self.connected = False
            self._way.current = None
            self._way.lost(door)
            log.get().info("member_lost", member=door.name, why=ended.words)
            self._say("", ended.words)
            await asyncio.sleep(self._pause_s(ended))

    async def _dial(self) -> tuple[Door, WebSocket]:
        """Return a line to the first member that takes one; Unreachable when none does."""
        unreachable = Unreachable("no address of a member is known")
        for doors in self._way.doors():
            try:
                return await first_open(doors, lambda door: connect(door, "/v1/agent", DIAL_S))
            except Unreachable as error:
                unreachable = error
        raise unreachable

    def _pause_s(self, why: Ended) -> float:
        """Return how long to wait before dialling again."""
        if why.refused:
            return (REFUSED_S if why.fatal else BACKOFF_MAX_S) * random.uniform(0.5, 1.0)
        return random.uniform(0.0, SPREAD_S) if self._way.remote else BACKOFF_MIN_S * random.uniform(0.5, 1.0)

    def _say(self, server: str, why: str = "") -> None:
        if self._told != (server, why):
            self._told = (server, why)
            self._tell(server, why)

    async def _converse(self, socket: WebSocket, door: Door) -> Ended:
        """Speak and listen until either fails; return why it did."""
        self._outdated = False
        try:
            await _send(socket, self._agent.hello())
        except Unreachable as error:
            return Ended(str(error))
        async with asyncio.TaskGroup() as group:
            speaker = group.create_task(self._speak(socket), name="link out")
            listener = group.create_task(self._listen(socket, door), name="link in")
            await asyncio.wait((speaker, listener), return_when=asyncio.FIRST_COMPLETED)
            speaker.cancel()
            listener.cancel()
        return next(task.result() for task in (listener, speaker) if not task.cancelled())

    async def _speak(self, socket: WebSocket) -> Ended:
        """Send what there is until the line breaks; return why it did."""
        full, beat_at = True, 0.0
        loop = asyncio.get_running_loop()
        try:
            while True:
                self._wake.clear()
                if self._outdated:
                    return Ended("what this machine can do has changed")
                await self._send_notes(socket)
                while (report := self._agent.report(full=full)) is not None:
                    await _send(socket, report)
                    full = False
                if loop.time() >= beat_at:
                    await _send(socket, self._agent.heartbeat(), ping=True)
                    if loop.time() - socket.heard_at > self._silent_s:
                        return Ended(f"silent for {self._silent_s:g} s")
                    beat_at = loop.time() + HEARTBEAT_S
                try:
                    async with asyncio.timeout_at(beat_at):
                        await self._wake.wait()
                    await asyncio.sleep(CALM_S)
                except TimeoutError:
                    continue
        except Unreachable as error:
            return Ended(str(error))

    async def _send_notes(self, socket: WebSocket) -> None:
        if self._dropped:
            log.get().warning("notes_dropped", count=self._dropped)
            self._dropped = 0
        while self._notes:
            batch = list(self._notes)[:NOTES_A_TIME]
            await _send(socket, *batch)
            while batch and self._notes and self._notes[0] is batch[0]:
                self._notes.popleft()
                batch.pop(0)

    async def _listen(self, socket: WebSocket, door: Door) -> Ended:
        """Hand on what the member says until the line breaks; return why it did."""
        try:
            while True:
                data = await socket.receive()
                try:
                    message = to_agent.decode(data)
                except msgspec.DecodeError as error:
                    log.get().warning("member_not_understood", error=str(error))
                    continue
                match message:
                    case Refused(why=why, fatal=fatal):
                        return Ended(f"refused: {why}", refused=True, fatal=fatal)
                    case Desired():
                        self._agent.desire(message)
                    case OpenStream():
                        self._agent.open_stream(message, door)
                    case Servers(servers=servers):
                        self._way.learn(servers)
                if not self.connected:
                    self.connected = True
                    self._way.current = door
                    log.get().info("member_connected", member=door.name)
                    self._say(door.name)
        except Unreachable as error:
            return Ended(str(error))


class Ended(NamedTuple):
    """Why a line is no more."""

    words: str
    refused: bool = False
    """By the member, in words."""
    fatal: bool = False
    """For as long as this machine shows what it has shown."""


async def _send(socket: WebSocket, *messages: Message, ping: bool = False) -> None:
    try:
        async with asyncio.timeout(SEND_S):
            await socket.send(*(encoder.encode(message) for message in messages), ping=ping)
    except TimeoutError:
        raise Unreachable(f"the member did not read for {SEND_S:g} s") from None
