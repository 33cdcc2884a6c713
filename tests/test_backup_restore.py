"""Restores: every point, into an empty folder only; damaged, newer and foreign backups; the authority; a trial that fails."""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
from backup_support import Site, notes, site, whys
from ledger_support import Process, desired, fleet, proposal, service

from slum.backup import bundles, config, litestream, manifest, points, restore, verify
from slum.backup.points import Broken, NoBackup
from slum.backup.restore import Restored
from slum.errors import ConfigError
from slum.ledger.client import connect
from slum.ledger.commands import SetAuthority
from slum.ledger.reader import Reader
from slum.ledger.recover import recover
from slum.ledger.refusal import Damaged
from slum.paths import Home
from slum.pki import authority


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a ledger of 40 notes ("d") and its backup ("store"), both at rest."""
    folder = tmp_path_factory.mktemp("template")

    async def fill(made: Site) -> None:
        await made.ledger.up()
        made.start()
        for number in range(4):
            await made.write(*notes(10, f"r{number}"))
            await made.sent()

    settings = config.made(f"file://{folder}/store", interval_ms=50, verify_hours=0)
    with site(settings, "--epoch-entries", "25") as made:
        asyncio.run(fill(made))
        made.kill()
        made.ledger.kill()
        shutil.copytree(made.home.data, folder / "d")
    return folder


@pytest.fixture
def made(template: Path, tmp_path: Path) -> Iterator[Site]:
    """The template's ledger and backup in folders of this test's own."""
    shutil.copytree(template / "store", tmp_path / "store")
    made = Site(config.made(f"file://{tmp_path}/store", interval_ms=50, verify_hours=0))
    try:
        shutil.copytree(template / "d", made.home.data)
        yield made
    finally:
        made.close()


def brought_back(made: Site, home: Home, **fields: Any) -> Restored:
    asked = {"seq": None, "at": None, "member": None, "recovery_key": None, "actor": "root@test", "now": time.time()}
    return restore.restore(home, made.store, made.settings, made.keys, tell=lambda _: None, **{**asked, **fields})


def new_home(tmp_path: Path, name: str = "back") -> Home:
    return Home(data=tmp_path / name, run=tmp_path / "run")


async def test_what_comes_back_is_a_ledger_that_goes_on(made: Site, tmp_path: Path) -> None:
    old = made.standing()
    process = Process("--epoch-entries", "25")
    with process:
        done = brought_back(made, process.home, member="m7")
        assert (done.seq, done.chain, done.cluster) == (old.seq, old.chain, old.cluster_id)
        assert done.generation > old.generation
        process.start()
        await process.up()
        async with connect(process.home.ledger_socket) as ledger:
            leader = await ledger.leader()
            await ledger.propose(proposal(notes(1, "after")[0], seen=leader.seq), deadline_s=5)
            members = await ledger.members()
        assert [member.id for member in members] == ["m7"]
        assert process.terminate() == 0
        assert whys(process.home.state / "state.db") == [f"r{r}.{n}" for r in range(4) for n in range(10)] + ["after.0"]
        with closing(Reader(process.home.state)) as reader:
            assert reader.verify().ok
            pause = reader.paused()
            assert pause is not None
            assert f"sequence {old.seq}" in pause.why
        assert not list(process.home.data.glob(".restore-*"))
        assert oct((process.home.state).stat().st_mode & 0o777) == "0o700"


@pytest.mark.parametrize("back", [0, 1, 7, 18, 30])
def test_every_point_can_be_had(made: Site, tmp_path: Path, back: int) -> None:
    head = made.head()
    assert head is not None
    with closing(sqlite3.connect(made.home.backup / "mirror.db")) as db:
        chains = dict(db.execute("SELECT seq, chain FROM _backup_log"))
        ats = dict(db.execute("SELECT seq, at FROM _backup_log"))
    seq = head.seq - back
    point = made.restored(tmp_path / "by-seq", seq=seq)
    assert (point.position.seq, point.position.chain) == (seq, chains[seq])
    assert point.at == ats[seq]
    by_time = made.restored(tmp_path / "by-time", at=ats[seq])
    assert by_time.position.chain == chains[max(s for s, at in ats.items() if at <= ats[seq])]


def test_a_point_that_is_not_held_is_named_with_what_is(made: Site, tmp_path: Path) -> None:
    head = made.head()
    assert head is not None
    for which in ({"seq": head.seq + 1}, {"seq": 0}, {"at": 5.0}):
        with pytest.raises(NoBackup, match=f"from sequence {head.first_seq} to {head.seq}"):
            made.restored(tmp_path / "out", **which)
    empty = config.made(f"file://{tmp_path}/nothing")
    with pytest.raises(NoBackup, match="no backup at this address"):
        points.restored(points_store(empty), empty, made.keys, tmp_path)


def points_store(settings: config.Settings) -> Any:
    from slum.backup.store import open_store

    return open_store(settings, config.Keys("", ""))


@pytest.mark.parametrize("there", ["state/state.db", "state/x", "somebody/elses"])
def test_a_folder_that_is_not_empty_is_left_as_it_is(made: Site, tmp_path: Path, there: str) -> None:
    home = new_home(tmp_path)
    file = home.data / there
    file.parent.mkdir(parents=True)
    file.write_text("precious")
    with pytest.raises(ConfigError, match="is not empty"):
        brought_back(made, home)
    assert sorted(str(path.relative_to(home.data)) for path in home.data.rglob("*") if path.is_file()) == [there]
    assert file.read_text() == "precious"


def test_a_machine_whose_services_live_on_may_have_its_control_plane_back(made: Site, tmp_path: Path) -> None:
    home = new_home(tmp_path)
    home.agent.mkdir(parents=True)
    home.state.mkdir()
    home.identity.write_text('{"tenement":"here","machine":"local:m9"}')
    for name in ("router", "caches", "wheels", "state.old"):
        (home.data / name).mkdir()
    (home.agent / "desired.json").write_text(f'{{"cluster":"{made.standing().cluster_id}"}}')
    assert brought_back(made, home).member == "m9"


def test_a_machine_of_another_cluster_is_refused(made: Site, tmp_path: Path) -> None:
    home = new_home(tmp_path)
    home.agent.mkdir(parents=True)
    (home.agent / "desired.json").write_text('{"cluster":"somebody-else"}')
    with pytest.raises(ConfigError, match="services of cluster somebody"):
        brought_back(made, home)
    assert sorted(path.name for path in home.data.iterdir()) == ["agent"]


def test_a_newer_schema_is_refused_and_changes_nothing(made: Site, tmp_path: Path) -> None:
    head = made.head()
    assert head is not None
    newer = msgspec.structs.replace(head, schema=99, version="9.9.9")
    (tmp_path / "store" / manifest.HEAD).write_bytes(manifest.encode(newer))
    home = new_home(tmp_path)
    with pytest.raises(ConfigError, match="schema 99") as caught:
        brought_back(made, home)
    assert "install slum 9.9.9" in caught.value.hint
    assert not home.data.exists()


def segments(made: Site) -> list[Path]:
    head = made.head()
    assert head is not None
    folder = Path(config.place_of(made.settings).path) / manifest.prefix_of(head.claim) / "db"
    return sorted(folder.rglob("*.ltx"), key=lambda path: path.name)


def holding(made: Site, txid: int) -> list[Path]:
    """Return the segments that hold the transaction: one, or several once Litestream has made larger ones of it."""
    ranges = {path: [int(part, 16) for part in path.stem.split("-")] for path in segments(made)}
    return [path for path, (first, end) in ranges.items() if first <= txid <= end]


@pytest.mark.parametrize("how", ["gone", "cut", "flipped", "last gone"])
def test_a_broken_segment_is_reported_with_what_can_be_had(made: Site, tmp_path: Path, how: str) -> None:
    head = made.head()
    assert head is not None
    last = max(int(path.stem.partition("-")[2], 16) for path in segments(made))
    for file in holding(made, last if how == "last gone" else last - 2):
        data = file.read_bytes()
        if how in ("gone", "last gone"):
            file.unlink()
        elif how == "cut":
            file.write_bytes(data[: len(data) // 2])
        else:
            file.write_bytes(data[:-60] + bytes([data[-60] ^ 8]) + data[-59:])
    home = new_home(tmp_path)
    with pytest.raises(Broken) as caught:
        brought_back(made, home)
    assert not home.data.exists()
    found = verify.verified(made.store, made.settings, made.keys)
    assert not found.ok
    assert found.why == str(caught.value)
    seq = int(caught.value.hint.rpartition("--seq ")[2])
    assert 0 < seq < head.seq
    assert brought_back(made, home, seq=seq).seq == seq
    assert (
        whys(home.state / "state.db")
        == [f"r{r}.{n}" for r in range(4) for n in range(10)][: len(whys(home.state / "state.db"))]
    )


def test_nothing_left_is_said(made: Site, tmp_path: Path) -> None:
    for file in segments(made):
        file.write_bytes(b"")
    with pytest.raises(Broken, match="nothing can be restored"):
        brought_back(made, new_home(tmp_path))


def test_a_backup_that_was_changed_is_found_out(made: Site, tmp_path: Path) -> None:
    """Segments carry checksums, so this takes somebody who writes new ones: rows changed, then sent by Litestream."""
    head = made.head()
    assert head is not None
    mirror = made.home.backup / "mirror.db"
    with closing(sqlite3.connect(mirror, isolation_level=None)) as db:
        db.execute("PRAGMA wal_autocheckpoint=0")
        db.execute("UPDATE events SET why = 'nobody said this' WHERE kind = 'instance_noted' AND why = 'r1.3'")
    _send(made, head.claim, tmp_path)
    with pytest.raises(Broken, match="event"):
        brought_back(made, new_home(tmp_path))


def test_a_row_that_was_changed_is_found_out(made: Site, tmp_path: Path) -> None:
    """Rows that no chain covers: the hash over all rows in HEAD does."""
    head = made.head()
    assert head is not None
    assert head.rows_seq == head.seq
    with closing(sqlite3.connect(made.home.backup / "mirror.db", isolation_level=None)) as db:
        db.execute("PRAGMA wal_autocheckpoint=0")
        db.execute("INSERT INTO overrides VALUES ('here', 'web', 'main', 1, 0)")
    _send(made, head.claim, tmp_path)
    with pytest.raises(Broken, match="rows at sequence"):
        brought_back(made, new_home(tmp_path))


def _send(made: Site, claim: str, tmp_path: Path) -> None:
    control = tmp_path / "c.sock"
    target = litestream.replica(made.settings, made.keys, claim)
    document = litestream.configuration(made.settings, target, made.home.backup / "mirror.db", control)
    lock = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
    child = litestream.Child(control, document, lock)
    try:
        end = time.monotonic() + 20
        while not child.listens:
            assert time.monotonic() < end
            time.sleep(0.01)
        child.sync(20)
    finally:
        child.stop()
        os.close(lock)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"chain": "0" * 64}, "the chain at sequence"),
        ({"rows": "0" * 64}, "the rows at sequence"),
        ({"cluster": "another"}, "not of the history"),
        ({"lineage": "another"}, "not of the history"),
    ],
)
def test_what_is_not_as_head_says_is_not_restored(
    made: Site, tmp_path: Path, change: dict[str, str], says: str
) -> None:
    head = made.head()
    assert head is not None
    (tmp_path / "store" / manifest.HEAD).write_bytes(manifest.encode(msgspec.structs.replace(head, **change)))
    home = new_home(tmp_path)
    with pytest.raises(Broken, match=says) as caught:
        brought_back(made, home)
    assert caught.value.exit_code == 8
    assert not home.data.exists()


def test_the_new_generation_is_above_all_that_the_backup_knows_of_whatever_the_clock_says(
    made: Site, tmp_path: Path
) -> None:
    head = made.head()
    assert head is not None
    newer = msgspec.structs.replace(head, generation=head.generation + 5)
    (tmp_path / "store" / manifest.HEAD).write_bytes(manifest.encode(newer))
    done = brought_back(made, new_home(tmp_path), seq=head.seq - 3, now=5.0)
    assert done.generation == head.generation + 6


def test_a_log_that_does_not_belong_to_its_state_is_found_out(made: Site, tmp_path: Path) -> None:
    head = made.head()
    assert head is not None
    path = tmp_path / "copy.db"
    with closing(sqlite3.connect(made.home.backup / "mirror.db")) as db, closing(sqlite3.connect(path)) as to:
        db.backup(to)
    points.check(path, head)
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("UPDATE _backup_log SET chain = ? WHERE seq = ?", ("0" * 64, head.seq))
    with pytest.raises(Damaged, match="does not end where its state does"):
        points.check(path, None)


def test_what_a_killed_restore_left_is_removed_by_the_next_and_one_that_runs_is_not(made: Site, tmp_path: Path) -> None:
    home = new_home(tmp_path)
    dead, running = (home.data / f"{restore.PREFIX}{name}" for name in ("dead", "running"))
    for folder in (dead, running):
        (folder / "state").mkdir(parents=True)
    lock = os.open(running, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    brought_back(made, home)
    os.close(lock)
    assert sorted(path.name for path in home.data.iterdir()) == [running.name, "state"]


def test_a_lost_head_is_said(made: Site, tmp_path: Path) -> None:
    (tmp_path / "store" / manifest.HEAD).unlink()
    with pytest.raises(NoBackup):
        brought_back(made, new_home(tmp_path))


async def test_bundles_come_back_and_what_lacks_is_named(tmp_path: Path) -> None:
    import hashlib

    settings = config.made(f"file://{tmp_path}/store", interval_ms=50, verify_hours=0)
    with site(settings) as made:
        await made.ledger.up()
        digests = []
        made.home.blobs.mkdir(parents=True)
        for data in (b"one", b"two"):
            digests.append(hashlib.sha256(data).hexdigest())
            (made.home.blobs / digests[-1]).write_bytes(data)
        one, two = digests
        await made.write(desired(fleet(service("a", bundle=one), service("b", bundle=two)), 0))
        made.start()
        await made.sent()
        assert bundles.in_store(made.store) == {one, two}
        made.store.delete(f"{manifest.BLOBS}/{two}")
        tried = verify.verified(made.store, made.settings, made.keys)
        assert (tried.ok, tried.why.partition(";")[0]) == (True, "bundles not in the store: 1")
        home = new_home(tmp_path)
        assert brought_back(made, home).missing == (two,)
        assert (home.blobs / one).read_bytes() == b"one"
        (tmp_path / "store" / manifest.BLOBS / one).write_bytes(b"not one")
        assert brought_back(made, new_home(tmp_path, "again")).missing == tuple(sorted((one, two)))


async def test_the_recovery_key_opens_the_authority_for_the_new_member(tmp_path: Path) -> None:
    settings = config.made(f"file://{tmp_path}/store", interval_ms=50, verify_hours=0)
    with site(settings) as made:
        await made.ledger.up()
        identity, recovery = authority.new_identity()
        _, member = authority.new_identity()
        born = authority.make("cluster", time.time())
        box = authority.seal(born.key, {member, recovery})
        await made.write(SetAuthority(certificate=born.certificate, box=box, recovery=recovery, recipients=(member,)))
        made.start()
        await made.sent()
        made.kill()
        made.ledger.kill()

        closed = new_home(tmp_path, "closed")
        assert brought_back(made, closed).authority == "sealed"
        wrong, _ = authority.new_identity()
        with pytest.raises(ConfigError, match="does not open the authority"):
            brought_back(made, new_home(tmp_path, "wrong"), recovery_key=wrong)
        assert not (tmp_path / "wrong").exists()

        opened = new_home(tmp_path, "opened")
        assert brought_back(made, opened, recovery_key=identity).authority == "opened"
        with closing(Reader(opened.state)) as reader:
            row = reader.authority()
            assert row is not None
            members = reader.cluster().members
        assert authority.unseal(row.box, opened.member_age.read_text()) == born.key
        assert authority.unseal(row.box, identity) == born.key, "the recovery key opens it still"
        assert row.recipients == (members[0].recipient,)
        assert members[0].recipient == authority.recipient_of(opened.member_age.read_text())
        assert opened.member_age.stat().st_mode & 0o777 == 0o600
        assert identity not in _everything(opened.data) + made.log


def _everything(folder: Path) -> str:
    return "".join(path.read_bytes().decode("latin-1") for path in folder.rglob("*") if path.is_file())


def test_what_was_restored_can_be_recovered_and_backed_up_further(made: Site, tmp_path: Path) -> None:
    home = new_home(tmp_path)
    done = brought_back(made, home)
    again = recover(home.state, actor="root@test", now=time.time(), epoch_bytes=1 << 20)
    assert again.generation > done.generation
    shutil.rmtree(home.data)
