"""One TLS connection to another member, without ever waiting: handshake, frames in, frames out, in order.

Knows bytes, sizes and deadlines; what frames mean is its owner's business (links.py). The certificate of the other side
is checked by OpenSSL against the members' and then compared as a whole.
"""

from __future__ import annotations

import os
import socket
import ssl
from collections import deque

from slum.ledger.peerwire import Splitter

READ_BYTES = 1 << 18
RECORD_BYTES = 1 << 14
"""The most that one TLS record carries, and one read returns: after less there is rarely more."""
TURN_BYTES = 1 << 21
"""Read at most so much from one connection before looking at the others."""
OUT_BYTES_MAX = 16 << 20
"""Beyond it messages to a slow peer are dropped; Raft sends again what is missing."""


class Broken(Exception):
    """The connection is over; the text says why."""


class Link:
    """Owned by one thread. *peer* is None until the certificate has told who is there."""

    def __init__(self, sock: socket.socket, *, outgoing: str | None, begun_at: float) -> None:
        self.sock = sock
        self.descriptor = sock.fileno()
        self.outgoing = outgoing
        self.peer: str | None = None
        self.is_up = False
        self.hello_sent = False
        self.begun_at = begun_at
        self.heard_at = begun_at
        self.said_at = begun_at
        self.splitter = Splitter()
        self.wants_write = outgoing is not None
        self.armed = self.wants_write
        """Whether the poller waits for it to be writable."""
        self.has_more = False
        self._tls: ssl.SSLSocket | None = None
        self._greeted = False
        self._out: deque[memoryview] = deque()
        self._out_bytes = 0

    @property
    def greeted(self) -> bool:
        """The TLS handshake is done."""
        return self._greeted

    def secure(self, context: ssl.SSLContext) -> None:
        """Begin TLS once the TCP connection stands."""
        try:
            error = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error:
                raise Broken(f"cannot connect: {os.strerror(error)}")
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._tls = context.wrap_socket(
                self.sock, server_side=self.outgoing is None, do_handshake_on_connect=False, suppress_ragged_eofs=False
            )
        except OSError as error:
            # The other side may have gone since; the socket goes with what was to wrap it.
            raise Broken(f"cannot connect: {error}") from error
        self.wants_write = False

    @property
    def secured(self) -> bool:
        return self._tls is not None

    def greet(self) -> bytes | None:
        """Go on with the handshake; return the other's certificate (DER) when it is done."""
        tls = self._socket()
        try:
            tls.do_handshake()
        except ssl.SSLWantReadError:
            self.wants_write = False
            return None
        except ssl.SSLWantWriteError:
            self.wants_write = True
            return None
        except (OSError, ValueError) as error:
            raise Broken(f"TLS failed: {error}") from error
        self._greeted = True
        self.wants_write = False
        return tls.getpeercert(binary_form=True) or b""

    def read(self, now: float) -> None:
        """Take what has come into the splitter, at most TURN_BYTES."""
        tls, taken = self._socket(), 0
        self.has_more = False
        while taken < TURN_BYTES:
            try:
                data = tls.recv(READ_BYTES)
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return
            except (OSError, ValueError) as error:
                raise Broken(f"connection lost: {error}") from error
            if not data:
                raise Broken("the other side closed the connection")
            self.heard_at = now
            taken += len(data)
            self.splitter.feed(data)
            if len(data) < RECORD_BYTES and not tls.pending():
                return
        self.has_more = True

    def write(self, frame: bytes, now: float, *, may_drop: bool) -> bool:
        """Queue *frame* and send what the kernel takes; False when it was dropped because the other reads too slowly."""
        if may_drop and self._out_bytes > OUT_BYTES_MAX:
            return False
        self._out.append(memoryview(frame))
        self._out_bytes += len(frame)
        self.said_at = now
        self.flush()
        return True

    def flush(self) -> None:
        tls = self._socket()
        while self._out:
            try:
                sent = tls.send(self._out[0])
            except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
                self.wants_write = True
                return
            except (OSError, ValueError) as error:
                raise Broken(f"connection lost: {error}") from error
            self._out_bytes -= sent
            if sent == len(self._out[0]):
                self._out.popleft()
            else:
                self._out[0] = self._out[0][sent:]
        self.wants_write = False

    def close(self) -> None:
        (self._tls or self.sock).close()

    def _socket(self) -> ssl.SSLSocket:
        if self._tls is None:
            raise Broken("not connected yet")
        return self._tls
