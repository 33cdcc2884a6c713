"""Server-sent events: a response whose body a producer writes, document by document, with back-pressure.

The producer is called with ``emit`` and ends the stream by returning. A comment is sent every KEEPALIVE_S so that
silence means a broken line; when the client goes away, or the server stops, the producer is cancelled. A SlumError becomes the last event,
"error", with a Problem; the HTTP status has been sent by then. Format: https://html.spec.whatwg.org/#server-sent-events.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from slum import log
from slum.errors import SlumError
from slum.server.problems import BUG, problem_of

KEEPALIVE_S = 5.0


class Emit(Protocol):
    async def __call__(self, document: msgspec.Struct, *, event: str = "", id: str = "") -> None:
        """Send *document* as one event; waits while the client does not read."""
        ...


Producer = Callable[[Emit], Awaitable[None]]


class EventStream(Response):
    media_type = "text/event-stream"

    def __init__(self, producer: Producer) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._producer = producer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        # One event goes out whole before the next, whoever sends it.
        lock = asyncio.Lock()

        async def write(chunk: bytes) -> None:
            async with lock:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})

        async def emit(document: msgspec.Struct, *, event: str = "", id: str = "") -> None:
            await write(as_event(document, event=event, id=id))

        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(_hang_up(receive), name="sse disconnect")
                group.create_task(_stop(scope["state"]["stopping"]), name="sse stop")
                group.create_task(_keep_alive(write), name="sse keepalive")
                group.create_task(self._produce(emit), name="sse producer")
        except* _Over:
            pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _produce(self, emit: Emit) -> None:
        try:
            await self._producer(emit)
        except SlumError as error:
            await emit(problem_of(error), event="error")
        except Exception:  # noqa: BLE001  the edge: a bug ends this stream, with its traceback in the log
            log.get().exception("stream_failed")
            await emit(BUG, event="error")
        raise _Over


def as_event(document: msgspec.Struct, *, event: str = "", id: str = "") -> bytes:
    """Return *document* as one server-sent event."""
    head = (f"id: {id}\n" if id else "") + (f"event: {event}\n" if event else "")
    return head.encode() + b"data: " + msgspec.json.encode(document) + b"\n\n"


class _Over(Exception):
    """The stream is finished, by the producer or by the client."""


async def _hang_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    raise _Over


async def _stop(stopping: asyncio.Event) -> None:
    await stopping.wait()
    raise _Over


async def _keep_alive(write: Callable[[bytes], Awaitable[None]]) -> None:
    while True:
        await asyncio.sleep(KEEPALIVE_S)
        await write(b": still here\n\n")
