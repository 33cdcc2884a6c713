"""Members in processes of their own, over mTLS on loopback: kills and pauses under load lose, double and reorder nothing."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from ledger_cluster import Cluster, Writer, until
from ledger_support import note, proposal

from slum.errors import QuorumLost
from slum.ledger.client import connect
from slum.ledger.commands import Done

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
        await cluster.agreed()
        cluster.terminate()
        cluster.check([], others=3)


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
        cluster.terminate()
        cluster.check(writers)


async def test_a_minority_refuses_at_once(seed: int) -> None:
    with Cluster() as cluster:
        cluster.start()
        await cluster.leader()
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
        await cluster.agreed()
        cluster.terminate()
        cluster.check(writers)
