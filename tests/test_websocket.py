"""Our two WebSocket clients (the agent's, and that of exec and run) against peers that say everything at once, or nothing."""

from __future__ import annotations

import asyncio
import secrets
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from wsproto import ConnectionType, WSConnection
from wsproto.events import AcceptConnection, BytesMessage, CloseConnection

from slum import wire
from slum.cli.terminal import attach
from slum.errors import Unreachable
from slum.node.websocket import connect
from slum.paths import Home
from slum.reach import Here

END = wire.encoder.encode(wire.StreamEnd(status=7))
Peer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def a_server(peer: Peer) -> AsyncIterator[Home]:
    """Serve *peer* where the API of a Home would be."""
    folder = Path(f"/tmp/sw{secrets.token_hex(4)}")
    home = Home(data=folder / "data", run=folder)
    home.api_socket.parent.mkdir(parents=True)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await peer(reader, writer)
        writer.close()
        await writer.wait_closed()

    try:
        async with await asyncio.start_unix_server(serve, str(home.api_socket)):
            yield home
    finally:
        shutil.rmtree(folder)


async def all_at_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Accept, say the last word and close in one packet, as a command that ends at once makes the server do."""
    protocol = WSConnection(ConnectionType.SERVER)
    protocol.receive_data(await reader.readuntil(b"\r\n\r\n"))
    list(protocol.events())
    said = (AcceptConnection(), BytesMessage(data=END), CloseConnection(code=1000))
    writer.write(b"".join(protocol.send(event) for event in said))
    await writer.drain()
    await reader.read(1024)


async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Read half the question and reset the connection."""
    await reader.read(10)


async def test_an_answer_that_comes_with_the_handshake_and_the_goodbye_is_read() -> None:
    async with a_server(all_at_once) as home:
        async with await connect(home.api_socket, "/v1/exec", 5) as socket:
            assert await socket.receive() == END
            for _ in range(2):
                with pytest.raises(Unreachable, match="1000"):
                    await socket.receive()


async def test_a_command_that_ends_with_the_handshake_gives_its_status() -> None:
    async with a_server(all_at_once) as home:
        assert await asyncio.to_thread(attach, Here(home), "exec", [("service", "notes")], terminal=False) == 7


async def test_a_peer_that_resets_before_it_answers_is_unreachable() -> None:
    async with a_server(hang_up) as home:
        with pytest.raises(Unreachable, match="the member is gone"):
            await connect(home.api_socket, "/v1/exec", 5)
        with pytest.raises(Unreachable, match="closed the connection"):
            await asyncio.to_thread(attach, Here(home), "exec", [("service", "notes")], terminal=False)
