"""The follower and the mirror against a real ledger that seals all the time: same chain, same rows, every point again."""

from __future__ import annotations

import random
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from ledger_support import SMALL, Steps, desired, fleet, flip, note, service

from slum.backup import mirror
from slum.backup.mirror import Feed, Mirror
from slum.ledger import folder, follow, frames, schema
from slum.ledger.commands import SetDesired
from slum.ledger.refusal import Damaged


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Steps]:
    with Steps(tmp_path / "state") as steps:
        steps.one(note(why="first"))
        yield steps


@pytest.fixture
def copied(ledger: Steps, tmp_path: Path) -> Iterator[Mirror]:
    made = Mirror.make(tmp_path / "state", tmp_path / "backup" / "mirror.db")
    yield made
    made.close()


def caught_up(made: Mirror, feed: Feed, now: float = 5.0) -> None:
    while batch := feed.next(made.position):
        done = 0
        while done < len(batch):
            done += made.apply(batch[done:], now)
            if made.position.applied == 0:
                break


def test_it_follows_over_seals_to_the_same_chain_and_rows(ledger: Steps, copied: Mirror, tmp_path: Path) -> None:
    feed = Feed(tmp_path / "state")
    for number in range(40):
        ledger.ask(*(note(why=f"{number}.{n}") for n in range(number % 3 + 1)))
        caught_up(copied, feed)
        assert copied.position == ledger.member.position
    assert ledger.member.position.epoch > 3
    assert copied.row_hash() == ledger.member.state.row_hash()
    feed.close()


def test_it_waits_for_litestream_to_write(ledger: Steps, copied: Mirror, tmp_path: Path) -> None:
    """Litestream has a table of its own in the mirror, and writes it at its checkpoints."""
    ledger.one(note())
    feed = Feed(tmp_path / "state")
    batch = feed.next(copied.position)
    with closing(sqlite3.connect(copied.path, isolation_level=None, check_same_thread=False)) as other:
        other.execute("CREATE TABLE _litestream_seq (id INTEGER)")
        other.execute("BEGIN IMMEDIATE")
        other.execute("INSERT INTO _litestream_seq VALUES (1)")
        timer = threading.Timer(0.2, other.execute, ("COMMIT",))
        timer.start()
        copied.apply(batch, 1.0)
        timer.join()
    assert copied.position == ledger.member.position
    feed.close()


def test_what_is_two_epochs_behind_begins_from_a_copy(ledger: Steps, copied: Mirror, tmp_path: Path) -> None:
    while ledger.member.position.epoch < 4:
        ledger.one(note())
    feed = Feed(tmp_path / "state")
    with pytest.raises(follow.Gone):
        caught_up(copied, feed)
    feed.close()


def test_a_mirror_that_differs_is_found_out(ledger: Steps, copied: Mirror, tmp_path: Path) -> None:
    ledger.one(note(why="the ledger's"))
    feed = Feed(tmp_path / "state")
    (data,) = feed.next(copied.position)
    copied.apply([data.replace(b"the ledger's", b"the mirror's")], 1.0)
    with pytest.raises(Damaged, match=r"is not what state\.db"):
        feed.next(copied.position)
    feed.close()


def test_entries_that_are_not_committed_are_not_given_and_may_be_cut(tmp_path: Path) -> None:
    """A follower stops where state.db does; what lies behind may be truncated and written again."""
    from slum.ledger import journal
    from slum.ledger.group import REGULAR, _Codec

    home = tmp_path / "state"
    with Steps(home) as steps:
        steps.one(note())
        at, (row,) = steps.member.position, steps.member.state.epochs(1)
    path = folder.journal_path(home, row)
    tail = follow.Tail(home, at.cluster_id, row, skip=0)
    first = list(tail.entries(at.applied))
    assert len(first) == at.applied
    log = journal.open_journal(path, SMALL.epoch_bytes)

    def command(data: bytes) -> bytes:
        return bytes([REGULAR]) + _Codec.dumps((0, (data,)))

    for data in (b"lost", b"lost too"):
        log.add(command(data), len(log) + 1, 9)
        log.sync()
    assert list(tail.entries(at.applied)) == []
    log.deleteEntriesFrom(len(log) - 2)
    log.add(command(b"kept"), len(log) + 1, 10)
    log.sync()
    assert list(tail.entries(at.applied + 1)) == [b"kept"]
    log.close()
    tail.close()


def test_a_mirror_takes_only_what_is_committed(tmp_path: Path) -> None:
    from slum.ledger import journal
    from slum.ledger.group import REGULAR, _Codec

    home = tmp_path / "state"
    with Steps(home) as steps:
        made = Mirror.make(home, tmp_path / "backup" / "mirror.db")
        steps.one(note(why="committed"))
        at, (row,) = steps.member.position, steps.member.state.epochs(1)
    log = journal.open_journal(folder.journal_path(home, row), SMALL.epoch_bytes)
    log.add(bytes([REGULAR]) + _Codec.dumps((0, (b"not committed",))), len(log) + 1, 9)
    log.sync()
    log.close()
    feed = Feed(home)
    caught_up(made, feed)
    assert made.position == at
    feed.close()
    made.close()


def test_a_frame_that_is_being_written_is_read_later(ledger: Steps, tmp_path: Path) -> None:
    at, (row,) = ledger.member.position, ledger.member.state.epochs(1)
    path = folder.journal_path(tmp_path / "state", row)
    size = 6 << 20
    part = tmp_path / "part"
    part.mkdir()
    whole = path.read_bytes()
    frame = frames.encode_frame(99, b"", row.salt)
    assert len(frame) < 64
    copy = part / path.name
    with closing(follow.Tail(tmp_path / "state", at.cluster_id, row, skip=0)) as tail:
        expected = list(tail.entries(at.applied))
    # The same file, growing byte by byte up to some point: nothing is given twice, nothing is misread.
    for cut in sorted(random.Random(7).sample(range(frames.HEAD_BYTES, 4000), 60)):
        copy.write_bytes(whole[:cut] + bytes(min(size, len(whole) - cut)))
        with closing(follow.Tail(part, at.cluster_id, row, skip=0)) as tail:
            found = list(tail.entries(at.applied))
            assert found == expected[: len(found)]
            copy.write_bytes(whole)
            assert found + list(tail.entries(at.applied)) == expected


def test_a_flipped_bit_is_no_entry(ledger: Steps, tmp_path: Path) -> None:
    ledger.ask(*(note(why="x" * 100) for _ in range(3)))
    at, (row,) = ledger.member.position, ledger.member.state.epochs(1)
    path = folder.journal_path(tmp_path / "state", row)
    with closing(follow.Tail(tmp_path / "state", at.cluster_id, row, skip=0)) as tail:
        flip(path, frames.HEAD_BYTES + 40)
        with pytest.raises(Damaged):
            list(tail.entries(at.applied))
        flip(path, frames.HEAD_BYTES + 40)


def test_every_point_is_made_again_from_the_log(ledger: Steps, copied: Mirror, tmp_path: Path) -> None:
    feed = Feed(tmp_path / "state")
    base = tmp_path / "base.db"
    with closing(sqlite3.connect(copied.path)) as db, closing(sqlite3.connect(base)) as to:
        db.backup(to)
    chains, rows = {}, {}
    for number in range(30):
        ledger.one(note(why=str(number)))
        caught_up(copied, feed, now=100.0 + number)
        chains[copied.position.seq], rows[copied.position.seq] = copied.position.chain, copied.row_hash()
    for seq in random.Random(1).sample(sorted(chains), 5):
        point = tmp_path / f"{seq}.db"
        with closing(sqlite3.connect(base)) as db, closing(sqlite3.connect(point)) as to:
            db.backup(to)
        position = mirror.replay(point, copied.path, seq)
        assert position.chain == chains[seq]
        mirror.strip(point)
        with closing(sqlite3.connect(point)) as db:
            assert schema.row_hash(db) == rows[seq]
            assert not db.execute("SELECT name FROM sqlite_schema WHERE name LIKE '!_%' ESCAPE '!'").fetchall()
    with closing(sqlite3.connect(copied.path, isolation_level=None)) as db:
        db.execute("UPDATE _backup_log SET chain = ? WHERE seq = ?", ("0" * 64, seq))
    with pytest.raises(Damaged, match=f"does not lead to sequence {seq}"):
        mirror.replay(base, copied.path, seq)
    feed.close()


def test_a_fleet_of_a_mebibyte_is_mirrored(ledger: Steps, copied: Mirror, tmp_path: Path) -> None:
    """Entries longer than a chunk of reading."""
    noise = random.Random(3).randbytes(520_000).hex()
    command = desired(fleet(service("big", command=("run", noise))), 0)
    assert isinstance(command, SetDesired)
    assert len(command.fleet_zstd) > 500_000
    assert ledger.one(command).seq  # type: ignore[union-attr]  # Done
    feed = Feed(tmp_path / "state")
    caught_up(copied, feed)
    assert copied.position == ledger.member.position
    feed.close()


def test_bundles_are_unnamed_only_after_the_retention(ledger: Steps, copied: Mirror) -> None:
    assert copied.unnamed({"a", "b"}, 100.0, 50.0) == set()
    assert copied.unnamed({"a", "b"}, 151.0, 50.0) == {"a", "b"}
    assert copied.unnamed({"b"}, 152.0, 50.0) == {"b"}
    assert copied.unnamed({"a"}, 153.0, 50.0) == set(), "what came back begins again"


def test_the_log_forgets_what_is_older_than_the_retention(ledger: Steps, copied: Mirror, tmp_path: Path) -> None:
    feed = Feed(tmp_path / "state")
    for now in (10.0, 20.0, 30.0):
        ledger.one(note())
        caught_up(copied, feed, now)
    copied.prune(20.0)
    seq = copied.position.seq
    assert mirror.logged(copied.path, seq=seq - 2) is None
    assert mirror.logged(copied.path, seq=seq) is not None
    feed.close()


def test_private_files_are_private(ledger: Steps, copied: Mirror) -> None:
    assert copied.path.stat().st_mode & 0o777 == 0o600
    assert copied.path.parent.stat().st_mode & 0o777 == 0o700
