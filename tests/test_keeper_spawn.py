"""Starting, signalling and reaping children with a real keeper."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import socket
import subprocess
import sys
from itertools import pairwise

import pytest
from keeper_support import Rig, alive, catches, child_of, children_of, exited, holds, python, rig, shell, text_of, until

from slum.node.keeperclient import Child, KeeperClient, KeeperError
from slum.node.types import OpenFile, Respawn, Signalling, Spawn

__all__ = ["rig"]

LIBC_SIGNALS = 0x1_8000_0000
"""Signals 32 and 33: libc keeps them for itself and lets no program reset them, so a caller who ignores them hands that on.
Harmless: libc puts its own handlers in place before it uses them."""

SHOW = """
import json, os, resource
fds = [fd for fd in range(1024) if os.path.exists(f"/proc/self/fd/{fd}")]
status = dict(line.split(":", 1) for line in open("/proc/self/status").read().splitlines())
print(json.dumps({
    "env": dict(os.environ), "cwd": os.getcwd(), "umask": os.umask(0), "nice": os.nice(0), "pid": os.getpid(),
    "session": os.getsid(0), "fds": fds, "nnp": status["NoNewPrivs"].strip(),
    "ignored": int(status["SigIgn"], 16), "blocked": int(status["SigBlk"], 16),
    "nofile": resource.getrlimit(resource.RLIMIT_NOFILE), "core": resource.getrlimit(resource.RLIMIT_CORE),
    "uids": os.getresuid(), "gids": os.getresgid(), "groups": os.getgroups(),
}))
"""


async def shown(rig: Rig, client: KeeperClient, spawn: Spawn) -> dict[str, object]:
    await client.spawn(spawn)
    child = await exited(client, spawn.name)
    assert child.status == 0, rig.logged(spawn.name)
    shown: dict[str, object] = json.loads(rig.logged(spawn.name)[-1])
    return shown


async def test_a_child_gets_exactly_what_was_asked(rig: Rig) -> None:
    client = await rig.started()
    readable = rig.folder / "given"
    readable.write_text("x")
    spawn = python(
        rig,
        "i/abc/1",
        SHOW,
        env={"ONLY": "this"},
        cwd=str(rig.folder),
        umask=0o027,
        nice=3,
        rlimits={"nofile": (77, 99), "core": (0, 0)},
        open_files=(OpenFile(path=str(readable), fd=9),),
    )
    seen = await shown(rig, client, spawn)
    assert seen["env"] in ({"ONLY": "this"}, {"ONLY": "this", "LC_CTYPE": "C.UTF-8"})  # Python's own coercion
    assert seen["cwd"] == str(rig.folder)
    assert seen["umask"] == 0o027
    assert seen["nice"] == 3
    assert seen["session"] == seen["pid"]
    assert seen["fds"] == [0, 1, 2, 9]
    assert seen["nofile"] == [77, 99]
    assert seen["core"] == [0, 0]
    assert seen["nnp"] == "1"
    assert seen["blocked"] == 0


async def test_a_child_ignores_no_signal_and_keeps_the_limits_of_the_keepers_caller(rig: Rig) -> None:
    client = await rig.started()
    await client.spawn(shell(rig, "grep", "grep SigIgn /proc/self/status; ulimit -n", no_new_privs=False))
    await exited(client, "grep")
    ignored, nofile = rig.logged("grep")
    assert int(ignored.split()[1], 16) & ~LIBC_SIGNALS == 0
    assert int(nofile) == resource.getrlimit(resource.RLIMIT_NOFILE)[0]


async def test_what_cannot_start_says_why_with_the_kernels_number(rig: Rig) -> None:
    client = await rig.started()
    plain = rig.folder / "plain"
    plain.write_text("#!/bin/sh\n")
    gone = str(rig.folder / "gone")
    cases = [
        (Spawn(name="a", argv=(f"{gone}/x",), env={}), errno.ENOENT, f"exec {gone}/x"),
        (Spawn(name="a", argv=("gone-x",), env={"PATH": "/usr/bin:/bin"}), errno.ENOENT, "exec gone-x"),
        (Spawn(name="a", argv=(str(plain),), env={}), errno.EACCES, "exec"),
        (shell(rig, "a", "true", cwd=gone), errno.ENOENT, f"cwd {gone}"),
        (shell(rig, "a", "true", cgroup_procs=(f"{gone}/procs",)), errno.ENOENT, "cgroup"),
        (shell(rig, "a", "true", open_files=(OpenFile(path=gone, fd=5),)), errno.ENOENT, "descriptors"),
        (shell(rig, "a", "true", rlimits={"nofile": (5, 1 << 40)}), errno.EPERM, "rlimits"),
    ]
    for spawn, number, step in cases:
        with pytest.raises(KeeperError) as refused:
            await client.spawn(spawn)
        assert (refused.value.kind, refused.value.errno) == ("os", number), refused.value
        assert step in refused.value.message
    assert await client.list_children() == ()
    assert list(rig.home.fifos.iterdir()) == []
    assert list(rig.home.keeper_table.iterdir()) == []


async def test_a_living_name_is_refused_and_an_exited_one_replaced(rig: Rig) -> None:
    client = await rig.started()
    await client.spawn(shell(rig, "one", "exec sleep 60"))
    with pytest.raises(KeeperError) as refused:
        await client.spawn(shell(rig, "one", "true"))
    assert refused.value.kind == "exists"
    await client.signal("one")
    assert (await exited(client, "one")).status == -signal.SIGTERM
    await client.spawn(shell(rig, "one", "exit 7"))
    assert (await exited(client, "one")).status == 7
    with pytest.raises(KeeperError) as refused:
        await client.signal("one")
    assert refused.value.kind == "missing"
    await client.forget("one")
    assert await client.list_children() == ()
    with pytest.raises(KeeperError) as refused:
        await client.forget("one")
    assert refused.value.kind == "missing"


async def test_events_tell_of_starts_and_exits_after_the_last_line_is_logged(rig: Rig) -> None:
    client = await rig.started()
    await client.subscribe()
    await client.spawn(shell(rig, "e", "echo last words; exit 3", meta={"generation": 4}))
    events = client.events()
    spawned, exit_ = [await anext(events) for _ in range(2)]
    assert (spawned.event, exit_.event) == ("spawned", "exit")
    assert exit_.child.status == 3
    assert exit_.child.meta == {"generation": 4}
    assert rig.logged("e") == ["last words"]


async def test_listeners_are_passed_as_systemd_does(rig: Rig) -> None:
    client = await rig.started()
    path = rig.folder / "fd.sock"
    listening = await client.listen("web", path=path, mode=0o640)
    assert await client.listen("web", path=path) == listening
    with pytest.raises(KeeperError) as refused:
        await client.listen("web", tcp="127.0.0.1:0")
    assert refused.value.kind == "exists"
    assert path.stat().st_mode & 0o777 == 0o640
    assert f" {listening.inode} {listening.bound}" in text_of("/proc/net/unix")
    with socket.socket(socket.AF_UNIX) as early:
        early.connect(str(path))  # before anybody accepts
        code = """
import os, socket
assert int(os.environ["LISTEN_PID"]) == os.getpid() and os.environ["LISTEN_FDS"] == "2"
sock = socket.socket(fileno=3)
accepted, _ = sock.accept()
accepted.sendall((os.environ["LISTEN_FDNAMES"] + " " + socket.socket(fileno=4).getsockname()[0]).encode())
"""
        await client.listen("tcp", tcp="127.0.0.1:0")
        await client.spawn(python(rig, "srv", code, listeners=("web", "tcp")))
        assert early.recv(100) == b"web:tcp 127.0.0.1"
    with pytest.raises(KeeperError) as refused:
        await client.spawn(shell(rig, "no", "true", listeners=("unknown",)))
    assert refused.value.kind == "missing"
    await client.close_listener("web")
    assert not path.exists()
    assert [each.name for each in await client.listeners()] == ["tcp"]


async def test_given_descriptors_become_the_childs(rig: Rig) -> None:
    client = await rig.started()
    read_in, write_in = os.pipe()
    read_out, write_out = os.pipe()
    await client.spawn(shell(rig, "x/1", "cat; echo to stderr >&2"), stdio=(read_in, write_out, write_out))
    os.close(read_in)
    os.close(write_out)
    with os.fdopen(write_in, "wb") as to_child, os.fdopen(read_out, "rb") as from_child:
        to_child.write(b"hello\n")
        to_child.close()
        assert from_child.read() == b"hello\nto stderr\n"  # and the end, which the keeper's own copies would hide
    assert rig.raw_log("x/1") == b""


async def test_what_a_child_leaves_behind_is_killed_with_it(rig: Rig) -> None:
    client = await rig.started()
    await client.spawn(shell(rig, "p", "sleep 1000 & echo $!; exec sleep 1000"))
    await holds(lambda: len(rig.logged("p")) == 1)
    left = int(rig.logged("p")[0])
    await client.signal("p")
    await exited(client, "p")
    await holds(lambda: not alive(left))


async def test_signals_reach_the_depth_that_was_said(rig: Rig) -> None:
    client = await rig.started()
    inner = "trap 'echo inner got it; exit 5' TERM; while :; do sleep 0.05; done"
    outer = f"trap 'echo outer got it' TERM; (/bin/sh -c \"{inner}\"; exit $?); exit $?"
    deep = shell(rig, "deep", outer, signalling=Signalling(term_depth=2, kill_depth=1))
    child = await client.spawn(deep)
    await holds(lambda: bool(children_of(child.pid)))
    middle = children_of(child.pid)[0]
    await holds(lambda: bool(children_of(middle)) and catches(children_of(middle)[0], signal.SIGTERM))
    await client.signal("deep")
    assert (await exited(client, "deep")).status == 5
    assert rig.logged("deep") == ["inner got it"]


async def test_kill_takes_the_whole_group_and_tree_reaches_everybody(rig: Rig) -> None:
    client = await rig.started()
    stubborn = "trap '' TERM; (trap '' TERM; sleep 1000) & echo ready; wait"
    child = await client.spawn(shell(rig, "k", stubborn))
    await holds(lambda: rig.logged("k") == ["ready"])
    below = children_of(child.pid)[0]
    await client.signal("k")
    await client.signal("k", signal.SIGKILL)
    assert (await exited(client, "k")).status == -signal.SIGKILL
    await holds(lambda: not alive(below))
    await client.spawn(
        shell(
            rig,
            "t",
            "(trap 'echo below; exit' USR1; while :; do sleep 0.02; done) & while :; do wait; sleep 0.02; done",
        )
    )
    pid = (await child_of(client, "t") or child).pid
    await holds(lambda: bool(children_of(pid)) and catches(children_of(pid)[0], signal.SIGUSR1))
    await client.signal("t", signal.SIGUSR1, tree=True)
    assert (await exited(client, "t")).status == -signal.SIGUSR1


async def test_a_respawned_child_comes_back_ever_more_slowly_until_stopped(rig: Rig) -> None:
    client = await rig.started()
    await client.subscribe()
    await client.spawn(shell(rig, "r", "echo $$; exit 1", respawn=Respawn(delay_ms_min=20, delay_ms_max=100)))
    exits: list[Child] = []
    async for event in client.events():
        if event.event == "exit":
            exits.append(event.child)
        if len(exits) == 6:
            break
    gaps = [later.started_at - (earlier.exited_at or 0) for earlier, later in pairwise(exits)]
    assert [child.respawns for child in exits] == list(range(6))
    for gap, least in zip(gaps, (0.02, 0.04, 0.08, 0.1, 0.1), strict=True):
        assert least <= gap < least + 1
    with pytest.raises(KeeperError):
        await client.forget("r")
    with pytest.raises(KeeperError):
        await client.spawn(shell(rig, "r", "true"))
    await client.stop_respawn("r")

    async def forgotten() -> bool | None:
        try:
            await client.forget("r")
        except KeeperError:
            return None
        return True

    await until(forgotten)
    assert len(set(rig.logged("r"))) >= 6


async def test_the_environment_of_a_child_is_not_on_disk(rig: Rig) -> None:
    client = await rig.started()
    await client.spawn(shell(rig, "s", "exec sleep 60", env={"SECRET": "hunter2", "PATH": os.defpath}))
    await client.spawn(shell(rig, "keep", "exec sleep 60", env={"A": "kept", "PATH": os.defpath}, respawn=Respawn()))
    records = {path.name: path.read_text() for path in rig.home.keeper_table.iterdir()}
    assert "hunter2" not in str(records)
    assert "kept" in records["c.keep"]
    assert all(path.stat().st_mode & 0o077 == 0 for path in rig.home.keeper_table.iterdir())


async def test_boot_children_start_unless_they_live(rig: Rig) -> None:
    boot = {"name": "b", "argv": ["/bin/sleep", "60"], "env": {}, "respawn": {}}
    rig.boot(boot, {"name": "broken", "argv": [str(rig.folder / "gone")], "env": {}})
    client = await rig.started()

    async def booted() -> Child | None:
        return await child_of(client, "b")

    first = await until(booted)
    await holds(lambda: "cannot start broken" in rig.said)
    rig.kill()
    client = await rig.started()
    assert (await until(booted)).pid == first.pid
    rig.kill()
    os.kill(first.pid, signal.SIGKILL)
    client = await rig.started()
    second = await until(booted)
    assert second.running
    assert second.pid != first.pid


async def test_shutdown_ends_the_named_and_then_the_keeper(rig: Rig) -> None:
    client = await rig.started()
    await client.listen("l", path=rig.folder / "l.sock")
    await client.spawn(shell(rig, "meek", "exec sleep 60", respawn=Respawn()))
    await client.spawn(shell(rig, "stubborn", "trap '' TERM; echo up; while :; do sleep 1; done"))
    await holds(lambda: rig.logged("stubborn") == ["up"])
    await client.shutdown(["meek", "stubborn", "unknown"], grace_s=0.2)
    process = rig.process
    assert process is not None
    await holds(lambda: process.poll() is not None)
    assert process.returncode == 0
    assert not (rig.folder / "l.sock").exists()
    assert list(rig.home.keeper_table.iterdir()) == []
    assert not rig.home.keeper_socket.exists()


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
async def test_a_child_of_another_uid_has_nothing_of_root(rig: Rig) -> None:
    client = await rig.started()
    who = {"uid": 200_123, "gid": 200_124, "groups": (200_125,)}
    await client.spawn(shell(rig, "u", "grep -E '^(Uid|Gid|Groups|CapEff|NoNewPrivs):' /proc/self/status", **who))
    await exited(client, "u")
    assert [line.split() for line in rig.logged("u")] == [
        ["Uid:", *["200123"] * 4],
        ["Gid:", *["200124"] * 4],
        ["Groups:", "200125"],
        ["CapEff:", "0" * 16],
        ["NoNewPrivs:", "1"],
    ]
    again = "echo again > /dev/stdout; cat /proc/self/oom_score_adj; kill -0 $PPID || echo refused"
    await client.spawn(shell(rig, "v", again, uid=200_123, gid=200_123, oom_score_adj=300))
    await exited(client, "v")
    lines = rig.logged("v")
    assert lines[0] == "again"  # it may open its own output by name
    assert lines[1] == "300"
    assert lines[-1] == "refused"


async def test_a_listener_is_blocking_for_each_child_whatever_the_last_one_did(rig: Rig) -> None:
    client = await rig.started()
    await client.listen("door", path=rig.home.run / "door.sock")
    code = "import os; print('blocking', os.get_blocking(3)); os.set_blocking(3, False)"
    for name in ("first", "second"):
        await client.spawn(
            Spawn(name=name, argv=(sys.executable, "-c", code), env={}, listeners=("door",), log=rig.log(name))
        )
        await holds(lambda name=name: rig.logged(name) == ["blocking True"])


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
async def test_a_child_cannot_be_led_to_where_its_user_may_not_go(rig: Rig) -> None:
    """The folder is entered as the user: a link in it must not lead past a folder that only root may pass."""
    client = await rig.started()
    rig.folder.chmod(0o711)
    private = rig.folder / "private"
    (private / "open").mkdir(parents=True)
    private.chmod(0o700)
    (rig.folder / "planted").symlink_to(private / "open")
    with pytest.raises(KeeperError) as caught:
        await client.spawn(shell(rig, "led", "pwd", cwd=str(rig.folder / "planted"), uid=64000, gid=64000))
    assert caught.value.errno == errno.EACCES
    await client.spawn(shell(rig, "rooted", "pwd", cwd=str(rig.folder / "planted")))


@pytest.mark.parametrize(("wanted", "taken"), [(0, 5), (7, 7)])
def test_a_keeper_that_was_started_niced_and_not_by_root_starts_its_children_as_nice(wanted: int, taken: int) -> None:
    script = f"""
import os, resource
from slum.node.keeper_child import renice
os.setpriority(os.PRIO_PROCESS, 0, 5)
resource.setrlimit(resource.RLIMIT_NICE, (0, 0))
if os.geteuid() == 0:
    os.setuid(65534)
renice({wanted})
print(os.getpriority(os.PRIO_PROCESS, 0))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=20)
    assert (done.stdout.strip(), done.stderr) == (str(taken), "")
