"""The command line at a control plane elsewhere: real `slum` processes, a real front, TLS; shells and uploads over it too."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cli_support import Ran
from fakes.agent import FakeAgent
from front_support import Holder, Site, a_site, another_authority
from server_support import a_fleet, a_service, applied

from slum import api, wire
from slum.cli.main import run
from slum.client import Client
from slum.contexts import Context, Contexts
from slum.errors import ConfigError, SlumError, Unreachable
from slum.node.doors import READ_BYTES, Streams
from slum.node.websocket import WebSocket
from slum.pki import request
from slum.reach import Elsewhere

pytestmark = pytest.mark.xdist_group("contexts")
SLUM = Path(sys.executable).with_name("slum")


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with a_site() as made:
        yield made


class Laptop:
    """Somebody's own machine: a config folder, and nothing of slum running."""

    def __init__(
        self, site: Site, folder: Path, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]
    ) -> None:
        self.site = site
        self.folder = folder
        self.contexts = Contexts(folder / "config" / "slum")
        self._patch = patch
        self._capture = capture
        for name in [name for name in os.environ if name.startswith("SLUM_")]:
            patch.delenv(name)
        self.env = {
            "XDG_CONFIG_HOME": str(folder / "config"),
            "SLUM_RUN_DIR": "/tmp/nothing-here",
            "SLUM_DATA_DIR": str(folder / "data"),
        }
        for name, value in self.env.items():
            patch.setenv(name, value)

    def slum(self, *words: str, code: int = 0, given: str = "", **env: str) -> Ran:
        """Run one command line here and expect its exit code."""
        self._capture.readouterr()
        with self._patch.context() as patch:
            patch.setattr(sys, "stdin", io.StringIO(given))
            for name, value in env.items():
                patch.setenv(name, value)
            got = run(words)
        done = Ran(got, *self._capture.readouterr())
        assert got == code, (words, done)
        return done

    def program(self, *words: str, given: str) -> subprocess.CompletedProcess[str]:
        """Run the real program, with real standard streams."""
        env = {**os.environ, **self.env}
        return subprocess.run(
            [SLUM, *words], input=given, env=env, capture_output=True, text=True, timeout=60, check=False
        )

    def add(self, name: str, user: str, role: str, *urls: str) -> Context:
        made = self.site.token("user", user, role=role)
        self.slum("context", "add", name, *(urls or (self.site.url,)), "--token-file", "-", given=made.token)
        return self.contexts.load(name)

    def rewrite(self, name: str, **fields: Any) -> None:
        context = msgspec.structs.replace(self.contexts.load(name), **fields)
        (self.contexts.folder(name) / "context.json").write_bytes(msgspec.json.encode(context))

    def client(self, name: str, **how: Any) -> Client:
        return Client(Elsewhere(self.contexts, self.contexts.load(name)), **how)


@pytest.fixture
def laptop(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Laptop:
    return Laptop(site, tmp_path, monkeypatch, capfd)


def test_a_user_comes_in_looks_around_and_goes_away(laptop: Laptop) -> None:
    laptop.slum("status", code=6)
    added = laptop.add("prod", "ana", "admin")
    assert (added.subject, added.role) == ("user/ana", "admin")
    files = {path.name: path.stat().st_mode & 0o777 for path in laptop.contexts.folder("prod").iterdir()}
    assert files == {"user.key": 0o600, "user.crt": 0o600, "ca.crt": 0o600, "context.json": 0o600}
    assert laptop.contexts.folder("prod").stat().st_mode & 0o777 == 0o700
    assert str(laptop.site.home.data) in laptop.slum("status").out
    laptop.add("look", "bob", "read")
    listed = msgspec.json.decode(laptop.slum("context", "list", "--json").out)
    assert [(one["name"], one["user"], one["current"]) for one in listed] == [
        ("look", "bob", False),
        ("prod", "ana", True),
    ]
    refused = laptop.slum("--context", "look", "token", "new", "user", "eve", "--role", "admin", code=2)
    assert "bob@" in refused.err
    assert "needs the role admin" in refused.err
    laptop.slum("status", SLUM_CONTEXT="look")
    laptop.slum("status", SLUM_CONTEXT="local", code=6)
    laptop.slum("--context", "local", "status", code=6)
    laptop.slum("--run-dir", "/tmp/nothing-here", "status", code=6)
    assert (
        "there is no context 'pord'; there is look, prod, local"
        in laptop.slum("--context", "pord", "status", code=2).err
    )
    laptop.slum("context", "use", "local")
    laptop.slum("status", code=6)
    laptop.slum("context", "use", "look")
    assert "removed" in laptop.slum("context", "remove", "look", "--json").out
    assert not laptop.contexts.folder("look").exists()
    laptop.slum("status", code=6)
    laptop.slum("context", "add", "prod", laptop.site.url, "--token-file", "-", given="x", code=2)
    laptop.slum("context", "add", "local", laptop.site.url, "--token-file", "-", given="x", code=2)


def test_a_token_goes_on_by_a_pipe_and_only_there(laptop: Laptop) -> None:
    laptop.add("prod", "ana", "admin")
    done = laptop.slum("token", "new", "user", "kim", "--role", "read")
    assert done.out.count("\n") == 1
    assert done.out.strip() not in done.err
    laptop.slum("context", "add", "kim", laptop.site.url, "--token-file", "-", given=done.out)
    assert "kim" in laptop.slum("user", "list").out
    assert "used" in laptop.slum("token", "list").out
    laptop.slum("user", "remove", "kim", code=2)
    assert "kim is out" in laptop.slum("user", "remove", "kim", "--yes").out
    refused = laptop.slum("--context", "kim", "status", code=2)
    assert "was revoked" in refused.err
    assert "slum token new" in refused.err
    laptop.slum("token", "revoke", "user/nobody", "--yes", code=2)


def test_an_interrupted_add_goes_on_with_its_key(laptop: Laptop) -> None:
    made = laptop.site.token("user", "lea", role="read")
    words = ("context", "add", "prod", "--token-file", "-", "--timeout", "1s")
    laptop.slum(*words, "https://127.0.0.1:1", given=made.token, code=6)
    key = (laptop.contexts.folder("prod") / "user.key").read_bytes()
    answer = laptop.site.join(made.token.partition("::")[2], key)
    assert answer.status_code == 200, "as if the answer had been lost"
    laptop.slum(*words, laptop.site.url, given=made.token)
    assert (laptop.contexts.folder("prod") / "user.key").read_bytes() == key
    certificate = (laptop.contexts.folder("prod") / "user.crt").read_text()
    assert certificate == msgspec.json.decode(answer.content, type=api.JoinAnswer).certificate


def test_a_member_that_is_away_is_passed_over(laptop: Laptop) -> None:
    laptop.add("prod", "ana", "admin")
    laptop.rewrite("prod", servers=("https://127.0.0.1:1", "https://127.0.0.1:2"))
    began = time.monotonic()
    with laptop.client("prod") as client:
        assert client.status().fleet == "default"
        assert client.add_token("user", "x", role="read").kind == "user"
    assert time.monotonic() - began < 10
    laptop.rewrite("prod", joined=())
    with laptop.client("prod", deadline_s=1.0) as client, pytest.raises(Unreachable, match=r"tried .*127\.0\.0\.1:1"):
        client.status()


def test_a_server_of_another_fleet_is_told_nothing(laptop: Laptop, tmp_path: Path) -> None:
    laptop.add("prod", "ana", "admin")
    (laptop.contexts.folder("prod") / "ca.crt").write_text(another_authority(tmp_path)[0])
    with laptop.client("prod", deadline_s=1.0) as client, pytest.raises(ConfigError, match="no member of the fleet"):
        client.status()


def test_a_certificate_is_renewed_when_it_is_used(laptop: Laptop) -> None:
    context = laptop.add("prod", "ana", "read")
    folder = laptop.contexts.folder("prod")
    before = (folder / "user.crt").read_text()
    with laptop.client("prod") as client:
        client.status()
    assert (folder / "user.crt").read_text() == before
    span = context.not_after - context.not_before
    laptop.rewrite("prod", not_before=context.not_before - 3 * span)
    with laptop.client("prod") as client:
        client.status()
    assert (folder / "user.crt").read_text() != before
    again = laptop.contexts.load("prod")
    assert again.not_after >= context.not_after
    assert (again.joined, again.role) == (context.joined, "read")
    laptop.rewrite("prod", not_before=context.not_before - 3 * span, servers=("https://127.0.0.1:1",), joined=())
    assert laptop.contexts.renewed(laptop.contexts.load("prod")).not_after == again.not_after, "a bound that only warns"
    laptop.rewrite("prod", not_before=0.0, not_after=1.0)
    with pytest.raises(SlumError):
        laptop.contexts.renewed(laptop.contexts.load("prod"))


def test_an_expired_context_renews_itself_first(laptop: Laptop) -> None:
    laptop.add("prod", "vera", "read")
    folder = laptop.contexts.folder("prod")
    reader = laptop.site.reader
    row = next(one for one in reader.certificates() if one.subject == "user/vera")
    reader.close()
    answer = api.JoinAnswer(
        kind="user", subject="user/vera", cluster="", certificate="", ca="", not_after=row.not_after, role="read"
    )
    expired = laptop.site.aged(Holder(folder / "user.key", folder / "user.crt", answer), days=100)
    (folder / "user.crt").write_text(expired.certificate.read_text())
    laptop.rewrite("prod", not_before=time.time() - 100 * 86_400, not_after=time.time() - 10 * 86_400)
    assert "running" in laptop.slum("status").out


def test_a_restart_of_the_server_is_waited_for(laptop: Laptop) -> None:
    laptop.add("prod", "ana", "admin")
    with laptop.client("prod") as client:
        client.status()
        laptop.site.plane.kill("server")
        laptop.site.plane.start("server")
        assert client.add_token("user", "y", role="read").kind == "user"


def test_uploads_go_through_whole(laptop: Laptop) -> None:
    laptop.add("prod", "ana", "admin")
    data = os.urandom(8 << 20)
    digest = hashlib.sha256(data).hexdigest()
    file = laptop.folder / "bundle"
    file.write_bytes(data)
    sent: list[int] = []
    with laptop.client("prod") as client:
        assert not client.has_blob(digest)
        client.put_blob(digest, file, sent=sent.append)
        assert client.has_blob(digest)
    assert sum(sent) == len(data)
    assert (laptop.site.home.blobs / digest).read_bytes() == data


class NodeDoor:
    """A member's front, dialled with a node's certificate."""

    name = "the front"

    def __init__(self, site: Site, holder: Holder) -> None:
        self._site, self._holder = site, holder

    async def open(self) -> Streams:
        return await asyncio.open_connection(
            "127.0.0.1",
            self._site.port,
            ssl=self._site.tls(self._holder),
            server_hostname="slum.internal",
            limit=READ_BYTES,
        )


async def test_shells_and_logs_go_through_and_a_node_speaks_for_itself_alone(laptop: Laptop) -> None:
    site = laptop.site
    await asyncio.to_thread(laptop.add, "prod", "ana", "admin")
    async with site.plane.http() as http:
        await applied(http, a_fleet(a_service()))

    async def echo(asked: wire.OpenStream, socket: WebSocket) -> None:
        while True:
            frame = wire.on_stream.decode(await socket.receive())
            if isinstance(frame, wire.StreamData) and frame.data:
                await socket.send(wire.encoder.encode(wire.StreamData(data=frame.data.upper() * 5000)))
            elif isinstance(frame, wire.StreamData):
                await socket.send(wire.encoder.encode(wire.StreamEnd(status=7)))
                return

    async with FakeAgent(site.home.api_socket) as agent:
        agent.on_stream = echo
        await agent.until(lambda a: a.instances)
        told = await asyncio.to_thread(laptop.program, "exec", "notes", "--", "cat", given="hello tls\n")
        assert (told.returncode, told.stdout) == (7, "HELLO TLS\n" * 5000), told
    node = await asyncio.to_thread(site.holder, "node", "here")
    door: Any = NodeDoor(site, node)
    async with FakeAgent(door, machine="node:here.1") as agent:
        assert (await agent.until(lambda a: a.desired))[0].tenement == "here"
        answer = await asyncio.to_thread(revoke, site, "node/here")
        assert answer == 200
        await agent.until(lambda a: a.ended, 2.0)
        assert "opens nothing any more" in agent.ended


def revoke(site: Site, subject: str) -> int:
    with site.local() as http:
        return http.post("/v1/revoke", json={"subject": subject}).status_code


def test_names_of_contexts_are_names(laptop: Laptop) -> None:
    for bad in ("../up", "", "A", "a/b", ".hidden", "x" * 41):
        with pytest.raises(ConfigError):
            laptop.contexts.folder(bad)
    assert request.new_key().startswith(b"-----BEGIN PRIVATE KEY-----")
