"""The agent's line to the control plane, against a member that serves a real WebSocket."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from fakes.front import FakeFleet
from fakes.member import Member

from slum import wire
from slum.model import Stamp
from slum.node.doors import Door, Near, Remote, Unix
from slum.node.home import trusting
from slum.node.link import Ended, Link
from slum.pki.request import make_request, new_key


class Quiet:
    """An agent with nothing to tell but what it can do."""

    def __init__(self) -> None:
        self.detail = "bubblewrap is not installed"

    def hello(self) -> wire.Hello:
        level = wire.LevelStatus(level="namespace", available=not self.detail, detail=self.detail)
        return wire.Hello(
            protocol=1,
            version="0",
            machine="local:m1",
            tenement="here",
            stamp=Stamp(),
            boot_id="b",
            host="h",
            cpus=1,
            memory_bytes=1,
            levels=(level,),
        )

    def report(self, *, full: bool) -> wire.Report | None:
        return None

    def heartbeat(self) -> wire.Heartbeat:
        return wire.Heartbeat(at=0.0, load=0.0, memory_available_bytes=0, rss_bytes=0)

    def desire(self, desired: wire.Desired) -> None: ...

    def open_stream(self, request: wire.OpenStream, door: Door) -> None: ...


async def test_a_new_proof_of_a_level_is_told_by_a_new_hello(tmp_path: Path) -> None:
    member, agent = Member(tmp_path / "api.sock"), Quiet()
    await member.start()
    link = Link(Near(member.path), agent)
    task = asyncio.create_task(link.run())
    try:
        await member.until(lambda: len(member.hellos) == 1)
        agent.detail = ""
        link.introduce()
        await member.until(lambda: len(member.hellos) == 2)
        assert [hello.levels[0].available for hello in member.hellos] == [False, True]
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await member.stop()


class Doors:
    """A way with *fronts* for doors, in their order."""

    remote = True

    def __init__(self, *doors: Door) -> None:
        self.current: Door | None = None
        self.all = doors
        self.told: list[tuple[str, ...]] = []
        self.expiries = asyncio.Event()

    def doors(self) -> tuple[tuple[Door, ...], ...]:
        return (self.all,)

    def lost(self, door: Door) -> None: ...

    def learn(self, servers: Sequence[str]) -> None:
        self.told.append(tuple(servers))

    def expired(self) -> None:
        self.expiries.set()


class Silent:
    """A door that nobody opens."""

    name = "silent"

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        await asyncio.Event().wait()
        raise AssertionError


async def test_a_door_that_does_not_open_is_not_waited_for(tmp_path: Path) -> None:
    member = Member(tmp_path / "api.sock")
    await member.start()
    way = Doors(Silent(), Unix(member.path))
    async with running(Link(way, Quiet())) as link:
        await member.until(lambda: member.hellos)
        member.say(wire.Servers(servers=("https://a:1", "https://b:2")))
        await member.until(lambda: way.told)
        assert way.told == [("https://a:1", "https://b:2")]
        assert link.connected
        assert way.current is way.all[1]
    await member.stop()


async def test_of_two_doors_that_open_at_once_one_line_stays(tmp_path: Path) -> None:
    member = Member(tmp_path / "api.sock")
    await member.start()
    hurdle = asyncio.Event()

    class Late(Unix):
        async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
            await hurdle.wait()
            return await super().open()

    class Last(Late):
        async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
            hurdle.set()
            return await super().open()

    async with running(Link(Doors(Late(member.path), Last(member.path)), Quiet())):
        await member.until(lambda: member.heartbeats)
        await member.until(lambda: member.open_lines == 1)
    await member.stop()


async def test_what_is_refused_for_good_is_dialled_again_only_much_later(tmp_path: Path) -> None:
    member = Member(tmp_path / "api.sock")
    await member.start()
    told: list[tuple[str, str]] = []
    link = Link(Near(member.path), Quiet(), lambda server, why: told.append((server, why)))
    async with running(link):
        await member.until(lambda: member.hellos)
        member.say(wire.Refused(why="revoked", fatal=True))
        await member.until(lambda: told and told[-1] == ("", "refused: revoked"))
        assert link._pause_s(Ended("refused: revoked", refused=True, fatal=True)) > 20
    await member.stop()


async def test_a_member_that_finds_the_certificate_expired_has_it_renewed(tmp_path: Path) -> None:
    """By the TLS alert of that name, as OpenSSL and Go send it; a reset comes right behind it."""
    fleet = FakeFleet()
    expired = shown(fleet, tmp_path, "old", time.time() - 120 * 86400)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(shown(fleet, tmp_path, "front", time.time(), server=True))
    server.load_verify_locations(cadata=fleet.ca)
    server.verify_mode = ssl.CERT_OPTIONAL

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                plain, _ = listener.accept()
                plain.settimeout(5)
                with plain, contextlib.suppress(OSError):
                    server.wrap_socket(plain, server_side=True).close()

    def tls() -> ssl.SSLContext:
        context = trusting(fleet.ca)
        context.load_cert_chain(expired)
        return context

    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"https://127.0.0.1:{listener.getsockname()[1]}"
        serving = asyncio.create_task(asyncio.to_thread(serve))
        way = Doors(Remote(url, tls))
        try:
            async with running(Link(way, Quiet())), asyncio.timeout(20):
                await way.expiries.wait()
        finally:
            # Whatever happened: a thread that waits for ever would keep the loop, and the whole run, from ending.
            listener.shutdown(socket.SHUT_RDWR)
            await serving


def shown(fleet: FakeFleet, folder: Path, name: str, now: float, *, server: bool = False) -> Path:
    """Return a file with a new key and a certificate that was made at *now*."""
    key = new_key()
    signed = fleet.sign(make_request(key), f"member/{name}", server=server, now=now)
    (folder / name).write_bytes(key + signed.certificate.encode())
    return folder / name


@asynccontextmanager
async def running(link: Link) -> AsyncIterator[Link]:
    task = asyncio.create_task(link.run())
    try:
        yield link
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
