"""What members' servers tell each other of their agents: merged, in order of the agents' own clocks, and forgotten with the line."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest
from starlette.websockets import WebSocket, WebSocketDisconnect

from slum import wire
from slum.errors import ConfigError, QuorumLost, Unreachable
from slum.ledger.reader import ClusterRow, MachineRow
from slum.model import LocalOperator, Settings, Stamp
from slum.server import memberwire
from slum.server.agents import Hub, Seen, Session
from slum.server.blobs import Blobs
from slum.server.copies import Copies
from slum.server.elsewhere import Away, Elsewhere
from slum.server.feed import Feeder
from slum.server.localmember import member_of
from slum.server.memberwire import Told
from slum.server.notes import Notes
from slum.server.pulse import Pulse
from slum.server.view import World
from slum.wire import Phase

AT_9 = Stamp(generation=7, seq=9)


def hello(machine: str = "t1", dialled_at: float = 1.0) -> wire.Hello:
    return wire.Hello(
        protocol=wire.PROTOCOL,
        version="0",
        machine=f"node:{machine}.1",
        tenement=machine,
        stamp=Stamp(),
        boot_id="b",
        host="box",
        cpus=1,
        memory_bytes=1,
        dialled_at=dialled_at,
    )


def report(phase: Phase = Phase.HEALTHY, seq: int = 5, number: int = 1) -> wire.Report:
    generation = wire.GenerationReport(number=number, release="r", phase=phase, pid=1, started_at=0.0)
    instance = wire.InstanceReport(service="web", id="main", phase=phase, generations=(generation,))
    return wire.Report(stamp=Stamp(generation=7, seq=seq), at=0.0, full=True, instances=(instance,))


def told(*messages: wire.Message, machine: str = "t1", **fields: Any) -> Told:
    return Told(heard=tuple((machine, wire.encoder.encode(message)) for message in messages), **fields)


def desired(seq: int) -> wire.Desired:
    stamp = Stamp(generation=7, seq=seq)
    return wire.Desired(stamp=stamp, cluster="c", revision=1, fleet="f", tenement="t1", domain="d", settings=Settings())


@pytest.fixture
def hub() -> Hub:
    return Hub(Pulse(), Notes())


@pytest.fixture
def elsewhere(hub: Hub) -> Elsewhere:
    return Elsewhere(hub, no_opener)


def no_opener(_member: str, _asked: memberwire.Open) -> Any:
    raise AssertionError("no stream was asked for")


def session_of(hub: Hub, machine: str = "t1") -> str:
    """Return the member that *machine* dialled, "here", or ""."""
    session = hub.seen[machine].session
    return session.member if isinstance(session, Away) else "here" if session else ""


async def test_what_another_member_hears_is_known_here_and_ages_when_the_line_breaks(
    hub: Hub, elsewhere: Elsewhere
) -> None:
    elsewhere.take("m2", told(hello(), report(), whole=True))
    assert session_of(hub) == "m2"
    assert hub.seen["t1"].instances["web", "main"].phase is Phase.HEALTHY
    assert hub.seen["t1"].is_connected(time.monotonic())
    elsewhere.take("m2", told(report(Phase.FAILED)))
    assert hub.seen["t1"].instances["web", "main"].phase is Phase.FAILED
    elsewhere.gone("m2")
    assert session_of(hub) == ""
    assert hub.seen["t1"].instances, "what it ran is still known"
    assert not hub.seen["t1"].is_connected(time.monotonic())


async def test_the_connection_that_the_agent_made_last_counts(hub: Hub, elsewhere: Elsewhere) -> None:
    elsewhere.take("m2", told(hello(dialled_at=2.0), report(), whole=True))
    elsewhere.take("m3", told(hello(dialled_at=1.0), report(Phase.FAILED), whole=True))
    assert session_of(hub) == "m2", "m3 has not noticed yet that the agent has gone"
    assert hub.seen["t1"].instances["web", "main"].phase is Phase.HEALTHY
    elsewhere.take("m3", told(hello(dialled_at=3.0), report()))
    assert session_of(hub) == "m3"
    elsewhere.take("m2", Told(lost=("t1",)))
    assert session_of(hub) == "m3", "the one that has lost it does not have it any more"
    elsewhere.take("m3", Told(lost=("t1",)))
    assert session_of(hub) == ""


async def test_an_agent_that_dialled_another_member_since_ends_its_session_here(hub: Hub, elsewhere: Elsewhere) -> None:
    session = Session(cast(WebSocket, None), "t1")
    hub.adopt(Seen(hello=hello(dialled_at=5.0), session=session, contact=time.monotonic()), "t1")
    elsewhere.take("m2", told(hello(dialled_at=4.0), whole=True))
    assert (session_of(hub), session.is_open) == ("here", True)
    elsewhere.take("m2", told(hello(dialled_at=6.0)))
    assert (session_of(hub), session.is_open) == ("m2", False)


async def test_members_stamp_the_same_config_at_different_times(hub: Hub, elsewhere: Elsewhere) -> None:
    """m2 pushed it at 5; we, who started later, would have at 8: the agent acts on the one of now all the same."""
    elsewhere.take("m2", told(hello(), report(seq=5), whole=True))
    assert not hub.seen["t1"].acts_on(desired(8))
    elsewhere.take("m2", Told(at=AT_9, behind=("t1",)))
    assert not hub.seen["t1"].acts_on(desired(8)), "m2 says that it does not act on that of 9 yet"
    elsewhere.take("m2", Told(at=AT_9))
    assert hub.seen["t1"].acts_on(desired(8))
    assert not hub.seen["t1"].acts_on(desired(10))


async def test_figures_alone_wake_nobody(hub: Hub, elsewhere: Elsewhere) -> None:
    """A thousand agents' heartbeats come every second: whoever waits for a change would look at all of them each time."""
    elsewhere.take("m2", told(hello(), report(), whole=True))
    beats = hub.changed.count
    stats = wire.InstanceStats(service="web", id="main", memory_bytes=7)
    figures = wire.Heartbeat(at=0.0, load=0.5, memory_available_bytes=1, rss_bytes=1, stats=(stats,))
    elsewhere.take("m2", told(at=AT_9))
    assert hub.changed.count == beats + 1, "the agent is up to date now"
    elsewhere.take("m2", told(figures, at=AT_9))
    assert hub.changed.count == beats + 1
    assert hub.seen["t1"].load == 0.5
    assert hub.seen["t1"].instances["web", "main"].memory_bytes == 7
    news = (told(report()), told(lost=("t1",)), told(restarted=(("t1", "web", "main", 1),)))
    for number, one in enumerate((*news, told(at=AT_9, troubles={"t1": "full"})), beats + 2):
        elsewhere.take("m2", one)
        assert hub.changed.count == number, one


async def test_restarts_are_told_apart_by_what_the_pushing_member_knew(hub: Hub, elsewhere: Elsewhere) -> None:
    elsewhere.take("m2", told(hello(), report(number=4), whole=True))
    elsewhere.take("m2", Told(restarted=(("t1", "web", "main", 3), ("t9", "web", "main", 3))))
    assert hub.seen["t1"].restarted == {("web", "main"): 3}


async def test_nonsense_and_strangers_change_nothing(hub: Hub, elsewhere: Elsewhere) -> None:
    elsewhere.take("m2", Told(heard=(("t1", b"\xc1"), ("t1", b"")), lost=("t9",), behind=("t9",), at=AT_9))
    elsewhere.take("m2", told(report()))
    assert hub.seen == {}


class Line:
    """Both ends of a feed's WebSocket, as far as a Feeder uses it."""

    def __init__(self) -> None:
        self.said: asyncio.Queue[Told] = asyncio.Queue()
        self.closed = asyncio.Event()

    async def send_bytes(self, data: bytes) -> None:
        self.said.put_nowait(memberwire.told.decode(data))

    async def receive_bytes(self) -> bytes:
        await self.closed.wait()
        raise WebSocketDisconnect


class ControlOf:
    """What a Feeder needs of a Control."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.troubles = {"t7": "no room"}


async def test_a_feed_begins_with_everything_and_goes_on_with_what_changes(hub: Hub, elsewhere: Elsewhere) -> None:
    own = Hub(Pulse(), Notes())
    cluster = ClusterRow(
        cluster_id="c", generation=7, epoch=1, lineage="l", term=1, seq=9, members=(), protocol=1, leader="", revision=0
    )
    own.take(World(seq=9, cluster=cluster))
    own.adopt(
        Seen(hello=hello(), session=Session(cast(WebSocket, None), "t1"), contact=0.0, is_reported=True, load=1.5), "t1"
    )
    own.seen["t1"].instances["web", "main"] = report().instances[0]
    own.adopt(Seen(hello=hello("t2"), session=None, contact=0.0), "t2")
    line = Line()
    feeder = Feeder(cast(Any, ControlOf(own)))
    async with asyncio.TaskGroup() as group:
        group.create_task(feeder.run(cast(WebSocket, line)))
        first = await line.said.get()
        assert first.whole
        elsewhere.take("m2", first)
        assert hub.seen.keys() == {"t1"}, "t2 is not connected there"
        assert (hub.seen["t1"].load, hub.seen["t1"].instances.keys()) == (1.5, {("web", "main")})
        elsewhere.take("m2", await line.said.get())
        assert elsewhere.troubles == {"t7": "no room"}
        for ear in own.ears:
            ear.heard("t1", wire.encoder.encode(report(Phase.FAILED)), soon=True)
            ear.lost("t1")
        elsewhere.take("m2", await line.said.get())
        assert hub.seen["t1"].instances["web", "main"].phase is Phase.FAILED
        assert session_of(hub) == ""
        line.closed.set()
    assert own.ears == set()


class FakeRelay:
    """Two other members, each of which takes and gives bundles, or is away."""

    def __init__(self, folder: Path) -> None:
        self.others = ("m2", "m3")
        self.away: set[str] = set()
        self.blobs = {name: Blobs(folder / name) for name in self.others}

    @asynccontextmanager
    async def asking(self, member: str, asked: memberwire.AnyAsk, _deadline_s: float = 1.0) -> AsyncIterator[Any]:
        if member in self.away:
            raise Unreachable(f"{member} is away")
        yield FakeSocket(self.blobs[member], asked)


class FakeSocket:
    def __init__(self, blobs: Blobs, asked: memberwire.AnyAsk) -> None:
        assert isinstance(asked, memberwire.Store | memberwire.Fetch)
        self._blobs, self._digest, self._chunks = blobs, asked.digest, list[bytes]()
        self._frames: list[bytes] = []
        if isinstance(asked, memberwire.Fetch):
            has = blobs.has(asked.digest)
            problem = None if has else memberwire.Problem(code="bad_input", message="no blob")
            data = blobs.path(asked.digest).read_bytes() if has else b""
            self._frames = [b"\x00" + data] if has else []
            self._frames.append(b"\x01" + memberwire.encode(memberwire.Answer(problem=problem)))

    async def send(self, chunk: bytes) -> None:
        self._chunks.append(chunk)
        if not chunk:
            await self._blobs.put(self._digest, chunks_of(*self._chunks))
            self._frames.append(memberwire.encode(memberwire.Answer()))

    async def receive(self) -> bytes:
        return self._frames.pop(0)


async def chunks_of(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


async def test_an_upload_counts_when_a_majority_has_it(tmp_path: Path) -> None:
    relay = FakeRelay(tmp_path)
    own = Blobs(tmp_path / "m1")
    copies = Copies(own, cast(Any, relay), cast(Any, None), Pulse())
    data = b"a bundle"
    digest = hashlib.sha256(data).hexdigest()
    relay.away = {"m2", "m3"}
    with pytest.raises(QuorumLost, match="only 1 of 3 members have the bundle"):
        await copies.put(digest, chunks_of(data))
    relay.away = {"m2"}
    await copies.put(digest, chunks_of(data))
    assert relay.blobs["m3"].has(digest)
    own.path(digest).unlink()
    assert await copies.touch(digest), "who lacks it fetches it"
    assert own.path(digest).read_bytes() == data
    other = hashlib.sha256(b"another").hexdigest()
    assert not await copies.touch(other)
    with pytest.raises(ConfigError):
        await copies.put(other, chunks_of(data))


def row(operator: str, machine_id: str, state: str = "created") -> MachineRow:
    return MachineRow(
        machine="here",
        tenement="here",
        operator=operator,
        incarnation=1,
        state=state,
        machine_id=machine_id,
        action="a",
        deadline_at=0.0,
        arrives_until=0.0,
    )


@pytest.mark.parametrize(
    ("named", "rows", "members", "whose"),
    [
        ("m2", (row("local", "local:m1"),), ["m1", "m2"], "m2"),
        (None, (), ["m1"], "m1"),
        (None, (row("local", "local:m1"),), ["m3", "m2", "m1"], "m1"),
        (None, (row("other", "local:m1"), row("local", "local:m3", "destroyed")), ["m1", "m2", "m3"], ""),
    ],
)
def test_whose_machine_a_local_operator_means(
    named: str | None, rows: tuple[MachineRow, ...], members: list[str], whose: str
) -> None:
    assert member_of(LocalOperator(name="local", member=named), rows, members) == whose
