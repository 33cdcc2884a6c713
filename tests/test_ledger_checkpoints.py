"""SQLite's write-ahead log is copied into state.db beside the ledger's thread, and a disk that fails is not passed over."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from ledger_support import note, scribe

from slum.ledger import checkpoints, schema
from slum.ledger.checkpoints import Checkpoints
from slum.ledger.perform import StateFailed


class Aside:
    """Work that runs when the test says so."""

    def __init__(self) -> None:
        self.works: list[Callable[[], None]] = []
        self.now = 0.0

    def run(self) -> None:
        self.works.pop()()


def in_the_file(path: Path) -> int:
    """Return the newest seq that is in state.db itself, whatever its WAL says."""
    with closing(sqlite3.connect(f"file:{path}?immutable=1", uri=True)) as db:
        return schema.read_position(db, str(path)).seq


def test_what_is_committed_comes_into_the_file_itself(tmp_path: Path) -> None:
    aside = Aside()
    checks = Checkpoints(clock=lambda: aside.now, apart=aside.works.append)
    with scribe(tmp_path) as s:
        s.done(note())
        checks.look(s.state)
        first = s.state.position.seq
        aside.run()
        assert in_the_file(s.state.path) == first
        s.done(note())
        checks.look(s.state)
        assert in_the_file(s.state.path) == first + 1, "what came meanwhile"
        s.done(note())
        checks.look(s.state)
        assert aside.works == [], "not every moment"
        aside.now += checkpoints.PERIOD_S
        checks.look(s.state)
        aside.run()
        checks.look(s.state)
        assert in_the_file(s.state.path) == first + 2
        aside.now += checkpoints.PERIOD_S
        checks.look(s.state)
        assert aside.works == [], "not without need"


@pytest.mark.parametrize("code", [sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL])
def test_a_disk_that_fails_ends_the_member_and_a_full_one_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    aside = Aside()
    checks = Checkpoints(clock=lambda: aside.now, apart=aside.works.append)
    real = sqlite3.connect

    class Disk(sqlite3.Connection):
        def execute(self, sql: str, *rest: object) -> sqlite3.Cursor:
            if "wal_checkpoint" in sql:
                error = sqlite3.OperationalError("the disk says no")
                error.sqlite_errorcode = code
                raise error
            return super().execute(sql, *rest)  # type: ignore[arg-type]

    with scribe(tmp_path) as s:
        s.done(note())
        with monkeypatch.context() as patch:
            patch.setattr(sqlite3, "connect", lambda *args, **kw: real(*args, factory=Disk, **kw))
            checks.look(s.state)
            aside.run()
        if code == sqlite3.SQLITE_FULL:
            checks.look(s.state)
        else:
            with pytest.raises(StateFailed, match="the disk says no"):
                checks.look(s.state)
        s.done(note())


def test_a_state_that_was_replaced_meanwhile_is_nobodys_business(tmp_path: Path) -> None:
    aside = Aside()
    checks = Checkpoints(clock=lambda: aside.now, apart=aside.works.append)
    with scribe(tmp_path, "old.db") as s:
        s.done(note())
        checks.look(s.state)
    for path in tmp_path.glob("old.db*"):
        path.unlink()
    aside.run()
    assert not list(tmp_path.glob("old.db*"))
    with scribe(tmp_path, "new.db") as s:
        s.done(note())
        checks.look(s.state)
