"""Bringing slum up and down on a machine: one keeper, found again, its programs back after kill -9, nothing left behind."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from slum.client import Client
from slum.errors import ConfigError, SlumError, Unreachable
from slum.node.boot import check_keeper
from slum.node.keeperclient import Child, call
from slum.node.types import Spawn
from slum.paths import Home
from slum.server import boot


@pytest.fixture
def home() -> Iterator[Home]:
    token = secrets.token_hex(4)
    made = Home(data=Path(f"/tmp/slum-u-{token}"), run=Path(f"/tmp/su{token}"))
    try:
        yield made
    finally:
        boot.down(made, services=True, grace_s=2.0)
        shutil.rmtree(made.data, ignore_errors=True)
        shutil.rmtree(made.run, ignore_errors=True)


def until(condition: Callable[[], object], deadline_s: float = 15.0) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"not so within {deadline_s:g} s"
        time.sleep(0.02)


def children(home: Home) -> dict[str, Child]:
    found = msgspec.convert(call(home, "list", after=None)["children"], list[Child])
    return {child.name: child for child in found}


def test_a_second_up_finds_the_first(home: Home) -> None:
    first = boot.up(home)
    assert (first.keeper_started, first.started) == (True, ("ledger", "server", "agent"))
    pids = {name: child.pid for name, child in children(home).items() if name != "agent"}
    second = boot.up(home)
    assert not second
    assert second.keeper_pid == first.keeper_pid
    assert {name: child.pid for name, child in children(home).items() if name != "agent"} == pids
    with Client(home) as client:
        assert client.status().revision == 0


def test_what_is_killed_comes_back(home: Home) -> None:
    boot.up(home)
    before = {name: children(home)[name].pid for name in ("ledger", "server")}
    for pid in before.values():
        os.kill(pid, signal.SIGKILL)
    until(lambda: all(children(home)[name].running and children(home)[name].pid != before[name] for name in before))
    until(lambda: boot.is_ready(home))
    with Client(home) as client:
        assert client.status().ledger.leader == "m1"


def test_down_leaves_services_and_up_comes_back(home: Home) -> None:
    first = boot.up(home)
    service = Spawn(name="i/abc/1", argv=("/bin/sleep", "600"), env={})
    call(home, "spawn", spawn=msgspec.to_builtins(service))
    pid = children(home)["i/abc/1"].pid
    stopped = boot.down(home, services=False)
    assert {"ledger", "server"} <= set(stopped.stopped)
    assert stopped.left == 1
    assert not boot.is_ready(home)
    again = boot.up(home)
    assert {"ledger", "server"} <= set(again.started)
    assert again.keeper_pid == first.keeper_pid
    assert children(home)["i/abc/1"].pid == pid
    assert boot.down(home, services=True).left == 0
    with pytest.raises(Unreachable):
        call(home, "hello")
    assert not boot.down(home, services=True)


def test_up_after_the_keeper_was_killed_takes_over(home: Home) -> None:
    first = boot.up(home)
    pid = children(home)["server"].pid
    os.kill(first.keeper_pid, signal.SIGKILL)
    until(lambda: not Path(f"/proc/{first.keeper_pid}").exists())
    second = boot.up(home)
    assert second.keeper_started
    assert children(home)["server"].pid == pid


def test_after_a_reboot_the_boot_command_alone_brings_all_back(home: Home) -> None:
    boot.up(home)
    boot.down(home, services=True)
    shutil.rmtree(home.run)
    argv = [sys.executable, "-m", "slum.node.keeper", "--detach"]
    subprocess.run([*argv, "--data-dir", str(home.data), "--run-dir", str(home.run)], check=True, timeout=20)
    until(lambda: boot.is_ready(home))


def test_what_is_private_is_closed_to_others(home: Home) -> None:
    boot.up(home)
    for path, mode in ((home.boot, 0o600), (home.private, 0o700), (home.state, 0o700), (home.api_socket, 0o600)):
        assert stat.S_IMODE(path.stat().st_mode) == mode, path


def test_the_programs_inherit_little(home: Home) -> None:
    given = {"PATH": "/bin", "HOME": "/root", "LANG": "C.UTF-8", "AWS_SECRET_ACCESS_KEY": "x", "PYTHONPATH": "/evil"}
    for spawn in boot.boot_children(home, "/opt/venv/bin/python", given):
        assert spawn.argv[0] == "/opt/venv/bin/python"
        assert spawn.respawn is not None
        assert spawn.log is not None
        assert set(spawn.env) == {"PATH", "HOME", "LANG", "SLUM_DATA_DIR", "SLUM_RUN_DIR", "PYTHONUNBUFFERED"}
        assert spawn.env["PATH"] == "/opt/venv/bin:/bin"


def test_a_control_plane_that_cannot_start_says_its_last_words(home: Home) -> None:
    home.state.mkdir(parents=True)
    (home.state / "CURRENT").write_text("nothing.db\n")
    with pytest.raises(Unreachable, match="ends again and again") as caught:
        boot.up(home)
    assert "names 'nothing.db', which is no state file" in caught.value.message
    assert "slum restore" in caught.value.hint


def test_the_command_line_can_import_it_cheaply() -> None:
    script = "import sys, slum.server.boot; print({'starlette', 'uvicorn', 'structlog', 'httpx'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_data_folder_that_cannot_be_is_bad_input(home: Home, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for data in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/slum")):
        with pytest.raises(
            ConfigError if data.is_relative_to(tmp_path) else SlumError, match=f"the data folder {data} "
        ):
            boot.up(Home(data=data, run=home.run))
    assert not home.run.exists()


def test_another_data_folder_for_a_run_folder_in_use_is_refused(home: Home, tmp_path: Path) -> None:
    boot.up(home)
    other = Home(data=tmp_path / "other", run=home.run)
    with pytest.raises(ConfigError, match=f"keeps its data in {home.data}, not in {other.data}"):
        boot.up(other)
    assert not other.data.exists()
    link = tmp_path / "link"
    link.symlink_to("/tmp")
    check_keeper(Home(data=link / home.data.name, run=home.run))


def test_what_kept_the_ledger_from_coming_up_is_said_in_its_own_words(home: Home) -> None:
    log = home.own_log("ledger")
    log.parent.mkdir(parents=True)
    log.write_text('1.0 {"error":"state.db is of protocol 3","hint":"install another","event":"ledger_failed"}\n')
    with pytest.raises(Unreachable, match=r"the last it said: state\.db is of protocol 3$") as raised:
        boot.wait_for_api(home, 0.1)
    assert raised.value.hint == "install another"
    log.write_text("1.0 no JSON at all\n")
    with pytest.raises(Unreachable, match="no JSON at all"):
        boot.wait_for_api(home, 0.1)
