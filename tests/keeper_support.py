"""A real keeper in folders of its own, for tests: started, killed, started again, and everything it began ended."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

from slum.errors import Unreachable
from slum.node.keeperclient import Child, KeeperClient, keeper_command
from slum.node.types import Log, Spawn
from slum.paths import Home

DEADLINE_S = 20.0
PAUSE_S = 0.01

T = TypeVar("T")


class Rig:
    """One Home, its keeper (or none), and clients to close at the end."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="sk", dir="/tmp"))
        self.folder.chmod(0o711)
        self.home = Home(data=self.folder / "d", run=self.folder / "r")
        self.process: subprocess.Popen[bytes] | None = None
        self._clients: list[KeeperClient] = []

    def start(self) -> None:
        """Start a keeper in the foreground; ``connect`` waits until it answers."""
        argv, env = keeper_command(self.home)
        with (self.folder / "said").open("ab") as said:
            self.process = subprocess.Popen(argv, env=env, stdin=subprocess.DEVNULL, stderr=said, cwd="/")

    def boot(self, *spawns: dict[str, Any]) -> None:
        self.home.data.mkdir(exist_ok=True)
        self.home.boot.write_text(json.dumps({"children": list(spawns)}))

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def said(self) -> str:
        return (self.folder / "said").read_text()

    async def connect(self) -> KeeperClient:
        async def attempt() -> KeeperClient | None:
            try:
                return await KeeperClient.connect(self.home)
            except Unreachable:
                assert self.process is None or self.process.poll() is None, self.said
                return None

        client = await until(attempt)
        self._clients.append(client)
        return client

    async def started(self) -> KeeperClient:
        self.start()
        return await self.connect()

    def kill(self, signum: int = signal.SIGKILL) -> None:
        """End the keeper by *signum*; its children stay."""
        assert self.process is not None
        self.process.send_signal(signum)
        self.process.wait(DEADLINE_S)
        self.process = None

    def log(self, name: str, **fields: int) -> Log:
        return Log(path=str(self.folder / "logs" / name / "current"), **fields)

    def raw_log(self, name: str) -> bytes:
        path = Path(self.log(name).path)
        return path.read_bytes() if path.exists() else b""

    def logged(self, name: str) -> list[str]:
        """Return the lines of the log of *name* without their times."""
        return [line.partition(" ")[2] for line in self.raw_log(name).decode().splitlines()]

    async def end(self) -> None:
        """End every child and the keeper, and remove the folders."""
        if self.process is not None and self.process.poll() is not None:
            self.process = None
        if self.process is None:
            self.start()
        client = await self.connect()
        await client.shutdown([child.name for child in await client.list_children()], grace_s=0)
        process = self.process
        assert process is not None
        await holds(lambda: process.poll() is not None)
        for each in self._clients:
            await each.close()
        shutil.rmtree(self.folder)


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    rig = Rig()
    try:
        yield rig
    finally:
        await rig.end()


def shell(rig: Rig, name: str, script: str, **fields: Any) -> Spawn:
    """Return a Spawn of ``sh -c script`` with a log and a PATH."""
    given: dict[str, Any] = {"env": {"PATH": os.defpath}, "log": rig.log(name), **fields}
    return Spawn(name=name, argv=("/bin/sh", "-c", script), **given)


def python(rig: Rig, name: str, code: str, **fields: Any) -> Spawn:
    """Return a Spawn of this Python with *code*."""
    given: dict[str, Any] = {"env": {"PATH": os.defpath}, "log": rig.log(name), **fields}
    return Spawn(name=name, argv=(sys.executable, "-I", "-S", "-c", code), **given)


async def until(look: Callable[[], Awaitable[T | None]]) -> T:
    """Return what *look* finds, asking again until it finds something."""
    deadline = time.monotonic() + DEADLINE_S
    while (found := await look()) is None:
        assert time.monotonic() < deadline, "it did not come to pass in time"
        await asyncio.sleep(PAUSE_S)
    return found


async def holds(condition: Callable[[], bool]) -> None:
    """Wait until *condition* holds."""

    async def look() -> bool | None:
        return condition() or None

    await until(look)


async def child_of(client: KeeperClient, name: str) -> Child | None:
    return next((child for child in await client.list_children() if child.name == name), None)


async def exited(client: KeeperClient, name: str) -> Child:
    """Wait until *name* has exited and return it."""

    async def look() -> Child | None:
        child = await child_of(client, name)
        return child if child is not None and not child.running else None

    return await until(look)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def text_of(path: str) -> str:
    return Path(path).read_text()


def children_of(pid: int) -> list[int]:
    return [int(word) for word in text_of(f"/proc/{pid}/task/{pid}/children").split()]


def catches(pid: int, signum: int) -> bool:
    """Return whether *pid* has a handler for *signum*."""
    status = dict(line.split(":\t", 1) for line in text_of(f"/proc/{pid}/status").splitlines() if ":\t" in line)
    return bool(int(status["SigCgt"], 16) >> signum - 1 & 1)
