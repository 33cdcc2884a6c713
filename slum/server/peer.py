"""Who is at the other end of a connection, and what such a one may do: the kernel's word here, the front's from elsewhere.

On the local socket the kernel tells (SO_PEERCRED): only this process's user and root are served, anybody else is hung up on
before a byte is parsed. On the front's socket each request carries what Caddy found in the client's certificate; these
headers are looked at there and nowhere else, before a body (and its trailers) can add any. Either travels as
``scope["state"]["peer"]``, also to WebSockets; guard.py turns a Visitor into a Guest, or away.
"""

from __future__ import annotations

import asyncio
import functools
import os
import pwd
import re
import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Flag, auto
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.websockets.wsproto_impl import WSProtocol

from slum import log
from slum.node.uids import FRONT_UID

CLOSE_S = 1.0
HOST = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]{0,62}[A-Za-z0-9])?")
URI_HEADER, SERIAL_HEADER, ADDRESS_HEADER = "X-Slum-Uri", "X-Slum-Serial", "X-Slum-Address"
"""What the front says of the client; it deletes every other X-Slum-* that came, and overwrites these."""


class Access(Flag):
    """What a route is open to, and what a peer may: a request passes when the two have one in common."""

    OPEN = auto()
    """Anybody who reaches the front: how one joins and renews."""
    NODE = auto()
    READ = auto()
    ADMIN = auto()
    MEMBER = auto()


class Peer:
    """Whoever asks. A subclass is one kind."""

    allows: Access

    def actor(self, host: str = "") -> str:
        """Return who it is in the audit trail; *host* is what the client says of itself."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True, kw_only=True)
class Local(Peer):
    """A process of this machine, of our user or root."""

    uid: int
    pid: int
    allows = ~Access(0)

    def actor(self, host: str = "") -> str:
        """Return ``user@host``; this machine's name when *host* is not usable."""
        return f"{_user_name(self.uid)}@{host if HOST.fullmatch(host) else os.uname().nodename}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Visitor(Peer):
    """Somebody at the front, not judged yet: *uri* and *serial* (hex) of the certificate shown, "" without one."""

    uri: str
    serial: str
    address: str
    allows = Access.OPEN

    def actor(self, host: str = "") -> str:
        return f"stranger@{host if HOST.fullmatch(host) else self.address}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Guest(Peer):
    """The holder of a certificate that the ledger knows and nobody has revoked."""

    subject: str
    """"user/NAME", "node/MACHINE/KEY" or "member/ID"."""
    role: str
    serial: str
    address: str

    @property
    def kind(self) -> str:
        return self.subject.partition("/")[0]

    @property
    def name(self) -> str:
        """The user's name, the member's id, the node's machine."""
        return self.subject.split("/")[1]

    @property
    def key(self) -> str:
        """A node's "machine.incarnation"."""
        return self.subject.rpartition("/")[2]

    @property
    def allows(self) -> Access:  # type: ignore[override]  # depends on the certificate
        return MAY.get((self.kind, self.role), Access.OPEN)

    def actor(self, host: str = "") -> str:
        """Return ``NAME@host`` of a user, ``node/MACHINE``, ``slum@ID`` of a member."""
        if self.kind == "user":
            return f"{self.name}@{host if HOST.fullmatch(host) else self.address}"
        return f"node/{self.name}" if self.kind == "node" else f"slum@{self.name}"


MAY: dict[tuple[str, str], Access] = {
    ("user", "read"): Access.OPEN | Access.READ,
    ("user", "admin"): Access.OPEN | Access.READ | Access.ADMIN,
    ("node", ""): Access.OPEN | Access.NODE,
    ("member", ""): Access.OPEN | Access.READ | Access.ADMIN | Access.MEMBER,
}
"""By kind of certificate and role. docs/security.md shows the same table, held by a test."""


class PeerProtocol(HttpToolsProtocol):
    """HTTP (and by upgrade WebSocket) on the local socket, for permitted peers only."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn narrows it
        peer = peer_of(transport.get_extra_info("socket"))
        if peer.uid not in (0, os.geteuid()):
            log.get().warning("peer_refused", uid=peer.uid, pid=peer.pid)
            transport.abort()
        self.app_state: dict[str, Any] = {**self.app_state, "peer": peer}
        super().connection_made(transport)


class FrontProtocol(HttpToolsProtocol):
    """HTTP from the front: each request is somebody else's, whom the front's headers name."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn narrows it
        peer = peer_of(transport.get_extra_info("socket"))
        if peer.uid not in (0, FRONT_UID if os.geteuid() == 0 else os.geteuid()):
            log.get().warning("front_refused", uid=peer.uid, pid=peer.pid)
            transport.abort()
        super().connection_made(transport)

    def on_headers_complete(self) -> None:
        """Name the peer now: what comes later in ``scope["headers"]`` are the client's trailers."""
        self.app_state = {**self.app_state, "peer": visitor_of(self.headers)}
        self.scope["state"] = self.app_state.copy()
        super().on_headers_complete()


def visitor_of(headers: Iterable[tuple[bytes, bytes]]) -> Visitor:
    """Return who the front says is asking; a header that came twice, or makes no sense, is nobody's."""
    found: dict[str, str] = {}
    for raw, value in headers:
        name = raw.decode("latin-1").lower()
        found[name] = "" if name in found else value.decode("latin-1").strip()
    uri, serial = found.get(URI_HEADER.lower(), ""), found.get(SERIAL_HEADER.lower(), "")
    known = bool(uri) and serial.isascii() and serial.isdigit() and len(serial) <= 50
    return Visitor(
        uri=uri if known else "",
        serial=f"{int(serial):x}" if known else "",
        address=found.get(ADDRESS_HEADER.lower(), "")[:64],
    )


class ShortGoodbye(WSProtocol):
    """A WebSocket that is closed soon: an agent that only sends would flood a stream that nobody reads any more."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.close_timeout = CLOSE_S


def peer_of(connection: socket.socket) -> Local:
    """Return the credentials that the kernel recorded when *connection* was made (unix(7), SO_PEERCRED)."""
    pid, uid, _gid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return Local(uid=uid, pid=pid)


@functools.lru_cache(maxsize=256)
def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
