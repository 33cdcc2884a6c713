"""A node's agent over TLS: any member will do, the next one is found by itself, and services notice nothing of it all."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

from agent_support import until, worker
from fakes.front import FakeFleet, FakeFront
from node_support import Node, fleet, node

from slum import wire
from slum.node import boot
from slum.node import home as homes
from slum.node.keeperclient import start_detached
from slum.pack import pack
from slum.pki import authority


def line_of(fronts: list[FakeFront]) -> FakeFront | None:
    """The member that has the agent's line."""
    return next((front for front in fronts if front.connected), None)


async def test_services_run_on_a_node_and_streams_go_to_the_member_that_asked(tmp_path: Path) -> None:
    async with fleet(2) as (whole, fronts), node() as here:
        await here.join(*fronts, token=whole.token("here.1"))
        packed = bundle(tmp_path)
        desired = here.desired(
            worker("say", "cat data.txt; exec sleep 600", bundle=packed[0], source="app"),
        )
        for front in fronts:
            front.push(desired)
            front.blobs[packed[0]] = packed[1]
        await here.start()
        await until(lambda: line_of(fronts), 20)
        first = line_of(fronts)
        await here.healthy(first, "say")
        assert first.hellos[0].machine == "node:here.1"
        assert set(first.peers) == {authority.uri_of("c1", "node/here/here.1")}
        stream = await first.stream(wire.LogsRequest(service="say"))
        said = wire.on_stream.decode(await stream.received.get())
        assert b"packed" in said.data
        shell = await first.stream(wire.RunRequest(service="say", command=("/bin/echo", "run here")))
        assert b"run here" in wire.on_stream.decode(await shell.received.get()).data
        children = {child.name for child in boot.children(here.home)}
        assert not children & {"ledger", "server"}


def bundle(folder: Path) -> tuple[str, bytes]:
    """Return digest and bytes of a packed folder."""
    (folder / "app").mkdir()
    (folder / "app" / "data.txt").write_text("packed")
    packed = pack(folder / "app", folder / "packed")
    return packed.digest, (folder / "packed").read_bytes()


async def test_a_lost_member_is_replaced_by_another_and_addresses_are_learned() -> None:
    async with fleet(2) as (whole, fronts), node() as here:
        await here.join(fronts[0], token=whole.token("here.1"))
        for front in fronts:
            front.push(here.desired(worker()))
        await here.start()
        await until(lambda: line_of(fronts), 20)
        await here.healthy(line_of(fronts), "tick")
        before = here.services()
        agent = here.agent_pid()
        for _ in range(2):
            lost = line_of(fronts)
            other = fronts[1 - fronts.index(lost)]
            await lost.stop()
            await until(lambda other=other: other.connected, 15)
            await until(lambda other=other: here.server() == other.url, 5)
            await lost.start()
        third = FakeFront(whole, "m3")
        await third.start()
        try:
            third.push(here.desired(worker()))
            line_of(fronts).say(wire.Servers(servers=(third.url, "nonsense://x", *(front.url for front in fronts))))
            await until(lambda: third.url in homes.read_home(here.home).servers, 10)
            assert homes.read_home(here.home).servers == (third.url, *(front.url for front in fronts))
            for front in fronts:
                await front.stop()
            await until(lambda: third.connected, 15)
            boot.restart(here.home, "agent")
            await until(lambda: here.agent_pid() not in (0, agent), 10)
            await until(lambda: len(third.hellos) > 1, 15)
            assert here.services() == before, "no service was touched"
        finally:
            await third.stop()


async def test_an_agent_that_was_told_wrong_addresses_goes_back_to_where_it_joined() -> None:
    async with fleet() as (whole, [front]), node() as here:
        whole.servers = ("https://127.0.0.1:1", "https://127.0.0.1:2")
        await here.join(front, token=whole.token("here.1"))
        assert homes.read_home(here.home).servers == whole.servers
        await here.start()
        await until(lambda: front.connected, 20)


async def test_after_a_month_without_a_control_plane_nothing_has_stopped_and_the_certificate_is_renewed() -> None:
    async with fleet() as (whole, [front]), node() as here:
        front.push(here.desired(worker()))
        await here.join(front, token=whole.token("here.1"))
        await here.start()
        await here.healthy(front, "tick")
        before = here.services()
        await front.stop()
        expire(whole, here)
        boot.restart(here.home, "agent")
        await until(lambda: here.server() == "" and homes.read_line(here.home), 15)
        assert here.services() == before
        hellos = len(front.hellos)
        await front.start()
        await until(lambda: len(front.hellos) > hellos, 30)
        assert whole.renewals == 1
        assert homes.read_home(here.home).not_after > time.time()
        assert here.services() == before


def expire(whole: FakeFleet, here: Node) -> None:
    """Give the node a certificate of long ago for the key that it has."""
    from slum.node.join import keep_answer
    from slum.pki.request import make_request

    key = homes.files(here.home).key.read_bytes()
    whole.now = lambda: time.time() - 120 * 86400
    keep_answer(here.home, whole.answer(make_request(key), "here.1"), homes.read_home(here.home))
    whole.now = time.time


async def test_after_a_reboot_keeper_and_agent_are_back_and_so_are_services_without_any_member() -> None:
    async with fleet() as (whole, [front]), node() as here:
        front.push(here.desired(worker()))
        await here.join(front, token=whole.token("here.1"))
        await here.start()
        await here.healthy(front, "tick")
        await front.stop()
        reboot(here)
        start_detached(here.home)
        await until(lambda: here.services(), 20)
        names = {child.name for child in boot.children(here.home)}
        assert names <= {"agent", "router", *here.services()}, "no control plane begins here"
        await front.start()
        await here.healthy(front, "tick")


def reboot(here: Node) -> None:
    """Kill everything without a word, and forget what a reboot forgets."""
    children = boot.children(here.home)
    os.kill(here.keeper_pid(), signal.SIGKILL)
    for child in children:
        if child.running:
            os.killpg(child.pid, signal.SIGKILL)
    shutil.rmtree(here.home.run)
