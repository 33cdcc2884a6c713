"""Deploys by a real agent under a real keeper: overlap without a lost request, replace, failures, dependencies, policies."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from agent_support import SETTINGS, Site, alive, free_port, service, site, until, worker

from slum.model import Deploy, Listen, Restart, Secret, Settings
from slum.wire import Override, Phase


@pytest.fixture
async def here() -> AsyncIterator[Site]:
    async with site() as running:
        yield running


async def test_services_start_serve_and_are_reported(here: Site) -> None:
    here.push(service(), service("door", listen=Listen.FD), worker())
    await here.healthy("web", "door", "tick")
    for name in ("web", "door"):
        version, pid = (await here.ask(name=name)).split()
        report = here.report(name)
        assert (version, int(pid), report.serving) == ("v1", report.pid, 1)
        assert report.url is not None
        assert report.url.startswith(f"http://{name}.localhost:")
        assert report.health.startswith("GET /healthz -> 200")
    assert here.report("tick").phase is Phase.RUNNING
    assert set(here.member.kinds()) == {"generation_started", "instance_healthy", "generation_serving"}
    hello = here.member.hellos[0]
    assert (hello.tenement, hello.machine) == ("here", "local:m1")
    assert any(level.level == "process" and level.available for level in hello.levels)


@pytest.mark.parametrize("listen", [Listen.SOCKET, Listen.FD])
async def test_an_overlapping_deploy_loses_no_request(here: Site, listen: Listen) -> None:
    here.push(service(listen=listen))
    await here.healthy()
    seen: list[str] = []
    stop = asyncio.Event()

    async def load() -> None:
        while not stop.is_set():
            seen.append((await here.ask("/slow/0.02")).split()[0])

    async with asyncio.TaskGroup() as group:
        for _ in range(3):
            group.create_task(load())
        for version in ("v2", "v3"):
            here.push(service(listen=listen, env={"VERSION": version}))
            await here.healthy()
        await here.member.until(lambda: len(here.report().generations) == 1)
        stop.set()
    assert {"v1", "v2", "v3"} <= set(seen)
    assert (await here.ask()).startswith("v3")
    assert "generation_drained" in here.member.kinds()
    sockets = sorted(path.name for path in (here.home.run / "i").rglob("*.sock"))
    assert sockets == ["g3.sock"]


async def test_a_long_request_is_drained_and_a_stubborn_generation_killed(here: Site) -> None:
    here.push(service(env={"STUBBORN": "1"}, stop_timeout_s=0.3))
    await here.healthy()
    old = here.report().pid
    assert old is not None
    waiting = asyncio.create_task(here.ask("/slow/1.0"))
    await until(lambda: not waiting.done())
    here.push(service(env={"VERSION": "v2"}))
    await here.healthy()
    assert alive(old)
    assert (await waiting).startswith("v1")
    await until(lambda: not alive(old))


async def test_a_failing_release_is_given_up_and_the_old_one_serves_on(here: Site) -> None:
    here.push(service())
    await here.healthy()
    before = await here.ask()
    here.push(service(env={"FAIL": "no such table"}))
    await here.member.until(lambda: here.phase() is Phase.FAILED)
    report = here.report()
    assert (report.serving, report.restarts) == (1, 2)
    assert report.detail.startswith("exit 2, 3 times in ")
    assert [e.status for e in report.exits] == [2, 2, 2]
    assert await here.ask() == before
    assert "instance_failed" in here.member.kinds()
    assert "cannot start: no such table" in here.home.instance_log("web", "main").read_text()
    here.push(service(env={"VERSION": "v3"}))
    await here.healthy()
    assert (await here.ask()).startswith("v3")


async def test_a_failing_replacement_falls_back_to_the_last_healthy_release(here: Site) -> None:
    port = free_port()
    here.push(service(listen=Listen.PORT, port=port))
    await here.healthy()
    here.push(service(listen=Listen.PORT, port=port, env={"FAIL": "x"}))
    await here.member.until(lambda: here.phase() is Phase.FAILED and here.report().serving is not None)
    generations = await here.generations()
    assert len(generations) == 1
    good = here.report().serving_release
    assert good is not None
    assert good != here.report().release


async def test_a_crash_loop_backs_off_and_a_restart_tries_again(here: Site) -> None:
    loop = worker(script="exit 7")
    here.push(loop)
    await here.member.until(lambda: here.phase("tick") is Phase.FAILED)
    assert here.report("tick").detail.startswith("exit 7, 3 times")
    async with asyncio.timeout(5):
        while set(await here.children()) != {"agent"}:  # noqa: ASYNC110 - the keeper forgets them
            await asyncio.sleep(0.02)
    count = here.member.kinds().count("generation_started")
    here.push(loop, overrides=(Override(service="tick", id="main", restarts=1),))
    await here.member.until(lambda: here.member.kinds().count("generation_started") == count + 3)
    await here.member.until(lambda: here.phase("tick") is Phase.FAILED)


async def test_an_unhealthy_generation_is_restarted(here: Site) -> None:
    here.push(service())
    await here.healthy()
    old = here.report().pid
    sick = here.home.services / "web" / "main" / "sick"
    sick.touch()
    await here.member.until(lambda: here.report().pid not in (old, None))
    sick.unlink()
    await here.healthy()
    note = next(n for n in here.member.notes if n.kind == "instance_unhealthy")
    assert "GET /healthz -> 503" in note.detail
    assert "database is locked" in note.detail


async def test_a_crash_reuses_the_kept_listener_and_requests_wait(here: Site) -> None:
    here.push(service(listen=Listen.FD, env={"SLOW": "0.3"}))
    await here.healthy()
    with pytest.raises(AssertionError):
        await here.ask("/crash")
    assert (await here.ask()).startswith("v1")
    await here.healthy()
    assert here.report().exits[-1].status == 3


async def test_stop_start_and_remove(here: Site) -> None:
    web = service(instances=("a", "b"))
    here.push(web)
    await here.member.until(lambda: {r.phase for r in here.member.reports.values()} == {Phase.HEALTHY})
    assert await here.ask() == await here.ask(instance="a")
    assert await here.ask() != await here.ask(instance="b")
    here.push(web, overrides=(Override(service="web", id="a", stopped=True),))
    await here.member.until(lambda: here.report("web", "a").phase is Phase.STOPPED)
    assert here.report("web", "b").phase is Phase.HEALTHY
    assert not (here.home.routes / "web" / "a.sock").exists()
    assert "instance_stopped" in here.member.kinds()
    here.push(web)
    await here.member.until(lambda: here.report("web", "a").phase is Phase.HEALTHY)
    here.push()
    await here.member.until(lambda: not here.member.reports)
    assert await here.generations() == {}
    assert list((here.home.run / "i").iterdir()) == []
    assert not list(here.home.routes.rglob("*.sock"))
    assert (here.home.services / "web" / "a").is_dir()


async def test_dependencies_come_first_and_leave_last(here: Site) -> None:
    db = service("db", env={"SLOW": "0.5"})
    here.push(service("app", depends_on=("db",)), db)
    await here.member.until(lambda: here.phase("app") is Phase.PENDING)
    assert here.report("app").detail == "waits for db"
    await here.healthy("app", "db")
    order = [n.service for n in here.member.notes if n.kind in ("generation_started", "instance_healthy")]
    assert order == ["db", "db", "app", "app"]
    here.push()
    await here.member.until(lambda: not here.member.reports)
    stopped = [n.service for n in here.member.notes if n.kind == "instance_stopped"]
    assert stopped == ["app", "db"]


async def test_a_job_that_ended_well_is_not_run_again(here: Site) -> None:
    here.push(worker(script="echo once >> $HOME/ran", restart=Restart.NEVER))
    await here.member.until(lambda: here.phase("tick") is Phase.EXITED)
    here.push(worker(script="echo once >> $HOME/ran", restart=Restart.NEVER))
    await here.member.until(lambda: here.phase("tick") is Phase.EXITED)
    assert (here.home.services / "tick" / "main" / "ran").read_text() == "once\n"


async def test_pre_deploy_runs_once_a_release_and_its_failure_fails_the_release(here: Site) -> None:
    web = service(pre_deploy="echo migrated >> $HOME/log; test ! -e $HOME/refuse", instances=("a", "b"))
    here.push(web)
    await here.member.until(lambda: {r.phase for r in here.member.reports.values()} == {Phase.HEALTHY})
    logs = [p.read_text() for p in here.home.services.glob("web/*/log")]
    assert logs == ["migrated\n"]
    folder = next(here.home.services.glob("web/*/log")).parent
    (folder / "refuse").touch()
    here.push(msgspec.structs.replace(web, env=()))
    await here.member.until(lambda: {r.phase for r in here.member.reports.values()} == {Phase.FAILED})
    assert {r.detail for r in here.member.reports.values()} == {"pre_deploy: exit 1"}
    assert {r.serving for r in here.member.reports.values()} == {1}
    assert "pre_deploy_failed" in here.member.kinds()


async def test_secrets_are_read_at_start_and_kept_nowhere(here: Site, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("canary-4471\n")
    secrets = (Secret(name="TOKEN", source=f"file:{file}"), Secret(name="OTHER", source="env:AGENT_SECRET"))
    here.push(service(secrets=secrets))
    await here.healthy()
    env = await here.ask("/env")
    assert "TOKEN=canary-4471" in env
    assert "OTHER=hush-9177" in env
    assert "SLUM_TENEMENT=here" in env
    for folder in (here.home.agent, here.home.logs, here.home.run):
        for path in folder.rglob("*"):
            if path.is_file() and not path.is_symlink():
                assert b"canary-4471" not in path.read_bytes(), path
    missing = Secret(name="TOKEN", source=f"file:{tmp_path}/absent")
    here.push(service(secrets=(missing,)))
    await here.member.until(lambda: here.phase() is Phase.FAILED)
    assert "cannot be read: No such file" in here.report().detail


async def test_a_secret_that_is_no_file_holds_up_nobody(here: Site, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    here.push(service(secrets=(Secret(name="TOKEN", source=f"file:{tmp_path}/fifo"),)))
    await here.member.until(lambda: here.phase() is Phase.FAILED)
    assert "fifo is no file" in here.report().detail


async def test_a_config_that_could_not_be_kept_is_tried_again(here: Site) -> None:
    here.push(service())
    await here.healthy()
    (here.home.agent / "desired.new").mkdir()
    asked = here.push(service(env={"VERSION": "v2"}))
    await here.member.until(lambda: here.member.stamp == asked.stamp)
    assert "cannot be kept" in here.member.refused
    (here.home.agent / "desired.new").rmdir()
    await here.member.until(lambda: here.member.refused == "")
    await here.healthy()
    assert (await here.ask()).startswith("v2")


@pytest.mark.parametrize(("own", "inside"), [("data", "logs"), ("data", "services/x"), ("run", "p")])
async def test_a_data_dir_among_slums_own_folders_is_refused(here: Site, own: str, inside: str) -> None:
    folder = Path(getattr(here.home, own)) / inside
    asked = here.push(service(), settings=Settings(data_dir=str(folder)))
    await here.member.until(lambda: here.member.stamp == asked.stamp)
    assert "slum's own folder" in here.member.refused
    assert not (folder / "web").exists()


async def test_a_level_or_limit_that_is_missing_is_refused_and_the_old_config_runs_on(here: Site) -> None:
    here.push(service())
    await here.healthy()
    before = await here.generations()
    asked = here.push(service(), service("vm", isolation="vm"))
    await here.member.until(lambda: here.member.stamp == asked.stamp)
    assert "service vm: level vm is not available here" in here.member.refused
    assert await here.generations() == before
    here.push(service())
    await here.healthy()
    assert here.member.refused == ""


async def test_an_older_config_is_ignored(here: Site) -> None:
    old = here.desired(service(env={"VERSION": "old"}))
    here.push(service())
    await here.healthy()
    here.member.push(old)
    here.push(service(), worker())
    await here.healthy("web", "tick")
    assert (await here.ask()).startswith("v1")


async def test_replace_never_has_two_alive(here: Site) -> None:
    one = worker(script="echo $$ > $HOME/pid; while :; do sleep 0.05; done", deploy=Deploy.REPLACE)
    here.push(one)
    await here.healthy("tick")
    first = here.report("tick").pid
    here.push(msgspec.structs.replace(one, stop_timeout_s=1.0))
    await here.member.until(lambda: here.phase("tick") is Phase.RUNNING)
    assert first is not None
    assert not alive(first)


async def test_figures_come_with_heartbeats(here: Site) -> None:
    here.push(service())
    await here.healthy()
    count = len(here.member.heartbeats)
    await here.member.until(lambda: len(here.member.heartbeats) > count + 1)
    beat = here.member.heartbeats[-1]
    assert 0 < beat.rss_bytes < 60 << 20
    assert beat.memory_available_bytes > 0
    if os.geteuid() == 0:
        stats = [s for b in here.member.heartbeats for s in b.stats]
        assert any(s.service == "web" and s.memory_bytes for s in stats)


def test_settings_are_quick() -> None:
    assert SETTINGS.backoff_max_ms < 1000
