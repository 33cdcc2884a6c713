"""Members in processes of their own, over mTLS on loopback: kills and pauses under load lose, double and reorder nothing."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from ledger_cluster import Cluster, Node, Writer, free_port, until
from ledger_support import Process, note, proposal

from slum.errors import ConfigError, QuorumLost
from slum.ledger import identity
from slum.ledger.client import change_members, connect, status
from slum.ledger.commands import PROTOCOL, Done
from slum.ledger.joiner import Join, prepare
from slum.ledger.reader import Reader

pytestmark = pytest.mark.xdist_group("ledger_cluster")


@asynccontextmanager
async def under_load(cluster: Cluster, seed: int, count: int = 4) -> AsyncIterator[list[Writer]]:
    writers = [Writer(cluster, name, random.Random(seed + name)) for name in range(count)]
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        for writer in writers:
            group.create_task(writer.run(stop))
        yield writers
        stop.set()


def written(writers: list[Writer]) -> int:
    return sum(len(writer.acknowledged) for writer in writers)


async def more(writers: list[Writer], count: int) -> None:
    enough = written(writers) + count
    await until(lambda: written(writers) >= enough)


async def test_any_member_takes_writes_and_shows_its_own(seed: int) -> None:
    with Cluster() as cluster:
        cluster.start()
        await cluster.agreed()
        leader = await cluster.leader()
        for node in cluster.nodes:
            async with connect(node.home.ledger_socket) as ledger:
                result = await ledger.propose(proposal(note(why=node.name)), deadline_s=10)
                assert isinstance(result, Done)
                info = await ledger.leader()
                assert info.seq >= result.seq, "who answered has applied it"
                assert (info.member, info.is_self) == (leader.name, node is leader)
                assert await ledger.barrier(deadline_s=5) > result.seq
                assert [member.id for member in await ledger.members()] == ["m1", "m2", "m3"]
        await cluster.finish([], others=3)


async def test_whoever_is_told_of_news_finds_it_in_the_state_db_beside_it(seed: int) -> None:
    """Members that do not lead commit what they apply together, but never behind what they say."""
    with Cluster() as cluster:
        cluster.start()
        await cluster.agreed()
        leader = await cluster.leader()
        other = next(node for node in cluster.nodes if node is not leader)
        async with connect(leader.home.ledger_socket) as ledger, connect(other.home.ledger_socket) as beside:
            for number in range(60):
                seq = cluster.position(other).seq
                waiting = asyncio.create_task(beside.wait(seq, deadline_s=10))
                result = await ledger.propose(proposal(note(why=str(number))), deadline_s=10)
                assert isinstance(result, Done)
                told = await waiting
                assert told > seq
                assert cluster.position(other).seq >= told
                if number % 3 == 0:
                    info = await beside.leader()
                    assert cluster.position(other).seq >= info.seq
        await cluster.finish([], others=60)


@pytest.mark.parametrize("what", ["one", "majority", "all", "pause"])
async def test_trouble_under_load(seed: int, what: str) -> None:
    chance = random.Random(seed)
    with Cluster() as cluster:
        cluster.start()
        await cluster.leader()
        async with under_load(cluster, seed) as writers:
            for _ in range(4):
                await more(writers, chance.randrange(20, 200))
                await asyncio.sleep(chance.random() * 0.05)
                if what == "pause":
                    leader = await cluster.leader()
                    cluster.signal(leader, signal.SIGSTOP)
                    await more(writers, 20)
                    cluster.signal(leader, signal.SIGCONT)
                    continue
                count = {"one": 1, "majority": 2, "all": 3}[what]
                victims = chance.sample(cluster.nodes, count)
                if what == "one":
                    victims = [await cluster.leader()]
                cluster.kill(*victims)
                if what == "one":
                    await more(writers, 20)
                cluster.start(*victims)
            await more(writers, 50)
        await cluster.agreed()
        assert cluster.position(cluster.nodes[0]).epoch > 2, "there should have been seals"
        await cluster.finish(writers)


async def test_a_minority_refuses_at_once(seed: int) -> None:
    with Cluster() as cluster:
        cluster.start()
        await cluster.agreed()
        cluster.kill(*cluster.nodes[1:])
        async with connect(cluster.nodes[0].home.ledger_socket) as ledger:
            with pytest.raises(QuorumLost):
                await ledger.propose(proposal(note()), deadline_s=10)
            began = time.monotonic()
            with pytest.raises(QuorumLost, match="1 of 3 members"):
                await ledger.propose(proposal(note()), deadline_s=10)
            assert time.monotonic() - began < 1.0
        cluster.start(*cluster.nodes[1:])
        await cluster.leader()
        async with connect(cluster.nodes[0].home.ledger_socket) as ledger:
            assert isinstance(await ledger.propose(proposal(note(why="again")), deadline_s=10), Done)


async def test_a_member_that_was_away_for_many_epochs_gets_a_copy(seed: int) -> None:
    with Cluster(epoch_entries=12) as cluster:
        cluster.start()
        await cluster.leader()
        away = cluster.nodes[2]
        cluster.kill(away)
        async with under_load(cluster, seed) as writers:
            await more(writers, 200)
            cluster.start(away)
            await more(writers, 100)
        await cluster.agreed()
        assert "copy_was_taken" in away.log.read_text()
        cluster.kill(away)
        cluster.start(away)
        await cluster.finish(writers)


# --- members come and go ----------------------------------------------------------------------------------------------


async def change(cluster: Cluster, **what: object) -> tuple[str, ...]:
    """Ask whoever leads for a change, again when leadership has moved."""
    while True:
        leader = await cluster.leader()
        try:
            members = await change_members(leader.home.ledger_socket, deadline_s=60, **what)  # type: ignore[arg-type]
        except QuorumLost as error:
            if "does not lead" not in str(error):
                raise
        else:
            return tuple(member.id for member in members)


async def test_one_becomes_three_under_load_and_one_again(seed: int) -> None:
    with Cluster(1) as cluster:
        cluster.start()
        first = await cluster.leader()
        async with under_load(cluster, seed) as writers:
            await more(writers, 100)
            for n in (1, 2):
                node = cluster.make_node(n)
                row = cluster.make_identity(node)
                async with connect(first.home.ledger_socket) as ledger:
                    join = Join(cluster="c0ffee", members=await ledger.members())
                prepare(node.home.state, join)
                cluster.nodes.append(node)
                cluster.start(node)
                assert (await change(cluster, add=row))[-1] == node.name
                await more(writers, 100)
            # The leader itself leaves.
            leader = await cluster.leader()
            left = await change(cluster, remove=leader.name)
            assert leader.name not in left
            await until(lambda: "no_longer_a_member" in leader.log.read_text())
            cluster.kill(leader)
            cluster.nodes.remove(leader)
            await more(writers, 100)
        await cluster.finish(writers)


async def test_what_makes_no_sense_is_refused(seed: int) -> None:
    with Cluster(1) as cluster:
        cluster.start()
        leader = await cluster.leader()
        for what, why in (({}, "adds one member"), ({"remove": "m9"}, "no member"), ({"remove": "m1"}, "last member")):
            with pytest.raises(ConfigError, match=why):
                await change_members(leader.home.ledger_socket, deadline_s=10, **what)  # type: ignore[arg-type]
        async with connect(leader.home.ledger_socket) as ledger:
            assert [member.id for member in await ledger.members()] == ["m1"]


async def test_a_ledger_of_one_gets_a_key_and_then_company(seed: int) -> None:
    """What was begun as one member without any identity grows like any other."""
    with Process() as process:
        process.start()
        await process.up()
        async with connect(process.home.ledger_socket) as ledger:
            await ledger.propose(proposal(note(why="before")), deadline_s=10)
            assert (await ledger.members())[0].public_key == ""
        process.terminate()
        address = f"127.0.0.1:{free_port()}"
        row = identity.make(process.home.state, id="m1", listen=address, address=address)
        process.start()
        await process.up()
        with Cluster(0) as cluster:
            node = cluster.make_node(1)
            other = cluster.make_identity(node)
            async with connect(process.home.ledger_socket) as ledger:
                await ledger.propose(proposal(note(why="between")), deadline_s=10)
                assert await ledger.members() == (row,)
                reader = Reader(process.home.state)
                prepare(node.home.state, Join(cluster=reader.cluster().cluster_id, members=(row,)))
                reader.close()
            cluster.nodes.append(node)
            cluster.start(node)
            members = await change_members(process.home.ledger_socket, add=other, deadline_s=60)
            assert [member.id for member in members] == ["m1", "m2"]
            async with connect(node.home.ledger_socket) as ledger:
                result = await ledger.propose(proposal(note(why="after")), deadline_s=10)
                assert isinstance(result, Done)
            reader = Reader(node.home.state)
            assert [event.why for event in reader.events(kind="instance_noted")] == ["before", "between", "after"]
            reader.close()


async def test_status_tells_who_is_there_and_how_far(seed: int) -> None:
    with Cluster() as cluster:
        cluster.start()
        await cluster.agreed()
        leader = await cluster.leader()
        async with connect(leader.home.ledger_socket) as ledger:
            await ledger.propose(proposal(note()), deadline_s=10)
        await cluster.agreed()
        for node in cluster.nodes:
            found = await status(node.home.ledger_socket)
            assert (found.member, found.leader, found.majority) == (node.name, leader.name, True)
            assert [member.id for member in found.members] == ["m1", "m2", "m3"]
            roles = {member.id: member.role for member in found.members}
            assert roles == {one.name: "leader" if one is leader else "follower" for one in cluster.nodes}
            assert all(member.protocol == PROTOCOL and member.contact_s is not None for member in found.members)
            assert found.alarms == ()
        told = await status(leader.home.ledger_socket)
        assert (told.age_s, {member.lag for member in told.members}) == (0.0, {0})
        down, *rest = [node for node in cluster.nodes if node is not leader]
        cluster.kill(down)

        async def told_of(node: Node) -> str:
            return next(one.role for one in (await status(node.home.ledger_socket)).members if one.id == down.name)

        end = time.monotonic() + 30
        while await told_of(rest[0]) != "down":
            assert time.monotonic() < end
        cluster.kill(leader)
        while not (alone := await status(rest[0].home.ledger_socket)).alarms:
            assert time.monotonic() < end
        assert (alone.leader, alone.majority) == (None, False)
        assert alone.age_s > 0
        assert [alarm.kind for alarm in alone.alarms] == ["no_leader"]
