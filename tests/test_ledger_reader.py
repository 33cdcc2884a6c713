"""What everyone but the ledger process sees of state.db."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path

import pytest
from ledger_support import Steps, desired, fleet, note, proposal, scribe, service

from slum.errors import QuorumLost
from slum.ledger import folder
from slum.ledger.commands import SetOverride
from slum.ledger.reader import Reader


def test_no_ledger_yet(tmp_path: Path) -> None:
    reader = Reader(tmp_path / "state.db")
    with pytest.raises(QuorumLost, match="there is no ledger"):
        reader.seq()
    with Steps(tmp_path) as steps:
        assert reader.seq() == steps.member.position.seq == 0
        assert reader.fleet() is None
        assert reader.revisions() == ()
    reader.close()


def test_events_by_every_filter(tmp_path: Path) -> None:
    (tmp_path / "CURRENT").write_text("state.db\n")
    with scribe(tmp_path) as s:
        s.done(desired(fleet(service("web"), service("db")), 0))
        s.done(SetOverride(verb="stop", instances=(("here", "web", "main"),)))
        for n in range(20):
            s.apply(proposal(note("instance_failed", f"instance:here/db/{n}", why=str(n)), actor=f"agent@{n % 2}"))
    with Reader_(tmp_path) as reader:
        everything = reader.events(limit=1000)
        assert [event.number for event in everything] == list(range(1, len(everything) + 1))
        assert reader.events(limit=3) == everything[:3]
        assert reader.events(limit=3, newest=True) == everything[-3:]
        assert reader.events(after=5, limit=2) == everything[5:7]
        assert reader.events(after=len(everything)) == ()
        assert [event.kind for event in reader.events(service="web")] == ["service_added", "override_set"]
        assert len(reader.events(service="db", kind="instance_failed", actor="agent@1")) == 10
        assert [e.why for e in reader.events(service="db", actor="agent@1", limit=2, newest=True)] == ["17", "19"]
        assert reader.events(kind="none") == ()


class Reader_(Reader):  # noqa: N801 - a Reader for `with`
    def __enter__(self) -> Reader_:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def test_it_follows_current(tmp_path: Path) -> None:
    with Steps(tmp_path) as steps:
        steps.one(note(why="old"))
        with Reader_(tmp_path / "state.db") as reader:
            assert reader.events(kind="instance_noted")[0].why == "old"
            with sqlite3.connect(tmp_path / "state.db") as source, sqlite3.connect(tmp_path / "state-2.db") as target:
                source.backup(target)
                target.execute("UPDATE events SET why = 'new' WHERE kind = 'instance_noted'")
            source.close()
            target.close()
            assert reader.events(kind="instance_noted")[0].why == "old"
            folder.move_current(tmp_path, "state-2.db")
            assert reader.events(kind="instance_noted")[0].why == "new"


def test_it_reads_what_a_killed_ledger_left(tmp_path: Path) -> None:
    home = tmp_path / "live"
    with Steps(home) as steps:
        steps.one(note(why="last"))
        shutil.copytree(home, tmp_path / "killed")
    (tmp_path / "killed" / "state.db-shm").unlink()
    for left in (home, tmp_path / "killed"):
        with Reader_(left / "state.db") as reader:
            assert reader.events(newest=True, limit=1)[0].why == "last"
            assert reader.verify().ok


def test_it_cannot_write(tmp_path: Path) -> None:
    with Steps(tmp_path), Reader_(tmp_path) as reader:
        with pytest.raises(QuorumLost, match="readonly"), reader._reading() as db:
            db.execute("DELETE FROM events")


def test_a_reader_never_holds_up_the_writer(tmp_path: Path) -> None:
    with Steps(tmp_path) as steps, Reader_(tmp_path) as reader:
        for n in range(50):
            steps.one(note(why="x" * 1000))
            assert reader.seq() == steps.member.position.seq
            assert len(reader.events(kind="instance_noted", limit=1000)) == n + 1


def test_damage_is_no_quorum_for_readers(tmp_path: Path) -> None:
    with Steps(tmp_path) as steps:
        steps.one(note())
    path = tmp_path / "state.db"
    path.write_bytes(path.read_bytes()[:2048] + bytes(4096))
    with Reader_(tmp_path) as reader, pytest.raises(QuorumLost, match="cannot be read"):
        reader.events()
