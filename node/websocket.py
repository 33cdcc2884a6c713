"""A WebSocket client, over whatever a Door opens, as small as an agent needs it: whole binary messages, bounded.

wsproto does the protocol (RFC 6455). A message over wire.FRAME_BYTES_MAX, a refused upgrade and a lost connection are
Unreachable. One reader and one writer at a time.
"""

from __future__ import annotations

import asyncio
from collections import deque
from pathlib import Path
from types import TracebackType

import msgspec
from wsproto import ConnectionType, WSConnection
from wsproto.events import (
    AcceptConnection,
    BytesMessage,
    CloseConnection,
    Message,
    Ping,
    RejectConnection,
    RejectData,
    Request,
)
from wsproto.utilities import ProtocolError

from slum.errors import Unreachable
from slum.frozen import Sparse
from slum.node.doors import READ_BYTES, Door, Unix
from slum.node.home import NAME
from slum.wire import FRAME_BYTES_MAX

REASON_BYTES_MAX = 4096
CLOSE_S = 1.0


class WebSocket:
    """An open connection; made by ``connect``, ended by leaving its ``async with``."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._protocol = WSConnection(ConnectionType.CLIENT)
        self._messages: deque[bytes] = deque()
        self._parts: list[bytes] = []
        self._size = 0
        self._accepted = False
        self._open = False
        """Whether there is somebody to say goodbye to."""
        self._ended = ""
        self._refusal = bytearray()
        self.heard_at = asyncio.get_running_loop().time()
        """When anything last came, in the loop's time."""

    async def __aenter__(self) -> WebSocket:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def send(self, *messages: bytes, ping: bool = False) -> None:
        """Send *messages*; returns when the connection takes more (its buffer is below the high-water mark).

        *ping* asks for a sign of life, in the same packet; it shows in ``heard_at``.
        """
        try:
            data = [self._protocol.send(BytesMessage(data=data)) for data in messages]
            if ping:
                data.append(self._protocol.send(Ping()))
            self._writer.write(b"".join(data))
            await self._writer.drain()
        except (OSError, ProtocolError) as error:
            raise Unreachable(f"the member is gone: {error}") from error

    async def receive(self) -> bytes:
        """Return the next message."""
        while not self._messages:
            await self._hear()
        return self._messages.popleft()

    async def close(self) -> None:
        """Say goodbye if that is still possible, and close."""
        try:
            if self._open:
                self._writer.write(self._protocol.send(CloseConnection(code=1000)))
        except (OSError, ProtocolError):
            self._open = False
        self._writer.close()
        try:
            async with asyncio.timeout(CLOSE_S) as limit:
                await self._writer.wait_closed()
        except OSError:
            # What was lost is closed already: Python 3.11.2 fails when it is closed and then aborted.
            if limit.expired():
                self._writer.transport.abort()

    async def _upgrade(self, target: str) -> None:
        self._writer.write(self._protocol.send(Request(host=NAME, target=target)))
        while not self._accepted:
            await self._hear()

    async def _hear(self) -> None:
        """Take in what comes next; Unreachable once it is over, after all that came before: often it is one packet."""
        if self._ended:
            raise Unreachable(self._ended)
        try:
            await self._read()
        except Unreachable as error:
            self._ended = str(error)

    async def _read(self) -> None:
        try:
            data = await self._reader.read(READ_BYTES)
            if not data and not self._accepted:
                raise Unreachable("the member is gone: it hung up before it answered")
            self.heard_at = asyncio.get_running_loop().time()
            self._protocol.receive_data(data or None)
            for event in self._protocol.events():
                self._take(event)
        except (OSError, ProtocolError) as error:
            raise Unreachable(f"the member is gone: {error}") from error

    def _take(self, event: object) -> None:
        match event:
            case AcceptConnection():
                self._accepted = self._open = True
            case RejectConnection(status_code=status, has_body=has_body):
                if not has_body:
                    raise Unreachable(f"the member refused the connection with HTTP {status}")
            case RejectData(data=data, body_finished=finished):
                self._refusal += bytes(data)[: REASON_BYTES_MAX - len(self._refusal)]
                if finished:
                    raise Unreachable(f"the member refused the connection: {_words(bytes(self._refusal))}")
            case Message(data=part, message_finished=finished):
                self._parts.append(part.encode() if isinstance(part, str) else bytes(part))
                self._size += len(self._parts[-1])
                if self._size > FRAME_BYTES_MAX:
                    raise Unreachable(f"the member sent a message over {FRAME_BYTES_MAX} bytes")
                if finished:
                    self._messages.append(b"".join(self._parts))
                    self._parts, self._size = [], 0
            case Ping():
                self._writer.write(self._protocol.send(event.response()))
            case CloseConnection(code=code, reason=reason):
                self._open = False
                raise Unreachable(f"the member closed the connection ({code}{': ' + reason if reason else ''})")


def _words(refusal: bytes) -> str:
    """Return what a refusal's body says: a Problem's message, else the text as it is."""
    try:
        return msgspec.json.decode(refusal, type=dict[str, _Problem])["error"].message
    except (msgspec.DecodeError, KeyError):
        return refusal.decode("utf-8", "replace")


class _Problem(Sparse):
    """Of api.Problem, what is needed here: the rest of that module is the agent's to do without."""

    message: str


async def connect(at: Path | Door, target: str, timeout_s: float) -> WebSocket:
    """Return an open WebSocket to *target* at a unix socket or Door; Unreachable when there is none in time."""
    door = Unix(at) if isinstance(at, Path) else at
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await door.open()
            socket = WebSocket(reader, writer)
            try:
                await socket._upgrade(target)
            except BaseException:
                await socket.close()
                raise
            return socket
    except TimeoutError:
        raise Unreachable(f"no answer at {door.name} within {timeout_s:g} s") from None
    except OSError as error:
        raise Unreachable(f"nobody answers at {door.name}: {error.strerror or error}") from error
