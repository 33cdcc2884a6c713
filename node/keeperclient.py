"""How others speak with the keeper: an asyncio client for the agent, plain calls for the command line, and its start.

Typed over version 1 of the protocol (docs/node.md). A refusal is a KeeperError that keeps the keeper's kind and errno; a
lost or absent keeper is Unreachable, and then its children live on: ``start_detached`` and connect again.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import msgspec

import slum
from slum.errors import SlumError, Unreachable
from slum.frozen import Frozen
from slum.node.types import Spawn
from slum.paths import Home

PACKET_BYTES_MAX = 128 << 10
CALL_TIMEOUT_S = 15.0
EVENTS_MAX = 10_000
READS_A_TURN = 64

Kind = Literal["exists", "missing", "invalid", "os"]


class KeeperError(SlumError):
    """The keeper refused: *kind* says how, *errno* what the kernel said where it did."""

    code = "keeper"

    def __init__(self, kind: Kind, message: str, *, errno: int | None = None) -> None:
        super().__init__(message)
        self.kind: Kind = kind
        self.errno = errno


class Child(Frozen):
    """One child of the keeper. Identity is (boot_id, pid, start_time); a negative *status* is a signal, None unseen."""

    name: str
    pid: int
    start_time: int
    boot_id: str
    state: Literal["running", "exited"]
    status: int | None
    exited_at: float | None
    started_at: float
    adopted: bool
    respawns: int
    meta: dict[str, str | int | None] = {}

    @property
    def running(self) -> bool:
        return self.state == "running"


class Event(Frozen):
    """What happened to *child*."""

    event: Literal["spawned", "exit"]
    child: Child


class Hello(Frozen):
    pid: int
    version: str
    boot_id: str
    started_at: float
    protocol: int
    data: str = ""
    """Its data folder; "" from an older keeper, which does not tell."""


class Listening(Frozen):
    """A listener: *inode* is its socket's, and *bound* the name that /proc/net/unix shows for it and its connections."""

    inode: int
    bound: str
    path: str | None = None
    tcp: str | None = None


class ListenerAddress(Frozen):
    name: str
    path: str | None = None
    tcp: str | None = None


class Stats(Frozen):
    rss_bytes: int
    children: int
    listeners: int
    fds: int
    dropped_bytes: dict[str, int]


class KeeperClient:
    """One connection to the keeper, used by any number of tasks at once. Every call may raise KeeperError or Unreachable."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._next_id = 0
        self._calls: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()
        self._sending = asyncio.Lock()
        self._writable = asyncio.Event()
        self._lost: str | None = None
        self._loop.add_reader(sock.fileno(), self._readable)

    @classmethod
    async def connect(cls, home: Home, *, timeout_s: float = CALL_TIMEOUT_S) -> Self:
        """Return a client of the keeper of *home*; Unreachable when none answers within *timeout_s*."""
        client = cls(_connected(home, blocking_s=None))
        try:
            await client.hello(timeout_s=timeout_s)
        except BaseException:
            await client.close()
            raise
        return client

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    @property
    def lost(self) -> bool:
        """Whether the connection is gone; it does not come back."""
        return self._lost is not None

    async def close(self) -> None:
        """Close the connection. May be repeated; ``close_listener`` is what closes a listening socket."""
        self._lose("the connection was closed")

    async def hello(self, *, timeout_s: float = CALL_TIMEOUT_S) -> Hello:
        return msgspec.convert(await self.call("hello", timeout_s=timeout_s), Hello)

    async def spawn(self, spawn: Spawn, stdio: tuple[int, int, int] | None = None) -> Child:
        """Start *spawn* and return it once its program executes; *stdio* become its 0, 1, 2 and stay open here too."""
        answer = await self.call("spawn", spawn=msgspec.to_builtins(spawn), fds=stdio or ())
        return msgspec.convert(answer["child"], Child)

    async def signal(self, name: str, signum: int = signal.SIGTERM, *, tree: bool = False) -> None:
        """Signal *name* as its Signalling says; kind "missing" when it is unknown or has exited."""
        await self.call("signal", name=name, signal=int(signum), tree=tree)

    async def list_children(self) -> tuple[Child, ...]:
        """Return all children, ordered by name."""
        found: list[Child] = []
        while True:
            answer = await self.call("list", after=found[-1].name if found else None)
            found += msgspec.convert(answer["children"], list[Child])
            if not answer["more"]:
                return tuple(found)

    async def forget(self, name: str) -> None:
        """Drop the record of the exited *name*; kind "invalid" while it lives."""
        await self.call("forget", name=name)

    async def stop_respawn(self, name: str) -> None:
        """Make the next exit of *name* its last; it is not signalled."""
        await self.call("stop_respawn", name=name)

    async def listen(
        self,
        name: str,
        *,
        path: Path | str | None = None,
        base: Path | str | None = None,
        tcp: str | None = None,
        backlog: int = 1024,
        uid: int | None = None,
        gid: int | None = None,
        mode: int = 0o600,
    ) -> Listening:
        """Make the keeper listen at *path* or *tcp*; the same again is no change, another address is kind "exists".

        *base* is a folder above *path* that no service can replace: below it no link is followed.
        """
        where = {"path": str(path)} if path is not None else {"tcp": tcp}
        if base is not None:
            where["base"] = str(base)
        answer = await self.call("listen", name=name, **where, backlog=backlog, uid=uid, gid=gid, mode=mode)
        return msgspec.convert(answer, Listening)

    async def listeners(self) -> tuple[ListenerAddress, ...]:
        answer = await self.call("listeners")
        return msgspec.convert(answer["listeners"], tuple[ListenerAddress, ...])

    async def close_listener(self, name: str) -> None:
        """Close the listener *name* and unlink its path; children that hold the socket keep it."""
        await self.call("close", name=name)

    async def subscribe(self) -> None:
        """Ask for events from now on; subscribe before listing, and nothing is missed."""
        await self.call("subscribe")

    async def events(self) -> AsyncIterator[Event]:
        """Yield each event after ``subscribe``; Unreachable when the connection is lost. For one task only."""
        while (event := await self._events.get()) is not None:
            yield event
        raise self._unreachable()

    async def stats(self) -> Stats:
        return msgspec.convert(await self.call("stats"), Stats)

    async def reexec(self) -> None:
        """Make the keeper replace itself by the installed one; this connection is lost then: connect again."""
        await self.call("reexec")

    async def shutdown(self, names: Sequence[str], *, grace_s: float = 10.0) -> None:
        """End *names* (TERM, then KILL after *grace_s*); the keeper ends when no child is left."""
        await self.call("shutdown", names=list(names), grace_s=grace_s)

    async def call(
        self, op: str, *, fds: Sequence[int] = (), timeout_s: float = CALL_TIMEOUT_S, **arguments: Any
    ) -> dict[str, Any]:
        """Do one request of the protocol and return its answer."""
        if self._lost is not None:
            raise self._unreachable()
        self._next_id += 1
        number = self._next_id
        packet = json.dumps({"id": number, "op": op, **arguments}).encode()
        if len(packet) > PACKET_BYTES_MAX:
            raise KeeperError("invalid", f"{op} is over {PACKET_BYTES_MAX} bytes")
        future: asyncio.Future[dict[str, Any]] = self._loop.create_future()
        self._calls[number] = future
        try:
            async with asyncio.timeout(timeout_s):
                await self._send(packet, fds)
                return _checked(await future)
        except TimeoutError:
            raise Unreachable(f"the keeper did not answer {op} within {timeout_s:.0f} s") from None
        except OSError as error:
            self._lose(error.strerror or str(error))
            raise self._unreachable() from error
        finally:
            self._calls.pop(number, None)
            if future.done() and not future.cancelled():
                future.exception()  # seen, whoever was cancelled meanwhile

    async def _send(self, packet: bytes, fds: Sequence[int]) -> None:
        async with self._sending:
            while True:
                if self._lost is not None:
                    raise self._unreachable()
                try:
                    self._sock.sendmsg([packet], _rights(fds), socket.MSG_NOSIGNAL)
                    return
                except BlockingIOError:
                    await self._wait_writable()

    async def _wait_writable(self) -> None:
        self._writable.clear()
        self._loop.add_writer(self._sock.fileno(), self._writable.set)
        try:
            await self._writable.wait()
        finally:
            if self._lost is None:
                self._loop.remove_writer(self._sock.fileno())

    def _readable(self) -> None:
        for _ in range(READS_A_TURN):
            try:
                packet = self._sock.recv(PACKET_BYTES_MAX)
            except BlockingIOError:
                return
            except OSError as error:
                self._lose(error.strerror or str(error))
                return
            if not packet:
                self._lose("it closed the connection")
                return
            self._take(json.loads(packet))
            if self._lost is not None:
                return

    def _take(self, message: dict[str, Any]) -> None:
        if "event" in message:
            if self._events.qsize() >= EVENTS_MAX:
                self._lose(f"{EVENTS_MAX} of its events were not read")
                return
            self._events.put_nowait(msgspec.convert(message, Event))
            return
        future = self._calls.get(message["id"])
        if future is not None and not future.done():
            future.set_result(message)

    def _lose(self, why: str) -> None:
        if self._lost is not None:
            return
        self._lost = why
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())
        self._sock.close()
        self._writable.set()
        self._events.put_nowait(None)
        for future in self._calls.values():
            if not future.done():
                future.set_exception(self._unreachable())

    def _unreachable(self) -> Unreachable:
        return Unreachable(f"the keeper is gone: {self._lost}", hint="its children live on; `slum up` starts a keeper")


def call(home: Home, op: str, *, timeout_s: float = CALL_TIMEOUT_S, **arguments: Any) -> dict[str, Any]:
    """Do one request without asyncio and return the answer; KeeperError or Unreachable."""
    packet = json.dumps({"id": 1, "op": op, **arguments}).encode()
    with _connected(home, blocking_s=timeout_s) as sock:
        try:
            sock.send(packet)
            answer = sock.recv(PACKET_BYTES_MAX)
        except OSError as error:
            raise Unreachable(f"the keeper at {home.keeper_socket} does not answer {op}: {error}") from error
    if not answer:
        raise Unreachable(f"the keeper at {home.keeper_socket} closed the connection instead of answering {op}")
    return _checked(json.loads(answer))


def keeper_command(home: Home, *, detach: bool = False) -> tuple[list[str], dict[str, str]]:
    """Return argv and environment of the keeper of *home*, as small as Python gets: no site, nothing of ours inherited."""
    argv = [sys.executable, "-S", "-P", "-m", "slum.node.keeper"]
    argv += ["--data-dir", str(home.data), "--run-dir", str(home.run)]
    package = Path(slum.__file__ or "").parent.parent
    return argv + ["--detach"] * detach, {"PYTHONPATH": str(package), "PATH": os.defpath}


def start_detached(home: Home, *, timeout_s: float = CALL_TIMEOUT_S) -> Hello:
    """Make a keeper of *home* run in the background, unless one does, and return its hello; Unreachable when it cannot.

    Blocks for some 100 ms; may be repeated at any time, also when the keeper was killed and its children live on.
    """
    argv, env = keeper_command(home, detach=True)
    try:
        done = subprocess.run(
            argv, env=env, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s, cwd="/", check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unreachable(f"the keeper does not start: {error}") from error
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip()
        raise Unreachable(f"the keeper does not start: {said or f'exit {done.returncode}'}", hint=_log_hint(home))
    deadline = time.monotonic() + timeout_s
    while True:  # one that holds the lock may not listen yet
        try:
            return msgspec.convert(call(home, "hello", timeout_s=timeout_s), Hello)
        except Unreachable:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _log_hint(home: Home) -> str:
    return f"see {home.own_log('keeper')}"


def _connected(home: Home, *, blocking_s: float | None) -> socket.socket:
    with contextlib.ExitStack() as undo:
        sock = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        sock.settimeout(blocking_s if blocking_s is not None else 0)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, PACKET_BYTES_MAX * 2)
            sock.connect(str(home.keeper_socket))
        except OSError as error:
            raise Unreachable(
                f"no keeper answers at {home.keeper_socket}: {error.strerror or error}",
                hint="`slum up` starts one, and it takes over what still runs",
            ) from error
        undo.pop_all()
        return sock


def _rights(fds: Sequence[int]) -> list[tuple[int, int, bytes]]:
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds).tobytes())] if fds else []


def _checked(answer: Mapping[str, Any]) -> dict[str, Any]:
    if not answer["ok"]:
        raise KeeperError(answer["kind"], answer["error"], errno=answer["errno"])
    return dict(answer)
