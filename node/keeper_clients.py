"""The keeper's unix socket: who may speak, whole packets in and out, and no patience with clients that do not read.

Every packet is one JSON object of at most PACKET_BYTES_MAX; junk is answered and forgotten. A client may be dropped
at any time; it never makes the keeper wait, raise or grow.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import struct
from collections import deque

from slum.node.keeper_loop import READ, WRITE, Loop
from slum.node.keeper_proc import close_all

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

PACKET_BYTES_MAX = 128 << 10
PENDING_BYTES_MAX = 1 << 20
CLIENTS_MAX = 256
ACCEPT_PAUSE_S = 1.0


class Refused(Exception):
    """A request that is answered with ``ok: false``; *kind* is exists, missing, invalid or os."""

    def __init__(self, kind: str, why: str, number: int | None = None) -> None:
        super().__init__(why)
        self.kind = kind
        self.why = why
        self.number = number


class Client:
    """One connection, from ``accept`` to ``close``."""

    def __init__(self, loop: Loop, sock: socket.socket, door: Door) -> None:
        self.subscribed = False
        self.closed = False
        self._loop = loop
        self._sock = sock
        self._door = door
        self._pending: deque[bytes] = deque()
        self._pending_bytes = 0
        loop.watch(sock.fileno(), self._ready)

    def send(self, message: dict[str, Any]) -> None:
        """Send *message*, now or when the client reads; a client that leaves too much unread is dropped."""
        if self.closed:
            return
        packet = json.dumps(message, separators=(",", ":")).encode()
        self._pending.append(packet)
        self._pending_bytes += len(packet)
        self._flush()
        if self._pending_bytes > PENDING_BYTES_MAX:
            self._door.say(f"dropped a client that left {self._pending_bytes} bytes unread")
            self.close()

    def answer(self, number: object, refused: Refused | None = None, **fields: Any) -> None:
        """Answer the request *number*: with *fields*, or with why it was refused."""
        if refused is None:
            self.send({"id": number, "ok": True, **fields})
        else:
            why = {"kind": refused.kind, "error": refused.why, "errno": refused.number}
            self.send({"id": number, "ok": False, **why})

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._pending.clear()
            self._pending_bytes = 0
            self._loop.unwatch(self._sock.fileno())
            self._sock.close()
            self._door.clients.discard(self)

    def _ready(self, mask: int) -> None:
        if mask & WRITE:
            self._flush()
        if mask & ~WRITE and not self.closed:
            self._receive()

    def _flush(self) -> None:
        had = bool(self._pending)
        while self._pending:
            try:
                self._sock.send(self._pending[0], socket.MSG_NOSIGNAL)
            except BlockingIOError:
                break
            except OSError:  # gone, which the next read tells
                self.close()
                return
            self._pending_bytes -= len(self._pending.popleft())
        if had:
            self._loop.remask(self._sock.fileno(), READ | WRITE if self._pending else READ)

    def _receive(self) -> None:
        try:
            packet, ancillary, flags, _ = self._sock.recvmsg(
                PACKET_BYTES_MAX + 1, socket.CMSG_SPACE(12), socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        fds = [fd for _, _, data in ancillary for (fd,) in struct.iter_unpack("i", data[: len(data) // 4 * 4])]
        if not packet:
            close_all(fds)
            self.close()
            return
        number = None
        try:
            request = _parse(packet, flags)
            number = request.get("id")
            self._door.handle(self, request, fds)
        except Refused as refused:
            self.answer(number, refused)
        finally:
            close_all(fds)


def _parse(packet: bytes, flags: int) -> dict[str, Any]:
    if flags & socket.MSG_TRUNC or len(packet) > PACKET_BYTES_MAX:
        raise Refused("invalid", f"a packet over {PACKET_BYTES_MAX} bytes")
    if flags & socket.MSG_CTRUNC:
        raise Refused("invalid", "more than 3 descriptors")
    try:
        request = json.loads(packet)
    except (ValueError, RecursionError) as error:
        raise Refused("invalid", f"not JSON: {str(error)[:200]}") from None
    if not isinstance(request, dict) or type(request.get("id")) is not int or not isinstance(request.get("op"), str):
        raise Refused("invalid", "not an object with a number id and an op")
    return request


class Door:
    """The listening socket; *handle* gets every well-formed request and closes none of the descriptors with it."""

    def __init__(
        self,
        loop: Loop,
        path: str,
        *,
        handle: Callable[[Client, dict[str, Any], list[int]], None],
        say: Callable[[str], None],
        inherited: int | None = None,
    ) -> None:
        self.clients: set[Client] = set()
        self.handle = handle
        self.say = say
        self._loop = loop
        self._path = path
        self._sock = _bind(path) if inherited is None else socket.socket(fileno=inherited)
        self._sock.setblocking(False)
        loop.watch(self._sock.fileno(), self._accept)

    def fileno(self) -> int:
        return self._sock.fileno()

    def tell_subscribers(self, message: dict[str, Any]) -> None:
        for client in [client for client in self.clients if client.subscribed]:
            client.send(message)

    def close(self) -> None:
        for client in list(self.clients):
            client.close()
        self._loop.unwatch(self._sock.fileno())
        self._sock.close()
        os.unlink(self._path)

    def _accept(self, _mask: int) -> None:
        try:
            sock, _ = self._sock.accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                raise
            self._loop.remask(self._sock.fileno(), 0)
            self._loop.after(ACCEPT_PAUSE_S, lambda: self._loop.remask(self._sock.fileno(), READ))
            return
        _, uid, _ = struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if uid not in (0, os.geteuid()) or len(self.clients) >= CLIENTS_MAX:
            sock.close()
            return
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, PACKET_BYTES_MAX * 2)
        self.clients.add(Client(self._loop, sock, self))


def _bind(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    temporary = f"{path}.{os.getpid()}"
    mask = os.umask(0o177)
    try:
        sock.bind(temporary)
        sock.listen(128)
        os.rename(temporary, path)
    except OSError:
        sock.close()
        raise
    finally:
        os.umask(mask)
    return sock
