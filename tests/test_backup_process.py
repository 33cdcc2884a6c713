"""The backup process beside a real ledger process: killed, overtaken, cut off from its store, pointed at the wrong one."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
from backup_support import KEY, S3, SECRET, Site, careless, is_alive, note, notes, site, start_backup, wait_for, whys
from ledger_support import desired, fleet, service

from slum.backup import claims as own_claims
from slum.backup import config, manifest, writer
from slum.backup.config import Keys, Settings
from slum.backup.manifest import Head
from slum.errors import QuorumLost, Unreachable
from slum.ledger.client import connect
from slum.paths import Home

pytestmark = pytest.mark.xdist_group("s3")


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    server = S3()
    try:
        server.start()
        yield server
    finally:
        server.close()


def file_settings(tmp_path: Path, **fields: object) -> Settings:
    return config.made(f"file://{tmp_path}/store", **{"interval_ms": 50, "verify_hours": 0, **fields})  # type: ignore[arg-type]


def s3_settings(s3: S3, tmp_path: Path, **fields: object) -> Settings:
    return s3.settings(tmp_path.name, **{"interval_ms": 50, **fields})


def events(made: Site, kind: str) -> list[str]:
    with closing(sqlite3.connect(made.home.state / "state.db")) as db:
        rows = db.execute("SELECT why FROM events WHERE kind = ? ORDER BY number", (kind,)).fetchall()
    return [row[0] for row in rows]


def words_of(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/environ").read_bytes()


def claims(made: Site) -> set[str]:
    return {listed.name.split("/")[1] for listed in made.store.list(manifest.CLAIMS)}


async def test_what_is_committed_is_in_an_s3_store_and_comes_back(s3: S3, tmp_path: Path) -> None:
    with site(s3_settings(s3, tmp_path, verify_hours=1), "--epoch-entries", "20") as made:
        await made.ledger.up()
        made.start()
        seq = await made.write(*notes(60))
        head = await made.sent(seq)
        await wait_for(lambda: (found := made.head()) is not None and found.verified is not None)
        point = made.restored(tmp_path / "out")
        assert point.position.seq >= seq
        assert whys(point.path) == [f"n.{n}" for n in range(60)]
        assert head.cluster == made.standing().cluster_id
        assert len(claims(made)) == 1, "seals cost no new prefix"
        log = made.log
        assert SECRET not in log + made.home.server_config.read_text()
        child = made.status()
        assert child is not None
        for pid in (child.pid, child.child_pid):
            assert SECRET.encode() not in words_of(pid)
        own = config.secrets_file(made.home)
        written = [
            path for path in made.ledger.base.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()
        ]
        assert written == [own], "credentials are in no other file"


async def test_kill_9_again_and_again_loses_nothing_and_resumes_the_claim(tmp_path: Path) -> None:
    with site(file_settings(tmp_path), "--epoch-entries", "200") as made:
        await made.ledger.up()
        made.start()
        await made.sent()
        for number in range(4):
            seq = await made.write(*notes(25, f"k{number}"))
            child = made.status()
            assert child is not None
            made.kill()
            await wait_for(lambda pid=child.child_pid: not is_alive(pid))
            made.start()
        await made.sent(seq)
        assert len(claims(made)) == 1
        point = made.restored(tmp_path / "out")
        assert whys(point.path) == [f"k{k}.{n}" for k in range(4) for n in range(25)]


async def test_all_killed_mid_write_a_prefix_of_what_was_acknowledged_comes_back(tmp_path: Path) -> None:
    acknowledged: list[str] = []

    async def load(made: Site) -> None:
        try:
            async with connect(made.home.ledger_socket) as ledger:
                from ledger_support import proposal

                for number in range(100_000):
                    await ledger.propose(proposal(note(why=f"w.{number}")), deadline_s=5)
                    acknowledged.append(f"w.{number}")
        except (Unreachable, QuorumLost):
            return

    with site(file_settings(tmp_path), "--epoch-entries", "100") as made:
        await made.ledger.up()
        made.start()
        await made.sent()
        loading = asyncio.create_task(load(made))
        await wait_for(lambda: len(acknowledged) > 300)
        first = made.head()
        assert first is not None
        await wait_for(lambda: (head := made.head()) is not None and head.seq > first.seq + 100)
        child = made.status()
        assert child is not None
        for pid in (made.ledger.pid, child.pid, child.child_pid):
            os.kill(pid, signal.SIGKILL)
        await loading
        head = made.head()
        point = made.restored(tmp_path / "out")
        assert head is not None
        assert point.position.seq >= head.seq, "HEAD named more than there is"
        found = whys(point.path)
        assert found == [f"w.{n}" for n in range(len(found))]
        assert len(found) <= len(acknowledged) + 1
        # The mirror's own log says what the chain was there.
        with closing(sqlite3.connect(made.home.backup / own_claims.MIRROR)) as db:
            ((chain,),) = db.execute("SELECT chain FROM _backup_log WHERE seq = ?", (point.position.seq,)).fetchall()
        assert chain == point.position.chain


async def test_litestream_killed_is_started_again(tmp_path: Path) -> None:
    with site(file_settings(tmp_path)) as made:
        await made.ledger.up()
        made.start()
        await made.sent()
        child = made.status()
        assert child is not None
        os.kill(child.child_pid, signal.SIGKILL)
        seq = await made.write(*notes(3))
        await made.sent(seq)
        assert len(claims(made)) == 1
        assert whys(made.restored(tmp_path / "out").path) == ["n.0", "n.1", "n.2"]


@pytest.mark.long
async def test_litestream_that_hangs_is_replaced(tmp_path: Path) -> None:
    word = tmp_path / "word"
    with site(file_settings(tmp_path)) as made:
        await made.ledger.up()
        made.configure()
        log = made.ledger.base / "backup.log"
        made.child = start_backup(made.home, log, SLUM_ALIVE_FILE=str(word), SLUM_ALIVE_MS="60000")
        await made.sent()
        child = made.status()
        assert child is not None
        os.kill(child.child_pid, signal.SIGSTOP)
        seq = await made.write(*notes(3))
        first = word.stat().st_mtime_ns
        await wait_for(lambda: word.stat().st_mtime_ns > first, 12)
        await made.sent(seq, 60)
        assert not is_alive(child.child_pid)
        assert len(claims(made)) == 1
        assert whys(made.restored(tmp_path / "out").path) == ["n.0", "n.1", "n.2"]


async def test_a_stale_claimant_writes_below_its_own_prefix_only(tmp_path: Path) -> None:
    with site(file_settings(tmp_path, interval_ms=100)) as made:
        await made.ledger.up()
        made.start()
        stale = await made.sent()
        before = made.status()
        assert before is not None
        for pid in (before.pid, before.child_pid):
            os.kill(pid, signal.SIGSTOP)
        await made.write(*notes(5))
        # Another machine that holds the same ledger, as another member would.
        other = Home(data=made.ledger.base / "d2", run=made.ledger.base / "r2")
        other.data.mkdir()
        (other.data / "state").symlink_to(made.home.state)
        lock = own_claims.locked(other, 1)
        second = writer.opened(
            other, made.settings, Keys(KEY, SECRET), made.store, member="m2", note=lambda *_, **__: None, lock=lock
        )
        try:
            newer = second.head
            assert newer is not None
            assert manifest.number_of(newer.claim) == manifest.number_of(stale.claim) + 1
            assert [span.claim for span in newer.former] == [stale.claim]
            seen: list[Head] = []
            for pid in (before.child_pid, before.pid):
                os.kill(pid, signal.SIGCONT)
            # It finds out, and because it leads by its ledger, claims anew instead of going on below the old one.
            await wait_for(
                lambda: seen.append(h) or h.claim != newer.claim if (h := made.head()) is not None else False
            )
            numbers = [manifest.number_of(head.claim) for head in seen]
            assert numbers == sorted(numbers)
            assert stale.claim not in {head.claim for head in seen}, "HEAD went back to the stale claim"
            await made.write(note())
            with pytest.raises(writer.Superseded):
                second.step()
        finally:
            second.close()
            os.close(lock)
        assert "Superseded" in made.log
        assert whys(made.restored(tmp_path / "out").path)[:5] == [f"n.{n}" for n in range(5)]


async def test_a_store_that_is_away_stops_no_write_raises_an_alarm_and_is_caught_up_with(
    s3: S3, tmp_path: Path
) -> None:
    with site(s3_settings(s3, tmp_path, alarm=1.0, verify_hours=0, backlog_mb=64)) as made:
        await made.ledger.up()
        made.start()
        await made.sent()
        s3.stop()
        try:
            seq = 0
            for number in range(8):
                big = fleet(service("big", command=("run", os.urandom(200_000).hex(), str(number))))
                seq = await made.write(desired(big, number), note(why=f"big.{number}"))
            await wait_for(lambda: events(made, "backup_behind"), 60, lambda: made.log[-2000:])
            found = await wait_for(lambda: (said := made.status()) is not None and said.state == "behind" and said)
            assert found.backlog_bytes < 40 << 20
            made.kill()
            made.start()
            pid = made.child.pid if made.child is not None else 0
            await wait_for(lambda: (said := made.status()) is not None and (said.pid, said.state) == (pid, "behind"))
            seq = await made.write(*notes(4))
        finally:
            s3.start()
        await made.sent(seq, 60)
        await wait_for(lambda: events(made, "backup_caught_up"))
        assert len(events(made, "backup_behind")) == 1
        assert whys(made.restored(tmp_path / "out").path)[-4:] == [f"n.{n}" for n in range(4)]


@pytest.mark.long
async def test_what_waits_is_bounded_and_a_new_claim_begins_when_it_was_not(s3: S3, tmp_path: Path) -> None:
    with site(s3_settings(s3, tmp_path, verify_hours=0, backlog_mb=1)) as made:
        await made.ledger.up()
        made.start()
        await made.sent()
        s3.stop()
        try:
            for number in range(3):
                big = fleet(service("big", command=("run", os.urandom(300_000).hex(), str(number))))
                seq = await made.write(desired(big, number))
            await wait_for(lambda: "MiB wait for the store" in made.log, 90, lambda: made.log[-2000:])
            await wait_for(lambda: not (made.home.backup / own_claims.MIRROR).exists())
        finally:
            s3.start()
        head = await made.sent(seq, 60)
        assert manifest.number_of(head.claim) == 2
        assert made.restored(tmp_path / "out").position.seq >= seq


async def test_the_backup_of_another_cluster_is_left_alone(tmp_path: Path) -> None:
    settings = file_settings(tmp_path)
    with site(settings) as first:
        await first.ledger.up()
        first.start()
        await first.write(*notes(3))
        head = await first.sent()
        first.kill()
        there = {listed.name for listed in first.store.list("")}
        with site(settings) as second:
            await second.ledger.up()
            second.start()
            await wait_for(lambda: events(second, "backup_refused"), words=lambda: second.log)
            (why,) = events(second, "backup_refused")
            assert f"cluster {head.cluster[:8]}" in why
            found = second.status()
            assert found is not None
            assert found.state == "refused"
            assert second.head() == head
            assert {listed.name for listed in second.store.list("")} == there


async def test_a_store_that_ignores_conditions_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    with careless() as endpoint, site(config.made("s3://backups/x", endpoint=endpoint, interval_ms=50)) as made:
        await made.ledger.up()
        made.start()
        await wait_for(lambda: events(made, "backup_refused"), words=lambda: made.log)
        assert "creates over an object that is there" in events(made, "backup_refused")[0]
        assert made.head() is None
        assert not (made.home.backup / own_claims.MIRROR).exists()


async def test_it_waits_for_its_configuration_and_takes_up_a_new_one(tmp_path: Path) -> None:
    with site(file_settings(tmp_path)) as made:
        await made.ledger.up()
        made.home.data.mkdir(exist_ok=True)
        made.child = start_backup(made.home, made.ledger.base / "backup.log")
        await wait_for(lambda: (found := made.status()) is not None and found.state == "waiting")
        made.configure()
        await made.sent()
        made.home.server_config.write_text('[backup]\nurl = "nonsense"\n')
        await wait_for(lambda: (found := made.status()) is not None and found.state == "refused")
        made.settings = msgspec.structs.replace(made.settings, url=f"file://{tmp_path}/elsewhere")
        made.configure()
        await made.sent()
        assert made.child.poll() is None


async def test_it_tells_the_keeper_that_it_lives_as_long_as_its_loop_turns(tmp_path: Path) -> None:
    word = tmp_path / "word"
    with site(file_settings(tmp_path, interval_ms=5000)) as made:
        await made.ledger.up()
        made.configure()
        log = made.ledger.base / "backup.log"
        made.child = start_backup(made.home, log, SLUM_ALIVE_FILE=str(word), SLUM_ALIVE_MS="1200")
        await made.sent()
        found, first = made.status(), word.stat().st_mtime_ns
        assert found is not None
        assert b"SLUM_ALIVE" not in words_of(found.child_pid), "nobody else speaks in its name"
        await wait_for(lambda: word.stat().st_mtime_ns > first + 1_000_000_000, 4)
        os.kill(found.pid, signal.SIGSTOP)
        silent = word.stat().st_mtime_ns
        os.kill(found.child_pid, 0)
        assert word.stat().st_mtime_ns == silent
        os.kill(found.pid, signal.SIGCONT)
        await wait_for(lambda: word.stat().st_mtime_ns > silent)


async def test_what_the_retention_has_passed_is_removed(tmp_path: Path) -> None:
    store = tmp_path / "store"
    old, young, bundle = (
        store / "claims/5-000001/db/x",
        store / "claims/6-000001/claim.json",
        store / "blobs" / ("a" * 64),
    )
    for file in (old, young, bundle):
        file.parent.mkdir(parents=True)
        file.write_bytes(b"x")
    os.utime(old, (1.0, 1.0))
    with site(file_settings(tmp_path)) as made:
        await made.ledger.up()
        made.start()
        await made.sent()
        await wait_for(lambda: not old.parents[1].exists())
        assert young.exists(), "it may be a claim that somebody is just making"
        assert bundle.exists(), "it was named until now, for all that is known"


async def test_a_claim_that_head_has_not_come_to_is_gone_on_with(tmp_path: Path) -> None:
    """Killed between claim and HEAD, again and again, it does not claim again and again."""
    with site(file_settings(tmp_path)) as made:
        await made.ledger.up()
        made.start()
        await made.sent()
        made.kill()
        (tmp_path / "store" / manifest.HEAD).unlink()
        made.start()
        await made.sent()
        assert len(claims(made)) == 1


async def test_a_damaged_mirror_is_thrown_away_and_made_anew(tmp_path: Path) -> None:
    with site(file_settings(tmp_path)) as made:
        await made.ledger.up()
        made.start()
        await made.write(*notes(20))
        await made.sent()
        made.kill()
        mirror = made.home.backup / own_claims.MIRROR
        (made.home.backup / f"{own_claims.MIRROR}-wal").unlink(missing_ok=True)
        data = bytearray(mirror.read_bytes())
        data[4096 : len(data) // 2] = b"\xff" * (len(data) // 2 - 4096)
        mirror.write_bytes(data)
        made.start()
        await wait_for(lambda: (head := made.head()) is not None and manifest.number_of(head.claim) == 2)
        assert len(whys(made.restored(tmp_path / "out").path)) == 20


async def test_sigterm_ends_it_and_its_child(tmp_path: Path) -> None:
    with site(file_settings(tmp_path)) as made:
        await made.ledger.up()
        made.start()
        await made.sent()
        found, child = made.status(), made.child
        assert found is not None
        assert child is not None
        child.terminate()
        assert await asyncio.to_thread(child.wait, 20) == 0
        assert not is_alive(found.child_pid)
