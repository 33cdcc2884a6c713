"""One member: epochs, crashes between any two steps of a seal, damage that is refused with a way out, a full disk."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from ledger_support import SMALL, Steps, desired, fleet, flip, note, proposal, service

from slum.errors import InvariantError, QuorumLost, SlumError
from slum.ledger import disk, folder, frames, group, journal
from slum.ledger.commands import Barrier, Done, Entry, Header, Intent, Outcome, SetOverride
from slum.ledger.group import check_engine, command_entry
from slum.ledger.reader import Reader
from slum.ledger.recover import recover
from slum.ledger.refusal import Damaged, Refusal
from slum.ledger.world import Config


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "state"


def written(home: Path) -> list[str]:
    """The texts of all notes in the ledger, in order."""
    reader = Reader(home)
    found = [event.why for event in reader.events(kind="instance_noted", limit=10_000)]
    assert reader.verify().ok
    reader.close()
    return found


def write(steps: Steps, *texts: str) -> None:
    for answer in steps.ask(*(note(why=text) for text in texts)):
        assert isinstance(answer, Done), answer


# --- the engine -------------------------------------------------------------------------------------------------------


def test_the_engine_is_the_one_that_was_examined() -> None:
    check_engine()


def test_another_engine_is_refused() -> None:
    original = group._engine.createJournal
    group._engine.createJournal = lambda _: None
    try:
        with pytest.raises(InvariantError, match="does not use our createJournal"):
            check_engine()
    finally:
        group._engine.createJournal = original


def test_the_log_holds_no_pickle(home: Path) -> None:
    with Steps(home) as steps:
        write(steps, "a")
        commands = [command for command, _, _ in steps.member.epoch.journal[0:]]
    entries = [data for data in map(command_entry, commands) if data is not None]
    assert len(entries) == 2
    assert all(msgspec.msgpack.decode(data)["header"]["member"] == "m1" for data in entries)
    with pytest.raises(InvariantError, match=r"append\(\) never wrote"):
        command_entry(b"\0" + b"\x80\x04cposix\nsystem\n.")


def test_groups_leave_no_descriptors(home: Path) -> None:
    with Steps(home) as steps:

        def descriptors() -> int:
            # A checkpoint beside the ledger's thread has some open for a moment.
            steps.member._checkpoints.close()
            return len(os.listdir("/proc/self/fd"))

        write(steps, "a")
        before = descriptors()
        for n in range(60):
            write(steps, str(n))
        assert steps.member.position.epoch > 4
        assert descriptors() == before


# --- restarts ---------------------------------------------------------------------------------------------------------


def test_a_new_cluster_and_what_it_remembers(home: Path) -> None:
    with Steps(home) as steps:
        first = steps.member.position
        assert steps.said("cluster_created")
        write(steps, "a", "b")
    with Steps(home, run="r2") as steps:
        assert not steps.said("cluster_created")
        write(steps, "c")
        now = steps.member.position
        assert (now.cluster_id, now.generation, now.leader) == (first.cluster_id, first.generation, "m1/r2")
        assert now.term == 2
        assert steps.member.leader().member == "m1"
    assert written(home) == ["a", "b", "c"]


def test_only_one_process_has_the_folder(home: Path) -> None:
    with Steps(home), pytest.raises(Refusal, match="another ledger process"):
        Steps(home)


def test_many_restarts_over_many_epochs(home: Path, seed: int) -> None:
    chance = random.Random(seed)
    expected: list[str] = []
    for run in range(25):
        with Steps(home, run=f"r{run}") as steps:
            for _ in range(chance.randrange(6)):
                texts = [f"{len(expected) + n}" for n in range(chance.randrange(1, 4))]
                write(steps, *texts)
                expected += texts
            for _ in range(chance.randrange(3)):
                steps.member.step(0)
    assert written(home) == expected
    assert len(folder.journals(home)) <= 2


def test_request_ids_hold_over_seals_and_restarts(home: Path) -> None:
    made = proposal(note(why="once"))
    answers = []
    for run in range(3):
        with Steps(home, run=f"r{run}") as steps:
            answers.append(steps.one(made))
            write(steps, *(f"{run}.{n}" for n in range(3)))
            for n in range(3, 15):
                write(steps, f"{run}.{n}")
    assert answers[0] == answers[1] == answers[2]
    assert written(home).count("once") == 1


def test_entries_that_were_logged_but_not_applied_are_applied_at_the_next_start(home: Path) -> None:
    with Steps(home) as steps:
        write(steps, "a")
    before = {path.name: path.read_bytes() for path in home.glob("state.db*")}
    with Steps(home) as steps:
        write(steps, "b", "c")
    for path in home.glob("state.db*"):
        path.unlink()
    for name, data in before.items():
        (home / name).write_bytes(data)
    with Steps(home, run="r2") as steps:
        write(steps, "d")
    assert written(home) == ["a", "b", "c", "d"]


def test_what_an_old_header_carried_is_proposed_again(home: Path) -> None:
    with Steps(home) as steps:
        write(steps, "a")
        answers: list[object] = []
        steps.member.proposer.submit(proposal(note(why="b")), answers.append, seq=1)
        batch = steps.member.proposer.take_batch()
        at = steps.member.position
        header = Header(generation=at.generation, epoch=at.epoch, term=at.term - 1, member="m1", at=1.0)
        steps.member.epoch.group.append(msgspec.msgpack.encode(Entry(header=header, proposals=batch)))
        steps.until(lambda: answers)
        assert steps.said("entry_was_stale")
        assert isinstance(answers[0], Done)
    assert written(home) == ["a", "b"]


# --- seals ------------------------------------------------------------------------------------------------------------


def test_what_is_proposed_around_a_seal_keeps_its_order(home: Path) -> None:
    with Steps(home) as steps:
        texts = [str(n) for n in range(100)]
        answers = [steps.one(note(why=text)) for text in texts]
        assert all(isinstance(answer, Done) for answer in answers)
        assert steps.member.position.epoch >= 9
        assert steps.said("epoch_began")
    assert written(home) == texts


def test_what_fell_behind_a_seal_is_proposed_in_the_next_epoch(home: Path) -> None:
    with Steps(home) as steps:
        while len(steps.member.epoch.journal) < SMALL.epoch_entries:
            write(steps, "a")
        answers: list[object] = []
        steps.member.proposer.submit(proposal(note(why="b")), answers.append, seq=1)
        steps.member._offers.offer()
        steps.member._offers.append(steps.member.proposer.take_batch())
        steps.until(lambda: answers)
        assert isinstance(answers[0], Done)
        assert steps.member.position.epoch == 2
    assert written(home)[-1] == "b"
    assert written(home).count("b") == 1


def test_bytes_seal_an_epoch_too(home: Path) -> None:
    with Steps(home, msgspec.structs.replace(SMALL, epoch_entries=1000, epoch_bytes=50_000)) as steps:
        for n in range(30):
            write(steps, "x" * 1900 + str(n))
            write(steps, "y" * 1900 + str(n))
        assert steps.member.position.epoch >= 3


def test_the_journal_before_is_kept_until_the_next_seal(home: Path) -> None:
    with Steps(home) as steps:
        while steps.member.position.epoch < 4:
            write(steps, "x")
        steps.until(lambda: steps.member.leader().is_self)
        assert sorted(epoch for _, epoch in folder.journals(home)) == [3, 4]


def left_at_each_step_of_a_seal(home: Path, tmp_path: Path) -> dict[str, Path]:
    """Return copies of the folder as a kill between any two steps of a seal leaves them."""
    left: dict[str, Path] = {}

    def keep(what: str, source: Path = home) -> Path:
        left[what] = shutil.copytree(source, tmp_path / what.replace(" ", "-"))
        return left[what]

    with Steps(home) as steps:
        while len(steps.member.epoch.journal) < SMALL.epoch_entries:
            write(steps, f"{len(steps.member.epoch.journal)}")
        steps.member._offers.offer()
        keep("the Seal is in no entry yet")
        steps.member._tick()
        keep("the Seal is logged but not synced")
        steps.member.epoch.journal.sync()
        synced = keep("the Seal is synced but not applied")
        steps.member._tick()
        assert steps.member.position.epoch == 2
        keep("state.db is in the next epoch but the group is not")
        path = max(folder.journals(home).items())[1]
        shutil.copy(path, keep("the next journal is there but state.db has not committed", synced))
        half = keep("the next journal is half made", synced) / path.name
        half.write_bytes(path.read_bytes()[:100])
    return left


def test_a_kill_at_any_step_of_a_seal_loses_nothing(home: Path, tmp_path: Path) -> None:
    counts = set()
    for what, left in left_at_each_step_of_a_seal(home, tmp_path).items():
        before = written(left)
        with Steps(left, run="r1") as steps:
            steps.until(lambda steps=steps: steps.member.position.epoch == 2 and steps.member.leader().is_self)
            write(steps, "after")
        assert written(left) == [*before, "after"], what
        counts.add(len(before))
    assert len(counts) == 1


def test_a_replay_makes_the_same_rows(home: Path, tmp_path: Path) -> None:
    """Applied once, or again after a crash: one and the same state.db, row for row."""
    with Steps(home, msgspec.structs.replace(SMALL, epoch_entries=1000)) as steps:
        steps.until(lambda: steps.member.leader().is_self)
        shutil.copytree(home, tmp_path / "early")
        for answer in steps.ask(desired(fleet(service("web")), 0), note(why="b"), Barrier()):
            assert isinstance(answer, Done)
        seq = steps.member.position.seq
    shutil.copy(next(home.glob("journal-*")), tmp_path / "early")
    with Steps(tmp_path / "early", msgspec.structs.replace(SMALL, epoch_entries=1000), run="r2") as steps:
        assert steps.member.position.seq < seq
        steps.until(lambda: steps.member.leader().is_self)
    rows = []
    for path in (home, tmp_path / "early"):
        db = sqlite3.connect(path / "state.db")
        tables = (
            "events WHERE seq <= ?",
            "results WHERE seq <= ?",
            "revisions WHERE seq <= ?",
            "entries WHERE number <= ?",
        )
        rows.append([db.execute(f"SELECT * FROM {table}", (seq,)).fetchall() for table in tables])
        db.close()
    assert rows[0][:3] == rows[1][:3]
    assert rows[0][3] == rows[1][3][: len(rows[0][3])]
    assert len(rows[0][0]) > 5


# --- damage -----------------------------------------------------------------------------------------------------------


def filled(home: Path, count: int = 5) -> list[str]:
    texts = [str(n) for n in range(count)]
    with Steps(home) as steps:
        for text in texts:
            write(steps, text)
    return texts


def refused(home: Path, match: str) -> Refusal:
    with pytest.raises(Refusal, match=match) as caught:
        Steps(home)
    assert caught.value.hint, "a refusal names the way out"
    return caught.value


def test_a_flipped_bit_in_the_journal_is_refused_and_recover_is_the_way_out(home: Path) -> None:
    texts = filled(home)
    path = next(home.glob("journal-*"))
    flip(path, frames.HEAD_BYTES + 200)
    assert "recover" in refused(home, "damaged at offset").hint
    at = recover(home, actor="root@test", now=1.0)
    with Steps(home, run="r2") as steps:
        write(steps, "again")
        assert steps.member.position.generation == at.generation
    assert written(home) == [*texts, "again"]


def test_a_journal_that_is_gone_is_amnesia(home: Path) -> None:
    filled(home)
    next(home.glob("journal-*")).unlink()
    assert "recover" in refused(home, "forget a vote").hint


def test_a_journal_that_is_shorter_than_what_was_applied_is_refused(home: Path) -> None:
    filled(home)
    path = next(home.glob("journal-*"))
    with path.open("r+b") as file:
        data = bytearray(file.read())
        last = data.rindex(b"\xf5SlF")
        file.seek(last)
        file.write(bytes(len(data) - last))
    refused(home, "the journal accounts for")


def test_a_journal_of_another_history_is_refused(home: Path, tmp_path: Path) -> None:
    filled(home)
    filled(tmp_path / "other")
    shutil.copy(next((tmp_path / "other").glob("journal-*")), next(home.glob("journal-*")))
    refused(home, "another history")


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE ledger SET chain = '0' || substr(chain, 2) || 'x'",
        "UPDATE ledger SET seq = seq + 1",
        "UPDATE ledger SET applied = applied - 1",
        "UPDATE ledger SET own_hash = 'x'",
        "DELETE FROM ledger",
        "UPDATE epochs SET chain0 = 'x'",
        "UPDATE epochs SET epoch = epoch + 1",
        "UPDATE entries SET results_hash = x'00' WHERE number = 2",
        "DELETE FROM entries WHERE number = 2",
        "DELETE FROM events WHERE number = (SELECT max(number) FROM events)",
        "PRAGMA user_version = 9",
    ],
)
def test_a_changed_ledger_row_or_chain_is_refused(home: Path, change: str) -> None:
    filled(home)
    with sqlite3.connect(home / "state.db") as db:
        db.execute(change)
    db.close()
    refused(home, "state.db|journal")


def test_a_state_file_that_is_no_database_is_refused(home: Path) -> None:
    filled(home)
    flip(home / "state.db", 5)
    refused(home, "SQLite cannot read it")


def test_recover_refuses_a_state_whose_events_were_changed(home: Path) -> None:
    filled(home)
    with sqlite3.connect(home / "state.db") as db:
        db.execute("UPDATE events SET why = 'x' WHERE number = 2")
    db.close()
    with pytest.raises(Damaged, match="event 2 does not match"):
        recover(home, actor="root@test", now=1.0)


def test_a_lost_current_is_never_a_new_cluster(home: Path) -> None:
    filled(home)
    kept = (home / "CURRENT").read_text()
    (home / "CURRENT").unlink()
    refused(home, "CURRENT is gone")
    for path in home.glob("state.db*"):
        path.unlink()
    refused(home, "its state.db and CURRENT are gone")
    (home / "CURRENT").write_text(kept)
    refused(home, "CURRENT names this file, but it is gone")
    (home / "CURRENT").write_text("../../etc/passwd\n")
    refused(home, "is no state file")


def test_what_a_killed_bootstrap_left_is_cleared(home: Path) -> None:
    with Steps(home):
        pass
    (home / "CURRENT").unlink()
    (home / "unfinished.db").write_bytes(b"half")
    with Steps(home) as steps:
        assert steps.said("cluster_created")
        write(steps, "a")
    assert not (home / "unfinished.db").exists()


# --- a full disk ------------------------------------------------------------------------------------------------------


def test_the_ballast_goes_when_it_must_and_comes_back_when_it_can() -> None:
    at = disk.marks(ballast=100, journal=20)
    assert (at.watermark, at.critical) == (60, 30)
    assert disk.wants_ballast(160, False, at)
    assert not disk.wants_ballast(159, False, at), "it would be low at once"
    assert disk.wants_ballast(30, True, at)
    assert not disk.wants_ballast(29, True, at)
    assert disk.is_low(59, at)
    assert not disk.is_low(60, at)


def test_what_may_shrink_is_taken_on_a_low_disk() -> None:
    smaller = desired(fleet(service("web")), 1)
    size = len(smaller.fleet_zstd)
    create = Intent(action="a", kind="create", machine="m", tenement="t", operator="o", incarnation=1, deadline_at=1.0)
    assert not disk.may_grow(smaller, size + 1)
    assert disk.may_grow(smaller, size)
    assert disk.may_grow(create, 0)
    assert not disk.may_grow(msgspec.structs.replace(create, kind="destroy"), 0)
    assert not disk.may_grow(Outcome(action="a", ok=True), 0)
    assert disk.may_grow(note(), 0)
    assert disk.may_grow(SetOverride(verb="stop", instances=()), 0)


@pytest.fixture
def little_disk(tmp_path: Path) -> Iterator[Path]:
    folder_ = tmp_path / "disk"
    folder_.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(folder_)], check=True)
    try:
        yield folder_
    finally:
        subprocess.run(["umount", str(folder_)], check=True)


def take_all_but(folder_: Path, leave: int) -> None:
    found = os.statvfs(folder_)
    descriptor = os.open(folder_ / "filler", os.O_RDWR | os.O_CREAT)
    size = os.fstat(descriptor).st_size + found.f_bavail * found.f_frsize - leave
    os.posix_fallocate(descriptor, 0, size)
    os.close(descriptor)


@pytest.mark.root
def test_on_a_low_disk_only_removals_are_taken(little_disk: Path) -> None:
    home = little_disk / "state"
    config = Config(epoch_entries=1000, epoch_bytes=1 << 20, ballast_bytes=8 << 20)
    with Steps(home, config) as steps:
        assert steps.said("ballast_made")
        assert isinstance(steps.one(desired(fleet(service("web"), service("db")), 0)), Done)
        take_all_but(little_disk, 12 << 20)
        steps.until(lambda: steps.said("disk_became_low"))
        answer = steps.one(note())
        assert isinstance(answer, QuorumLost)
        assert "almost full" in answer.message
        assert isinstance(steps.one(desired(fleet(), 1)), Done), "what shrinks is taken"
        take_all_but(little_disk, 1 << 20)
        steps.until(lambda: steps.said("ballast_given_up"))
        assert isinstance(steps.one(Barrier()), Done)
        (little_disk / "filler").unlink()
        steps.until(lambda: steps.said("disk_has_room_again"))
        assert isinstance(steps.one(note()), Done)
        assert (home / "ballast").exists()


@pytest.mark.root
def test_a_disk_that_is_full_ends_the_member_and_loses_nothing(little_disk: Path) -> None:
    home = little_disk / "state"
    acknowledged = []
    with Steps(home) as steps:
        write(steps, "first")
        acknowledged.append("first")
        take_all_but(little_disk, 0)
        # Below the watermark only what shrinks is asked for; here everything is, as if the mark had come too late.
        with pytest.raises((OSError, SlumError), match=r"full|No space left"):  # noqa: PT012 - it fails at one of many
            for n in range(200):
                steps.member._guard._next_check = float("inf")
                steps.member._guard.low = False
                write(steps, f"{n}" + "x" * 1500)
                acknowledged.append(f"{n}" + "x" * 1500)
    (little_disk / "filler").unlink()
    with Steps(home, run="r2") as steps:
        steps.until(lambda: steps.member.leader().is_self)
    found = written(home)
    assert found[: len(acknowledged)] == acknowledged
    assert len(found) <= len(acknowledged) + 1


def test_a_disk_without_room_for_the_ballast_is_said(home: Path) -> None:
    with Steps(home, msgspec.structs.replace(SMALL, ballast_bytes=1 << 50)) as steps:
        assert steps.said("ballast_is_missing")


def test_slack_holds_what_comes_after_the_limit() -> None:
    """The last batch before a seal, the Seal, and their frames fit into what was allocated."""
    assert journal.SLACK_BYTES >= 2 * (1 << 20) + (64 << 10)
