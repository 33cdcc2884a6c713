"""A claim's writer in this process, beside a ledger that is stepped by hand: what it writes when, and what it does not go on with."""

from __future__ import annotations

import hashlib
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
from backup_support import notes, whys
from ledger_support import Steps, desired, fleet, note, service

from slum.backup import claims, config, litestream, manifest, points, writer
from slum.backup.config import Keys
from slum.backup.manifest import Head
from slum.backup.store import FolderStore, Listed
from slum.backup.writer import Writer
from slum.ledger import follow
from slum.paths import Home

NO_KEYS = Keys("", "")


@dataclass
class Bench:
    """A ledger, a store, and what a writer says and tells."""

    home: Home
    store: FolderStore
    settings: config.Settings
    notes: list[str] = field(default_factory=list)
    told: int = 0

    @contextmanager
    def ledger(self) -> Iterator[Steps]:
        with Steps(self.home.state) as steps:
            yield steps

    @contextmanager
    def writer(self) -> Iterator[Writer]:
        with ExitStack() as stack:
            lock = claims.locked(self.home, 5)
            stack.callback(os.close, lock)
            made = writer.opened(
                self.home,
                self.settings,
                NO_KEYS,
                self.store,
                member="m1",
                note=lambda event, **_: self.notes.append(event),
                lock=lock,
                tell=self._tell,
            )
            stack.callback(made.close)
            yield made

    def head(self) -> Head:
        found = self.store.get(manifest.HEAD)
        assert found is not None
        return manifest.decode_head(found.data)

    def _tell(self) -> None:
        self.told += 1


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    run = Path(tempfile.mkdtemp(prefix="sw", dir="/tmp"))
    home = Home(data=tmp_path / "d", run=run)
    home.data.mkdir()
    settings = config.made(f"file://{tmp_path}/store", interval_ms=50, verify_hours=0)
    try:
        yield Bench(home, FolderStore(tmp_path / "store"), settings)
    finally:
        shutil.rmtree(run)


class Looking(FolderStore):
    """A folder that looks, whenever HEAD is about to be written, whether all that it will name is there."""

    def __init__(self, folder: Path, settings: config.Settings) -> None:
        super().__init__(folder)
        self._settings = settings
        self._scratch = folder.with_name("looked")
        self._scratch.mkdir()
        self.moves: list[int] = []

    def create(self, name: str, data: bytes) -> str:
        self._look(name, data)
        return super().create(name, data)

    def replace(self, name: str, data: bytes, tag: str) -> str:
        self._look(name, data)
        return super().replace(name, data, tag)

    def _look(self, name: str, data: bytes) -> None:
        if name != manifest.HEAD:
            return
        head = manifest.decode_head(data)
        path = self._scratch / f"{len(self.moves)}.db"
        litestream.restore(litestream.replica(self._settings, NO_KEYS, head.claim), path)
        at = points.check(path, head)
        assert (at.seq, at.chain) == (head.seq, head.chain), "HEAD would name what is not there yet"
        with closing(sqlite3.connect(path)) as db:
            for (digest,) in db.execute("SELECT DISTINCT digest FROM blobs"):
                assert self.get(f"{manifest.BLOBS}/{digest}") is not None, (
                    "HEAD would name a bundle that is not there yet"
                )
        self.moves.append(head.seq)


def test_what_head_names_is_there_before_it_is_named(bench: Bench, tmp_path: Path) -> None:
    bench.store = looking = Looking(tmp_path / "store", bench.settings)
    bench.home.blobs.mkdir(parents=True)
    with bench.ledger() as ledger, bench.writer() as made:
        for number in range(5):
            data = f"bundle {number}".encode()
            digest = hashlib.sha256(data).hexdigest()
            (bench.home.blobs / digest).write_bytes(data)
            ledger.ask(
                *(note(why=f"{number}.{n}") for n in range(4)), desired(fleet(service("a", bundle=digest)), number)
            )
            while made.step():
                pass
            assert made.seq == bench.head().seq == ledger.member.position.seq
    assert len(set(looking.moves)) >= 5
    assert bench.told > 5, "the keeper would take it for dead"


def test_a_claim_is_gone_on_with_only_by_whoever_made_it(bench: Bench) -> None:
    with bench.ledger() as ledger:
        for change in ({}, {"token": "somebody else's"}, {"generation": 1}):
            with bench.writer() as made:
                ledger.one(note())
                made.step()
                first = made.claim
            name = f"{manifest.prefix_of(first)}/claim.json"
            found = bench.store.get(name)
            assert found is not None
            claim = msgspec.structs.replace(msgspec.json.decode(found.data, type=manifest.Claim), **change)
            bench.store.replace(name, manifest.encode(claim), found.tag)
            with bench.writer() as made:
                assert (made.claim == first) == (change == {}), change
                assert bench.head().claim == made.claim
    assert bench.notes.count("backup_claimed") == 3


def test_of_two_that_take_the_next_claim_one_takes_the_one_after(bench: Bench, tmp_path: Path) -> None:
    class Late(FolderStore):
        """Shows the claims only from the second time on, as a list does that was made a moment ago."""

        looked = False

        def list(self, prefix: str) -> Iterator[Listed]:
            found = iter(()) if prefix == manifest.CLAIMS and not self.looked else super().list(prefix)
            self.looked = self.looked or prefix == manifest.CLAIMS
            return found

    with bench.ledger() as ledger:
        at = ledger.member.position
        theirs = manifest.claim_name(at.generation, 1)
        bench.store.create(f"{manifest.prefix_of(theirs)}/claim.json", b"{}")
        bench.store = Late(tmp_path / "store")
        with bench.writer() as made:
            assert made.claim == manifest.claim_name(at.generation, 2)


def test_a_ledger_that_was_put_back_does_not_write_over_what_it_has_lost(bench: Bench, tmp_path: Path) -> None:
    """As when the disk of a machine is restored from an image: nothing of it is wrong, but it is not what HEAD comes from."""
    with bench.ledger() as ledger:
        ledger.one(note(why="before"))
    shutil.copytree(bench.home.data, tmp_path / "image")
    with bench.ledger() as ledger, bench.writer() as made:
        ledger.ask(*notes(3, "lost"))
        made.step()
    head = bench.head()
    shutil.rmtree(bench.home.data)
    shutil.copytree(tmp_path / "image", bench.home.data)
    with bench.ledger() as ledger:
        assert ledger.member.position.seq < head.seq
        with pytest.raises(claims.Behind), bench.writer():
            pass
        while ledger.member.position.seq < head.seq + 2:
            ledger.one(note(why="other"))
        with (
            pytest.raises(claims.NotAllowed, match=f"at sequence {head.seq} is not what this ledger has"),
            bench.writer(),
        ):
            pass
        assert bench.head() == head
        while ledger.member.position.epoch < 3:
            ledger.one(note(why="other"))
        assert follow.chain_at(bench.home.state, head.seq) is None, "of an epoch that is over nothing is kept"


def test_the_chain_of_each_entry_of_this_epoch_is_known(bench: Bench) -> None:
    with bench.ledger() as ledger:
        chains: dict[int, str] = {}
        for _ in range(9):
            ledger.one(note())
            chains[ledger.member.position.seq] = ledger.member.position.chain
        found = {seq: follow.chain_at(bench.home.state, seq) for seq in chains}
        began = ledger.member.state.epochs(1)[0].seq0
    assert {seq: chain for seq, chain in found.items() if seq >= began} == {
        s: c for s, c in chains.items() if s >= began
    }


def test_what_waits_is_known_without_a_backup_process(bench: Bench) -> None:
    with bench.ledger() as ledger:
        ledger.one(note(at=10.0))
        at = ledger.member.position
        assert follow.after(bench.home.state, at.generation, at.seq) == (0, None)
        for when in (20.0, 30.0):
            ledger.one(note(at=when))
        assert follow.after(bench.home.state, at.generation, at.seq) == (2, 20.0)
        assert follow.after(bench.home.state, at.generation + 1, 0) == (0, None)
        entries, since = follow.after(bench.home.state, at.generation - 1, 1000)
        assert entries >= 1
        assert since is not None


def restored(bench: Bench, folder: Path, **which: Any) -> points.Point:
    folder.mkdir(parents=True)
    return points.restored(bench.store, bench.settings, NO_KEYS, folder, **which)


@pytest.mark.parametrize("how", ["gone", "empty", "cut", "no text", "strange claim", "claim that is not there"])
def test_without_head_the_newest_claim_can_be_had(bench: Bench, tmp_path: Path, how: str) -> None:
    with bench.ledger() as ledger, bench.writer() as made:
        ledger.ask(*notes(3))
        made.step()
        at, claim = ledger.member.position, made.claim
    file = tmp_path / "store" / manifest.HEAD
    data = file.read_bytes()
    match how:
        case "gone":
            file.unlink()
        case "no text":
            file.write_bytes(data.replace(b'"claim"', b'"cl\xe5im"'))
        case "claim that is not there":
            file.write_bytes(data.replace(claim.encode(), f"{claim[:-1]}9".encode()))
        case "strange claim":
            file.write_bytes(data.replace(claim.encode(), b"../" + claim.encode()[3:]))
        case _:
            file.write_bytes(data[: len(data) // 2] if how == "cut" else b"")
    with pytest.raises((points.NoBackup, points.Broken)) as caught:
        restored(bench, tmp_path / "first")
    assert f"--claim {claim}" in caught.value.hint
    found = restored(bench, tmp_path / "second", claim=claim)
    assert (found.position.seq, found.position.chain, found.member) == (at.seq, at.chain, "m1")
    assert whys(found.path) == ["n.0", "n.1", "n.2"]
    with pytest.raises(points.NoBackup, match="is no claim"):
        restored(bench, tmp_path / "third", claim="../7-000001")
    with pytest.raises(points.Broken, match="nothing can be restored"):
        restored(bench, tmp_path / "fourth", claim="7-000009")
