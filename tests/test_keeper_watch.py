"""The watchdog: a respawned child that hangs is killed and comes back; one that is slow, stopped with all else, or new is not."""

from __future__ import annotations

import os
import signal
import sys

import pytest
from keeper_support import Rig, alive, child_of, holds, rig, until

from slum.node.hang import Activity, Patience, excused
from slum.node.keeperclient import Child, KeeperClient
from slum.node.types import Respawn, Spawn

__all__ = ["rig"]

LIMIT_MS = 1200
TELLS = "import asyncio\nfrom slum.alive import Alive\nasyncio.run(Alive().keep_telling())"
DEADLOCKS = """
import os, threading
from slum.alive import Alive
Alive().tell()
if not os.path.exists("MARK"):
    open("MARK", "w").close()
    lock = threading.Lock(); lock.acquire(); lock.acquire()
import asyncio
asyncio.run(asyncio.sleep(1000))
"""


def program(rig: Rig, name: str, code: str) -> Spawn:
    return Spawn(
        name=name,
        argv=(sys.executable, "-P", "-c", code),
        env={"PATH": os.defpath},
        log=rig.log(name),
        respawn=Respawn(delay_ms_min=10, silent_ms_max=LIMIT_MS),
    )


async def telling(rig: Rig, client: KeeperClient, name: str) -> Child:
    """Wait until *name* has told once, and return it."""
    await holds((rig.home.private / "w" / name).exists)
    child = await child_of(client, name)
    assert child is not None
    return child


async def replaced(client: KeeperClient, old: Child) -> Child:
    async def look() -> Child | None:
        child = await child_of(client, old.name)
        return child if child is not None and child.running and child.pid != old.pid else None

    return await until(look)


async def test_a_stopped_child_is_killed_and_comes_back_and_its_neighbours_stay(rig: Rig) -> None:
    client = await rig.started()
    for name, code in (("one", TELLS), ("two", TELLS), ("mute", "import time; time.sleep(1000)")):
        await client.spawn(program(rig, name, code))
    one, two = await telling(rig, client, "one"), await telling(rig, client, "two")
    for _ in range(2):
        os.kill(one.pid, signal.SIGSTOP)
        old, one = one, await replaced(client, one)
        assert not alive(old.pid)
        one = await telling(rig, client, "one")
    assert [line for line in rig.logged("one") if "killed, for it hung" in line]
    assert "one: killed, for it hung: it has not told that it lives for 1.2 s" in rig.said
    assert (await child_of(client, "two")) == two
    mute = await child_of(client, "mute")
    assert mute is not None
    assert mute.respawns == 0  # what never told is not waited for


async def test_a_deadlock_is_a_hang(rig: Rig) -> None:
    client = await rig.started()
    mark = rig.folder / "mark"
    await client.spawn(program(rig, "lock", DEADLOCKS.replace("MARK", str(mark))))
    await holds(mark.exists)
    first = await child_of(client, "lock")
    assert first is not None
    assert (await replaced(client, first)).respawns == 1


async def test_nobody_is_killed_after_a_stop_of_everything(rig: Rig) -> None:
    client = await rig.started()
    await client.spawn(program(rig, "one", TELLS))
    one = await telling(rig, client, "one")
    told = rig.home.private / "w" / "one"
    for pid in (rig.pid, one.pid):
        os.kill(pid, signal.SIGSTOP)
    stopped_at = os.times().elapsed
    await holds(lambda: os.times().elapsed - stopped_at > 2 * LIMIT_MS / 1000)
    for pid in (rig.pid, one.pid):
        os.kill(pid, signal.SIGCONT)
    before = told.stat().st_mtime_ns
    await holds(lambda: told.stat().st_mtime_ns > before + 3 * LIMIT_MS * 1_000_000)
    assert (await child_of(client, "one")) == one


async def test_one_that_hung_while_the_keeper_was_dead_is_killed_by_the_next(rig: Rig) -> None:
    client = await rig.started()
    await client.spawn(program(rig, "one", TELLS))
    one = await telling(rig, client, "one")
    rig.kill()
    os.kill(one.pid, signal.SIGSTOP)
    assert (await replaced(await rig.started(), one)).respawns == 1


async def test_one_that_shall_end_is_not_watched_any_more(rig: Rig) -> None:
    client = await rig.started()
    await client.spawn(program(rig, "one", TELLS))
    await client.spawn(program(rig, "two", TELLS))
    one, two = await telling(rig, client, "one"), await telling(rig, client, "two")
    await client.stop_respawn("one")
    for child in (one, two):
        os.kill(child.pid, signal.SIGSTOP)
    await replaced(client, two)
    assert alive(one.pid)
    os.kill(one.pid, signal.SIGCONT)


@pytest.mark.parametrize(
    ("states", "cpu_s", "excuse"),
    [
        ("S", 0.0, False),
        ("T", 0.0, False),
        ("SSR", 4.9, False),
        ("SSR", 1.0, True),
        ("SD", 0.0, True),
        ("t", 0.0, True),
        ("", 0.0, True),
    ],
)
def test_what_excuses_silence(states: str, cpu_s: float, excuse: bool) -> None:
    """Waiting for a disk, a debugger, being gone, and wanting a CPU without getting one; not: sleeping, stopped, spinning."""
    before, now = Activity("S", 10.0, 100.0), Activity(states, 10.0 + cpu_s, 105.0)
    assert excused(before, now) is excuse


def test_one_word_gives_the_whole_time_again() -> None:
    patience = Patience(looks=3)
    asleep = [Activity("S", 0.0, float(at)) for at in range(10)]
    assert [patience.silent(each) for each in asleep[:2]] == [False, False]
    patience.heard()
    assert [patience.silent(each) for each in asleep[2:5]] == [False, False, True]
