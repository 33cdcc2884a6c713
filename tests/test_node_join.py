"""Joining a fleet: who is told the token, what is on disk after it, and that every step can be repeated. Real TLS."""

from __future__ import annotations

import asyncio
import json
import stat
import subprocess
import sys
import time

import pytest
from fakes.front import FakeFleet
from node_support import fleet, node

from slum.errors import ConfigError, Unreachable
from slum.node import home as homes
from slum.node.front import Stranger
from slum.node.join import join
from slum.node.renew import renew
from slum.node.renewal import next_pause_s
from slum.pki import authority


async def test_what_joining_leaves_is_private_whole_and_not_done_twice() -> None:
    async with fleet() as (whole, [front]), node() as here:
        token = whole.token("here.1")
        assert await here.join(front, token=token)
        files = homes.files(here.home)
        for file in (files.key, files.certificate, files.authority, files.home, here.home.identity):
            assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
        assert stat.S_IMODE(here.home.agent.stat().st_mode) == 0o700
        identity = json.loads(here.home.identity.read_bytes())
        assert identity == {
            "tenement": "here",
            "machine": "node:here.1",
            "cluster": "c1",
            "key": "here.1",
            "of": "here",
        }
        told = homes.read_home(here.home)
        assert (told.servers, told.fleet) == ((front.url,), "test")
        assert told.not_before < time.time() < told.renew_at < told.not_after
        assert not list(here.home.agent.glob("*.new")), "no half-written file"
        assert not (here.home.agent / "join.json").exists(), "the key is kept once"
        before = files.certificate.read_text()
        asked = len(front.heard)
        assert not await here.join(front, token=token)
        assert (len(front.heard), files.certificate.read_text()) == (asked, before)
        secret = token.partition("::")[2]
        for file in here.home.agent.iterdir():
            assert secret not in file.read_text(), f"{file} holds the token"


async def test_a_stranger_is_not_told_one_byte_of_the_token() -> None:
    async with fleet() as (whole, [front]), fleet() as (_, [other]), node() as here:
        token = whole.token()
        with pytest.raises(Stranger, match="was not told the token"):
            await here.join(other, token=token)
        assert token.partition("::")[2].encode() not in bytes(other.heard)
        assert b"/v1/join" not in bytes(other.heard)
        assert await here.join(other, front, token=token), "the right one is found among several"
        assert token.partition("::")[2].encode() not in bytes(other.heard)


async def test_an_impostor_that_shows_the_right_authority_cannot_speak_for_it() -> None:
    async with fleet() as (whole, _), fleet() as (_, [impostor]), node() as here:
        token = whole.token()
        impostor.shows = whole.ca
        with pytest.raises(Stranger):
            await here.join(impostor, token=token)
        assert token.partition("::")[2].encode() not in bytes(impostor.heard)


async def test_an_authority_hidden_behind_the_right_one_is_not_believed() -> None:
    async with fleet() as (theirs, [impostor]), node() as here:
        whole = FakeFleet()
        while not padded(whole.ca):
            whole = FakeFleet()
        impostor.shows = whole.ca + theirs.ca
        token = whole.token()
        with pytest.raises(Stranger):
            await here.join(impostor, token=token)
        assert token.partition("::")[2].encode() not in bytes(impostor.heard)


def padded(certificate: str) -> bool:
    """Tell whether its base64 ends in padding, behind which a decoder reads no more."""
    return "=" in certificate


async def test_a_lost_answer_strands_no_machine() -> None:
    async with fleet() as (whole, [front]), node() as here:
        token = whole.token()
        front.lose_answers = 1
        with pytest.raises(Unreachable):
            await here.join(front, token=token)
        assert homes.read_home(here.home) is None
        assert await here.join(front, token=token), "the key of before is shown again, so the token is still its own"


DIES = """
import os, sys
left = int(sys.argv.pop(1))
def die(event, _):
    global left
    if event == "os.rename":
        left -= 1
        if left < 0:
            os._exit(9)
sys.addaudithook(die)
from slum.cli.main import run
sys.exit(run(sys.argv[1:]))
"""


async def test_a_join_that_is_killed_before_any_of_its_files_is_resumed() -> None:
    async with fleet() as (whole, [front]), node() as here:
        token = whole.token()
        folders = ("--data-dir", str(here.home.data), "--run-dir", str(here.home.run))
        codes: list[int | None] = []
        while not codes or (codes[-1] == 9 and len(codes) < 20):
            child = await asyncio.create_subprocess_exec(
                sys.executable, "-c", DIES, str(len(codes)), *folders, "join", front.url, "--token-file", "-", "--no-start",
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.DEVNULL,
            )  # fmt: skip
            await child.communicate(token.encode())
            codes.append(child.returncode)
        assert codes[-1] == 0
        assert len(codes) >= 7, "it died before each of its files"
        assert len(whole.bound) == 1
        homes.tls(here.home)
        assert json.loads(here.home.identity.read_bytes())["machine"] == "node:here.1"


async def test_a_used_token_is_refused_to_another_machine() -> None:
    async with fleet() as (whole, [front]), node() as here, node() as thief:
        token = whole.token()
        assert await here.join(front, token=token)
        with pytest.raises(ConfigError, match="not valid"):
            await thief.join(front, token=token)
        assert homes.read_home(thief.home) is None


async def test_a_token_is_for_one_machine() -> None:
    async with fleet() as (whole, [front]), node() as here:
        with pytest.raises(ConfigError, match="for the machine 'workers-1', not for 'here'"):
            await here.join(front, token=whole.token("workers-1.2"))


async def test_a_new_token_makes_it_another_machine_with_another_key() -> None:
    async with fleet() as (whole, [front]), node() as here:
        assert await here.join(front, token=whole.token("here.1"))
        key = homes.files(here.home).key.read_bytes()
        assert await here.join(front, token=whole.token("here.2"))
        assert json.loads(here.home.identity.read_bytes())["machine"] == "node:here.2"
        assert homes.files(here.home).key.read_bytes() != key


async def test_nobody_there_is_tried_again_until_somebody_is() -> None:
    async with fleet() as (whole, [front]), node() as here:
        token = whole.token()
        await front.stop()
        with pytest.raises(Unreachable, match="does not answer"):
            await here.join(front, token=token)
        said: list[str] = []

        def come_back(text: str) -> None:
            said.append(text)
            loop.call_soon_threadsafe(lambda: tasks.append(loop.create_task(again())))

        async def again() -> None:
            if len(tasks) == 1:
                await front.start()

        loop, tasks = asyncio.get_running_loop(), list[asyncio.Task[None]]()
        assert await asyncio.to_thread(
            join, here.home, urls=[front.url], machine="", token=token, wait_s=30.0, say=come_back
        )
        assert "trying again" in said[0]
        await asyncio.gather(*tasks)


async def test_a_control_plane_s_own_machine_joins_nothing() -> None:
    async with fleet() as (whole, [front]), node() as here:
        here.home.state.mkdir(parents=True)
        (here.home.state / "CURRENT").write_text("x")
        with pytest.raises(ConfigError, match="holds a control plane"):
            await here.join(front, token=whole.token())


@pytest.mark.parametrize(
    "url", ["http://cp:7443", "https://cp/x", "https://", "https://u@cp", "https://cp:seven", "ftp://cp"]
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="no address"):
        homes.checked_url(url)


@pytest.mark.parametrize(
    ("url", "meant"),
    [
        ("https://cp.example.com", "https://cp.example.com:7443"),
        ("cp.example.com:8443", "https://cp.example.com:8443"),
        ("https://[fd00::1]:7443/", "https://[fd00::1]:7443"),
        ("10.0.0.1", "https://10.0.0.1:7443"),
    ],
)
def test_addresses(url: str, meant: str) -> None:
    assert homes.checked_url(url) == meant
    assert homes.checked_url(meant) == meant


async def test_renewal_keeps_the_key_also_when_all_has_expired() -> None:
    async with fleet() as (whole, [front]), node() as here:
        whole.now = lambda: time.time() - 120 * 86400
        assert await here.join(front, token=whole.token())
        assert homes.read_home(here.home).not_after < time.time()
        whole.now = time.time
        files = homes.files(here.home)
        key, old = files.key.read_bytes(), files.certificate.read_text()
        whole.servers = (front.url, "https://127.0.0.1:1")
        told = await asyncio.to_thread(renew, here.home)
        assert told == homes.read_home(here.home)
        assert told.not_after > time.time() + 80 * 86400
        assert told.servers == whole.servers
        assert files.key.read_bytes() == key
        assert files.certificate.read_text() != old
        homes.tls(here.home)
        whole.revoked.add(authority.read_certificate(files.certificate.read_text(), whole.ca).serial)
        with pytest.raises(ConfigError, match="revoked"):
            await asyncio.to_thread(renew, here.home)


def test_a_certificate_that_is_due_again_at_once_is_not_renewed_in_a_hurry() -> None:
    """Each renewal is noted in the ledger; a member's clock may be months behind."""
    now, day = 1e9, 86400.0
    young = homes.HomeFile(cluster="c", servers=(), not_before=now, not_after=now + 90 * day)
    old = homes.HomeFile(cluster="c", servers=(), not_before=now - 70 * day, not_after=now + 20 * day)
    dead = homes.HomeFile(cluster="c", servers=(), not_before=now - 100 * day, not_after=now - 10 * day)
    assert next_pause_s(young, 0.0, renewed=True, now=now) == 0.0
    for told, most_s in ((old, 600.0), (dead, 60.0)):
        for renewed in (True, False):
            pauses = [0.0]
            for _ in range(12):
                pauses.append(next_pause_s(told, pauses[-1], renewed=renewed, now=now))
            assert pauses[1] == 5.0
            assert pauses[-1] == most_s
            assert pauses == sorted(pauses)


def test_the_agent_beside_its_control_plane_never_imports_ssl() -> None:
    """Nor does the line's code; it takes 5 MB."""
    script = (
        "import sys; sys.modules['ssl'] = None\n"
        "import slum.node.machine\n"
        "print(sorted({'cryptography', 'h2', 'httpx', 'http.client', '_ssl'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
