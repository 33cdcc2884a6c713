"""Connections between members: real TLS on loopback, pinned keys, what strangers and junk come to."""

from __future__ import annotations

import select
import socket
import ssl
import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest
from ledger_cluster import free_port

from slum.ledger import identity
from slum.ledger.commands import Member
from slum.ledger.links import Links
from slum.ledger.net import Down, Event, Got, Up
from slum.ledger.peerwire import Append, Hello, Ping, pack
from slum.ledger.reach import hellos

PLACE = (1, 1)


class End:
    """One member's Links, looked at by hand."""

    def __init__(self, folder: Path, name: str, days: int = 36500) -> None:
        self.home = folder / name
        address = f"127.0.0.1:{free_port()}"
        self.row = identity.make(self.home, id=name, listen=address, address=address)
        if days != 36500:
            key, certificate = identity.make_certificate(name, days=days)
            (self.home / identity.KEY).write_bytes(key)
            (self.home / identity.CERTIFICATE).write_bytes(certificate)
        me = identity.load(self.home)
        assert me is not None
        self.row = identity.row(self.home, me)
        self.notes: list[tuple[str, dict[str, object]]] = []
        self.links = Links(self.home, me, lambda event, **fields: self.notes.append((event, fields)))
        self.events: list[Event] = []

    def knows(self, *rows: Member) -> None:
        self.links.set_members(rows, self.hello, [row.id for row in rows if row.id > self.row.id])

    def hello(self) -> Hello:
        return Hello(
            version=1, cluster="c", member=self.row.id, incarnation=self.row.incarnation, generation=1, epoch=1,
            lineage="l", chain0="", last_index=1, last_term=0, seq=0, protocol=1, run="r",
        )  # fmt: skip

    def look(self) -> None:
        self.events += self.links.receive(0.005)

    def got(self, kind: type[Event]) -> list[Event]:
        return [event for event in self.events if isinstance(event, kind)]


@pytest.fixture
def ends(tmp_path: Path) -> Iterator[Callable[..., End]]:
    with ExitStack() as stack:

        def make(name: str, **how: int) -> End:
            end = End(tmp_path, name, **how)
            stack.callback(end.links.close)
            return end

        yield make


def until(happened: Callable[[], object], *ends: End, deadline_s: float = 10.0) -> None:
    end_at = time.monotonic() + deadline_s
    while not happened():
        assert time.monotonic() < end_at, [(end.events[-3:], end.notes) for end in ends]
        for end in ends:
            end.look()


def joined(a: End, b: End) -> None:
    a.knows(b.row)
    b.knows(a.row)
    until(lambda: a.got(Up) and b.got(Up), a, b)


def test_frames_arrive_in_order_and_whole(ends: Callable[..., End]) -> None:
    a, b = ends("m1"), ends("m2")
    joined(a, b)
    entries = tuple((b"\0" + bytes(900_000), n + 2, 1) for n in range(5))
    big = Append(place=PLACE, term=1, commit=1, prev_index=1, prev_term=0, entries=entries)
    for n in range(200):
        a.links.send("m2", Ping(place=PLACE, seq=n, at=0.0))
    a.links.send("m2", big)
    b.links.send("m1", Ping(place=PLACE, seq=7, at=0.0))
    until(lambda: len(b.got(Got)) == 201 and a.got(Got), a, b)
    found = [event.message for event in b.got(Got) if isinstance(event, Got)]
    assert [message.seq for message in found[:-1] if isinstance(message, Ping)] == list(range(200))
    assert found[-1] == big


def test_dates_of_certificates_do_not_matter(ends: Callable[..., End]) -> None:
    joined(ends("m1", days=1), ends("m2", days=1))


def test_another_key_under_a_known_name_is_cut_off(ends: Callable[..., End], tmp_path: Path) -> None:
    a, b = ends("m1"), ends("m2")
    impostor = msgspec.structs.replace(b.row, public_key=ends("m3").row.public_key)
    a.knows(impostor)
    b.knows(a.row)
    until(lambda: any(event == "link_ended" for event, _ in a.notes), a, b)
    assert not a.got(Up)
    assert not b.got(Up)


def test_one_member_cannot_speak_for_another(ends: Callable[..., End]) -> None:
    a, b = ends("m1"), ends("m2")
    a.knows(b.row)
    b.links.set_members((a.row,), lambda: msgspec.structs.replace(b.hello(), member="m3"), ())
    until(lambda: any("calls itself" in str(fields["why"]) for _, fields in a.notes), a, b)
    assert not a.got(Up)


def test_one_that_was_removed_while_it_was_away_learns_that_the_others_are_there(
    ends: Callable[..., End], tmp_path: Path
) -> None:
    """Else it would take them for lost, and could be made to go on alone."""
    a, b = ends("m1"), ends("m2")
    away = End(tmp_path, "m3")
    away.links.close()
    joined(a, b)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(hellos, away.home, (a.row, b.row), away.hello(), 10.0)
        until(asked.done, a, b, deadline_s=20)
    assert asked.result() == ({}, {"m1", "m2"})


def test_a_dead_connection_is_dialled_again(ends: Callable[..., End]) -> None:
    a, b = ends("m1"), ends("m2")
    joined(a, b)
    b.links.drop("m1", "for the test")
    until(lambda: a.got(Down) and len(a.got(Up)) == 2 and len(b.got(Up)) == 2, a, b)
    assert any("for the test" in str(fields["why"]) for _, fields in a.notes)


def test_who_is_no_longer_a_member_is_cut_off(ends: Callable[..., End]) -> None:
    a, b = ends("m1"), ends("m2")
    joined(a, b)
    a.knows()
    until(lambda: b.got(Down), a, b)


def tls(end: End, *, certificate: Path | None = None) -> ssl.SSLSocket:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if certificate is not None:
        context.load_cert_chain(certificate / identity.CERTIFICATE, certificate / identity.KEY)
    host, _, port = end.row.address.rpartition(":")
    raw = socket.create_connection((host, int(port)), timeout=5)
    made = context.wrap_socket(raw, do_handshake_on_connect=False)
    made.settimeout(0.02)
    return made


def finished(sock: socket.socket, *ends: End) -> bool:
    """Step the members until the other side of *sock* is gone."""
    handshaken = not isinstance(sock, ssl.SSLSocket)
    for _ in range(400):
        for end in ends:
            end.look()
        try:
            if isinstance(sock, ssl.SSLSocket) and not handshaken:
                sock.do_handshake()
                handshaken = True
            if sock.recv(100) == b"":
                return True
        except TimeoutError:
            continue
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            continue
        except OSError:
            return True
    return False


def test_strangers_get_nothing(ends: Callable[..., End], tmp_path: Path) -> None:
    a, b, stranger = ends("m1"), ends("m2"), ends("m9")
    joined(a, b)
    for certificate in (None, stranger.home):
        sock = tls(a, certificate=certificate)
        try:
            assert finished(sock, a, b)
        finally:
            sock.close()
    a.links.send("m2", Ping(place=PLACE, seq=1, at=0.0))
    until(lambda: b.got(Got), a, b)


@pytest.mark.parametrize(
    "junk", [b"\x80\x04cposix\nsystem\n", b"GET / HTTP/1.1\r\n\r\n", struct.pack(">I", 0x7FFFFFFF) + bytes(100)]
)
def test_junk_is_cut_off(ends: Callable[..., End], junk: bytes) -> None:
    a, b = ends("m1"), ends("m2")
    joined(a, b)
    host, _, port = a.row.address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=5) as sock:
        sock.settimeout(0.02)
        sock.sendall(junk)
        assert finished(sock, a, b)
    a.links.send("m2", Ping(place=PLACE, seq=1, at=0.0))
    until(lambda: b.got(Got), a, b)


def test_who_is_gone_before_it_was_let_in_harms_nobody(ends: Callable[..., End]) -> None:
    """Killed members, port scanners: their connections are reset while they wait for us, and so when they are looked at."""
    a, b = ends("a"), ends("b")
    joined(a, b)
    host, port = b.row.address.split(":")
    for said in (b"", b"x" * 100):
        for _ in range(20):
            sock = socket.create_connection((host, int(port)))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.sendall(said)
            sock.close()
        for _ in range(40):
            b.look()
    a.links.send("b", Ping(place=PLACE, seq=7, at=1.0))
    until(lambda: b.got(Got), a, b)


def test_who_answers_with_a_reset_is_dialled_again(ends: Callable[..., End]) -> None:
    a = ends("a")
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        a.knows(msgspec.structs.replace(a.row, id="b", address=address))
        for _ in range(3):
            until(lambda: _can_accept(listening), a)
            sock, _ = listening.accept()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()


def _can_accept(listening: socket.socket) -> bool:
    return bool(select.select([listening], [], [], 0)[0])


def test_a_member_that_sends_junk_is_cut_off(ends: Callable[..., End]) -> None:
    a, b = ends("m1"), ends("m2")
    a.knows(b.row)
    sock = tls(a, certificate=b.home)
    try:
        until(lambda: _shakes(sock), a)
        sock.sendall(struct.pack(">I", 0x7FFFFFFF))
        assert finished(sock, a)
        assert any("at most 4096" in str(fields["why"]) for _, fields in a.notes), a.notes
    finally:
        sock.close()


def test_an_accepted_member_may_send_no_pickle(ends: Callable[..., End]) -> None:
    a, b = ends("m1"), ends("m2")
    a.knows(b.row)
    sock = tls(a, certificate=b.home)
    try:
        until(lambda: _shakes(sock), a)
        sock.sendall(pack(b.hello()))
        until(lambda: a.got(Up), a)
        bad = msgspec.msgpack.encode({"t": "append", "place": PLACE, "term": 1, "commit": 1, "prev_index": 1,
                                      "prev_term": 0, "entries": [[b"\2\x80\x04.", 2, 1]]})  # fmt: skip
        sock.sendall(struct.pack(">I", len(bad)) + bad)
        until(lambda: a.got(Down), a)
    finally:
        sock.close()


def _shakes(sock: ssl.SSLSocket) -> bool:
    try:
        sock.do_handshake()
    except (TimeoutError, ssl.SSLWantReadError):
        return False
    return True
