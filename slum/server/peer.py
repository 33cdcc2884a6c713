"""Who is at the other end of the unix socket: uvicorn's protocol with the kernel's word on it (SO_PEERCRED).

Only this process's user and root are served; anybody else is hung up on before a byte is parsed. The peer travels as
``scope["state"]["peer"]``, also to WebSockets, and names the actor of what the request commits.
"""

from __future__ import annotations

import asyncio
import functools
import os
import pwd
import re
import socket
import struct
from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.websockets.wsproto_impl import WSProtocol

from slum import log

CLOSE_S = 1.0
HOST = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]{0,62}[A-Za-z0-9])?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    uid: int
    pid: int

    def actor(self, host: str = "") -> str:
        """Return ``user@host``; *host* is what the client says of itself, this machine's name when it is not usable."""
        return f"{_user_name(self.uid)}@{host if HOST.fullmatch(host) else os.uname().nodename}"


class PeerProtocol(HttpToolsProtocol):
    """HTTP (and by upgrade WebSocket) for permitted peers only."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn narrows it
        peer = peer_of(transport.get_extra_info("socket"))
        if peer.uid not in (0, os.geteuid()):
            log.get().warning("peer_refused", uid=peer.uid, pid=peer.pid)
            transport.abort()
        self.app_state: dict[str, Any] = {**self.app_state, "peer": peer}
        super().connection_made(transport)


class ShortGoodbye(WSProtocol):
    """A WebSocket that is closed soon: an agent that only sends would flood a stream that nobody reads any more."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.close_timeout = CLOSE_S


def peer_of(connection: socket.socket) -> Peer:
    """Return the credentials that the kernel recorded when *connection* was made (unix(7), SO_PEERCRED)."""
    pid, uid, _gid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return Peer(uid=uid, pid=pid)


@functools.lru_cache(maxsize=256)
def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
