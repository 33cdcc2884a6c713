"""A member as an agent sees it: pushes a Desired, hears hello, reports, notes and heartbeats, asks for streams, has blobs.

A real WebSocket server (wsproto) on a unix socket. It can be stopped and started again, push to whoever is connected, and
remembers everything that it heard.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from pathlib import Path

from wsproto import ConnectionType, WSConnection
from wsproto.events import AcceptConnection, BytesMessage, CloseConnection, Ping, RejectConnection, RejectData, Request

from slum import wire


class Connection:
    """One WebSocket, from the member's side. *received* fills as messages come; None at its end."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.received: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._reader = reader
        self._writer = writer
        self.protocol = WSConnection(ConnectionType.SERVER)
        self.target = ""

    async def shake_hands(self) -> bool:
        while not self.target:
            data = await self._reader.read(65536)
            if not data:
                return False
            self.protocol.receive_data(data)
            for event in self.protocol.events():
                if isinstance(event, Request):
                    self.target = event.target
        return True

    def accept(self) -> None:
        self._writer.write(self.protocol.send(AcceptConnection()))

    def reject(self, status: int, body: bytes) -> None:
        self._writer.write(self.protocol.send(RejectConnection(status_code=status, has_body=True)))
        self._writer.write(self.protocol.send(RejectData(data=body)))

    def send(self, message: object) -> None:
        self._writer.write(self.protocol.send(BytesMessage(data=wire.encoder.encode(message))))

    async def read(self) -> None:
        """Take what comes until the connection ends."""
        parts = b""
        while True:
            try:
                data = await self._reader.read(65536)
            except ConnectionError:
                # Reset by a peer that left words of ours unread: what it said before is still in the buffer, which
                # a StreamReader with an exception does not give out.
                data = bytes(self._reader._buffer)
                self._reader._buffer.clear()
            if not data:
                self.received.put_nowait(None)
                return
            self.protocol.receive_data(data)
            for event in self.protocol.events():
                if isinstance(event, BytesMessage):
                    parts += event.data
                    if event.message_finished:
                        self.received.put_nowait(bytes(parts))
                        parts = b""
                elif isinstance(event, Ping):
                    self._writer.write(self.protocol.send(event.response()))
                elif isinstance(event, CloseConnection):
                    self.received.put_nowait(None)
                    return

    def close(self) -> None:
        self._writer.close()


class Member:
    """Serves *path*. Everything heard over the agent's line is in the attributes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.hellos: list[wire.Hello] = []
        self.notes: list[wire.Note] = []
        self.heartbeats: list[wire.Heartbeat] = []
        self.reports: dict[tuple[str, str], wire.InstanceReport] = {}
        self.history: list[wire.InstanceReport] = []
        self.stamp: wire.Stamp | None = None
        self.refused = ""
        self.desired: wire.Desired | None = None
        self.blobs: dict[str, bytes] = {}
        self.open_lines = 0
        """Agents' lines that are open now."""
        self._changed = asyncio.Condition()
        self._server: asyncio.Server | None = None
        self._line: Connection | None = None
        self._streams: dict[str, asyncio.Future[Connection]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        self.path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._accept, str(self.path))

    async def stop(self) -> None:
        """Hang up on everybody and listen no more."""
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._server is not None:
            await self._server.wait_closed()
        self._line = None

    @property
    def connected(self) -> bool:
        """Whether an agent's line is open, and has said hello."""
        return self._line is not None and bool(self.hellos)

    def say(self, message: object) -> None:
        """Send *message* to the agent that is connected."""
        assert self._line is not None
        self._line.send(message)

    def push(self, desired: wire.Desired) -> None:
        self.desired = desired
        if self._line is not None:
            self._line.send(desired)

    async def stream(self, request: wire.LogsRequest | wire.ExecRequest | wire.RunRequest) -> Connection:
        """Ask the agent for a stream and return it once dialled."""
        assert self._line is not None
        name = secrets.token_hex(16)
        dialled: asyncio.Future[Connection] = asyncio.get_running_loop().create_future()
        self._streams[name] = dialled
        self._line.send(wire.OpenStream(id=name, request=request))
        async with asyncio.timeout(10):
            return await dialled

    async def until(self, condition: Callable[[], object], seconds: float = 20.0) -> None:
        """Return when *condition* holds, asked after everything that is heard and every 50 ms."""
        try:
            async with asyncio.timeout(seconds):
                while not condition():
                    try:
                        async with asyncio.timeout(0.05):
                            async with self._changed:
                                await self._changed.wait()
                    except TimeoutError:
                        continue
        except TimeoutError:
            raise AssertionError(f"not within {seconds} s; reports: {list(self.reports.values())}") from None

    def kinds(self) -> list[str]:
        return [note.kind for note in self.notes]

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n")
            if b" /v1/blobs/" in head:
                await self._blob(head.split()[1].rpartition(b"/")[2].decode(), reader, writer)
                return
            connection = Connection(reader, writer)
            connection.protocol.receive_data(head)
            if not await connection.shake_hands():
                return
            if connection.target == "/v1/agent":
                connection.accept()
                await self._agent(connection)
            else:
                dialled = self._streams.pop(connection.target.rpartition("/")[2], None)
                if dialled is None:
                    connection.reject(404, b"no such stream")
                    return
                connection.accept()
                dialled.set_result(connection)
                await connection.read()
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            writer.close()

    async def _agent(self, connection: Connection) -> None:
        self._line = connection
        self.open_lines += 1
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(connection.read())
                while (data := await connection.received.get()) is not None:
                    self._hear(wire.from_agent.decode(data), connection)
                    async with self._changed:
                        self._changed.notify_all()
        finally:
            self.open_lines -= 1
        if self._line is connection:
            self._line = None

    def _hear(self, message: wire.FromAgent, connection: Connection) -> None:
        match message:
            case wire.Hello():
                self.hellos.append(message)
                if self.desired is not None:
                    connection.send(self.desired)
            case wire.Report():
                if message.full:
                    self.reports.clear()
                for report in message.instances:
                    self.reports[report.service, report.id] = report
                    self.history.append(report)
                for gone in message.gone:
                    self.reports.pop(gone, None)
                self.stamp, self.refused = message.stamp, message.refused
            case wire.Heartbeat():
                self.heartbeats.append(message)
            case wire.Note():
                self.notes.append(message)

    async def _blob(self, digest: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        body = self.blobs.get(digest)
        status = b"200 OK" if body is not None else b"404 Not Found"
        body = body or b"{}"
        writer.write(b"HTTP/1.1 " + status + b"\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(body))
        writer.write(body)
        await writer.drain()
