"""Streams to agents: the member asks over the agent's session, the agent dials in, and the two ends are joined.

A stream's id is 128 random bits, valid once and for DIAL_S. An AgentEnd is that dialled WebSocket; whoever opened it reads
frames as fast as its own client takes them, so back-pressure reaches the agent. Closing either side closes the other.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Protocol

import msgspec
from starlette.websockets import WebSocket, WebSocketDisconnect

from slum import api, wire
from slum.errors import ConfigError, SlumError, Unreachable
from slum.node.websocket import WebSocket as ClientSocket
from slum.server.agents import Session
from slum.server.elsewhere import Away
from slum.server.memberwire import Open
from slum.server.peer import Guest, Peer
from slum.server.problems import Missing, problem_response

DIAL_S = 10.0
CLOSE_S = 2.0
Request = wire.LogsRequest | wire.ExecRequest | wire.RunRequest


class Lost(Unreachable):
    """The stream's other end went away without a last word."""


class End(Protocol):
    """The agent's end of a stream, exclusive to who opened it."""

    machine: str

    async def receive(self) -> bytes: ...

    async def send(self, frame: bytes) -> None: ...


class AgentEnd:
    """One stream that an agent dialled here."""

    def __init__(self, websocket: WebSocket, machine: str) -> None:
        self.machine = machine
        self.closed = asyncio.Event()
        self._websocket = websocket

    async def receive(self) -> bytes:
        try:
            return await self._websocket.receive_bytes()
        except (WebSocketDisconnect, KeyError) as error:
            raise Lost(f"the agent of {self.machine} ended the stream early") from error

    async def send(self, frame: bytes) -> None:
        try:
            await self._websocket.send_bytes(frame)
        except (WebSocketDisconnect, RuntimeError) as error:
            raise Lost(f"the agent of {self.machine} ended the stream early") from error


class AwayEnd:
    """A stream of an agent that dialled another member, which passes on what both sides say."""

    def __init__(self, socket: ClientSocket, machine: str) -> None:
        self.machine = machine
        self._socket = socket

    async def receive(self) -> bytes:
        try:
            return await self._socket.receive()
        except Unreachable as error:
            raise Lost(f"the member that the agent of {self.machine} dialled ended the stream early") from error

    async def send(self, frame: bytes) -> None:
        try:
            await self._socket.send(frame)
        except Unreachable as error:
            raise Lost(f"the member that the agent of {self.machine} dialled ended the stream early") from error


class Streams:
    """The streams that were asked for and not dialled yet."""

    def __init__(self) -> None:
        self._waiting: dict[str, tuple[str, asyncio.Future[AgentEnd]]] = {}

    @asynccontextmanager
    async def open(self, session: Session | Away, request: Request) -> AsyncIterator[End]:
        """Yield the agent's end of a new stream; it is closed on leaving. Unreachable when the agent does not dial."""
        if isinstance(session, Away):
            async with session.opener(session.member, Open(machine=session.machine, request=request)) as socket:
                yield AwayEnd(socket, session.machine)
            return
        name = secrets.token_hex(16)
        dialled: asyncio.Future[AgentEnd] = asyncio.get_running_loop().create_future()
        self._waiting[name] = (session.machine, dialled)
        try:
            session.open(wire.OpenStream(id=name, request=request))
            yield await self._dialled(session.machine, dialled)
        finally:
            self._waiting.pop(name, None)
            if dialled.done() and not dialled.cancelled():
                dialled.result().closed.set()

    async def _dialled(self, machine: str, dialled: asyncio.Future[AgentEnd]) -> AgentEnd:
        try:
            async with asyncio.timeout(DIAL_S):
                return await dialled
        except TimeoutError:
            raise Unreachable(
                f"the agent of {machine} did not open the stream within {DIAL_S:g} s",
                hint="`slum status` tells whether it is busy or gone",
            ) from None

    async def serve(self, websocket: WebSocket, peer: Peer) -> None:
        """Serve an agent's dial-in to its end; with a node's certificate only a stream that its machine was asked for."""
        name = websocket.path_params["id"]
        machine, dialled = self._waiting.get(name, (None, None))
        strange = isinstance(peer, Guest) and peer.name != machine
        if not strange:
            self._waiting.pop(name, None)
        if machine is None or dialled is None or dialled.done() or strange:
            await refuse(websocket, Missing("no stream of that id is waited for"))
            return
        await websocket.accept()
        end = AgentEnd(websocket, machine)
        # Who asked may have left while we accepted.
        if not dialled.done():
            dialled.set_result(end)
            await end.closed.wait()
        await close(websocket)


async def refuse(websocket: WebSocket, error: SlumError) -> None:
    """Answer a WebSocket request with an HTTP status and a Problem instead of accepting it."""
    await websocket.send_denial_response(problem_response(error))


async def close(websocket: WebSocket) -> None:
    """Close politely, for at most CLOSE_S; one that is gone already is fine."""
    try:
        async with asyncio.timeout(CLOSE_S):
            await websocket.close()
    except (TimeoutError, WebSocketDisconnect, RuntimeError):
        return


async def pipe(client: WebSocket, end: End) -> None:
    """Carry frames both ways until either side ends; the client hears a StreamEnd in any case."""
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(_to_agent(client, end), name="stream in")
            group.create_task(_to_client(client, end), name="stream out")
    except* _Finished:
        pass
    except* Lost as lost:
        await _tell(client, wire.StreamEnd(error=str(lost.exceptions[0])))


async def log_lines(end: End, service: str) -> AsyncIterator[api.LogLine]:
    """Yield the lines of a logs stream until its StreamEnd; ConfigError or Unreachable for what the agent says went wrong."""
    rest = b""
    while True:
        try:
            frame = wire.on_stream.decode(await end.receive())
        except msgspec.DecodeError as error:
            raise Lost(f"the agent of {end.machine} sent what is no frame: {error}") from error
        if isinstance(frame, wire.StreamEnd):
            if frame.error:
                raise ConfigError(frame.error)
            return
        if isinstance(frame, wire.StreamData):
            *lines, rest = (rest + frame.data).split(b"\n")
            for line in lines:
                yield _log_line(end.machine, service, line)


def _log_line(machine: str, service: str, line: bytes) -> api.LogLine:
    """Parse ``ID UNIX_SECONDS TEXT``; a line of another form is shown whole, at time 0."""
    parts = line.decode("utf-8", "replace").split(" ", 2)
    try:
        instance, at, text = parts[0], float(parts[1]), parts[2] if len(parts) > 2 else ""
    except (IndexError, ValueError):
        instance, at, text = "", 0.0, line.decode("utf-8", "replace")
    return api.LogLine(tenement=machine, service=service, id=instance, at=at, text=text)


async def _to_agent(client: WebSocket, end: End) -> None:
    while True:
        try:
            frame = await client.receive_bytes()
        except (WebSocketDisconnect, KeyError):
            raise _Finished from None
        await end.send(frame)


async def _to_client(client: WebSocket, end: End) -> None:
    while True:
        frame = await end.receive()
        try:
            await client.send_bytes(frame)
        except (WebSocketDisconnect, RuntimeError):
            raise _Finished from None
        if _is_last(frame):
            raise _Finished


def _is_last(frame: bytes) -> bool:
    try:
        return isinstance(wire.on_stream.decode(frame), wire.StreamEnd)
    except msgspec.DecodeError:
        return False


async def _tell(client: WebSocket, last: wire.StreamEnd) -> None:
    try:
        async with asyncio.timeout(CLOSE_S):
            await client.send_bytes(wire.encoder.encode(last))
    except (TimeoutError, WebSocketDisconnect, RuntimeError):
        return


class _Finished(Exception):
    """Either side said its last word."""
