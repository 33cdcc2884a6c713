"""The real network of a member: one mTLS connection to each other member, dialled by the lower id (or by the learner), all in one thread.

A connection counts once the certificate is the one on record for the member and its hello came; before that it may send
4 KiB and has two seconds. A new connection replaces the old one, whose queue is dropped, so that what arrives from a peer
is in the order it was sent. A silent connection is pinged, a dead one is noticed in IDLE_S and dialled again.
"""

from __future__ import annotations

import errno
import select
import socket
import ssl
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from slum.ledger import identity
from slum.ledger.beginning import Note
from slum.ledger.commands import Member
from slum.ledger.group import Wake
from slum.ledger.link import Broken, Link
from slum.ledger.net import Down, Event, Got, Up
from slum.ledger.peerwire import FRAME_BYTES_MAX, Append, BadFrame, Hello, Message, Refused, pack, unpack

BEGIN_S = 2.0
IDLE_S = 1.2
REDIAL_S = 0.15
REFUSED_S = 1.0
"""Who was told why not calls again after so long."""
STRANGERS_MAX = 32
"""Connections that have not said a hello yet."""


class Links:
    def __init__(self, home: Path, me: identity.Me, note: Note) -> None:
        self.wake = Wake()
        self._home = home
        self._me = me
        self._note = note
        self._members: dict[str, Member] = {}
        self._by_certificate: dict[bytes, str] = {}
        self._hello: Callable[[], Hello] | None = None
        self._contexts: tuple[ssl.SSLContext, ssl.SSLContext] | None = None
        self._links: dict[int, Link] = {}
        self._up: dict[str, Link] = {}
        self._dial_at: dict[str, float] = {}
        self._events: list[Event] = []
        self._said: dict[str, str] = {}
        self._others: dict[int, Callable[[], None]] = {}
        self._poll = select.epoll()
        self._listening = _listen(me.listen)
        self._poll.register(self._listening.fileno(), select.EPOLLIN)
        self._poll.register(self.wake.descriptor, select.EPOLLIN)

    # --- what a member calls -----------------------------------------------------------------------------------------

    def set_members(self, members: Sequence[Member], hello: Callable[[], Hello], dial: Collection[str]) -> None:
        self._hello = hello
        self._dial_at = {peer: self._dial_at.get(peer, 0.0) for peer in dial}
        wanted = {member.id: member for member in members if member.id != self._me.id}
        if wanted == self._members and self._contexts is not None:
            return
        for link in list(self._links.values()):
            if link.peer is not None and wanted.get(link.peer) != self._members.get(link.peer):
                self._end(link, "no longer a member, or with another key")
        self._members = wanted
        self._by_certificate = {identity.certificate_of(member): member.id for member in wanted.values()}
        self._contexts = (
            identity.context(self._home, wanted.values(), server=False),
            identity.context(self._home, wanted.values(), server=True),
        )

    def send(self, peer: str, message: Message) -> None:
        link = self._up.get(peer)
        if link is None:
            return
        may_drop = isinstance(message, Append) and bool(message.entries)
        self._write(link, message, may_drop=may_drop)

    def drop(self, peer: str, why: str) -> None:
        link = self._up.get(peer)
        if link is not None:
            self._write(link, Refused(why=why))
            self._end(link, f"refused: {why}")

    def receive(self, wait_s: float) -> list[Event]:
        self._dial_missing(time.monotonic())
        if self._dial_at.keys() - self._up.keys():
            wait_s = min(wait_s, REDIAL_S)
        busy = self._events or any(link.has_more for link in self._links.values())
        for descriptor, event in self._poll.poll(0 if busy else wait_s):
            if descriptor == self.wake.descriptor:
                self.wake.clear()
            elif descriptor == self._listening.fileno():
                self._accept(time.monotonic())
            elif descriptor in self._links:
                self._guarded(self._links[descriptor], event)
            elif descriptor in self._others:
                self._others[descriptor]()
        for link in [link for link in self._links.values() if link.has_more]:
            self._guarded(link, select.EPOLLIN)
        # Only now: after a long turn of ours, what the others have said in it had to be read first.
        self._end_silent(time.monotonic())
        events, self._events = self._events, []
        return events

    def wait_for(self, descriptor: int, ready: Callable[[], None]) -> None:
        self._others[descriptor] = ready
        self._poll.register(descriptor, select.EPOLLIN)

    def close(self) -> None:
        for link in list(self._links.values()):
            self._end(link, "closed")
        self._listening.close()
        self._poll.close()
        self.wake.close()

    # --- connections -------------------------------------------------------------------------------------------------

    def _end_silent(self, now: float) -> None:
        for link in list(self._links.values()):
            if not link.is_up and now - link.begun_at > BEGIN_S:
                self._end(link, "no hello came")
            elif link.is_up and now - link.heard_at > IDLE_S:
                self._end(link, f"silent for {IDLE_S} s")

    def _dial_missing(self, now: float) -> None:
        dialling = {link.outgoing for link in self._links.values()}
        for peer, at in self._dial_at.items():
            if peer not in self._up and peer not in dialling and now >= at:
                self._dial_at[peer] = now + REDIAL_S
                self._dial(peer, now)

    def _dial(self, peer: str, now: float) -> None:
        host, _, port = self._members[peer].address.rpartition(":")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        sock.setblocking(False)
        try:
            sock.connect((host.strip("[]"), int(port)))
        except BlockingIOError:
            pass
        except (OSError, ValueError):
            sock.close()
            return
        self._add(Link(sock, outgoing=peer, begun_at=now))

    def _accept(self, now: float) -> None:
        try:
            sock, _ = self._listening.accept()
        except OSError as error:
            # What the network has done to the new connection comes as an error of accept.
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise
            return
        sock.setblocking(False)
        if self._contexts is None:
            sock.close()
            return
        strangers = [link for link in self._links.values() if not link.is_up and link.outgoing is None]
        if len(strangers) >= STRANGERS_MAX:
            # The newest may be a member, which is through in milliseconds; who only holds a place goes.
            self._end(min(strangers, key=lambda link: link.begun_at), "too many that have not said who they are")
        link = Link(sock, outgoing=None, begun_at=now)
        try:
            link.secure(self._contexts[1])
        except Broken:
            link.close()
        else:
            self._add(link)

    def _add(self, link: Link) -> None:
        self._links[link.descriptor] = link
        self._poll.register(link.descriptor, select.EPOLLIN | (select.EPOLLOUT if link.wants_write else 0))

    def _guarded(self, link: Link, event: int) -> None:
        try:
            self._serve(link, event)
        except (Broken, BadFrame) as error:
            self._end(link, str(error))
        else:
            self._rearm(link)

    def _serve(self, link: Link, event: int) -> None:
        now = time.monotonic()
        if not link.secured:
            if event & (select.EPOLLERR | select.EPOLLHUP):
                raise Broken("cannot connect")
            assert self._contexts is not None
            link.secure(self._contexts[0])
        if not link.greeted:
            certificate = link.greet()
            if certificate is None:
                return
            link.peer = self._by_certificate.get(certificate)
            if link.peer is None or link.outgoing not in (None, link.peer):
                raise Broken("its certificate is not the one on record")
            self._say_hello(link)
        if event & select.EPOLLOUT:
            link.flush()
        if event & (select.EPOLLIN | select.EPOLLERR | select.EPOLLHUP):
            # A last word (why we are refused) may have come together with the end.
            try:
                link.read(now)
            finally:
                self._take(link)

    def _say_hello(self, link: Link) -> None:
        assert self._hello is not None
        link.write(pack(self._hello()), time.monotonic(), may_drop=False)

    def _take(self, link: Link) -> None:
        while (frame := link.splitter.take()) is not None:
            message = unpack(frame)
            if isinstance(message, Refused):
                if link.peer in self._dial_at:
                    self._dial_at[link.peer] = time.monotonic() + REFUSED_S
                raise Broken(f"refused: {message.why}")
            if link.is_up:
                assert link.peer is not None
                self._events.append(Got(link.peer, message))
            elif isinstance(message, Hello):
                self._begin(link, message)
            else:
                raise BadFrame(f"{type(message).__name__} before a hello")

    def _begin(self, link: Link, hello: Hello) -> None:
        if hello.member != link.peer:
            raise Broken(f"{link.peer} calls itself {hello.member!r}")
        assert link.peer is not None
        old = self._up.get(link.peer)
        if old is not None:
            self._end(old, "replaced by a new connection")
        link.is_up = True
        link.splitter.bytes_max = FRAME_BYTES_MAX
        self._up[link.peer] = link
        self._said.pop(link.peer, None)
        self._events.append(Up(link.peer, hello))

    def _write(self, link: Link, message: Message, *, may_drop: bool = False) -> None:
        try:
            link.write(pack(message), time.monotonic(), may_drop=may_drop)
        except Broken as error:
            self._end(link, str(error))
        else:
            self._rearm(link)

    def _rearm(self, link: Link) -> None:
        if link.armed != link.wants_write and self._links.get(link.descriptor) is link:
            link.armed = link.wants_write
            self._poll.modify(link.descriptor, select.EPOLLIN | (select.EPOLLOUT if link.wants_write else 0))

    def _end(self, link: Link, why: str) -> None:
        descriptor = link.descriptor
        if self._links.get(descriptor) is not link:
            return
        del self._links[descriptor]
        self._poll.unregister(descriptor)
        link.close()
        peer = link.peer or link.outgoing or "?"
        if link.is_up and self._up.get(peer) is link:
            del self._up[peer]
            # What it sent before is void with it: a message of an old connection may never follow one of a new.
            # That it came, and with which hello, stays: it may have been refused, or be of a later generation.
            self._events = [event for event in self._events if event.peer != peer or isinstance(event, Up)]
            self._events.append(Down(peer, why))
        if self._said.get(peer) != why:
            self._said[peer] = why
            self._note("link_ended", peer=peer, why=why)


def _listen(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host.strip("[]"), int(port)))
        listening.listen(64)
        listening.setblocking(False)
    except OSError:
        listening.close()
        raise
    return listening
