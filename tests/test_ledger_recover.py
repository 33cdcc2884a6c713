"""When members are lost for good or differ: one goes on alone, the rest are fenced, wrong rows stop their member."""

from __future__ import annotations

import asyncio
import signal
import sqlite3
import time
from pathlib import Path

import msgspec
import pytest
from ledger_cluster import Cluster, Node, until
from ledger_support import flip, note, proposal

from slum.errors import QuorumLost, Unreachable
from slum.ledger import fence, folder, frames, identity
from slum.ledger.client import change_members, connect, status
from slum.ledger.commands import Done, Member
from slum.ledger.joiner import Join, prepare
from slum.ledger.reader import Reader
from slum.ledger.recover import examine, missing, obstacle, recover
from slum.ledger.refusal import Refusal
from slum.ledger.rows import Differ, RowsAt, compare

pytestmark = pytest.mark.xdist_group("ledger_cluster")
THREE = tuple(Member(id=name, incarnation="i", public_key="k", address="a") for name in ("m1", "m2", "m3"))


async def write(node: Node, *texts: str) -> None:
    async with connect(node.home.ledger_socket) as ledger:
        for text in texts:
            assert isinstance(await ledger.propose(proposal(note(why=text)), deadline_s=20), Done)


async def up(node: Node) -> None:
    """Return once the ledger of *node* answers."""
    end = time.monotonic() + 30
    while True:
        try:
            await status(node.home.ledger_socket)
        except (Unreachable, QuorumLost):
            assert time.monotonic() < end, node.log.read_text()
            await asyncio.sleep(0.02)
        else:
            return


def written(node: Node) -> list[str]:
    reader = Reader(node.home.state)
    found = [event.why for event in reader.events(kind="instance_noted", limit=10_000)]
    assert reader.verify().ok
    reader.close()
    return found


async def refusal_of(node: Node) -> str:
    """Return the last line of a member that ends by itself."""
    await until(lambda: not node.runs)
    return node.log.read_text().splitlines()[-1]


# --- who may go on alone ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("others", "why"),
    [
        ({}, ""),
        ({"m2": (7, 3, 2, 10)}, "that is a majority"),
        ({"m2": (7, 3, 2, 11)}, "m2 answers and has more"),
        ({"m2": (7, 3, 3, 1)}, "m2 answers and has more"),
        ({"m2": (7, 4, 0, 1)}, "m2 answers and has more"),
        ({"m2": (8, 1, 0, 1)}, "m2 answers and has more"),
    ],
)
def test_who_may_go_on_alone(others: dict[str, tuple[int, int, int, int]], why: str) -> None:
    found = obstacle("m1", (7, 3, 2, 10), THREE, others)
    assert (why in found) if why else not found


def test_of_five_an_equal_one_may_but_not_one_that_is_behind() -> None:
    five = (*THREE, *(msgspec.structs.replace(THREE[0], id=name) for name in ("m4", "m5")))
    assert obstacle("m1", (7, 3, 2, 10), five, {"m2": (7, 3, 2, 10)}) == ""
    assert "m2 answers and has more" in obstacle("m1", (7, 3, 2, 9), five, {"m2": (7, 3, 2, 10)})
    assert "no member" in obstacle("m9", (7, 3, 2, 9), five, {})
    assert "it was removed" in obstacle("m1", (7, 3, 2, 10), five, {}, {"m2"})


def test_what_may_be_missing_is_said() -> None:
    assert missing("m1", THREE[:1], "") == ()
    (lost,) = missing("m1", THREE, "")
    assert "m2, m3" in lost
    assert "damaged at offset 9" in missing("m1", THREE, "damaged at offset 9")[1]


# --- one of several goes on alone -------------------------------------------------------------------------------------


async def test_a_survivor_goes_on_alone_and_the_rest_are_fenced_and_join_again(seed: int) -> None:
    with Cluster() as cluster:
        cluster.start()
        await cluster.agreed()
        leader = await cluster.leader()
        texts = [f"before.{n}" for n in range(20)]
        await write(leader, *texts)
        await cluster.agreed()
        one, two, three = cluster.nodes
        cluster.kill(two, three)

        # Refused while it runs, and while a majority answers.
        with pytest.raises(Refusal, match="another ledger process"):
            await asyncio.to_thread(recover, one.home.state, actor="root@test", now=1.0)
        cluster.kill(one)
        cluster.start(two)
        await up(two)
        with pytest.raises(Refusal, match=r"m2 answer.*(majority|has more)"):
            await asyncio.to_thread(recover, one.home.state, actor="root@test", now=1.0)
        cluster.kill(two)

        held = await asyncio.to_thread(examine, one.home.state, reach_s=0.2)
        assert (held.member, held.members, held.obstacle, held.log_problem) == ("m1", ("m1", "m2", "m3"), "", "")
        assert held.last_at > 0
        assert "m2, m3" in held.missing[0]
        at = await asyncio.to_thread(recover, one.home.state, actor="root@test", now=time.time(), reach_s=0.2)
        assert at.generation > held.generation
        assert [row.id for row in at.members] == ["m1"]
        cluster.start(one)
        await up(one)
        await write(one, "alone")
        assert written(one) == [*texts, "alone"], "all that it held is kept"

        # The others may even be a majority of the old generation: they are told, and end.
        cluster.start(two, three)
        for node in (two, three):
            last = await refusal_of(node)
            assert "fenced" in last
            assert "join as new" in last
            saved = next(node.home.state.glob("replaced-*.jsonl")).read_bytes().splitlines()
            assert {msgspec.json.decode(line)["applied"] for line in saved} <= {True, False}
            cluster.start(node)
            assert "fenced" in await refusal_of(node), "no restart forgets it"
        assert {one_.role for one_ in (await status(one.home.ledger_socket)).members if one_.id != "m1"} == {"fenced"}

        # It comes back as new, under its old name even.
        fence.set_aside(two.home.state, time.time())
        row = cluster.make_identity(two)
        async with connect(one.home.ledger_socket) as ledger:
            prepare(two.home.state, Join(cluster="c0ffee", members=await ledger.members()))
        cluster.start(two)
        members = await change_members(one.home.ledger_socket, add=row, deadline_s=60)
        assert [member.id for member in members] == ["m1", "m2"]
        await up(two)
        await write(two, "together")
        assert written(two) == [*texts, "alone", "together"]


async def test_what_only_the_log_of_the_survivor_holds_is_kept(seed: int) -> None:
    """An entry that was never committed, because nobody else was there, is taken over."""
    with Cluster(count=2) as cluster:
        cluster.start()
        await cluster.agreed()
        leader = await cluster.leader()
        other = next(node for node in cluster.nodes if node is not leader)
        await write(leader, "committed")
        cluster.signal(other, signal.SIGSTOP)
        async with connect(leader.home.ledger_socket) as ledger:
            asking = asyncio.create_task(ledger.propose(proposal(note(why="only logged")), deadline_s=20))
            path = max(folder.journals(leader.home.state).items())[1]
            await until(lambda: b"only logged" in path.read_bytes())
            cluster.kill(leader)
            with pytest.raises((Unreachable, QuorumLost)):
                await asking
        cluster.signal(other, signal.SIGCONT)
        cluster.kill(other)
        held = await asyncio.to_thread(examine, leader.home.state, reach_s=0.2)
        assert held.unapplied == 1
        await asyncio.to_thread(recover, leader.home.state, actor="root@test", now=time.time(), reach_s=0.2)
        assert written(leader) == ["committed", "only logged"]


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["journal", "state.db"])
async def test_one_with_a_flipped_bit_refuses_and_names_the_way_out(seed: int, what: str) -> None:
    with Cluster(epoch_entries=1000) as cluster:
        cluster.start()
        await cluster.agreed()
        leader = await cluster.leader()
        await write(leader, *(f"{n}" for n in range(30)))
        await cluster.agreed()
        victim = next(node for node in cluster.nodes if node is not leader)
        cluster.kill(victim)
        if what == "journal":
            flip(max(folder.journals(victim.home.state).items())[1], frames.HEAD_BYTES + 400)
        else:
            path = folder.current(victim.home.state)
            assert path is not None
            with sqlite3.connect(path) as db:
                db.execute("PRAGMA wal_checkpoint(TRUNCATE)").close()
                (pages,) = db.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'ledger'").fetchone()
                (size,) = db.execute("PRAGMA page_size").fetchone()
            db.close()
            flip(path, (pages - 1) * size + 3)
        cluster.start(victim)
        last = await refusal_of(victim)
        assert "damage" in last or "cannot read" in last or "not match" in last
        assert "join as" in last or "put back a copy" in last
        await write(leader, "the others go on")


async def test_rows_that_differ_stop_their_member_at_the_next_seal(seed: int) -> None:
    """A bit that flips in a row where no check of SQLite's looks."""
    with Cluster(epoch_entries=20) as cluster:
        cluster.start()
        await cluster.agreed()
        leader = await cluster.leader()
        await write(leader, "first", "second")
        await cluster.agreed()
        victim = next(node for node in cluster.nodes if node is not leader)
        cluster.kill(victim)
        path = folder.current(victim.home.state)
        assert path is not None
        with sqlite3.connect(path) as db:
            db.execute("UPDATE events SET why = 'forged' WHERE why = 'first'")
        db.close()
        cluster.start(victim)
        await cluster.agreed()
        await write(leader, *(f"{n}" for n in range(60)))
        last = await refusal_of(victim)
        assert "serves no more" in last
        assert "join as" in last
        cluster.start(victim)
        assert "serves no more" in await refusal_of(victim)
        assert written(leader)[:2] == ["first", "second"]
        assert "rows_differ" in leader.log.read_text()
        await write(leader, "the others go on")


def test_whose_rows_are_wrong() -> None:
    def rows(hash: str, epoch: int = 2) -> RowsAt:
        return RowsAt(place=(7, epoch), hash=hash)

    three = {"m1", "m2", "m3"}
    assert compare(None, {"m2": rows("a")}, three) is None
    assert compare(rows("a"), {"m2": rows("a"), "m3": rows("b", 1)}, three) is None
    assert compare(rows("a"), {"m2": rows("b")}, three) == Differ(("m2",), certain=False)
    assert compare(rows("a"), {"m2": rows("b"), "m3": rows("b")}, three) == Differ(("m2", "m3"), certain=True)
    assert compare(rows("a"), {"m2": rows("b"), "m3": rows("c")}, three) == Differ(("m2", "m3"), certain=False)
    assert compare(rows("a"), {"m2": rows("b"), "m9": rows("b")}, three) == Differ(("m2",), certain=False)


async def test_a_wiped_disk_does_not_come_back_under_its_old_name(seed: int) -> None:
    with Cluster() as cluster:
        cluster.start()
        await cluster.agreed()
        leader = await cluster.leader()
        victim = next(node for node in cluster.nodes if node is not leader)
        cluster.kill(victim)
        home = victim.home.state
        kept = {name: (home / name).read_bytes() for name in (identity.KEY, identity.CERTIFICATE, identity.ME)}
        wipe(home)
        # With its old key but another incarnation it is known, and refused for what it forgot.
        for name, data in kept.items():
            (home / name).write_bytes(data)
        me = msgspec.json.decode(kept[identity.ME], type=identity.Me)
        (home / identity.ME).write_bytes(msgspec.json.encode(msgspec.structs.replace(me, incarnation="new")))
        async with connect(leader.home.ledger_socket) as ledger:
            prepare(home, Join(cluster="c0ffee", members=await ledger.members()))
        cluster.start(victim)
        await until(lambda: "must join as new" in leader.log.read_text())
        # With a new key nobody even listens to it.
        cluster.kill(victim)
        wipe(home)
        identity.make(home, id=victim.name, listen=me.listen, address=me.address)
        async with connect(leader.home.ledger_socket) as ledger:
            prepare(home, Join(cluster="c0ffee", members=await ledger.members()))
            cluster.start(victim)
            await until(lambda: "joining" in victim.log.read_text())
            assert isinstance(await ledger.propose(proposal(note()), deadline_s=20), Done)
        assert folder.current(home) is None


def wipe(home: Path) -> None:
    for path in home.iterdir():
        path.unlink()
