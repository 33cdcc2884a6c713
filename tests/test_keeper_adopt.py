"""A keeper that is killed, replaced or doubled: children live on, and the next keeper has them, their words and sockets."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Sequence

import pytest
from keeper_support import DEADLINE_S, Rig, alive, child_of, exited, holds, python, rig, shell, text_of, until

from slum.errors import Unreachable
from slum.node.keeper_start import LEFT
from slum.node.keeperclient import Child, KeeperClient, call, keeper_command, start_detached
from slum.node.types import Respawn

__all__ = ["rig"]

TALK = "trap 'echo bye; exit 9' TERM; n=0; while :; do n=$((n+1)); echo line $n; sleep 0.02; done"
ANSWER = """
import socket
sock = socket.socket(fileno=3)
while True:
    accepted, _ = sock.accept()
    accepted.sendall(b"here")
    accepted.close()
"""


async def lines(rig: Rig, name: str, more_than: int) -> list[str]:
    await holds(lambda: len(rig.logged(name)) > more_than)
    return rig.logged(name)


async def test_children_outlive_a_killed_keeper_and_are_adopted(rig: Rig) -> None:
    client = await rig.started()
    before = await client.spawn(shell(rig, "i/x/1", TALK, meta={"generation": 1}))
    await lines(rig, "i/x/1", 3)
    rig.kill()
    with pytest.raises(Unreachable):
        await client.list_children()
    assert client.lost
    heard = len(rig.logged("i/x/1"))
    client = await rig.started()
    after = await child_of(client, "i/x/1")
    assert after is not None
    assert (after.pid, after.start_time, after.meta) == (before.pid, before.start_time, before.meta)
    assert after.adopted
    assert after.running
    said = await lines(rig, "i/x/1", heard + 5)
    numbers = [int(line.split()[1]) for line in said]
    assert numbers == list(range(1, len(said) + 1))  # also what it said while there was no keeper
    await client.signal("i/x/1")
    gone = await exited(client, "i/x/1")
    assert gone.status is None
    assert rig.logged("i/x/1")[-1] == "bye"
    assert list(rig.home.fifos.iterdir()) == []
    await client.forget("i/x/1")


async def test_an_adopted_child_leaves_nobody_behind(rig: Rig) -> None:
    client = await rig.started()
    await client.spawn(shell(rig, "p", "sleep 1000 & echo $!; exec sleep 1000"))
    left = int((await lines(rig, "p", 0))[0])
    rig.kill()
    client = await rig.started()
    await client.signal("p", signal.SIGTERM)
    await exited(client, "p")
    await holds(lambda: not alive(left))


async def test_what_died_unseen_has_no_status_and_the_respawned_is_back(rig: Rig) -> None:
    client = await rig.started()
    once = await client.spawn(shell(rig, "once", "exec sleep 1000"))
    again = await client.spawn(shell(rig, "again", "echo $A; exec sleep 1000", env={"A": "a"}, respawn=Respawn()))
    await client.spawn(shell(rig, "done", "exit 3"))
    await exited(client, "done")
    rig.kill()
    for child in (once, again):
        os.kill(child.pid, signal.SIGKILL)
    await holds(lambda: not alive(once.pid) and not alive(again.pid))
    client = await rig.started()
    assert (await exited(client, "once")).status is None
    assert (await exited(client, "done")).status == 3

    async def back() -> Child | None:
        child = await child_of(client, "again")
        return child if child is not None and child.running else None

    child = await until(back)
    assert child.pid != again.pid
    assert child.respawns == 1
    assert await lines(rig, "again", 1) == ["a", "a"]


async def test_an_adopted_respawned_child_comes_back_too(rig: Rig) -> None:
    client = await rig.started()
    first = await client.spawn(shell(rig, "r", "exec sleep 1000", respawn=Respawn(delay_ms_min=20)))
    rig.kill()
    client = await rig.started()
    await client.subscribe()
    os.kill(first.pid, signal.SIGKILL)
    events = client.events()
    exit_, spawned = [await anext(events) for _ in range(2)]
    assert (exit_.event, exit_.child.status, spawned.event) == ("exit", None, "spawned")
    assert not spawned.child.adopted


async def test_a_reused_pid_is_no_child_and_is_not_signalled(rig: Rig) -> None:
    client = await rig.started()
    await client.spawn(shell(rig, "c", "exec sleep 1000"))
    rig.kill()
    record = rig.home.keeper_table / "c.c"
    facts = json.loads(record.read_text())
    os.kill(facts["pid"], signal.SIGKILL)
    stranger = a_stranger()
    try:
        # A clock tick earlier: this test is faster than the kernel's count of start times.
        record.write_text(json.dumps(facts | {"pid": stranger.pid, "start_time": facts["start_time"] - 1}))
        client = await rig.started()
        assert (await exited(client, "c")).status is None
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def a_stranger() -> subprocess.Popen[bytes]:
    return subprocess.Popen(["sleep", "1000"], start_new_session=True)


async def test_records_of_another_boot_and_junk_are_left_out(rig: Rig) -> None:
    client = await rig.started()
    child = await client.spawn(shell(rig, "c", "exec sleep 1000"))
    rig.kill()
    record = rig.home.keeper_table / "c.c"
    facts = json.loads(record.read_text())
    os.kill(child.pid, signal.SIGKILL)
    record.write_text(json.dumps(facts | {"boot_id": "another"}))
    (rig.home.keeper_table / "c.junk").write_text("{")
    (rig.home.keeper_table / "c.less").write_text(json.dumps({"boot_id": facts["boot_id"], "spawn": {"name": 1}}))
    (rig.home.keeper_table / "l.less").write_text(json.dumps({"boot_id": facts["boot_id"]}))
    (rig.home.keeper_table / ".c.half").write_text("")
    client = await rig.started()
    assert await client.list_children() == ()
    assert list(rig.home.fifos.iterdir()) == []


async def test_a_listener_survives_with_the_connections_that_wait(rig: Rig) -> None:
    client = await rig.started()
    path = rig.folder / "s.sock"
    kept = await client.listen("kept", path=path)
    cold = await client.listen("cold", path=rig.folder / "cold.sock", mode=0o640)
    tcp = await client.listen("tcp", tcp="127.0.0.1:0")
    await client.spawn(shell(rig, "holder", "exec sleep 1000", listeners=("kept", "tcp")))
    with socket.socket(socket.AF_UNIX) as waiting:
        waiting.connect(str(path))
        waiting.settimeout(DEADLINE_S)
        rig.kill()
        client = await rig.started()
        assert (await client.listen("kept", path=path)).inode == kept.inode
        assert (await client.listen("tcp", tcp="127.0.0.1:0")).bound == tcp.bound
        again = await client.listen("cold", path=rig.folder / "cold.sock")
        assert again.inode != cold.inode
        assert (rig.folder / "cold.sock").stat().st_mode & 0o777 == 0o640
        await client.signal("holder")
        await exited(client, "holder")
        await client.spawn(python(rig, "web", ANSWER, listeners=("kept",)))
        assert waiting.recv(10) == b"here"
    await client.spawn(python(rig, "cold", ANSWER, listeners=("cold",)))
    with socket.socket(socket.AF_UNIX) as later:
        later.settimeout(DEADLINE_S)
        later.connect(str(rig.folder / "cold.sock"))
        assert later.recv(10) == b"here"


async def test_reexec_keeps_pid_children_listeners_and_statuses(rig: Rig) -> None:
    client = await rig.started()
    listening = await client.listen("l", path=rig.folder / "l.sock")
    before = await client.spawn(shell(rig, "i/x/1", TALK))
    await client.spawn(shell(rig, "gone", "exit 4"))
    await exited(client, "gone")
    pid = (await client.hello()).pid
    for round_ in range(3):
        fds = (await client.stats()).fds
        await client.reexec()
        await holds(lambda client=client: client.lost)  # type: ignore[misc]  # bound for the closure
        client = await rig.connect()
        assert (await client.hello()).pid == pid
        assert (await client.stats()).fds == fds, f"round {round_}"
    after = await child_of(client, "i/x/1")
    assert after is not None
    assert after.pid == before.pid
    assert not after.adopted
    assert (await client.listen("l", path=rig.folder / "l.sock")).inode == listening.inode
    assert (await exited(client, "gone")).status == 4
    heard = len(rig.logged("i/x/1"))
    await lines(rig, "i/x/1", heard)
    await client.signal("i/x/1")
    assert (await exited(client, "i/x/1")).status == 9  # it is still our own child


async def test_orphans_of_children_are_reaped(rig: Rig) -> None:
    client = await rig.started()
    await client.spawn(shell(rig, "o", "(setsid sh -c 'echo $$; exec sleep 0.2' &); exec sleep 1000"))
    orphan = int((await lines(rig, "o", 0))[0])

    await holds(lambda: not os.path.exists(f"/proc/{orphan}"))
    assert f"PPid:\t{rig.pid}" in text_of(f"/proc/{(await client.list_children())[0].pid}/status")


async def test_a_keeper_that_is_asked_to_end_says_that_the_next_one_is_needed(rig: Rig) -> None:
    """By its exit status, for an init that starts it again unless it was its own wish."""
    client = await rig.started()
    child = await client.spawn(shell(rig, "c", "exec sleep 1000"))
    process = rig.process
    assert process is not None
    process.terminate()
    await holds(lambda: process.poll() is not None)
    assert process.returncode == LEFT
    assert alive(child.pid)


async def test_a_second_keeper_leaves_the_first_alone(rig: Rig) -> None:
    client = await rig.started()
    await client.spawn(shell(rig, "c", "exec sleep 1000"))
    for detach, code in ((False, 1), (True, 0)):
        argv, env = keeper_command(rig.home, detach=detach)
        second = await asyncio.create_subprocess_exec(*argv, env=env, stderr=subprocess.PIPE)
        _, said = await second.communicate()
        assert second.returncode == code
        assert f"a keeper runs here already (pid {rig.pid})" in said.decode()
    assert len(await client.list_children()) == 1


async def test_a_detached_keeper_belongs_to_nobody_and_logs_to_its_file(rig: Rig) -> None:
    rig.boot({"name": "b", "argv": ["/gone"], "env": {}})
    hello = await asyncio.to_thread(start_detached, rig.home)
    assert (await asyncio.to_thread(start_detached, rig.home)).pid == hello.pid
    try:
        stat = text_of(f"/proc/{hello.pid}/stat").rpartition(")")[2].split()
        assert int(stat[1]) not in (os.getpid(), os.getppid())
        assert int(stat[3]) != os.getsid(0)
        assert os.readlink(f"/proc/{hello.pid}/cwd") == "/"
        await holds(lambda: "cannot start b" in rig.home.own_log("keeper").read_text())
        assert "SLUM" not in text_of(f"/proc/{hello.pid}/environ")
    finally:
        call(rig.home, "shutdown", names=[])
        await holds(lambda: not alive(hello.pid))


async def test_folders_of_others_are_refused(rig: Rig) -> None:
    await rig.started()
    rig.kill()
    rig.home.private.chmod(0o755)
    rig.start()
    process = rig.process
    assert process is not None
    await holds(lambda: process.poll() is not None)
    assert process.returncode == 2
    assert f"{rig.home.private} is open to others" in rig.said
    rig.home.private.chmod(0o700)


async def test_a_linked_folder_is_refused_with_the_folder_behind_it(rig: Rig) -> None:
    behind = rig.folder / "behind"
    behind.mkdir(mode=0o711)
    rig.home.data.symlink_to(behind)
    rig.start()
    process = rig.process
    assert process is not None
    await holds(lambda: process.poll() == 2)
    assert f"{rig.home.data} is a symbolic link; give the folder itself, {behind}" in rig.said
    rig.home.data.unlink()


async def test_a_spawn_that_the_keepers_death_cut_short_leaves_no_unknown_process(rig: Rig) -> None:
    """Kill the keeper at random moments of a burst of spawns: all that executes is in the next keeper's table."""
    marker = f"slum-{os.getpid()}-{rig.folder.name}"
    for delay in (0.0, 0.002, 0.005, 0.009, 0.02):
        client = await rig.started()
        names = [f"n{number}" for number in range(10)]
        bursts = [asyncio.create_task(_quiet_spawn(client, rig, name, marker)) for name in names]
        await asyncio.wait(bursts, timeout=delay)
        rig.kill()
        await asyncio.gather(*bursts)
        client = await rig.started()
        known = {child.pid for child in await client.list_children() if child.running}
        await holds(lambda known=known: set(_running(marker)) == known)  # type: ignore[misc]
        for child in await client.list_children():
            if child.running:
                await client.signal(child.name, signal.SIGKILL)
            await exited(client, child.name)
            await client.forget(child.name)
        rig.kill()
    shutil.rmtree(rig.home.run)


async def _quiet_spawn(client: KeeperClient, rig: Rig, name: str, marker: str) -> None:
    try:
        await client.spawn(shell(rig, name, f"exec sleep 1000 # {marker}", env={"M": marker, "PATH": os.defpath}))
    except Unreachable:
        return


def _running(marker: str) -> Sequence[int]:
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            try:
                with open(f"/proc/{entry}/environ", "rb") as file:
                    if f"M={marker}".encode() in file.read():
                        found.append(int(entry))
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
    return found
