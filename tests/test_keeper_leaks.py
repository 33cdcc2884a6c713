"""After hundreds of rounds the keeper holds what it held before, and its memory stays small."""

from __future__ import annotations

import asyncio
import os
import subprocess
from pathlib import Path

import pytest
from keeper_support import Rig, children_of, exited, holds, rig, shell

from slum.node.keeper_table import CHILD, Table
from slum.node.keeperclient import KeeperClient, call
from slum.node.types import Spawn

__all__ = ["rig"]

ROUNDS = 500
AT_ONCE = 20


async def test_500_starts_and_exits_leave_nothing(rig: Rig) -> None:
    client = await rig.started()
    await client.spawn(shell(rig, "stays", "exec sleep 1000"))
    await one_round(client, rig, "warm")
    before = await client.stats()
    for first in range(0, ROUNDS, AT_ONCE):
        names = [f"i/{number}/1" for number in range(first, first + AT_ONCE)]
        await asyncio.gather(*(one_round(client, rig, name) for name in names))
    after = await client.stats()
    assert (after.fds, after.children, after.listeners) == (before.fds, 1, 0)
    assert after.rss_bytes - before.rss_bytes < 1 << 20
    assert children_of(rig.pid) == [child.pid for child in await client.list_children()]
    assert [path.name for path in rig.home.fifos.iterdir()] == ["stays"]
    assert [path.name for path in rig.home.keeper_table.iterdir()] == ["c.stays"]


async def one_round(client: KeeperClient, rig: Rig, name: str) -> None:
    listener = rig.folder / f"{name.replace('/', '-')}.sock"
    await client.listen(name, path=listener)
    await client.spawn(shell(rig, name, "echo out; exit 1", listeners=(name,), log=rig.log("shared")))
    await exited(client, name)
    await client.forget(name)
    await client.close_listener(name)
    assert not listener.exists()


async def test_the_keeper_stays_small(rig: Rig) -> None:
    client = await rig.started()
    idle = (await client.stats()).rss_bytes
    assert idle < 13 << 20, f"{idle / (1 << 20):.1f} MB"
    argv = ("/bin/sh", "-c", "exec sleep 1000", *(f"--an-option-of-a-wall={number}" for number in range(60)))
    count = 100
    for number in range(count):
        name = f"i/{number:012x}/1"
        env = {f"NAME_{index}": "value" * 10 for index in range(20)}
        await client.spawn(Spawn(name=name, argv=argv, env=env, log=rig.log(name), meta={"release": "0" * 64}))
    each = ((await client.stats()).rss_bytes - idle) / count
    assert each < 25 << 10, f"{each / 1024:.1f} KB a child"


async def test_nothing_of_the_keeper_is_held_by_a_child(rig: Rig) -> None:
    client = await rig.started()
    await client.listen("l", path=rig.folder / "l.sock")
    child = await client.spawn(shell(rig, "c", "exec sleep 1000"))
    await holds(lambda: held_by(child.pid) == {"/dev/null", str(rig.home.fifos / "c")})
    await holds(lambda: call(rig.home, "stats")["children"] == 1)


def held_by(pid: int) -> set[str]:
    folder = f"/proc/{pid}/fd"
    return {os.readlink(f"{folder}/{fd}") for fd in os.listdir(folder)}


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_record_is_replaced_where_it_lies_when_the_folder_is_full(tmp_path: Path) -> None:
    """A service may fill the run folder; the router must start again all the same."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], check=True)
    try:
        table = Table(str(tmp_path), "b")
        table.save(CHILD, "router", {"pid": 1, "text": "x" * 100})
        with (tmp_path / "filler").open("wb", buffering=0) as filler:
            filler.write(bytes(1 << 20))  # as much as fits
        table.save(CHILD, "router", {"pid": 22})
        assert table.load(CHILD) == [{"pid": 22, "boot_id": "b"}]
        table.save(CHILD, "router", {"pid": 333, "text": "y" * 2000})
        assert table.load(CHILD)[0]["pid"] == 333
        with pytest.raises(OSError, match=r"No space|no room"):
            table.save(CHILD, "router", {"pid": 4, "text": "z" * 5000})
        with pytest.raises(OSError, match=r"No space|no room"):
            table.save(CHILD, "new", {"pid": 5})
        assert [record["pid"] for record in table.load(CHILD)] == [333]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
