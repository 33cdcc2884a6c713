"""Killing all of a child, whatever it did to escape: by cgroup, of both versions, and never a neighbour."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from keeper_support import Rig, alive, children_of, exited, holds, python, rig, shell

from slum.node.keeperclient import KeeperError
from slum.node.types import Respawn, Signalling

__all__ = ["rig"]

V1 = Path("/sys/fs/cgroup/pids")
V2 = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified"))
ESCAPE = "setsid sh -c 'echo $$; exec sleep 1000' & sleep 0.1; wait"
BOMB = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
while True:
    try:
        os.fork()
    except OSError:
        time.sleep(0.001)
"""


def made(parent: Path | None, why: str) -> Iterator[Path]:
    folder = (parent or Path("/gone")) / f"slum-test-{os.getpid()}-{os.urandom(3).hex()}"
    try:
        folder.mkdir()
    except OSError as error:
        if os.environ.get("CI") == "true" and os.geteuid() == 0:
            pytest.fail(f"{why}: {error}")
        pytest.skip(f"{why}: {error}")
    yield folder
    folder.rmdir()


@pytest.fixture
def pids_cgroup() -> Iterator[Path]:
    yield from made(V1 if V1.is_dir() else _v2(), "no cgroup with a pids limit can be made")


@pytest.fixture
def unified_cgroup() -> Iterator[Path]:
    yield from made(_v2(), "no cgroup of version 2 can be made")


def _v2() -> Path | None:
    return next((root for root in V2 if (root / "cgroup.controllers").exists()), None)


def procs(cgroup: Path) -> list[int]:
    return [int(word) for word in (cgroup / "cgroup.procs").read_text().split()]


@pytest.mark.root
async def test_a_fork_bomb_is_killed_whole(rig: Rig, pids_cgroup: Path) -> None:
    client = await rig.started()
    (pids_cgroup / "pids.max").write_text("60")
    member = str(pids_cgroup / "cgroup.procs")
    signalling = Signalling(procs_files=(member,))
    await client.spawn(python(rig, "bomb", BOMB, cgroup_procs=(member,), signalling=signalling))
    await holds(lambda: len(procs(pids_cgroup)) > 50)
    await client.signal("bomb", signal.SIGKILL)
    await exited(client, "bomb")
    await holds(lambda: procs(pids_cgroup) == [])


@pytest.mark.root
async def test_what_left_the_session_ends_with_its_child(rig: Rig, unified_cgroup: Path) -> None:
    client = await rig.started()
    member = str(unified_cgroup / "cgroup.procs")
    signalling = Signalling(kill_file=str(unified_cgroup / "cgroup.kill"), procs_files=(member,))
    await client.spawn(shell(rig, "e", ESCAPE, cgroup_procs=(member,), signalling=signalling))
    await holds(lambda: len(rig.logged("e")) == 1)
    escaped = int(rig.logged("e")[0])
    await client.signal("e")
    await exited(client, "e")
    await holds(lambda: not alive(escaped))


async def test_a_cgroup_that_a_living_neighbour_shares_is_not_emptied(rig: Rig) -> None:
    client = await rig.started()
    listing = rig.folder / "procs"
    listing.write_text("")
    signalling = Signalling(procs_files=(str(listing),))
    await client.spawn(shell(rig, "old", ESCAPE, signalling=signalling))
    young = await client.spawn(shell(rig, "young", "exec sleep 1000", signalling=signalling))
    await holds(lambda: len(rig.logged("old")) == 1)
    escaped = int(rig.logged("old")[0])
    listing.write_text(f"{escaped}\n{young.pid}\n")
    await client.signal("old", signal.SIGKILL)
    await exited(client, "old")
    assert alive(young.pid)
    assert alive(escaped)
    await client.signal("young", signal.SIGKILL)
    await exited(client, "young")
    await holds(lambda: not alive(escaped))


async def test_a_respawned_child_may_leave_processes_alone(rig: Rig) -> None:
    client = await rig.started()
    child = await client.spawn(shell(rig, "agent", "sleep 1000 & echo $!; wait", respawn=Respawn()))
    await holds(lambda: len(rig.logged("agent")) == 1)
    worker = int(rig.logged("agent")[0])
    assert children_of(child.pid) == [worker]
    os.kill(child.pid, signal.SIGKILL)
    await holds(lambda: len(rig.logged("agent")) == 2)
    assert alive(worker)
    os.kill(worker, signal.SIGKILL)


async def test_a_start_that_hangs_holds_up_nobody_and_is_given_up(rig: Rig) -> None:
    client = await rig.started()
    stuck = rig.folder / "fifo"
    os.mkfifo(stuck)  # opening it to write waits for a reader, as a frozen cgroup would

    async def hang() -> KeeperError:
        with pytest.raises(KeeperError) as refused:
            await client.spawn(shell(rig, "stuck", "true", cgroup_procs=(str(stuck),)))
        return refused.value

    hanging = asyncio.create_task(hang())
    while not any(child.name == "stuck" for child in await client.list_children()):
        pass
    await client.spawn(shell(rig, "other", "exit 4"))
    assert (await exited(client, "other")).status == 4
    assert not hanging.done()
    assert (await hanging).errno == errno.ETIMEDOUT
    assert (await exited(client, "stuck")).status == -signal.SIGKILL
