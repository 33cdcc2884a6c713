"""The keeper's socket under junk, floods and strangers; none of it may end it or make it wait."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from keeper_support import DEADLINE_S, Rig, child_of, exited, holds, rig, shell

from slum.errors import Unreachable
from slum.node.keeper_child import check_spawn
from slum.node.keeper_listen import bind, check_listen
from slum.node.keeper_start import Places
from slum.node.keeperclient import KeeperClient, KeeperError, call
from slum.node.types import Log, Respawn, Spawn
from slum.paths import Home, checked_home

__all__ = ["rig"]


def opened(home: Home) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.settimeout(DEADLINE_S)
    try:
        sock.connect(str(home.keeper_socket))
    except OSError:
        sock.close()
        raise
    return sock


async def test_the_folders_are_those_of_home(rig: Rig) -> None:
    home = checked_home(rig.home.data, rig.home.run)
    places = Places(str(home.data), str(home.run))
    assert {name: getattr(places, name) for name in places.__slots__} == {
        "alive": f"{home.private}/w",  # told to whom it concerns, and no part of Home
        "boot": str(home.boot),
        "data": str(home.data),
        "fifos": str(home.fifos),
        "lock": str(home.private / "keeper.lock"),
        "log": str(home.own_log("keeper")),
        "private": str(home.private),
        "run": str(home.run),
        "socket": str(home.keeper_socket),
        "table": str(home.keeper_table),
    }
    await rig.started()
    assert home.keeper_socket.stat().st_mode & 0o777 == 0o600
    assert home.private.stat().st_mode & 0o777 == 0o700


async def test_junk_is_answered_and_forgotten(rig: Rig) -> None:
    client = await rig.started()
    junk = [
        b"{",
        b"\xff\xfe",
        b"[]",
        b'"text"',
        b"{}",
        b'{"id": true, "op": "hello"}',
        b'{"id": 1, "op": 5}',
        b'{"id": 1, "op": "unknown"}',
        b'{"id": 1e400, "op": "hello"}',
        b"[" * 100_000,
        b'{"id":1,"op":"hello","x":' + b'{"a":' * 20_000 + b"1" + b"}" * 20_000 + b"}",
        b'{"id": 1, "op": "signal", "name": "x", "signal": 100000}',
        b'{"id": 1, "op": "signal", "name": ["x"]}',
        b'{"id": 1, "op": "spawn"}',
        b'{"id": 1, "op": "spawn", "spawn": {"name": "../../x", "argv": ["/bin/true"], "env": {}}}',
        b'{"id": 1, "op": "spawn", "spawn": {"name": "x", "argv": ["/bin/true\\u0000"], "env": {}}}',
        b'{"id": 1, "op": "spawn", "spawn": {"name": "x", "argv": ["/bin/true", "\\ud800"], "env": {}}}',
        b'{"id": 1, "op": "spawn", "spawn": {"name": "x", "argv": ["/bin/true"], "env": {"A=B": "c"}}}',
        b'{"id": 1, "op": "spawn", "spawn": {"name": "x", "argv": ["/bin/true"], "env": {}, "uid": 1e9}}',
        b'{"id": 1, "op": "spawn", "spawn": {"name": "x", "argv": ["/bin/true"], "env": {}, "cwd": "/\\u0000"}}',
        b'{"id": 1, "op": "spawn", "spawn": {"name": "x", "argv": ["/bin/true"], "env": {}, "uid": '
        + b"9" * 30
        + b"}}",
        b'{"id": 1, "op": "spawn", "spawn": {"name": "x", "argv": ["a"], "env": {}, "log": {"path": "/\\u0000"}}}',
        b'{"id": 1, "op": "spawn", "spawn": {"name": "x", "argv": ["a"], "env": {}, "log": {"path": "/\\ud800"}}}',
        b'{"id": 1, "op": "listen", "name": "x", "path": "' + b"/x" * 200 + b'"}',
        b'{"id": 1, "op": "listen", "name": "x", "path": "/gone/x.sock"}',
        b'{"id": 1, "op": "listen", "name": "x", "tcp": "localhost:80"}',
        b'{"id": 1, "op": "list", "after": 5}',
        b'{"id": 1, "op": "shutdown", "names": "x"}',
        b'{"id": 1, "op": "shutdown", "names": [], "grace_s": NaN}',
        b"x" * (200 << 10),
    ]
    fds = (await client.stats()).fds
    with opened(rig.home) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        for packet in junk:
            sock.send(packet)
            answer = json.loads(sock.recv(1 << 20))
            assert answer["ok"] is False, packet[:100]
            assert answer["kind"] in ("invalid", "os", "missing")
    assert (await client.hello()).pid == rig.pid
    assert await client.list_children() == ()
    assert await client.listeners() == ()
    await holds(lambda: call(rig.home, "stats")["fds"] == fds + 1)
    assert "a bug" not in rig.said


async def test_descriptors_where_none_belong_are_closed(rig: Rig) -> None:
    client = await rig.started()
    fds = (await client.stats()).fds
    reader, writer = os.pipe()
    with opened(rig.home) as sock:
        for count in (1, 2, 3, 10):
            for op in ("hello", "spawn", "nonsense"):
                socket.send_fds(sock, [json.dumps({"id": 1, "op": op}).encode()], [writer] * count)
                assert json.loads(sock.recv(1 << 20))["ok"] is False
    os.close(writer)
    assert os.read(reader, 1) == b""  # the keeper holds no copy
    os.close(reader)
    await holds(lambda: call(rig.home, "stats")["fds"] == fds + 1)


async def test_a_client_that_does_not_read_is_dropped_and_others_are_served(rig: Rig) -> None:
    client = await rig.started()
    for number in range(20):
        await client.spawn(shell(rig, f"n{number}", "exec sleep 1000", meta={"word": "x" * 1900}))
    with opened(rig.home) as deaf:
        deaf.setblocking(False)
        request = json.dumps({"id": 1, "op": "list"}).encode()

        def hung_up() -> bool:
            try:
                deaf.send(request)
            except BlockingIOError:
                return False
            except (BrokenPipeError, ConnectionResetError):
                return True
            return False

        await holds(hung_up)
        assert len(await client.list_children()) == 20
    assert "dropped a client" in rig.said


async def test_many_clients_come_and_go(rig: Rig) -> None:
    client = await rig.started()
    fds = (await client.stats()).fds
    with contextlib.ExitStack() as held:
        for _ in range(400):
            with contextlib.suppress(OSError):  # beyond its bound it hangs up at once
                sock = held.enter_context(opened(rig.home))
                sock.send(b'{"id":1,"op":"subscribe"}')
        assert (await client.hello()).pid == rig.pid
    await holds(lambda: call(rig.home, "stats")["fds"] == fds + 1)


async def test_a_client_that_leaves_in_the_middle_of_a_spawn_does_no_harm(rig: Rig) -> None:
    client = await rig.started()
    with opened(rig.home) as sock:
        spawn = {"name": "x", "argv": ["/bin/true"], "env": {}}
        sock.send(json.dumps({"id": 1, "op": "spawn", "spawn": spawn}).encode())
    await exited(client, "x")


async def test_a_long_list_comes_in_pages(rig: Rig) -> None:
    client = await rig.started()
    for number in range(60):
        spawn = Spawn(name=f"p{number:03}", argv=("/bin/true",), env={}, meta={"word": "x" * 2000})
        await client.spawn(spawn)
    names = [child.name for child in await client.list_children()]
    assert names == [f"p{number:03}" for number in range(60)]


async def test_the_client_tells_a_refusal_from_a_lost_keeper(rig: Rig) -> None:
    client = await rig.started()
    with pytest.raises(KeeperError) as refused:
        await client.forget("nobody")
    assert refused.value.kind == "missing"
    with pytest.raises(KeeperError) as refused:
        await client.spawn(Spawn(name="big", argv=("/bin/true",), env={"A": "x" * (200 << 10)}))
    assert refused.value.kind == "invalid"
    await client.subscribe()
    rig.kill()
    with pytest.raises(Unreachable):
        await anext(client.events())
    with pytest.raises(Unreachable):
        await client.hello()
    with pytest.raises(Unreachable):
        await KeeperClient.connect(rig.home)
    with pytest.raises(Unreachable):
        call(rig.home, "hello")


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
async def test_another_user_is_not_served(rig: Rig) -> None:
    await rig.started()
    for folder in (rig.home.run, rig.home.private):
        folder.chmod(0o755)
    rig.home.keeper_socket.chmod(0o666)
    sock = opened_as(rig.home, 200_123)
    with sock:
        with contextlib.suppress(BrokenPipeError):
            sock.send(b'{"id":1,"op":"hello"}')
        with contextlib.suppress(ConnectionResetError):
            assert sock.recv(1000) == b""
    rig.home.private.chmod(0o700)


def opened_as(home: Home, uid: int) -> socket.socket:
    """Return a connection whose peer credentials are of *uid*: made by a process of that uid, and handed over."""
    ours, theirs = socket.socketpair()
    code = (
        "import os, socket, sys\n"
        f"os.setgid({uid}); os.setuid({uid})\n"
        "sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
        f"sock.connect({str(home.keeper_socket)!r})\n"
        "socket.send_fds(socket.socket(fileno=0), [b'x'], [sock.fileno()])\n"
    )
    with ours, theirs:
        subprocess.run([sys.executable, "-c", code], stdin=theirs, check=True)
        _, (fd,), _, _ = socket.recv_fds(ours, 1, 1)
    sock = socket.socket(fileno=fd)
    sock.settimeout(DEADLINE_S)
    return sock


WORDS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
THINGS = st.recursive(WORDS, lambda deeper: st.lists(deeper, max_size=3) | st.dictionaries(st.text(max_size=5), deeper))
GOOD: dict[str, Any] = json.loads(json.dumps({"name": "a", "argv": ["/bin/true"], "env": {}}))
FIELDS = sorted(Spawn.__struct_fields__)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(FIELDS), THINGS), THINGS)
def test_a_spawn_is_either_whole_or_a_value_error(changes: dict[str, Any], thing: Any) -> None:
    for raw in (GOOD | changes, thing):
        try:
            checked = check_spawn(raw)
        except ValueError:
            continue
        assert sorted(checked) == FIELDS
    try:
        check_listen(dict.fromkeys(("path", "tcp", "uid", "gid", "backlog", "mode"), thing))
    except ValueError:
        return
    raise AssertionError("both addresses were taken")


async def test_every_field_of_spawn_passes_the_check(rig: Rig) -> None:
    client = await rig.started()
    spawn = Spawn(name="full", argv=("/bin/true",), env={"A": "b"}, log=Log(path="/tmp/x"), respawn=Respawn())
    checked = check_spawn(json.loads(json.dumps(_builtins(spawn))))
    assert checked == json.loads(json.dumps(_builtins(spawn)))
    assert await child_of(client, "full") is None


def _builtins(spawn: Spawn) -> Any:
    import msgspec

    return msgspec.to_builtins(spawn)


async def test_a_listener_is_bound_through_no_link_below_its_base(rig: Rig) -> None:
    """A service owns the folders below the base: a link must not lead the keeper to somebody else's socket."""
    client = await rig.started()
    base, other = rig.folder / "mine", rig.folder / "other"
    (base / "real").mkdir(parents=True)
    other.mkdir()
    (base / "sub").symlink_to(other)
    with socket.socket(socket.AF_UNIX) as theirs:
        theirs.bind(str(other / "app.sock"))
        inode = (other / "app.sock").stat().st_ino
        for name in ("sub/app.sock", "sub/none.sock"):
            with pytest.raises(KeeperError) as caught:
                await client.listen("l", path=base / name, base=base)
            assert caught.value.kind == "os"
        assert [(path.name, path.stat().st_ino) for path in other.iterdir()] == [("app.sock", inode)]
    with pytest.raises(KeeperError, match="below base"):
        await client.listen("l", path=other / "app.sock", base=base)
    await client.listen("l", path=base / "real" / "app.sock", base=base, mode=0o640)
    assert (base / "real" / "app.sock").stat().st_mode & 0o777 == 0o640
    (base / "real").rename(base / "away")
    (base / "real").symlink_to(base / "away")
    await client.close_listener("l")
    assert (base / "away" / "app.sock").is_socket(), "it was reached through a link"


def test_a_bind_touches_nothing_that_takes_the_place_of_the_new_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The owner of the folder may put a link to any file in the place of the socket as soon as it has its name."""
    victim = tmp_path / "victim"
    victim.write_text("")
    victim.chmod(0o604)
    record = {"name": "l", "path": str(tmp_path / "l.sock"), "gid": os.getgid(), "mode": 0o660}

    class Swapped(socket.socket):
        def bind(self, address: Any) -> None:
            super().bind(address)
            os.unlink(address)
            os.symlink(victim, address)

    monkeypatch.setattr(socket, "socket", Swapped)
    with pytest.raises(OSError, match="in the place"):
        bind(check_listen(record))
    assert victim.stat().st_mode & 0o777 == 0o604
    assert [path.name for path in tmp_path.iterdir()] == ["victim"]
