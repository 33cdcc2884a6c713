"""Streams that a member asks for: the agent dials one WebSocket each and speaks logs or a shell on it.

A stream that fails ends with a StreamEnd that says why; it never touches the agent's own line, nor an instance.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Collection
from contextlib import aclosing
from typing import cast

import msgspec

from slum import log
from slum.errors import SlumError, Unreachable
from slum.node.doors import Door
from slum.node.roster import Roster
from slum.node.shell import Shells
from slum.node.websocket import WebSocket, connect
from slum.paths import Home
from slum.wire import LogsRequest, OpenStream, StreamData, StreamEnd, encoder, on_stream

DIAL_S = 5.0
STREAMS_MAX = 64


class Streams:
    """One agent's; each stream is a task of *group*."""

    def __init__(self, home: Home, roster: Roster, shells: Shells, group: asyncio.TaskGroup) -> None:
        self._home = home
        self._roster = roster
        self._shells = shells
        self._group = group
        self._open = 0

    def open(self, asked: OpenStream, door: Door) -> None:
        """Begin the stream that the member behind *door* asks for; over STREAMS_MAX it is not dialled, and the member's deadline passes."""
        if self._open >= STREAMS_MAX:
            log.get().warning("stream_refused", open=self._open)
            return
        self._open += 1
        task = self._group.create_task(self._serve(asked, door), name=f"stream {asked.id[:8]}")
        task.add_done_callback(self._closed)

    def _closed(self, _task: asyncio.Task[None]) -> None:
        self._open -= 1

    async def _serve(self, asked: OpenStream, door: Door) -> None:
        try:
            async with await connect(door, f"/v1/agent/streams/{asked.id}", DIAL_S) as socket:
                if isinstance(asked.request, LogsRequest):
                    await self._logs(asked.request, socket)
                else:
                    await self._shells.serve(asked.request, socket)
        except Unreachable as error:
            log.get().info("stream_lost", why=str(error))

    async def _logs(self, request: LogsRequest, socket: WebSocket) -> None:
        """Send lines until there are no more, or (following) until the other side leaves."""
        async with asyncio.TaskGroup() as group:
            sending = group.create_task(self._send_logs(request, socket), name="log lines")
            leaving = group.create_task(_left(socket), name="log reader")
            await asyncio.wait((sending, leaving), return_when=asyncio.FIRST_COMPLETED)
            sending.cancel()
            leaving.cancel()

    async def _send_logs(self, request: LogsRequest, socket: WebSocket) -> None:
        from slum.node import logs

        ids = self._ids(request)
        end = StreamEnd(status=0)
        try:
            lines = logs.read(
                self._home,
                request.service,
                ids,
                since=request.since,
                tail=request.tail,
                grep=request.grep,
                follow=request.follow,
                generation=request.generation,
            )
            async with aclosing(cast("AsyncGenerator[bytes, None]", lines)):
                async for data in lines:
                    await socket.send(encoder.encode(StreamData(data=data)))
        except Unreachable:
            return
        except (SlumError, OSError) as error:
            end = StreamEnd(error=str(error))
        try:
            await socket.send(encoder.encode(end))
        except Unreachable:
            return

    def _ids(self, request: LogsRequest) -> Collection[str]:
        """Return the asked id, or all that are declared or have logs."""
        if request.id is not None:
            return (request.id,)
        folder = self._home.logs / request.service
        there = {entry.name for entry in folder.iterdir() if entry.is_dir()} if folder.is_dir() else set()
        return sorted(there | {key.id for key in self._roster.wants if key.service == request.service})


async def _left(socket: WebSocket) -> None:
    while True:
        try:
            message = on_stream.decode(await socket.receive())
        except (Unreachable, msgspec.DecodeError):
            return
        if isinstance(message, StreamEnd):
            return
