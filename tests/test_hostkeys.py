"""Keys of hosts in the ledger: what one member saw first is what every member expects, over real SSH and a real ledger."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import asyncssh
import pytest
from server_support import Plane, get
from ssh_support import a_site

from slum import api, model
from slum.errors import OperatorError
from slum.ledger.client import connect
from slum.ledger.reader import Reader
from slum.operators.ssh import Ssh
from slum.operators.ssh_hosts import key_file
from slum.paths import Home
from slum.server.control import Control
from slum.server.dial import dialler
from slum.server.hostkeys import LedgerKeys
from slum.server.link import Link
from slum.server.view import View


class Door(asyncssh.SSHServer):
    """A host that counts who tries to log in."""

    tries = 0

    def begin_auth(self, username: str) -> bool:
        type(self).tries += 1
        return False


class Host:
    """sshd's part, at one port, with a host key that can change."""

    def __init__(self, folder: Path) -> None:
        self.port = 0
        self.login = folder / "login"
        asyncssh.generate_private_key("ssh-ed25519").write_private_key(self.login)
        self.keys = [asyncssh.generate_private_key("ssh-ed25519") for _ in range(2)]

    @asynccontextmanager
    async def up(self, key: int) -> AsyncIterator[None]:
        async with await asyncssh.listen(
            "127.0.0.1", self.port, server_factory=Door, server_host_keys=[self.keys[key]], reuse_address=True
        ) as server:
            self.port = server.get_port()
            Door.tries = 0
            yield

    @property
    def name(self) -> str:
        return f"127.0.0.1:{self.port}"

    def fingerprint(self, key: int) -> str:
        return str(self.keys[key].get_fingerprint())


@asynccontextmanager
async def a_member(plane: Plane, folder: Path, host: Host) -> AsyncIterator[Ssh]:
    """Yield the ssh operator of a member with files of its own, and the ledger of *plane*."""
    home = Home(data=folder / "data", run=plane.home.run)
    control = Control(
        home,
        Link(lambda: connect(plane.home.ledger_socket)),
        View(Reader(plane.home.state / "state.db")),
        dialler(home),
    )
    line = asyncio.create_task(control.link.run())
    site = a_site(folder)
    definition = model.SshOperator(
        name="vps", hosts=(model.SshHost(host="127.0.0.1", port=host.port),), key=str(host.login)
    )
    try:
        yield Ssh(definition, type(site)(home=site.home, member="m", agent=site.agent, keys=LedgerKeys(control)))
    finally:
        line.cancel()
        await asyncio.gather(line, return_exceptions=True)
        control.view.close()


async def login(operator: Ssh) -> None:
    async with operator.shell(operator.hosts[0]):
        return


async def refused(operator: Ssh) -> OperatorError:
    with pytest.raises(OperatorError) as caught:
        await login(operator)
    assert caught.value.provider_code == "host_key", caught.value
    assert Door.tries == 0, "somebody in between was sent something"
    return caught.value


async def test_what_one_member_saw_first_every_member_expects(plane: Plane, tmp_path: Path) -> None:
    await plane.ready()
    host = Host(tmp_path)
    async with plane.http() as http:
        async with host.up(0):
            async with a_member(plane, tmp_path / "a", host) as one:
                await login(one)
            (known,) = await get(http, "hostkeys", tuple[api.HostKey, ...])
            assert (known.host, known.fingerprint) == (host.name, host.fingerprint(0))
        assert not key_file(Home(data=tmp_path / "a/data", run=tmp_path)).path.exists()

        async with host.up(1), a_member(plane, tmp_path / "b", host) as two:
            error = await refused(two)
            assert host.fingerprint(0) in error.message
            assert f"slum hostkey forget {host.name}" in error.hint
            answer = await http.delete(f"/v1/hostkeys/{host.name}")
            assert answer.status_code == 200, answer.text
            assert (await http.delete("/v1/hostkeys/192.0.2.1")).status_code == 404
            assert (await http.delete("/v1/hostkeys/a:b:c@")).status_code == 404
            await login(two)
            async with a_member(plane, tmp_path / "a", host) as one:
                await login(one)
        async with host.up(0), a_member(plane, tmp_path / "b", host) as two:
            await refused(two)
        told = [one for one in await get(http, "events", tuple[api.Event, ...]) if one.subject == f"host:{host.name}"]
        assert [one.kind for one in told] == ["host_pinned", "host_forgotten", "host_pinned"]
        assert [one.after for one in told if one.after] == [{"fingerprint": host.fingerprint(n)} for n in (0, 1)]


async def test_a_key_that_a_member_knew_before_is_the_one_that_is_expected(plane: Plane, tmp_path: Path) -> None:
    await plane.ready()
    host = Host(tmp_path)
    async with host.up(0):
        own = key_file(Home(data=tmp_path / "a/data", run=tmp_path))
        await own.pin(host.name, host.keys[1].export_public_key().decode().strip())
        async with a_member(plane, tmp_path / "a", host) as one:
            await refused(one)
    async with host.up(1), a_member(plane, tmp_path / "a", host) as one, plane.http() as http:
        assert await get(http, "hostkeys", tuple[api.HostKey, ...]) == ()
        await login(one)
        (known,) = await get(http, "hostkeys", tuple[api.HostKey, ...])
        assert known.fingerprint == host.fingerprint(1)


async def test_while_the_ledger_is_of_an_older_protocol_each_keeps_its_own_file(tmp_path: Path) -> None:
    """Nothing is committed, and so nothing raised: whoever has just upgraded can go back."""
    reader: Any = SimpleNamespace(host=lambda _: None, cluster=lambda: SimpleNamespace(protocol=1))
    old: Any = SimpleNamespace(home=Home(data=tmp_path, run=tmp_path), me="m1", view=SimpleNamespace(reader=reader))
    keys = LedgerKeys(old)
    await keys.pin("box:22", "ssh-ed25519 AAAA")
    assert keys.find("box:22") == "ssh-ed25519 AAAA"
