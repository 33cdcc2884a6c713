"""How this member's server reaches another member's: TLS 1.3 to its front, both sides with certificates of the fleet's authority.

The certificate that answers must be that very member's (``spiffe://<cluster>/member/<id>``), so that an address that moved
to another machine leads nowhere. The files are read anew for each connection: a renewed certificate counts at once.
"""

from __future__ import annotations

import asyncio
import ssl
from typing import TYPE_CHECKING

from slum.ledger.commands import Member
from slum.node.doors import READ_BYTES, Streams
from slum.node.home import NAME
from slum.node.websocket import WebSocket, connect
from slum.paths import Home
from slum.server import memberwire

if TYPE_CHECKING:
    from slum.server.relay import Dial

DIAL_S = 5.0


def dialler(home: Home) -> Dial:
    """Return how the server of *home* dials other members."""

    async def dial(member: Member) -> WebSocket:
        return await connect(MemberDoor(home, member), memberwire.PATH, DIAL_S)

    return dial


class MemberDoor:
    """The front of *member*, as node.doors.Door."""

    def __init__(self, home: Home, member: Member) -> None:
        self.name = f"{member.id} ({member.api})"
        self._home = home
        self._member = member

    async def open(self) -> Streams:
        host, _, port = self._member.api.rpartition(":")
        reader, writer = await asyncio.open_connection(
            host.strip("[]"), int(port), ssl=context(self._home), server_hostname=NAME, limit=READ_BYTES
        )
        names = (writer.get_extra_info("peercert") or {}).get("subjectAltName", ())
        if not any(kind == "URI" and name.endswith(f"/member/{self._member.id}") for kind, name in names):
            writer.close()
            raise OSError(f"another one than {self._member.id} answers there")
        return reader, writer


def context(home: Home) -> ssl.SSLContext:
    """Return a TLS context that shows this member's certificate and takes those of the fleet's authority only."""
    made = ssl.create_default_context(cafile=str(home.state / "ca.crt"))
    made.minimum_version = ssl.TLSVersion.TLSv1_3
    made.load_cert_chain(home.state / "front.crt", home.state / "front.key")
    return made
