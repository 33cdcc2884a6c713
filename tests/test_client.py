"""The client against a real server on a unix socket: what it asks, what it survives, what it raises."""

from __future__ import annotations

import hashlib
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from fakes.api import START, FakeApi, FakeFleet

from slum import api
from slum.answers import parse_events
from slum.client import Client
from slum.errors import ConfigError, Conflict, QuorumLost, Unreachable
from slum.model import Fleet, LocalOperator, Service, Tenement
from slum.node.keeperclient import call, start_detached
from slum.node.types import Respawn, Spawn
from slum.paths import Home, checked_home


@pytest.fixture
def home() -> Iterator[Home]:
    run = Path(f"/tmp/c{secrets.token_hex(5)}")
    yield checked_home(run / "data", run)
    shutil.rmtree(run, ignore_errors=True)


@pytest.fixture
def fake(home: Home) -> Iterator[FakeApi]:
    with FakeApi(home.api_socket, FakeFleet()) as served:
        yield served


def fleet(command: str = "run") -> Fleet:
    tenement = Tenement(name="here", operator="local", services=(Service(name="web", command=(command,)),))
    return Fleet(name="test", operators=(LocalOperator(name="local"),), tenements=(tenement,))


def test_every_page_is_read_as_its_type(home: Home, fake: FakeApi) -> None:
    fake.fleet.set_fleet(fleet())
    with Client(home) as client:
        assert client.present()
        assert client.status().fleet == "test"
        assert client.state().revision == 1
        assert client.fleet(0).fleet == Fleet()
        assert [r.revision for r in client.revisions()] == [0, 1]
        assert [v.report.service for v in client.instances()] == ["web"]
        assert client.explain("web").instances
        assert client.events(newest=True, limit=1)[0].kind == "fleet_applied"
        assert client.verify().ok


def test_nobody_there_is_said_at_once(home: Home) -> None:
    with Client(home) as client:
        assert not client.present()
        with pytest.raises(Unreachable, match="no control plane runs on this machine"):
            client.status()


@pytest.mark.parametrize("fault", ["busy", "cut before", "cut after"])
def test_a_mutation_survives_faults_and_happens_once(home: Home, fake: FakeApi, fault: str) -> None:
    with Client(home) as client:
        client.state()
        fake.fleet.faults = [("PUT /v1/fleet", fault)]
        done = client.apply(fleet(), base_revision=0, why="test")
    assert done == api.Applied(revision=1, seq=101, changed=True)
    assert fake.fleet.revision == 1
    assert fake.fleet.requests.count("PUT /v1/fleet") == 2


def test_a_restarting_server_is_waited_for(home: Home, fake: FakeApi) -> None:
    with Client(home) as client:
        client.status()
        fake.stop()
        late = threading.Timer(0.3, fake.start)
        late.start()
        assert client.status().fleet == ""
        late.join()


def test_a_server_that_a_keeper_starts_again_is_waited_for_and_one_that_was_stopped_is_not(home: Home) -> None:
    start_detached(home)
    try:
        server = Spawn(name="server", argv=("/bin/sleep", "1000"), env={}, respawn=Respawn())
        for spawn in (server, msgspec.structs.replace(server, name="service")):
            call(home, "spawn", spawn=msgspec.to_builtins(spawn))
        fake = FakeApi(home.api_socket, FakeFleet())
        late = threading.Timer(0.3, fake.start)
        late.start()
        with Client(home) as client:
            assert client.present()
            assert client.status().revision == 0
        late.join()
        fake.stop()
        call(home, "shutdown", names=["server"], grace_s=5)
        wait(lambda: all(c["name"] != "server" or c["state"] == "exited" for c in call(home, "list")["children"]))
        with Client(home) as client:
            assert not client.present()
            with pytest.raises(Unreachable, match="no control plane runs"):
                client.status()
    finally:
        call(home, "shutdown", names=["server", "service"], grace_s=0)
        wait(lambda: not home.keeper_socket.exists())


def wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline


def test_no_quorum_is_raised_after_the_deadline(home: Home, fake: FakeApi) -> None:
    fake.fleet.faults = [("GET /v1/status", "busy")] * 50
    with Client(home, deadline_s=0.5) as client, pytest.raises(QuorumLost, match="no leader"):
        client.status()
    assert fake.fleet.requests.count("GET /v1/status") > 1


def test_a_conflict_keeps_what_changed(home: Home, fake: FakeApi) -> None:
    fake.fleet.set_fleet(fleet())
    with Client(home) as client, pytest.raises(Conflict) as caught:
        client.apply(fleet("other"), base_revision=0, why="apply")
    assert caught.value.changes == ("root@ops changed service notes.memory_limit_mb 256 -> 512",)
    assert fake.fleet.revision == 1


def test_an_error_of_the_server_is_the_same_class_here(home: Home, fake: FakeApi) -> None:
    with Client(home) as client, pytest.raises(ConfigError, match="there is no revision 9"):
        client.fleet(9)


def test_a_blob_is_streamed_and_counted(home: Home, fake: FakeApi, tmp_path: Path) -> None:
    blob = tmp_path / "blob"
    blob.write_bytes(secrets.token_bytes(700_000))
    digest = hashlib.sha256(blob.read_bytes()).hexdigest()
    sent: list[int] = []
    fake.fleet.faults = [("PUT /v1/blobs", "cut before")]
    with Client(home) as client:
        assert not client.has_blob(digest)
        client.put_blob(digest, blob, sent=sent.append)
        assert client.has_blob(digest)
    assert fake.fleet.blobs[digest] == blob.read_bytes()
    assert sum(sent) >= 700_000
    assert max(sent) < 700_000


def test_followed_events_come_once_each_over_a_restart(home: Home, fake: FakeApi) -> None:
    fake.fleet.event("service_added", "service:web")
    with Client(home) as client:
        stream = client.follow_events(after=0)
        assert next(stream).number == 1
        fake.stop()
        fake.fleet.event("service_changed", "service:web")
        late = threading.Timer(0.2, fake.start)
        late.start()
        assert next(stream).number == 2
        late.join()
        fake.fleet.event("service_removed", "service:web")
        assert next(stream).kind == "service_removed"
        stream.close()


def test_followed_logs_come_once_each_over_a_restart(home: Home, fake: FakeApi) -> None:
    def line(n: int) -> api.LogLine:
        return api.LogLine(tenement="here", service="web", id="main", at=START + n / 1000, text=f"line {n}\u2028\x85")

    fake.fleet.lines += [line(1), line(1), line(2)]
    with Client(home) as client:
        stream = client.logs("web", follow=True, tail=10)
        assert [next(stream) for _ in range(3)] == [line(1), line(1), line(2)]
        fake.stop()
        fake.fleet.lines += [line(2), line(3)]
        late = threading.Timer(0.2, fake.start)
        late.start()
        assert [next(stream) for _ in range(2)] == [line(2), line(3)]
        late.join()
        stream.close()


def test_progress_that_never_arrives_ends_with_the_time(home: Home, fake: FakeApi) -> None:
    fake.fleet.set_fleet(fleet())
    fake.fleet.stuck = True
    with Client(home) as client, pytest.raises(TimeoutError):
        list(client.progress(1, timeout_s=0.3))
    fake.fleet.stuck = False
    with Client(home) as client:
        assert [step.what for step in client.progress(1, timeout_s=5)][-1] == "done"


@pytest.mark.parametrize("size", [1, 2, 3, 1000])
def test_event_streams_are_parsed_however_they_are_cut(size: int) -> None:
    text = b': hi\r\n\r\nevent: error\r\ndata: {"a":\ndata: 1}\n\ndata:\xe2\x80\xa8x\nid: 7\n\n\n\ndata: unfinished\n'
    chunks = [text[n : n + size] for n in range(0, len(text), size)]
    assert list(parse_events(chunks)) == [("error", b'{"a":\n1}'), ("message", b"\xe2\x80\xa8x")]
