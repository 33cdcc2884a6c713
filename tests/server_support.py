"""A control plane for tests: real ledger and server processes in two throw-away folders, with a real keeper beside them.

The keeper holds a placeholder named "agent", so that the local operator finds its agent running and a test's FakeAgent
can take its place on the wire.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TypeVar

import httpx
import msgspec

from slum import api
from slum.ledger.commands import new_request_id
from slum.model import Fleet, LocalOperator, Service, Tenement
from slum.node.keeperclient import start_detached
from slum.node.types import Spawn
from slum.paths import Home
from slum.server.boot import down

T = TypeVar("T")
NOBODY_SEES_SEQ = 0


class Plane:
    """One control plane on one machine. *home* is its own; nothing of it outlives ``close``."""

    def __init__(self) -> None:
        token = secrets.token_hex(4)
        self.home = Home(data=Path(f"/tmp/slum-s-{token}"), run=Path(f"/tmp/ss{token}"))
        sleep = Spawn(name="agent", argv=(sys.executable, "-c", "import time; time.sleep(900)"), env={})
        self.home.data.mkdir(mode=0o711)
        self.home.boot.write_bytes(msgspec.json.encode({"children": (sleep,)}))
        self.keeper = start_detached(self.home)
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.log = (self.home.data / "log").open("ab")
        self.start("ledger")
        self.start("server")

    def start(self, name: str) -> None:
        argv = [sys.executable, "-m", f"slum.{name}.process"]
        argv += ["--data-dir", str(self.home.data), "--run-dir", str(self.home.run)]
        self.running[name] = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log, cwd="/")

    def kill(self, name: str, signum: int = signal.SIGKILL) -> int:
        process = self.running.pop(name)
        process.send_signal(signum)
        return process.wait(10)

    @property
    def logged(self) -> str:
        return (self.home.data / "log").read_text()

    def close(self) -> None:
        for name in tuple(self.running):
            self.kill(name)
        self.log.close()
        down(self.home, services=True, grace_s=1.0)
        shutil.rmtree(self.home.data)
        shutil.rmtree(self.home.run)

    @asynccontextmanager
    async def http(self) -> AsyncIterator[httpx.AsyncClient]:
        transport = httpx.AsyncHTTPTransport(uds=str(self.home.api_socket))
        async with httpx.AsyncClient(transport=transport, base_url="http://slum", timeout=20.0) as client:
            yield client

    async def ready(self, deadline_s: float = 15.0) -> None:
        """Return when the API answers and the ledger has a leader."""

        async def asks() -> bool:
            try:
                async with self.http() as http:
                    return (await http.get("/v1/status")).status_code == 200
            except httpx.TransportError:
                return False

        try:
            await eventually(asks, deadline_s)
        except TimeoutError as error:
            raise TimeoutError(f"{error}; running: {sorted(self.running)}; logged:\n{self.logged}") from None


@contextmanager
def a_plane() -> Iterator[Plane]:
    plane = Plane()
    try:
        yield plane
    finally:
        plane.close()


async def eventually(condition: Callable[[], Awaitable[T]], deadline_s: float = 8.0) -> T:
    """Return what *condition* gives as soon as that is true; TimeoutError when it does not become so."""
    end = time.monotonic() + deadline_s
    while not (found := await condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"not so within {deadline_s:g} s")
        await asyncio.sleep(0.02)
    return found


def a_fleet(*services: Service, name: str = "test", tenement: str = "here") -> Fleet:
    return Fleet(
        name=name,
        operators=(LocalOperator(name="local"),),
        tenements=(Tenement(name=tenement, operator="local", services=services),) if tenement else (),
    )


def a_service(name: str = "notes", **fields: object) -> Service:
    return Service(**{"name": name, "command": ("python3", "app.py"), **fields})  # type: ignore[arg-type]


def request_id(seq: int = NOBODY_SEES_SEQ) -> str:
    return new_request_id(seq)


async def put(http: httpx.AsyncClient, fleet: Fleet, base: int, **fields: object) -> httpx.Response:
    """Send *fleet* as an apply does."""
    asked = api.ApplyRequest(**{"fleet": fleet, "base_revision": base, "request_id": request_id(), **fields})  # type: ignore[arg-type]
    return await http.put("/v1/fleet", content=msgspec.json.encode(asked))


async def applied(http: httpx.AsyncClient, fleet: Fleet, base: int = 0) -> api.Applied:
    answer = await put(http, fleet, base)
    assert answer.status_code == 200, answer.text
    return msgspec.json.decode(answer.content, type=api.Applied)


async def get(http: httpx.AsyncClient, path: str, as_type: type[T], /, **query: object) -> T:
    answer = await http.get(f"/v1/{path}", params={k: str(v) for k, v in query.items()})
    assert answer.status_code == 200, answer.text
    return msgspec.json.decode(answer.content, type=as_type)


def problem(answer: httpx.Response) -> api.Problem:
    return msgspec.json.decode(answer.content, type=dict[str, api.Problem])["error"]


async def documents(answer: httpx.Response, kind: type[T]) -> AsyncIterator[T]:
    """Yield the documents of an event stream; an "error" event fails the test."""
    event = ""
    async for line in answer.aiter_lines():
        if line.startswith("event: "):
            event = line.removeprefix("event: ")
        if line.startswith("data: "):
            assert event != "error", line
            yield msgspec.json.decode(line.removeprefix("data: "), type=kind)
        if not line:
            event = ""


def is_root() -> bool:
    return os.geteuid() == 0
