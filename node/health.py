"""Ask one generation whether it is well: an HTTP request over its own socket, or that it accepts a connection.

2xx and 3xx are healthy. The socket is opened as sockets.py says, so that a planted link leads nowhere, and the peer is
spoken to by a real HTTP client (h11) with a deadline and a cap on what is read. A listener that the keeper holds accepts
into its backlog without the service, so there "accepts" means that our connection has left the queue. Answers are facts;
what follows from them is decided in supervise.py. Must never raise for what a service does.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from pathlib import Path

import h11

from slum.frozen import Frozen
from slum.node.sockets import open_socket, open_to_router, queued

BODY_BYTES_MAX = 64 << 10
ANSWER_BYTES_MAX = 256 << 10
"""Of all that is received: interim answers and the frames of chunks are no body, and may have no end."""
READ_BYTES = 16 << 10
EXCERPT_CHARS = 200
RETRY_S = 0.02
USER_AGENT = "slum-health"


class Door(Frozen):
    """Where and how to ask. Either *path* (with the folder *base* above it that the service cannot replace) or *port*."""

    path: Path | None = None
    base: Path | None = None
    bound: str = ""
    """The name under which the kernel shows the listener that the keeper holds; empty when the service bound it."""
    uid: int | None = None
    router_gid: int | None = None
    port: int | None = None
    health: str | None = None
    host: str = "localhost"


class Answer(Frozen):
    """*text* is one line for people: "GET /healthz -> 503 in 4 ms: database is locked"."""

    ok: bool
    text: str


async def ask(door: Door, timeout_s: float) -> Answer:
    """Return the answer, after *timeout_s* at the latest."""
    what = f"GET {door.health}" if door.health else "connect"
    if door.path is not None and not _there(door.path):
        return Answer(ok=False, text=f"{what}: no socket at {door.path}")
    began = time.monotonic()
    try:
        async with asyncio.timeout(timeout_s):
            with await connect(door) as sock:
                if door.health is not None:
                    status, excerpt = await get(sock, door.health, door.host)
                    took_ms = (time.monotonic() - began) * 1000
                    text = f"{what} -> {status} in {took_ms:.0f} ms" + (f": {excerpt}" if excerpt else "")
                    return Answer(ok=200 <= status < 400, text=text)
                if door.bound:
                    await accepted(door.bound)
    except TimeoutError:
        return Answer(ok=False, text=f"{what}: no answer within {timeout_s:g} s")
    except FileNotFoundError:
        return Answer(ok=False, text=f"{what}: no socket at {door.path}")
    except (OSError, h11.RemoteProtocolError) as error:
        return Answer(
            ok=False,
            text=f"{what}: {error.strerror or error}" if isinstance(error, OSError) else f"{what}: no HTTP: {error}",
        )
    return Answer(ok=True, text=f"{what}: accepted in {(time.monotonic() - began) * 1000:.0f} ms")


async def connect(door: Door) -> socket.socket:
    """Return a connected, non-blocking socket; OSError when there is nobody."""
    if door.port is not None:
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", door.port))
        except BaseException:
            sock.close()
            raise
        return sock
    if door.path is None or door.base is None:
        raise FileNotFoundError
    fd = open_socket(door.path, base=door.base, uid=door.uid)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        if door.router_gid is not None:
            open_to_router(fd, door.router_gid)
        while True:
            try:
                sock.connect(f"/proc/self/fd/{fd}")
            except BlockingIOError:
                # Its backlog is full; connecting to a unix socket cannot be waited for by polling.
                await asyncio.sleep(RETRY_S)
            else:
                return sock
    except BaseException:
        sock.close()
        raise
    finally:
        os.close(fd)


async def get(sock: socket.socket, path: str, host: str) -> tuple[int, str]:
    """Send one GET and return (status, beginning of a bad answer's body as one line)."""
    loop = asyncio.get_running_loop()
    http = h11.Connection(h11.CLIENT, max_incomplete_event_size=READ_BYTES)
    headers = [("Host", host), ("User-Agent", USER_AGENT), ("Accept", "*/*"), ("Connection", "close")]
    head = http.send(h11.Request(method="GET", target=path, headers=headers)) or b""
    await loop.sock_sendall(sock, head + (http.send(h11.EndOfMessage()) or b""))
    status, body, size, received = 0, b"", 0, 0
    while True:
        event = http.next_event()
        if event is h11.NEED_DATA:
            data = await loop.sock_recv(sock, READ_BYTES)
            received += len(data)
            if received > ANSWER_BYTES_MAX:
                break
            http.receive_data(data)
            await asyncio.sleep(0)  # sock_recv does not wait while more is there: a flood would hold up all else
        elif isinstance(event, h11.Response):
            status = event.status_code
        elif isinstance(event, h11.Data):
            body, size = (body + event.data)[: EXCERPT_CHARS * 4], size + len(event.data)
        if isinstance(event, h11.EndOfMessage | h11.ConnectionClosed) or size > BODY_BYTES_MAX:
            break
    if not status:
        raise h11.RemoteProtocolError(f"no answer in {received >> 10} KiB")
    # The answer was read to its end: closing earlier would show in the service's log as a broken pipe.
    text = "" if 200 <= status < 400 else " ".join(body.decode("utf-8", "replace").split())[:EXCERPT_CHARS]
    return status, text


async def accepted(bound: str) -> None:
    """Return when no connection waits in the queue of the listener that the kernel shows as *bound*, or it moves on."""
    waiting = queued(bound)
    while waiting:
        await asyncio.sleep(RETRY_S)
        now = queued(bound)
        if now < waiting:
            return
        waiting = now


def _there(path: Path) -> bool:
    """Tell cheaply that nothing is there yet, which is most of the answers while services start."""
    return os.path.lexists(path)
