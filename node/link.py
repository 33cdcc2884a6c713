"""The agent's line to the control plane: one WebSocket that it dials, dials again when it breaks, and never needs.

Up go a hello, reports of what changed (all of them on a new connection), notes and a heartbeat every 5 s; down come the
desired config and requests to open streams, which are handed to the agent. While nobody answers, notes wait, bounded:
the oldest are dropped and counted. Must never make the agent wait, nor stop anything because the line is down.
"""

from __future__ import annotations

import asyncio
import os
import random
import tempfile
from collections import deque
from pathlib import Path
from typing import Protocol

import h11
import msgspec

from slum import log
from slum.errors import SlumError, Unreachable
from slum.node.websocket import WebSocket, connect
from slum.wire import Desired, Heartbeat, Hello, Message, Note, OpenStream, Refused, Report, encoder, to_agent

DIAL_S = 5.0
SEND_S = 15.0
HEARTBEAT_S = 5.0
SILENT_S = 45.0
BACKOFF_MIN_S, BACKOFF_MAX_S = 0.1, 5.0
NOTES_MAX, NOTES_A_TIME = 1000, 100
CALM_S = 0.005
"""So long after a change before telling it: changes come in bursts."""
BLOB_S = 600.0
BLOB_READ_BYTES = 256 << 10


class Agent(Protocol):
    """What the link asks of the agent; none of it waits."""

    def hello(self) -> Hello: ...

    def report(self, *, full: bool) -> Report | None:
        """Return some of what changed since the last call (of all when *full*), None when nothing did."""
        ...

    def heartbeat(self) -> Heartbeat: ...

    def desire(self, desired: Desired) -> None: ...

    def open_stream(self, request: OpenStream) -> None: ...


class Link:
    """Runs for the agent's whole life. ``poke`` after anything changed that may be worth a report."""

    def __init__(self, api_socket: Path, agent: Agent) -> None:
        self.connected = False
        self._api_socket = api_socket
        self._agent = agent
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
                async with await connect(self._api_socket, "/v1/agent", DIAL_S) as socket:
                    delay_s = await self._converse(socket)
            except Unreachable as error:
                if self.connected:
                    log.get().info("member_lost", why=str(error))
            finally:
                self.connected = False
            await asyncio.sleep(delay_s * random.uniform(0.5, 1.0))
            delay_s = min(delay_s * 2, BACKOFF_MAX_S)

    async def _converse(self, socket: WebSocket) -> float:
        """Speak and listen until either fails; return how long to wait before dialling again."""
        self._outdated = False
        await _send(socket, self._agent.hello())
        async with asyncio.TaskGroup() as group:
            speaker = group.create_task(self._speak(socket), name="link out")
            listener = group.create_task(self._listen(socket), name="link in")
            await asyncio.wait((speaker, listener), return_when=asyncio.FIRST_COMPLETED)
            speaker.cancel()
            listener.cancel()
        outcome = next((t.result() for t in (listener, speaker) if not t.cancelled()), "")
        log.get().info("member_lost", why=outcome)
        return BACKOFF_MAX_S if outcome.startswith("refused") else BACKOFF_MIN_S

    async def _speak(self, socket: WebSocket) -> str:
        """Send what there is until the line breaks; return why it did."""
        full, beat_at = True, 0.0
        loop = asyncio.get_running_loop()
        try:
            while True:
                self._wake.clear()
                if self._outdated:
                    return "what this machine can do has changed"
                await self._send_notes(socket)
                while (report := self._agent.report(full=full)) is not None:
                    await _send(socket, report)
                    full = False
                if loop.time() >= beat_at:
                    await _send(socket, self._agent.heartbeat())
                    await socket.ping()
                    if loop.time() - socket.heard_at > SILENT_S:
                        return f"silent for {SILENT_S:g} s"
                    beat_at = loop.time() + HEARTBEAT_S
                try:
                    async with asyncio.timeout_at(beat_at):
                        await self._wake.wait()
                    await asyncio.sleep(CALM_S)
                except TimeoutError:
                    continue
        except Unreachable as error:
            return str(error)

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

    async def _listen(self, socket: WebSocket) -> str:
        """Hand on what the member says until the line breaks; return why it did."""
        try:
            while True:
                data = await socket.receive()
                if not self.connected:
                    self.connected = True
                    log.get().info("member_connected")
                try:
                    message = to_agent.decode(data)
                except msgspec.DecodeError as error:
                    log.get().warning("member_not_understood", error=str(error))
                    continue
                match message:
                    case Desired():
                        self._agent.desire(message)
                    case OpenStream():
                        self._agent.open_stream(message)
                    case Refused(why=why):
                        return f"refused: {why}"
        except Unreachable as error:
            return str(error)


async def _send(socket: WebSocket, *messages: Message) -> None:
    try:
        async with asyncio.timeout(SEND_S):
            await socket.send(*(encoder.encode(message) for message in messages))
    except TimeoutError:
        raise Unreachable(f"the member did not read for {SEND_S:g} s") from None


async def fetch_blob(api_socket: Path, digest: str, folder: Path) -> Path:
    """Stream the blob *digest* into a new file in *folder* and return it; the caller verifies and removes it.

    Unreachable when no member answers or the transfer breaks (safe to repeat), SlumError when the member has no such blob.
    """
    try:
        async with asyncio.timeout(BLOB_S):
            reader, writer = await asyncio.open_unix_connection(str(api_socket))
            try:
                return await _download(reader, writer, digest, folder)
            finally:
                writer.close()
    except TimeoutError:
        raise Unreachable(f"bundle {digest[:12]} did not arrive within {BLOB_S:g} s") from None
    except (OSError, h11.RemoteProtocolError) as error:
        raise Unreachable(f"bundle {digest[:12]} cannot be fetched: {error}") from error


async def _download(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, digest: str, folder: Path) -> Path:
    http = h11.Connection(h11.CLIENT)
    request = h11.Request(
        method="GET", target=f"/v1/blobs/{digest}", headers=[("Host", "slum"), ("Connection", "close")]
    )
    writer.write((http.send(request) or b"") + (http.send(h11.EndOfMessage()) or b""))
    await writer.drain()
    done = False
    with tempfile.NamedTemporaryFile(dir=folder, prefix="blob-", delete=False) as out:
        path = Path(out.name)
        try:
            while not done:
                event = http.next_event()
                if event is h11.NEED_DATA:
                    http.receive_data(await reader.read(BLOB_READ_BYTES))
                elif isinstance(event, h11.Response) and event.status_code != 200:
                    raise SlumError(f"the member has no bundle {digest[:12]} (HTTP {event.status_code})")
                elif isinstance(event, h11.Data):
                    out.write(event.data)
                elif isinstance(event, h11.ConnectionClosed):
                    raise Unreachable(f"bundle {digest[:12]}: the member hung up")
                done = isinstance(event, h11.EndOfMessage)
        except BaseException:
            os.unlink(path)
            raise
    return path
