"""What the agent keeps and tells: its log of instances, adoption from the keeper's list, reports in parts, bounded notes."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from agent_support import service

from slum.model import Key, Service, Settings, Stamp
from slum.node.adopt import adopt, child_name, key_of, meta_of
from slum.node.keeperclient import Child
from slum.node.observed import Generation, Observed, Past, Ready, Starting, Target, retargeted, started
from slum.node.roster import NOTES_BURST, REPORTS_MAX, Clock, Roster
from slum.node.store import Store, memory_of, observed_of
from slum.paths import Home
from slum.wire import Desired, Note

KEY = Key(tenement="here", service="web", id="main")
WEB = service()


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(data=tmp_path / "d", run=tmp_path / "r")
    home.agent.mkdir(parents=True)
    return home


@pytest.fixture
def store(home: Home) -> Iterator[Store]:
    store = Store(home)
    yield store
    store.close()


def generation(number: int, *, socket: int | None = None, release: str = "r1", pid: int | None = None) -> Generation:
    return Generation(
        number=number,
        socket=number if socket is None else socket,
        release=release,
        restarts=0,
        service=WEB,
        started_at=10.0,
        stage=Starting(since=10.0),
        pid=pid,
    )


def child(number: int, *, socket: int | None = None, status: int | None = None, running: bool = True) -> Child:
    return Child(
        name=child_name(KEY, number),
        pid=1000 + number,
        start_time=1,
        boot_id="b",
        state="running" if running else "exited",
        status=status,
        exited_at=None if running else 50.0,
        started_at=20.0,
        adopted=False,
        respawns=0,
        meta=meta_of(KEY, generation(number, socket=socket)),
    )


def define(_key: Key, _release: str) -> Service:
    return WEB


# --- the log of instances ---------------------------------------------------------------------------------------------


def test_what_is_saved_is_read_again_and_a_torn_end_is_skipped(home: Home, store: Store) -> None:
    seen = started(retargeted(Observed(key=KEY), Target(release="r1"), 5.0), generation(3))
    other = Observed(key=Key(tenement="here", service="gone", id="main"), counter=1)
    store.memories()
    for each in (Observed(key=KEY, counter=1), other, seen):
        store.save(each)
    store.forget(other.key)
    store.close()
    file = home.agent / "instances.jsonl"
    with file.open("ab") as out:
        out.write(b'{"key":{"tenement":"here","serv')
    again = Store(home)
    try:
        memories, bad = again.memories()
        assert (memories, bad) == ([memory_of(seen)], 1)
        assert observed_of(memories[0]).counter == 3
        assert again.service(KEY, "r1") == WEB
        again.compact()
        assert len(file.read_bytes().splitlines()) == 1
    finally:
        again.close()


def test_the_same_again_is_not_written(home: Home, store: Store) -> None:
    store.memories()
    store.save(Observed(key=KEY, counter=1))
    size = (home.agent / "instances.jsonl").stat().st_size
    store.save(Observed(key=KEY, counter=1))
    assert (home.agent / "instances.jsonl").stat().st_size == size


def test_one_agent_at_a_time(home: Home, store: Store) -> None:
    assert store.lock()
    assert store.lock()
    assert not Store(home).lock()


def test_a_run_folder_that_is_new_means_a_reboot(store: Store) -> None:
    assert store.first_since_boot()
    assert not store.first_since_boot()


# --- adoption ---------------------------------------------------------------------------------------------------------


def test_what_serves_is_taken_over_as_healthy_and_what_came_later_has_to_prove_itself() -> None:
    remembered = Observed(key=KEY, serving=2, counter=3)
    seen, ends = adopt(remembered, [child(1), child(2), child(3)], define, 100.0)
    assert ends == ()
    assert [type(g.stage) for g in seen.generations] == [Ready, Ready, Starting]
    assert [g.pid for g in seen.generations] == [1001, 1002, 1003]
    assert adopt(seen, [child(1), child(2), child(3)], define, 200.0) == (seen, ())


def test_ends_that_nobody_told_are_found() -> None:
    known = Observed(key=KEY, serving=1, generations=(generation(1, pid=1001), generation(2, pid=1002), generation(3)))
    seen, ends = adopt(known, [child(1, running=False, status=4)], define, 100.0)
    assert [(e.number, e.status, e.at) for e in ends] == [(1, 4, 50.0), (2, None, 100.0)]
    assert [g.number for g in seen.generations] == [1, 2], "what was never started is dropped"


def test_a_start_whose_answer_was_lost_is_found_running() -> None:
    known = Observed(key=KEY, generations=(generation(1),))
    seen, ends = adopt(known, [child(1)], define, 100.0)
    assert (seen.generations[0].pid, ends) == (1001, ())


def test_only_instances_are_instances() -> None:
    assert key_of(child(1)) == KEY
    stranger = Child(
        name="agent",
        pid=1,
        start_time=1,
        boot_id="b",
        state="running",
        status=None,
        exited_at=None,
        started_at=0,
        adopted=False,
        respawns=0,
    )
    assert key_of(stranger) is None


# --- what is told -----------------------------------------------------------------------------------------------------


def roster(store: Store, notes: list[Note]) -> Roster:
    store.memories()
    return Roster(store, Clock(), notes.append, lambda: None)


def desired(*services: Service, seq: int = 1) -> Desired:
    return Desired(
        stamp=Stamp(generation=1, seq=seq),
        cluster="c",
        revision=seq,
        fleet="f",
        tenement="here",
        domain="localhost",
        settings=Settings(),
        services=services,
        routing_listen=("127.0.0.1:80",),
    )


def test_reports_come_in_parts_and_then_only_what_changed(store: Store) -> None:
    told = roster(store, [])
    assert told.report(full=True) is None
    ids = tuple(f"i{n}" for n in range(REPORTS_MAX + 7))
    told.desire(desired(service(instances=ids)))
    first, second = told.report(full=True), told.report(full=False)
    assert first is not None
    assert second is not None
    assert (first.full, second.full) == (True, False)
    names = {r.id for r in (*first.instances, *second.instances)}
    assert names == set(ids)
    assert told.report(full=False) is None
    told.desire(desired(service(instances=("i0",)), seq=2))
    told.forget(Key(tenement="here", service="web", id="i1"))
    third = told.report(full=False)
    assert third is not None
    assert third.gone == (("web", "i1"),)
    assert third.stamp.seq == 2


def test_a_crash_loop_does_not_drown_the_notes(store: Store) -> None:
    notes: list[Note] = []
    told = roster(store, notes)
    told.desire(desired(WEB))
    for _ in range(500):
        told.note("instance_exited", KEY, "exit 1")
    told.note("instance_failed", KEY, "exit 1, 500 times")
    assert NOTES_BURST <= len(notes) <= NOTES_BURST + 3
    assert notes[-1].kind == "instance_failed"


def test_a_full_disk_does_not_end_supervision(store: Store, home: Home) -> None:
    told = roster(store, [])
    told.desire(desired(WEB))
    store.close()
    home.agent.joinpath("instances.jsonl").unlink()
    home.agent.rename(home.data / "elsewhere")
    seen = Observed(key=KEY, counter=9, past=(Past(at=1, generation=1, socket=1, release="r", restarts=0, status=1),))
    told.fold(seen)
    assert told.seen(KEY) == seen
    told.forget(KEY)
    told.remember(rebooted=False)


@contextmanager
def room_for(bytes_: int) -> Iterator[None]:
    """No file may grow beyond *bytes_*: a write is cut short there, as it is where a disk ends."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_config_that_does_not_fit_leaves_the_one_before_whole(store: Store, home: Home) -> None:
    first = desired(WEB)
    store.keep_desired(first)
    second = desired(*(service(f"s{number}") for number in range(100)))
    with room_for(4096), pytest.raises(OSError, match="too large"):
        store.keep_desired(second)
    assert store.desired() == first
    assert [path.name for path in home.agent.iterdir()] == ["desired.json"]
    store.keep_desired(second)
    assert store.desired() == second


def test_a_line_that_is_cut_short_costs_no_other(store: Store, home: Home) -> None:
    told = roster(store, [])
    told.desire(desired(WEB))
    told.fold(Observed(key=KEY, counter=1))
    size = (home.agent / "instances.jsonl").stat().st_size
    with room_for(size + 10):
        told.fold(Observed(key=KEY, counter=2))
    other = Key(tenement="here", service="web", id="other")
    told.fold(Observed(key=other, counter=3))
    again = Store(home)
    memories, bad = again.memories()
    assert ({memory.key: memory.counter for memory in memories}, bad) == ({KEY: 2, other: 3}, 0)
