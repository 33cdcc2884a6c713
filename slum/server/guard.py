"""Who may pass: the one place where a request's peer is held against what its route is open to.

A certificate that reached us was signed by the fleet's authority and is in date (the front saw to both); here the ledger is
asked whether it is one of those that it knows, whether it was revoked, and what its holder may do. What stays open (an
agent's session, a shell, an event stream, an upload) is remembered by its certificate and ended within a second of a
revocation. Says no more to a stranger than that it is one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from slum import log
from slum.errors import QuorumLost, SlumError
from slum.server import cluster
from slum.server.peer import Access, Guest, Peer, Visitor
from slum.server.problems import Forbidden, Unknown, problem_response

if TYPE_CHECKING:
    from slum.server.control import Control
    from slum.server.view import View

BEHIND_S = 1.0
"""A certificate that another member has just made may be on its way to this one's state."""
LOOK_S = 0.2
LEAVE_S = 10.0
"""A member that leaves hears the end of what it asked, unless its certificate is revoked before."""
REVOKED, NO_MEMBER = "was revoked", "belongs to no member of now"
"""What a member that was removed hears."""
AGAIN = "join again with a new token: `slum token new` makes one where the control plane runs"


class Guard:
    """The ASGI application of one route, behind the question whether it is open to who asks."""

    def __init__(self, app: ASGIApp, access: Access, control: Control) -> None:
        self._app = app
        self._access = access
        self._control = control

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            peer = await admitted(self._control, scope["state"]["peer"], self._access)
        except SlumError as error:
            response = problem_response(error)
            if scope["type"] == "websocket":
                await WebSocket(scope, receive, send).send_denial_response(response)
            else:
                await response(scope, receive, send)
            return
        scope["state"]["peer"] = peer
        if isinstance(peer, Guest):
            await self._watched(peer, scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _watched(self, peer: Guest, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve *peer* until it is done or its certificate is revoked."""
        said = _Said(send)
        try:
            async with asyncio.timeout(None) as open_:
                with self._control.sessions.opened(peer, open_):
                    await self._app(scope, receive, said)
        except TimeoutError:
            if not open_.expired():
                raise
            log.get().warning(
                "session_ended", why="its certificate opens nothing any more", peer=peer.subject, serial=peer.serial
            )
            await said.goodbye(scope["type"])


class Sessions:
    """What is open by certificate, so that a revocation ends it."""

    def __init__(self) -> None:
        self._open: dict[asyncio.Timeout, Guest] = {}

    @contextmanager
    def opened(self, peer: Guest, timeout: asyncio.Timeout) -> Iterator[None]:
        self._open[timeout] = peer
        try:
            yield
        finally:
            del self._open[timeout]

    def end_revoked(self, view: View) -> int:
        """End what *view* no longer allows; return how many."""
        if not self._open:
            return 0
        revoked = view.reader.revoked()
        members = {f"member/{member.id}" for member in view.world().cluster.members}
        now, gone = asyncio.get_running_loop().time(), 0
        for timeout, peer in self._open.items():
            if timeout.expired():
                continue
            if peer.serial in revoked:
                timeout.reschedule(now)
                gone += 1
            elif peer.kind == "member" and peer.subject not in members and timeout.when() is None:
                timeout.reschedule(now + LEAVE_S)
        return gone

    async def run(self, control: Control) -> None:
        """End what is revoked, for ever."""
        while True:
            seen = control.committed.count
            try:
                self.end_revoked(control.view)
            except QuorumLost as error:
                log.get().warning("revocations_not_read", why=error.message)
            await control.committed.wait(seen, 30.0)
            await asyncio.sleep(LOOK_S)


async def admitted(control: Control, peer: Peer, access: Access) -> Peer:
    """Return *peer* as the ledger knows it, if a route open to *access* is open to it; Unknown or Forbidden if not."""
    if isinstance(peer, Visitor) and not access & Access.OPEN:
        peer = await _guest(control, peer)
    if not access & peer.allows:
        raise Forbidden(
            f"{peer.actor()} may not do this: it needs {_needed(access)}",
            hint="`slum token new user NAME --role admin` makes a token for more, where the control plane runs",
        )
    return peer


async def _guest(control: Control, visitor: Visitor) -> Guest:
    """Return whom the certificate of *visitor* belongs to; Unknown when the ledger does not stand by it."""
    if not visitor.serial:
        raise Unknown("this needs a certificate of the fleet, and none was shown", hint=AGAIN)
    standing = control.world().cluster
    prefix = f"spiffe://{standing.cluster_id}/"
    end = asyncio.get_running_loop().time() + BEHIND_S
    while True:
        seen = control.committed.count
        row = control.view.reader.certificate(visitor.serial)
        left = end - asyncio.get_running_loop().time()
        if row is not None or left <= 0:
            break
        await control.committed.wait(seen, left)
    subject = visitor.uri.removeprefix(prefix)
    why = ""
    if not visitor.uri.startswith(prefix) or row is None or row.subject != subject:
        why = "is not known here"
    elif row.revoked_at:
        why = REVOKED
    elif row.not_after < time.time() and await _has_expired(control, row.not_after):
        why = "has expired"
    elif subject.startswith("member/") and subject.removeprefix("member/") not in {m.id for m in standing.members}:
        why = NO_MEMBER
    if why or row is None:
        log.get().warning("certificate_refused", why=why, uri=visitor.uri[:200], serial=visitor.serial)
        hint = "it renews itself when it is used" if why == "has expired" else AGAIN
        raise Unknown(f"the certificate {why}", hint=hint)
    return Guest(subject=subject, role=row.role, serial=row.serial, address=visitor.address)


async def _has_expired(control: Control, not_after: float) -> bool:
    """Tell whether it has by the members' time; where that is not known the front's word is enough."""
    try:
        now = await cluster.time_of_members(control)
    except QuorumLost:
        return False
    return now is not None and not_after < now


def _needed(access: Access) -> str:
    if access & Access.READ:
        return "a user"
    if access & Access.ADMIN:
        return "the role admin"
    return "a member's certificate" if access & Access.MEMBER else "a node's certificate"


class _Said:
    """Remembers how far an answer has come, to end it well."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._started = self._ended = False

    async def __call__(self, message: Message) -> None:
        kind = message["type"]
        self._started = self._started or kind in ("http.response.start", "websocket.accept")
        self._ended = (
            self._ended
            or kind == "websocket.close"
            or (kind == "http.response.body" and not message.get("more_body", False))
        )
        await self._send(message)

    async def goodbye(self, kind: str) -> None:
        """Say the last word that is missing; a client that is gone does not hear it."""
        if self._ended:
            return
        try:
            if kind == "websocket":
                await self._send(
                    {"type": "websocket.close", "code": 1008, "reason": "the certificate opens nothing any more"}
                )
            elif self._started:
                await self._send({"type": "http.response.body", "body": b"", "more_body": False})
        except (RuntimeError, OSError) as error:
            log.get().debug("goodbye_not_said", error=str(error))
