"""Agents over real WebSockets: admission, the push, what is kept of their reports, notes, silence, and restarts of the server."""

from __future__ import annotations

import asyncio
import time

import httpx
import msgspec
import pytest
from fakes.agent import FakeAgent
from server_support import Plane, a_fleet, a_service, applied, eventually, get, request_id

from slum import api, wire
from slum.errors import Unreachable
from slum.ledger.reader import ClusterRow
from slum.model import Fleet, LocalOperator, Tenement
from slum.node.websocket import connect
from slum.server.desired import advance
from slum.server.view import World
from slum.wire import Phase


async def act(http: httpx.AsyncClient, verb: str, service: str = "notes") -> None:
    asked = api.ActionRequest(verb=verb, service=service, request_id=request_id())
    answer = await http.post("/v1/actions", content=msgspec.json.encode(asked))
    assert answer.status_code == 200, answer.text


async def test_the_config_is_pushed_at_once_and_at_each_change(plane: Plane, http: httpx.AsyncClient) -> None:
    await applied(http, a_fleet(a_service()))
    async with FakeAgent(plane.home.api_socket) as agent:
        first = (await agent.until(lambda a: a.desired))[0]
        assert (first.revision, first.tenement, first.fleet) == (1, "here", "test")
        assert [service.name for service in first.services] == ["notes"]
        await act(http, "stop")
        second = await agent.until(lambda a: a.desired[1] if len(a.desired) > 1 else None)
        assert second.stamp > first.stamp
        assert second.overrides == (wire.Override(service="notes", id="main", stopped=True),)


async def test_what_does_not_concern_a_tenement_is_not_pushed(plane: Plane, http: httpx.AsyncClient) -> None:
    await applied(http, a_fleet(a_service()))
    async with FakeAgent(plane.home.api_socket) as agent:
        await agent.until(lambda a: a.instances)
        await agent.say(wire.Note(kind="instance_failed", service="notes", id="main", at=time.time(), detail="x"))
        await eventually(lambda: has_event(http, "instance_failed"))
        await act(http, "restart")
        await agent.until(lambda a: len(a.desired) > 1)
        assert len(agent.desired) == 2, "the note moved the ledger's seq, but not this tenement's config"


async def has_event(http: httpx.AsyncClient, kind: str) -> tuple[api.Event, ...]:
    return await get(http, "events", tuple[api.Event, ...], kind=kind)


async def test_an_agent_waits_until_its_machine_is_committed(plane: Plane, http: httpx.AsyncClient) -> None:
    async with FakeAgent(plane.home.api_socket) as agent:
        await applied(http, a_fleet(a_service()))
        await agent.until(lambda a: a.desired)


@pytest.mark.parametrize("hello", [{"machine": "local:m9"}, {"tenement": "there"}])
async def test_a_stranger_is_sent_away_but_may_dial_again(
    plane: Plane, http: httpx.AsyncClient, hello: dict[str, str]
) -> None:
    await applied(http, a_fleet(a_service()))
    async with FakeAgent(plane.home.api_socket, **hello) as agent:
        (refused,) = await agent.until(lambda a: a.refused, 15)
        assert "not (yet) the machine" in refused.why
        assert not refused.fatal
        assert agent.desired == []


async def test_what_is_no_hello_is_hung_up_on(plane: Plane, http: httpx.AsyncClient) -> None:
    for data in (b"", b"\xc1", b"x" * 100, wire.encoder.encode({"t": "nonsense"})):
        async with await connect(plane.home.api_socket, "/v1/agent", 5) as socket:
            await socket.send(data)
            with pytest.raises(Unreachable, match="1003"):
                await socket.receive()
    assert (await http.get("/v1/health")).status_code == 200


async def test_a_newer_connection_of_the_same_machine_replaces_the_older(plane: Plane, http: httpx.AsyncClient) -> None:
    await applied(http, a_fleet(a_service()))
    async with FakeAgent(plane.home.api_socket) as old:
        await old.until(lambda a: a.desired)
        async with FakeAgent(plane.home.api_socket) as new:
            await new.until(lambda a: a.desired)
            assert "newer connection" in await old.until(lambda a: a.ended)
            await act(http, "restart")
            await new.until(lambda a: len(a.desired) > 1)
        assert len(old.desired) == 1


async def instances(http: httpx.AsyncClient) -> dict[str, api.InstanceView]:
    found = await get(http, "instances", tuple[api.InstanceView, ...])
    return {f"{view.report.service}/{view.report.id}": view for view in found}


async def test_reports_are_merged_and_declared_instances_always_shown(plane: Plane, http: httpx.AsyncClient) -> None:
    await applied(http, a_fleet(a_service(instances=("a", "b"))))
    before = await instances(http)
    assert [view.report.phase for view in before.values()] == [Phase.PENDING, Phase.PENDING]
    assert before["notes/a"].report.detail
    async with FakeAgent(plane.home.api_socket, obedient=False) as agent:
        await agent.until(lambda a: a.desired)
        await agent.report(agent.instance("notes", Phase.HEALTHY, "a"), full=True)
        await agent.report(agent.instance("notes", Phase.STARTING, "b"))
        await agent.say(
            wire.Heartbeat(
                at=time.time(),
                load=0.5,
                memory_available_bytes=1 << 30,
                rss_bytes=30 << 20,
                stats=(wire.InstanceStats(service="notes", id="a", memory_bytes=7, cpu_s=0.1, requests=3),),
            )
        )

        async def merged() -> bool:
            now = await instances(http)
            return now["notes/a"].report.memory_bytes == 7 and now["notes/b"].report.phase is Phase.STARTING

        await eventually(merged)
        view = (await instances(http))["notes/a"]
        assert view.report.phase is Phase.HEALTHY
        assert view.stale_s is None
        (tenement,) = (await get(http, "status", api.Status)).tenements
        assert (tenement.state, tenement.agent_rss_bytes, tenement.limits) == ("ready", 30 << 20, "cgroup v1")
    await eventually(lambda: is_stale(http))
    assert (await instances(http))["notes/a"].report.phase is Phase.HEALTHY, "silence changes nothing"
    (tenement,) = (await get(http, "status", api.Status)).tenements
    assert tenement.state == "unknown"


async def is_stale(http: httpx.AsyncClient) -> bool:
    return (await instances(http))["notes/a"].stale_s is not None


async def test_notes_become_events_of_the_agent(plane: Plane, http: httpx.AsyncClient) -> None:
    await applied(http, a_fleet(a_service()))
    async with FakeAgent(plane.home.api_socket) as agent:
        await agent.until(lambda a: a.desired)
        at = time.time()
        for number in range(450):
            note = wire.Note(
                kind="instance_exited", service="notes", id="main", at=at, detail=f"exit {number}", generation=1
            )
            await agent.say(note)
        await agent.say(wire.Note(kind="Bad Kind!", service="x" * 99, id="../..", at=at, detail="y" * 9999))

        async def all_there() -> bool:
            return len(await get(http, "events", tuple[api.Event, ...], kind="instance_exited", limit=1000)) == 450

        await eventually(all_there)
        found = await get(http, "events", tuple[api.Event, ...], kind="instance_exited", service="notes", limit=1000)
        assert [event.why for event in found] == [f"exit {n}" for n in range(450)]
        assert (found[0].actor, found[0].subject) == ("agent@here", "instance:here/notes/main")
        assert found[0].after == {"generation": 1}
        (odd,) = await eventually(lambda: has_event(http, "agent_noted"))
        assert len(odd.why) <= 2000
        assert (await get(http, "events/verify", api.Verified)).ok


async def test_notes_wait_for_the_ledger(plane: Plane, http: httpx.AsyncClient) -> None:
    await applied(http, a_fleet(a_service()))
    async with FakeAgent(plane.home.api_socket) as agent:
        await agent.until(lambda a: a.desired)
        plane.kill("ledger")
        await agent.say(wire.Note(kind="instance_exited", service="notes", id="main", at=1.0, detail="meanwhile"))
        plane.start("ledger")
        await plane.ready()
        (event,) = await eventually(lambda: has_event(http, "instance_exited"))
        assert event.why == "meanwhile"


async def test_a_killed_server_loses_nothing_that_was_applied(plane: Plane, http: httpx.AsyncClient) -> None:
    await applied(http, a_fleet(a_service()))
    async with FakeAgent(plane.home.api_socket) as agent:
        first = (await agent.until(lambda a: a.desired))[0]
        plane.kill("server")
        await agent.until(lambda a: a.ended)
        plane.start("server")
        await plane.ready()
        await agent.hang_up()
        await agent.dial()
        again = await agent.until(lambda a: a.desired[1] if len(a.desired) > 1 else None)
        assert again.stamp >= first.stamp
        assert again.services == first.services
        await eventually(lambda: is_healthy(http))


async def is_healthy(http: httpx.AsyncClient) -> bool:
    return (await instances(http))["notes/main"].report.phase is Phase.HEALTHY


async def test_while_the_ledger_is_away_reads_and_writes_answer_503_soon(plane: Plane, http: httpx.AsyncClient) -> None:
    await applied(http, a_fleet(a_service()))
    plane.kill("ledger")
    began = time.monotonic()
    asked = api.ActionRequest(verb="stop", service="notes", request_id=request_id())
    answer = await http.post("/v1/actions", content=msgspec.json.encode(asked))
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "no_quorum"
    assert answer.headers["retry-after"] == "1"
    assert time.monotonic() - began < 10
    assert (await http.get("/v1/health")).json() == {"ok": True, "ledger": False}
    # What is committed can still be read.
    assert (await get(http, "fleet", api.FleetDoc)).revision == 1
    plane.start("ledger")
    await plane.ready()
    assert (await http.post("/v1/actions", content=msgspec.json.encode(asked))).status_code == 200


async def test_an_agent_that_does_not_read_holds_up_nobody(plane: Plane, http: httpx.AsyncClient) -> None:
    await applied(http, a_fleet(a_service()))
    async with await connect(plane.home.api_socket, "/v1/agent", 5) as deaf:
        await deaf.send(wire.encoder.encode(FakeAgent(plane.home.api_socket).hello()))
        for revision in range(1, 6):
            await applied(http, a_fleet(a_service(pre_deploy="x" * 200, memory_limit_mb=64 + revision)), revision)
        assert (await get(http, "fleet", api.FleetDoc)).revision == 6


async def test_connections_that_say_nothing_do_not_stop_the_api(plane: Plane, http: httpx.AsyncClient) -> None:
    sockets = await asyncio.gather(*(connect(plane.home.api_socket, "/v1/agent", 20) for _ in range(300)))
    try:
        assert (await http.get("/v1/status")).status_code == 200
    finally:
        await asyncio.gather(*(socket.close() for socket in sockets))


def test_only_the_machine_that_is_concerned_gets_a_new_stamp() -> None:
    tenement = Tenement(name="w", operator="local", count=3, services=(a_service(),))
    fleet = Fleet(operators=(LocalOperator(name="local"),), tenements=(tenement,))
    cluster = ClusterRow(
        cluster_id="c",
        generation=1,
        epoch=1,
        lineage="",
        term=1,
        seq=5,
        members=(),
        protocol=1,
        leader="m1",
        revision=1,
    )
    first = advance({}, World(seq=5, cluster=cluster, revision=1, fleet=fleet))
    assert [d.stamp.seq for d in first.values()] == [5, 5, 5]
    stopped = {"w-2": (wire.Override(service="notes", id="main", stopped=True),)}
    second = advance(first, World(seq=9, cluster=cluster, revision=1, fleet=fleet, overrides=stopped))
    assert [second[m].stamp.seq for m in ("w-1", "w-2", "w-3")] == [5, 9, 5]
    assert second["w-1"] is first["w-1"]
