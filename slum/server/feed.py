"""What another member's server is told about the agents that dialled this one: all at first, then what changes.

One Feeder a watcher, one connection. Reports go out within milliseconds, figures once a second in one frame, and a frame goes out
every second in any case, so that silence means a broken line. Everything is bounded: a watcher that does not read loses its
connection, and begins anew with the whole.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from starlette.websockets import WebSocket, WebSocketDisconnect

from slum import wire
from slum.server import memberwire
from slum.server.agents import Seen, Session

if TYPE_CHECKING:
    from slum.server.control import Control

CALM_S = 0.02
EVERY_S = 1.0
SEND_S = 10.0
QUEUE_BYTES_MAX = 32 << 20
MESSAGE_BYTES_MAX = 4 << 20
"""Of what agents said, a frame: the rest goes into the next one."""


class Feeder:
    """Queues what the hub hears, for one watcher."""

    def __init__(self, control: Control) -> None:
        self._control = control
        self._heard: list[tuple[str, bytes]] = []
        self._bytes = 0
        self._lost: set[str] = set()
        self._marks: set[tuple[str, str, str, int]] = set()
        self._soon = asyncio.Event()

    # --- called by the hub --------------------------------------------------------------------------------------------
    def heard(self, machine: str, message: bytes, *, soon: bool) -> None:
        self._heard.append((machine, message))
        self._bytes += len(message)
        if soon:
            self._soon.set()

    def joined(self, machine: str, hello: bytes) -> None:
        self._lost.discard(machine)
        self.heard(machine, hello, soon=True)

    def lost(self, machine: str) -> None:
        self._lost.add(machine)
        self._soon.set()

    def moved(self) -> None:
        self._soon.set()

    # --- the connection -----------------------------------------------------------------------------------------------
    async def run(self, websocket: WebSocket) -> None:
        """Tell *websocket* for as long as it listens."""
        hub = self._control.hub
        hub.ears.add(self)
        try:
            for told in self._whole():
                await _send(websocket, told)
            async with asyncio.TaskGroup() as group:
                group.create_task(_until_gone(websocket), name="feed in")
                group.create_task(self._speak(websocket), name="feed out")
        except* (WebSocketDisconnect, RuntimeError, TimeoutError, _Over):
            pass
        finally:
            hub.ears.discard(self)

    async def _speak(self, websocket: WebSocket) -> None:
        while True:
            try:
                async with asyncio.timeout(EVERY_S):
                    await self._soon.wait()
                await asyncio.sleep(CALM_S)
            except TimeoutError:
                pass
            self._soon.clear()
            if self._bytes > QUEUE_BYTES_MAX:
                raise _Over
            heard, self._heard, self._bytes = self._heard, [], 0
            lost, self._lost = self._lost, set()
            *parts, rest = _parts(heard)
            for part in parts:
                await _send(websocket, memberwire.Told(heard=part))
            await _send(websocket, self._told(heard=rest, lost=tuple(sorted(lost))))

    def _whole(self) -> list[memberwire.Told]:
        heard: list[tuple[str, bytes]] = []
        for machine, seen in self._own():
            heard.append((machine, wire.encoder.encode(seen.hello)))
            report = wire.Report(
                stamp=seen.stamp, at=0.0, full=True, instances=tuple(seen.instances.values()), refused=seen.refused
            )
            if seen.is_reported:
                heard.append((machine, wire.encoder.encode(report)))
            figures = wire.Heartbeat(
                at=0.0, load=seen.load, memory_available_bytes=seen.memory_available_bytes, rss_bytes=seen.rss_bytes
            )
            heard.append((machine, wire.encoder.encode(figures)))
        first, *others = _parts(heard)
        return [
            memberwire.Told(whole=True, heard=first),
            *(memberwire.Told(heard=part) for part in others),
            self._told(),
        ]

    def _told(self, heard: tuple[tuple[str, bytes], ...] = (), lost: tuple[str, ...] = ()) -> memberwire.Told:
        control, desired = self._control, self._control.hub.desired
        own = self._own()
        marks = {(machine, *key, number) for machine, seen in own for key, number in seen.restarted.items()}
        new, self._marks = marks - self._marks, marks
        return memberwire.Told(
            heard=heard,
            lost=lost,
            at=control.hub.stamp,
            behind=tuple(
                machine for machine, seen in own if machine in desired and seen.stamp < desired[machine].stamp
            ),
            restarted=tuple(sorted(new)),
            troubles=control.troubles,
        )

    def _own(self) -> list[tuple[str, Seen]]:
        return [(m, seen) for m, seen in self._control.hub.seen.items() if isinstance(seen.session, Session)]


def _parts(heard: list[tuple[str, bytes]]) -> list[tuple[tuple[str, bytes], ...]]:
    """Cut *heard* into frames of a bearable size; at least one."""
    parts: list[list[tuple[str, bytes]]] = [[]]
    size = 0
    for machine, message in heard:
        if size + len(message) > MESSAGE_BYTES_MAX and parts[-1]:
            parts.append([])
            size = 0
        parts[-1].append((machine, message))
        size += len(message)
    return [tuple(part) for part in parts]


async def _send(websocket: WebSocket, told: memberwire.Told) -> None:
    async with asyncio.timeout(SEND_S):
        await websocket.send_bytes(memberwire.encode(told))


async def _until_gone(websocket: WebSocket) -> None:
    while True:
        await websocket.receive_bytes()


class _Over(Exception):
    """The watcher does not read as fast as agents talk."""
