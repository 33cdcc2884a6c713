"""A real keeper with a real router, and small HTTP services on unix sockets behind it."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from slum.node import keeperclient, router
from slum.node.keeperclient import Child, KeeperClient
from slum.node.router import Wanted
from slum.node.routes import Routes
from slum.paths import Home

DEADLINE_S = 15.0


@asynccontextmanager
async def kept_home() -> AsyncIterator[tuple[Home, KeeperClient]]:
    """Run a keeper of a new home, whose folders the router's uid can pass; all of it is gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="s", dir="/tmp"))
    os.chmod(folder, 0o711)
    home = Home(data=folder / "d", run=folder / "r")
    for path, mode in ((home.data, 0o711), (home.run, 0o711), (home.private, 0o700), (home.run / "i", 0o711)):
        path.mkdir(mode=mode)
        path.chmod(mode)
    pid = (await asyncio.to_thread(keeperclient.start_detached, home)).pid
    try:
        async with await KeeperClient.connect(home) as keeper:
            try:
                yield home, keeper
            finally:
                await keeper.shutdown([child.name for child in await keeper.list_children()], grace_s=2)
                await until(lambda: not os.path.exists(f"/proc/{pid}"))
    finally:
        shutil.rmtree(folder)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for *condition*, at most DEADLINE_S."""
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110 - what is waited for happens in other processes
            await asyncio.sleep(0.01)


@dataclass
class Site:
    """A running router on a port of its own."""

    home: Home
    keeper: KeeperClient
    address: str
    routes: Routes
    port: int = 0
    domain: str = "localhost"

    async def ensure(self) -> None:
        await router.ensure(self.keeper, self.home, Wanted(listen=(self.address,), domain=self.domain))

    async def child(self) -> Child:
        return next(child for child in await self.keeper.list_children() if child.name == router.NAME)

    async def get(self, host: str, path: str = "/", headers: str = "") -> Answer:
        return await request(self.port, host, path, headers)


@asynccontextmanager
async def site() -> AsyncIterator[Site]:
    async with kept_home() as (home, keeper):
        made = Site(home=home, keeper=keeper, address="127.0.0.1:0", routes=Routes(home))
        await made.ensure()
        bound = (await keeper.listen(router.listener_name(made.address), tcp=made.address, backlog=4096)).bound
        made.port = int(bound.rpartition(":")[2])
        yield made


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: str


async def request(port: int, host: str, path: str = "/", headers: str = "", *, ip: str = "127.0.0.1") -> Answer:
    """Do one HTTP/1.1 request on a connection of its own."""
    async with asyncio.timeout(DEADLINE_S):
        reader, writer = await asyncio.open_connection(ip, port)
        try:
            writer.write(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n{headers}\r\n".encode())
            return parse(await reader.read())
        finally:
            writer.close()


def parse(raw: bytes) -> Answer:
    head, _, body = raw.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    if not first:
        raise ConnectionResetError("closed without an answer")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return Answer(status=int(first.split()[1]), headers=headers, body=body.decode())


@dataclass
class Service:
    """An HTTP/1.1 service of some 20 lines: it answers its name and the request's head, or what *handle* does."""

    name: str
    path: Path | None = None
    handle: Callable[[bytes, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]] | None = None
    served: int = 0
    open: set[int] = field(default_factory=set)
    heads: list[str] = field(default_factory=list)

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open.add(id(writer))
        try:
            while head := await _head(reader):
                self.heads.append(head.decode())
                if self.handle is not None:
                    await self.handle(head, reader, writer)
                    return
                body = self.name.encode()
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
                await writer.drain()
                self.served += 1
        except ConnectionError:
            return
        finally:
            self.open.discard(id(writer))
            writer.close()


async def _head(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return b""


@asynccontextmanager
async def serving(service: Service) -> AsyncIterator[asyncio.Server]:
    """Serve on the service's unix socket (connectable by the router), or on a TCP port when it has none."""
    if service.path is None:
        server = await asyncio.start_server(service, "127.0.0.1", 0)
    else:
        server = await asyncio.start_unix_server(service, str(service.path), backlog=512)
        service.path.chmod(0o666)
    async with server:
        yield server


def loopback() -> str:
    """Return an address of 127.0.0.0/8 that no other test is likely to use."""
    return f"127.{random.randint(2, 254)}.{random.randint(0, 254)}.{random.randint(1, 254)}"
