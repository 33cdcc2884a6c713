"""An agent for tests of the server: dials a member over real WebSockets and says what a test tells it to say.

With *obedient* it does as a good agent would, at once: each Desired is answered by a full report in which every instance
is healthy on its release, started once more when its release or its restarts changed, stopped where that was asked.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from slum import wire
from slum.errors import Unreachable
from slum.model import Stamp, release_of
from slum.node.websocket import WebSocket, connect
from slum.wire import Phase

T = TypeVar("T")
StreamHandler = Callable[[wire.OpenStream, WebSocket], Awaitable[None]]


class FakeAgent:
    def __init__(
        self,
        api_socket: Path,
        tenement: str = "here",
        machine: str = "local:m1",
        *,
        obedient: bool = True,
        stamp: Stamp | None = None,
    ) -> None:
        self.api_socket = api_socket
        self.tenement = tenement
        self.machine = machine
        self.obedient = obedient
        self.stamp = stamp or Stamp()
        self.desired: list[wire.Desired] = []
        self.refused: list[wire.Refused] = []
        self.instances: dict[tuple[str, str], wire.InstanceReport] = {}
        self.on_stream: StreamHandler = end_at_once
        self.ended = ""
        """Why the connection is over, once it is."""
        self._restarts: dict[tuple[str, str], int] = {}
        self._socket: WebSocket | None = None
        self._moved = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        await self.dial()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.hang_up()

    async def dial(self) -> None:
        """Connect, say hello, and listen from now on."""
        self._socket = await connect(self.api_socket, "/v1/agent", 5.0)
        self.ended = ""
        await self.say(self.hello())
        self._start(self._listen(self._socket), "fake agent")

    async def hang_up(self) -> None:
        tasks, self._tasks = self._tasks, set()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._socket is not None:
            await self._socket.close()
            self._socket = None

    def hello(self) -> wire.Hello:
        level = wire.LevelStatus(level="namespace", available=True, detail="proven in 4 ms")
        no = wire.LevelStatus(level="sandbox", available=False, detail="runsc not found", fix="apt install runsc")
        return wire.Hello(
            protocol=wire.PROTOCOL,
            version="0.1.0",
            machine=self.machine,
            tenement=self.tenement,
            stamp=self.stamp,
            boot_id="b" * 32,
            host="box",
            cpus=2,
            memory_bytes=4 << 30,
            levels=(level, no, wire.LevelStatus(level="process", available=True, detail="")),
            limits="cgroup v1",
        )

    async def say(self, message: wire.FromAgent) -> None:
        assert self._socket is not None
        await self._socket.send(wire.encoder.encode(message))

    async def report(self, *instances: wire.InstanceReport, full: bool = False, refused: str = "") -> None:
        """Report *instances* under the newest stamp."""
        for instance in instances:
            self.instances[instance.service, instance.id] = instance
        await self.say(wire.Report(stamp=self.stamp, at=time.time(), full=full, instances=instances, refused=refused))

    async def until(self, condition: Callable[[FakeAgent], T], deadline_s: float = 8.0) -> T:
        """Return what *condition* gives as soon as that is true."""
        async with asyncio.timeout(deadline_s):
            while not (found := condition(self)):
                self._moved.clear()
                await self._moved.wait()
            return found

    def instance(self, service: str, phase: Phase, instance: str = "main", **fields: object) -> wire.InstanceReport:
        """Return a report of *service* on the release that is desired of it."""
        wanted = next(s for s in self.desired[-1].services if s.name == service)
        before = self.instances.get((service, instance))
        number = before.generations[-1].number if before and before.generations else 1
        release = release_of(wanted)
        generation = wire.GenerationReport(
            number=number, release=release, phase=phase, pid=4000 + number, started_at=time.time(), serving=True
        )
        base = {"release": release, "serving": number, "generations": (generation,), "since": time.time()}
        return wire.InstanceReport(service=service, id=instance, phase=phase, **{**base, **fields})  # type: ignore[arg-type]

    async def _listen(self, socket: WebSocket) -> None:
        try:
            while True:
                await self._take(wire.to_agent.decode(await socket.receive()))
                self._moved.set()
        except Unreachable as error:
            self.ended = str(error)
            self._moved.set()

    async def _take(self, message: wire.ToAgent) -> None:
        match message:
            case wire.Desired():
                self.desired.append(message)
                self.stamp = message.stamp
                if self.obedient:
                    await self.obey()
            case wire.OpenStream():
                self._start(self._stream(message), f"fake stream {message.id[:6]}")
            case wire.Refused():
                self.refused.append(message)

    async def obey(self) -> None:
        """Report that all is as the newest Desired says."""
        desired = self.desired[-1]
        overrides = {(o.service, o.id): o for o in desired.overrides}
        before, self.instances = self.instances, {}
        for service in desired.services:
            for instance in service.instances:
                key = (service.name, instance)
                override = overrides.get(key, wire.Override(service=service.name, id=instance))
                self.instances[key] = _as_told(before.get(key), release_of(service), override, self._restarts)
        await self.say(
            wire.Report(stamp=self.stamp, at=time.time(), full=True, instances=tuple(self.instances.values()))
        )

    async def _stream(self, request: wire.OpenStream) -> None:
        try:
            async with await connect(self.api_socket, f"/v1/agent/streams/{request.id}", 5.0) as socket:
                await self.on_stream(request, socket)
        except Unreachable as error:
            self.ended = self.ended or str(error)

    def _start(self, work: Awaitable[None], name: str) -> None:
        async def run() -> None:
            await work

        task = asyncio.create_task(run(), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _as_told(
    before: wire.InstanceReport | None, release: str, override: wire.Override, restarts: dict[tuple[str, str], int]
) -> wire.InstanceReport:
    key = (override.service, override.id)
    number = before.generations[-1].number if before and before.generations else 0
    is_same = before is not None and before.release == release and restarts.get(key, 0) == override.restarts
    restarts[key] = override.restarts
    phase = Phase.STOPPED if override.stopped else Phase.HEALTHY
    if is_same and before is not None and before.phase is phase:
        return before
    number += 0 if override.stopped else 1
    generation = wire.GenerationReport(
        number=number, release=release, phase=phase, pid=4000 + number, started_at=time.time(), serving=True
    )
    return wire.InstanceReport(
        service=override.service,
        id=override.id,
        phase=phase,
        release=release,
        serving=None if override.stopped else number,
        generations=(generation,),
        since=time.time(),
    )


async def end_at_once(_request: wire.OpenStream, socket: WebSocket) -> None:
    await socket.send(wire.encoder.encode(wire.StreamEnd(status=0)))


def saying(*lines: str) -> StreamHandler:
    """Return a handler that answers any stream with *lines* ("ID SECONDS TEXT") and the end."""

    async def handle(_request: wire.OpenStream, socket: WebSocket) -> None:
        for line in lines:
            await socket.send(wire.encoder.encode(wire.StreamData(data=line.encode() + b"\n")))
        await socket.send(wire.encoder.encode(wire.StreamEnd(status=0)))

    return handle


async def echoing(_request: wire.OpenStream, socket: WebSocket) -> None:
    """Answer a shell's input with the same as output; "exit" ends it with status 7."""
    while True:
        frame = wire.on_stream.decode(await socket.receive())
        if isinstance(frame, wire.StreamData) and frame.data == b"exit":
            await socket.send(wire.encoder.encode(wire.StreamEnd(status=7)))
            return
        if isinstance(frame, wire.StreamData):
            await socket.send(wire.encoder.encode(wire.StreamData(data=frame.data, channel=1)))
