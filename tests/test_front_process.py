"""The front as a process: killed, moved, renewed, taken down; and who may reach the socket behind it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from front_support import Site, a_site

from slum.errors import ConfigError
from slum.ledger.client import connect
from slum.node import boot as keeper_boot
from slum.node.keeperclient import Child, KeeperClient, call
from slum.node.uids import FRONT_UID, ROUTER_UID
from slum.server import boot, front, trust

pytestmark = pytest.mark.xdist_group("front-process")


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with a_site() as made:
        yield made


def caddy(site: Site) -> Child:
    return next(child for child in keeper_boot.children(site.home) or () if child.name == "front")


def until(condition: Callable[[], object], deadline_s: float = 10.0) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, "not so in time"
        time.sleep(0.02)


def end(pid: int, signum: int, states: str) -> None:
    """Signal *pid* and wait until every thread of it has heard: one that has not may still take a connection along."""
    os.kill(pid, signum)

    def state(stat: Path) -> str:
        try:
            return stat.read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return states[0]

    until(lambda: all(state(stat) in states for stat in Path(f"/proc/{pid}/task").glob("*/stat")))


async def again(site: Site, listen: list[str] | None = None) -> tuple[str, ...]:
    keeper = await KeeperClient.connect(site.home)
    try:
        return await front.ensure(keeper, site.home, listen)
    finally:
        await keeper.close()


def answers(site: Site) -> int:
    with site.http() as http:
        return http.get("/v1/ca").status_code


def test_a_killed_front_comes_back_and_a_server_that_is_away_is_said(site: Site) -> None:
    pid = caddy(site).pid
    end(pid, signal.SIGKILL, "ZX")
    assert answers(site) == 200, "the keeper holds the listener: a connection waits for the next front"
    assert caddy(site).pid != pid
    site.plane.kill("server")
    with site.http() as http:
        answer = http.get("/v1/ca")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json()["error"]["code"] == "no_quorum"
    site.plane.start("server")
    until(lambda: answers(site) == 200)


def test_a_front_that_hangs_is_ended_and_comes_back(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUM_SILENT_MS", "3000")
    site.plane.kill("server")
    site.plane.start("server")
    until(lambda: answers(site) == 200)
    pid = caddy(site).pid
    end(pid, signal.SIGSTOP, "T")
    assert answers(site) == 200, "a connection waits for the next front"
    assert caddy(site).pid != pid


def test_ensuring_changes_only_what_changed(site: Site) -> None:
    pid = caddy(site).pid
    assert asyncio.run(again(site)) == (f"127.0.0.1:{site.port}",)
    assert caddy(site).pid == pid
    site.home.front_certificate.unlink()

    async def renew() -> bool:
        reader = site.reader
        try:
            async with connect(site.home.ledger_socket) as ledger:
                return await trust.certify(ledger, reader, site.home, "m1")
        finally:
            reader.close()

    assert asyncio.run(renew())
    asyncio.run(again(site))
    assert caddy(site).pid != pid
    assert answers(site) == 200
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(ConfigError, match="cannot listen"):
            asyncio.run(again(site, [f"127.0.0.1:{taken.getsockname()[1]}"]))
    assert front.read_settings(site.home) == front.Settings(listen=(f"127.0.0.1:{site.port}",))


@pytest.mark.root
def test_only_the_fronts_own_user_reaches_the_socket_that_is_believed(site: Site) -> None:
    """The router's user must not: a service could make it lead there."""
    program = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
    argv = ["/usr/bin/python3", "-c", program, str(site.home.front_socket)]

    def tries(uid: int) -> int:
        return subprocess.run(argv, user=uid, group=uid, extra_groups=[], capture_output=True, check=False).returncode

    assert tries(FRONT_UID) == 0
    for uid in (ROUTER_UID, 200_000, 65_534):
        assert tries(uid) != 0, uid
    assert os.stat(f"/proc/{caddy(site).pid}").st_uid == FRONT_UID


@pytest.mark.root
def test_another_user_behind_the_front_is_hung_up_on(site: Site) -> None:
    """Were the folder open, the kernel's word would still be asked for."""
    site.home.front_run.chmod(0o755)
    site.home.front_socket.chmod(0o666)
    program = (
        "import socket, sys\n"
        "s = socket.socket(socket.AF_UNIX); s.settimeout(5); s.connect(sys.argv[1])\n"
        "try:\n"
        " s.sendall(b'GET /v1/ca HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n')\n"
        " sys.exit(bool(s.recv(1)))\n"
        "except OSError: sys.exit(0)\n"
    )
    argv = ["/usr/bin/python3", "-c", program, str(site.home.front_socket)]
    assert subprocess.run(argv, user=ROUTER_UID, group=ROUTER_UID, extra_groups=[], check=False).returncode == 0
    assert subprocess.run(argv, user=FRONT_UID, group=FRONT_UID, extra_groups=[], check=False).returncode == 1


def test_the_config_names_no_secret_and_no_admin(site: Site) -> None:
    config = msgspec.json.decode((site.home.front / "caddy.json").read_bytes())
    assert config["admin"]["disabled"]
    assert b"PRIVATE" not in (site.home.front / "caddy.json").read_bytes()


def test_what_is_down_takes_no_connections(site: Site) -> None:
    """The last one here: afterwards there is no control plane."""
    call(
        site.home,
        "spawn",
        spawn={"name": "service", "argv": [sys.executable, "-c", "input()"], "env": {}, "open_files": []},
    )
    held = call(site.home, "listeners")["listeners"]
    assert [one["name"] for one in held] == [f"front/127.0.0.1_{site.port}"]
    boot.down(site.home, services=False, grace_s=2.0)
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", site.port), 2.0):
        pass
