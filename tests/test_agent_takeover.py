"""An agent that was killed, a keeper that was killed, a member that is gone, a reboot: services do not notice."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import AsyncIterator

import pytest
from agent_support import Site, alive, end, service, site, until, worker

from slum.model import Listen
from slum.node.keeperclient import KeeperClient, start_detached
from slum.wire import Phase


@pytest.fixture
async def here() -> AsyncIterator[Site]:
    async with site() as running:
        yield running


async def test_kill_9_of_the_agent_changes_nothing_that_runs(here: Site) -> None:
    here.push(service(), service("door", listen=Listen.FD), worker())
    await here.healthy("web", "door", "tick")
    before, notes = await here.generations(), len(here.member.notes)
    old = await here.kill_agent()
    assert (await here.ask()).startswith("v1")
    hellos = len(here.member.hellos)
    await here.member.until(lambda: len(here.member.hellos) > hellos or not alive(old))
    await here.healthy("web", "door", "tick")
    await here.member.until(lambda: here.report().health)
    assert await here.generations() == before
    assert here.member.kinds()[notes:] == []
    here.push(service(env={"VERSION": "v2"}), service("door", listen=Listen.FD), worker())
    await here.healthy("web", "door", "tick")
    await here.member.until(lambda: here.report().serving == 2)
    after = await here.generations()
    assert {n: p for n, p in after.items() if n in before} != {}
    assert (await here.ask()).startswith("v2")


@pytest.mark.parametrize("pause_s", [0.0, 0.03, 0.08, 0.2, 0.4])
async def test_kill_9_of_the_agent_amid_a_deploy_starts_nothing_twice(here: Site, pause_s: float) -> None:
    here.push(service(), worker())
    await here.healthy("web", "tick")
    first = await here.generations()
    here.push(service(env={"VERSION": "v2"}), worker())
    await asyncio.sleep(pause_s)  # this is the moment that is tried, not a condition
    await here.kill_agent()
    await here.healthy("web", "tick", seconds=30)
    await here.member.until(lambda: len(here.report().generations) == 1)
    generations = await here.generations()
    assert len(generations) == 2
    assert len(set(first.items()) & set(generations.items())) == 1
    assert (await here.ask()).startswith("v2")
    numbers = [n.generation for n in here.member.notes if n.kind == "generation_started" and n.service == "web"]
    assert len(numbers) == len(set(numbers))


async def test_an_exit_while_the_agent_is_away_is_a_crash_like_any_other(here: Site) -> None:
    here.push(service())
    await here.healthy()
    child = (await here.children())["agent"]
    os.kill(child.pid, signal.SIGSTOP)
    pid = here.report().pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    await until(lambda: not alive(pid))
    os.kill(child.pid, signal.SIGKILL)
    await here.member.until(lambda: here.report().pid not in (None, pid))
    await here.healthy()
    assert here.report().exits[-1].status == -9
    assert here.report().generations[0].number == 2


async def test_the_crash_count_outlives_the_agent(here: Site) -> None:
    here.push(worker(script="exit 4"))
    await here.member.until(lambda: here.phase("tick") is Phase.FAILED)
    starts = here.member.kinds().count("generation_started")
    await here.kill_agent()
    hellos = len(here.member.hellos)
    await here.member.until(lambda: len(here.member.hellos) > hellos)
    await here.member.until(lambda: here.phase("tick") is Phase.FAILED)
    assert here.report("tick").restarts == 2
    assert here.member.kinds().count("generation_started") == starts


async def test_a_killed_keeper_is_replaced_by_the_agent_and_services_live(here: Site) -> None:
    here.push(service(), service("door", listen=Listen.FD))
    await here.healthy("web", "door")
    before = await here.generations()
    os.kill((await here.keeper.hello()).pid, signal.SIGKILL)
    assert (await here.ask()).startswith("v1")
    await here.keeper.close()
    here.keeper = await next_keeper(here)
    assert await here.generations() == before
    here.push(service(env={"VERSION": "v2"}), service("door", listen=Listen.FD, env={"VERSION": "v2"}))
    await here.healthy("web", "door")
    assert [(await here.ask(name=n)).split()[0] for n in ("web", "door")] == ["v2", "v2"]


async def next_keeper(here: Site) -> KeeperClient:
    """The keeper that the agent starts, once it answers."""
    from slum.errors import Unreachable

    async with asyncio.timeout(20):
        while True:
            try:
                return await KeeperClient.connect(here.home)
            except Unreachable:
                await asyncio.sleep(0.05)


async def test_without_a_member_the_agent_goes_on_and_reports_when_it_is_back(here: Site) -> None:
    here.push(service(), worker())
    await here.healthy("web", "tick")
    await here.member.stop()
    pid = here.report().pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    await until(lambda: not alive(pid))
    await here.kill_agent()
    await until_answers(here)
    before = await here.generations()
    here.member.reports.clear()
    await here.member.start()
    await here.healthy("web", "tick")
    assert here.report().exits[-1].status == -9
    assert await here.generations() == before


async def until_answers(here: Site) -> None:
    async with asyncio.timeout(20):
        while True:
            try:
                await here.ask()
            except (OSError, AssertionError):
                await asyncio.sleep(0.05)
            else:
                return


async def test_a_reboot_without_a_control_plane_restores_the_services(here: Site) -> None:
    here.push(service(), worker(), worker("lost", script="exit 1"))
    await here.healthy("web", "tick")
    await here.member.until(lambda: here.phase("lost") is Phase.FAILED)
    await here.member.stop()
    await here.keeper.close()
    await end(here.home)
    shutil.rmtree(here.home.run)
    start_detached(here.home)
    here.keeper = await KeeperClient.connect(here.home)
    await until_answers(here)
    names = await here.generations()
    assert len(names) >= 2
    assert any(name.endswith("/2") for name in names), "generation numbers go on"


async def test_a_lost_member_is_dialled_again_and_notes_wait(here: Site) -> None:
    await here.member.stop()
    await here.member.start()
    here.push(service())
    await here.healthy()
    assert len(here.member.hellos) >= 2
    await here.member.stop()
    pid = here.report().pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    await until(lambda: not alive(pid))
    await until_answers(here)
    notes = len(here.member.notes)
    await here.member.start()
    await here.member.until(lambda: {"instance_exited", "generation_started"} <= set(here.member.kinds()[notes:]))
    await here.healthy()


async def test_sigterm_of_the_agent_leaves_everything_running(here: Site) -> None:
    here.push(service())
    await here.healthy()
    before = await here.generations()
    child = (await here.children())["agent"]
    await here.keeper.stop_respawn("agent")
    os.kill(child.pid, signal.SIGTERM)
    await until(lambda: not alive(child.pid))
    ended = (await here.children())["agent"]
    assert ended.status == 0, here.log()
    assert await here.generations() == before
    assert (await here.ask()).startswith("v1")
