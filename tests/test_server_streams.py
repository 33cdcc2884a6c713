"""What stays open: progress until all is settled, logs, exec and run, events that are followed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import httpx
import msgspec
import pytest
from fakes.agent import FakeAgent, echoing, saying
from server_support import (
    Plane,
    a_fleet,
    a_service,
    applied,
    documents,
    eventually,
    get,
    problem,
    request_id,
)

from slum import api, wire
from slum.errors import Unreachable
from slum.node.websocket import WebSocket, connect
from slum.wire import Phase


@pytest.fixture
async def agent(plane: Plane, http: httpx.AsyncClient) -> AsyncIterator[FakeAgent]:
    """A connected agent of a fleet with one service; it reports nothing by itself."""
    await applied(http, a_fleet(a_service(instances=("a", "b"))))
    async with FakeAgent(plane.home.api_socket, obedient=False) as made:
        await made.until(lambda a: a.desired)
        yield made


async def act(http: httpx.AsyncClient, verb: str) -> None:
    asked = api.ActionRequest(verb=verb, service="notes", request_id=request_id())
    assert (await http.post("/v1/actions", content=msgspec.json.encode(asked))).status_code == 200


# --- progress ---------------------------------------------------------------------------------------------------------


async def progress(
    http: httpx.AsyncClient,
    revision: int = 1,
    on: Callable[[api.Progress], Awaitable[None]] | None = None,
) -> list[api.Progress]:
    """Return every step of the stream to its end; *on* is told each."""
    steps: list[api.Progress] = []
    async with asyncio.timeout(15):
        async with http.stream("GET", "/v1/progress", params={"revision": str(revision)}) as answer:
            async for step in documents(answer, api.Progress):
                steps.append(step)
                if on is not None:
                    await on(step)
    return steps


def last_of(steps: list[api.Progress], name: str) -> api.Progress:
    return [step for step in steps if step.name == name][-1]


async def test_progress_tells_each_step_and_ends_when_all_is_healthy(http: httpx.AsyncClient, agent: FakeAgent) -> None:
    async def go_on(step: api.Progress) -> None:
        if (step.name, step.state) == ("here/notes/b", "pending"):
            await agent.report(agent.instance("notes", Phase.STARTING, "a"), full=True)
        if (step.name, step.state) == ("here/notes/a", "starting"):
            await agent.report(agent.instance("notes", Phase.HEALTHY, "a"), agent.instance("notes", Phase.HEALTHY, "b"))

    steps = await progress(http, on=go_on)
    assert steps[-1] == api.Progress(what="done", ok=True, final=True)
    ready = last_of(steps, "here")
    assert (ready.what, ready.state, ready.final) == ("tenement", "agent ready", True)
    one = last_of(steps, "here/notes/a")
    assert (one.service, one.state, one.ok, one.final, one.serving) == ("notes", "healthy", True, True, 1)
    assert 0 <= one.took_s < 15


async def test_progress_of_a_failure_carries_the_cause_and_the_last_lines(
    http: httpx.AsyncClient, agent: FakeAgent
) -> None:
    agent.on_stream = saying("a 1700000000.250 Traceback", "a 1700000000.500 No such file: ap.py")
    await agent.report(
        agent.instance("notes", Phase.FAILED, "a", detail="exit 2, 3 times in 2.1 s", serving=1),
        agent.instance("notes", Phase.HEALTHY, "b"),
        full=True,
    )
    steps = await progress(http)
    assert steps[-1].what == "done"
    assert not steps[-1].ok
    assert steps[-1].failed == ("here/notes/a",)
    failed = last_of(steps, "here/notes/a")
    assert (failed.ok, failed.detail, failed.serving) == (False, "exit 2, 3 times in 2.1 s", 1)
    assert failed.logs == ("Traceback", "No such file: ap.py")


async def test_progress_of_many_failures_asks_for_few_logs_and_all_at_once(
    http: httpx.AsyncClient, agent: FakeAgent
) -> None:
    """A hundred services that fail must not be a hundred waits, one after the other."""
    asked: list[str] = []
    together = asyncio.Barrier(5)

    async def wait_for_the_others(request: wire.OpenStream, socket: WebSocket) -> None:
        assert isinstance(request.request, wire.LogsRequest)
        asked.append(request.request.service)
        await together.wait()
        await saying("main 1.000 boom")(request, socket)

    agent.on_stream = wait_for_the_others
    names = [f"bad{number:02}" for number in range(30)]
    await applied(http, a_fleet(*map(a_service, names)), 1)
    await agent.until(lambda a: len(a.desired) > 1)
    await agent.report(*(agent.instance(name, Phase.FAILED, generation=1) for name in names), full=True)
    steps = await progress(http, 2)
    assert len(steps[-1].failed) == 30
    assert [step.service for step in steps if step.logs == ("boom",)] == names[:5]
    assert sorted(asked) == names[:5]


async def test_progress_does_not_take_an_old_releases_health_for_the_new(
    http: httpx.AsyncClient, agent: FakeAgent
) -> None:
    await agent.report(
        agent.instance("notes", Phase.HEALTHY, "a"), agent.instance("notes", Phase.HEALTHY, "b"), full=True
    )
    old = dict(agent.instances)
    await applied(http, a_fleet(a_service(instances=("a", "b"), memory_limit_mb=512)), 1)
    await agent.until(lambda a: len(a.desired) > 1)
    await agent.report(*old.values())

    async def go_on(step: api.Progress) -> None:
        if (step.name, step.state) == ("here/notes/b", "healthy") and not step.final:
            await agent.report(agent.instance("notes", Phase.HEALTHY, "a"), agent.instance("notes", Phase.HEALTHY, "b"))

    steps = await progress(http, 2, on=go_on)
    assert steps[-1].ok
    assert [step.final for step in steps if step.name == "here/notes/b" and step.state == "healthy"] == [False, True]


async def test_progress_of_a_restart_waits_for_the_next_generation(http: httpx.AsyncClient, agent: FakeAgent) -> None:
    agent.obedient = True
    await agent.obey()
    assert (await progress(http))[-1].ok
    agent.obedient = False
    await act(http, "restart")
    await agent.until(lambda a: len(a.desired) > 1)
    await agent.report(*agent.instances.values())

    async def go_on(step: api.Progress) -> None:
        if step.name == "here/notes/b" and not step.final and step.state == "healthy":
            await agent.obey()

    steps = await progress(http, on=go_on)
    assert steps[-1].ok
    assert last_of(steps, "here/notes/a").serving == 2


async def test_progress_of_a_stop_ends_when_all_is_stopped(http: httpx.AsyncClient, agent: FakeAgent) -> None:
    agent.obedient = True
    await agent.obey()
    await act(http, "stop")
    steps = await progress(http)
    assert steps[-1].ok
    assert last_of(steps, "here/notes/a").state == "stopped"


async def test_progress_waits_for_an_agent_that_is_away(plane: Plane, http: httpx.AsyncClient) -> None:
    await applied(http, a_fleet(a_service()))
    agent = FakeAgent(plane.home.api_socket)

    async def go_on(step: api.Progress) -> None:
        if step.state == "waiting":
            await agent.dial()

    try:
        steps = await progress(http, on=go_on)
    finally:
        await agent.hang_up()
    assert steps[-1].ok
    assert "waiting" in [step.state for step in steps if step.name == "here"]


async def test_progress_tells_of_a_machine_that_cannot_do_it(http: httpx.AsyncClient, agent: FakeAgent) -> None:
    await agent.report(full=True, refused='"namespace" is not available: no bubblewrap')
    steps = await progress(http)
    assert not steps[-1].ok
    assert last_of(steps, "here").detail == '"namespace" is not available: no bubblewrap'
    assert last_of(steps, "here/notes/a").detail == '"namespace" is not available: no bubblewrap'


async def test_progress_waits_until_what_was_removed_is_gone(http: httpx.AsyncClient, agent: FakeAgent) -> None:
    agent.obedient = True
    await agent.obey()
    agent.obedient = False
    await applied(http, a_fleet(a_service(instances=("a",))), 1)
    await agent.until(lambda a: len(a.desired) > 1)
    await agent.report(agent.instance("notes", Phase.HEALTHY, "a"))

    async def go_on(step: api.Progress) -> None:
        if (step.name, step.state) == ("here/notes/b", "leaving"):
            await agent.obey()

    steps = await progress(http, 2, on=go_on)
    assert last_of(steps, "here/notes/b").state == "removed"
    assert steps[-1].ok


async def test_progress_ends_when_its_revision_is_replaced(http: httpx.AsyncClient, agent: FakeAgent) -> None:
    async def go_on(step: api.Progress) -> None:
        if step.name == "here/notes/b":
            await applied(http, a_fleet(a_service()), 1)

    last = (await progress(http, on=go_on))[-1]
    assert not last.ok
    assert last.detail.startswith("revision 1 was replaced by revision 2 of ")


async def test_progress_of_a_revision_to_come_is_refused(http: httpx.AsyncClient) -> None:
    async with http.stream("GET", "/v1/progress", params={"revision": "7"}) as answer:
        body = (await answer.aread()).decode()
    assert "event: error" in body
    assert "there is no revision 7" in body


# --- logs -------------------------------------------------------------------------------------------------------------


async def lines(http: httpx.AsyncClient, **query: str) -> list[api.LogLine]:
    async with asyncio.timeout(15):
        async with http.stream("GET", "/v1/logs", params={"service": "notes", **query}) as answer:
            assert answer.status_code == 200
            return [line async for line in documents(answer, api.LogLine)]


async def test_logs_are_lines_with_instance_and_time(http: httpx.AsyncClient, agent: FakeAgent) -> None:
    agent.on_stream = saying("a 1700000000.250 one two", "b 1700000001.000 ", "odd")
    found = await lines(http)
    assert [(line.tenement, line.service, line.id, line.at, line.text) for line in found] == [
        ("here", "notes", "a", 1700000000.25, "one two"),
        ("here", "notes", "b", 1700000001.0, ""),
        ("here", "notes", "", 0.0, "odd"),
    ]


async def test_what_is_asked_of_logs_reaches_the_agent(http: httpx.AsyncClient, agent: FakeAgent) -> None:
    asked: list[wire.OpenStream] = []

    async def note(request: wire.OpenStream, socket: WebSocket) -> None:
        asked.append(request)
        await socket.send(wire.encoder.encode(wire.StreamEnd()))

    agent.on_stream = note
    await lines(http, id="b", since="12.5", tail="3", grep="a|b")
    assert asked[0].request == wire.LogsRequest(service="notes", id="b", since=12.5, tail=3, grep="a|b")
    assert len(asked[0].id) == 32


async def test_lines_split_over_frames_are_whole(http: httpx.AsyncClient, agent: FakeAgent) -> None:
    async def split(_request: wire.OpenStream, socket: WebSocket) -> None:
        for part in (b"a 1.000 fir", b"st\na 2.000 sec", b"ond\n"):
            await socket.send(wire.encoder.encode(wire.StreamData(data=part)))
        await socket.send(wire.encoder.encode(wire.StreamEnd()))

    agent.on_stream = split
    assert [line.text for line in await lines(http)] == ["first", "second"]


async def test_following_goes_on_over_a_restart_of_the_agent(http: httpx.AsyncClient, agent: FakeAgent) -> None:
    asked: list[wire.LogsRequest] = []

    async def cut(request: wire.OpenStream, socket: WebSocket) -> None:
        assert isinstance(request.request, wire.LogsRequest)
        asked.append(request.request)
        line = f"a {100 + len(asked)}.000 line {len(asked)}\n"
        await socket.send(wire.encoder.encode(wire.StreamData(data=line.encode())))

    agent.on_stream = cut
    found: list[str] = []
    async with http.stream("GET", "/v1/logs", params={"service": "notes", "follow": "1", "tail": "5"}) as answer:
        async for line in documents(answer, api.LogLine):
            found.append(line.text)
            if len(found) == 3:
                break
    assert found == ["line 1", "line 2", "line 3"]
    assert (asked[0].tail, asked[0].since) == (5, None)
    assert asked[1].tail is None
    assert asked[1].since == pytest.approx(101.001)


async def test_a_reader_that_leaves_ends_the_agents_stream(http: httpx.AsyncClient, agent: FakeAgent) -> None:
    over = asyncio.Event()

    async def for_ever(_request: wire.OpenStream, socket: WebSocket) -> None:
        try:
            while True:
                await socket.send(wire.encoder.encode(wire.StreamData(data=b"a 1.000 " + b"x" * 1000 + b"\n")))
        except Unreachable:
            over.set()

    agent.on_stream = for_ever
    async with http.stream("GET", "/v1/logs", params={"service": "notes", "follow": "1"}) as answer:
        async for _line in documents(answer, api.LogLine):
            break
    async with asyncio.timeout(8):
        await over.wait()


async def test_a_slow_reader_slows_the_agent_and_costs_no_memory(
    plane: Plane, http: httpx.AsyncClient, agent: FakeAgent
) -> None:
    sent = 0

    async def flood(_request: wire.OpenStream, socket: WebSocket) -> None:
        nonlocal sent
        while True:
            await socket.send(wire.encoder.encode(wire.StreamData(data=b"a 1.000 " + b"x" * 60_000 + b"\n")))
            sent += 60_000

    agent.on_stream = flood
    async with http.stream("GET", "/v1/logs", params={"service": "notes", "follow": "1"}):
        before = -1
        while sent != before:
            before = sent
            await asyncio.sleep(0.3)
        assert sent < 8 << 20
        assert rss_bytes(plane) < 80 << 20


def rss_bytes(plane: Plane) -> int:
    with open(f"/proc/{plane.running['server'].pid}/statm") as file:
        return int(file.read().split()[1]) * 4096


async def test_logs_without_an_agent_say_so(http: httpx.AsyncClient) -> None:
    await applied(http, a_fleet(a_service()))
    async with http.stream("GET", "/v1/logs", params={"service": "notes"}) as answer:
        body = (await answer.aread()).decode()
    assert "event: error" in body
    assert "the agent of here is not connected" in body


@pytest.mark.parametrize(
    ("query", "status", "message"),
    [
        ({"service": "nots"}, 404, "did you mean 'notes'?"),
        ({"service": "notes", "grep": "("}, 400, "no regular expression"),
        ({"service": "notes", "folow": "1"}, 400, "folow: unknown parameter; did you mean `follow`?"),
        ({"service": "notes", "tail": "many"}, 400, "tail"),
        ({}, 400, "service"),
    ],
)
async def test_logs_refuse_what_makes_no_sense(
    http: httpx.AsyncClient, query: dict[str, str], status: int, message: str
) -> None:
    await applied(http, a_fleet(a_service()))
    answer = await http.get("/v1/logs", params=query)
    assert answer.status_code == status
    assert message in problem(answer).message


# --- exec and run -----------------------------------------------------------------------------------------------------


def data(text: bytes, channel: int = 0) -> bytes:
    return wire.encoder.encode(wire.StreamData(data=text, channel=channel))


async def test_a_shell_is_piped_both_ways_and_ends_with_its_status(
    plane: Plane, http: httpx.AsyncClient, agent: FakeAgent
) -> None:
    agent.on_stream = echoing
    target = "/v1/exec?service=notes&id=b&tty=1&rows=40&columns=120&command=sh&command=-c&command=cat%20-"
    async with await connect(plane.home.api_socket, target, 10) as shell:
        await shell.send(data(b"hello"))
        assert wire.on_stream.decode(await shell.receive()) == wire.StreamData(data=b"hello", channel=1)
        await shell.send(data(b"x" * 300_000))
        echoed = wire.on_stream.decode(await shell.receive())
        assert isinstance(echoed, wire.StreamData)
        assert len(echoed.data) == 300_000
        await shell.send(data(b"exit"))
        assert wire.on_stream.decode(await shell.receive()) == wire.StreamEnd(status=7)
        with pytest.raises(Unreachable, match="1000"):
            await shell.receive()


async def test_exec_and_run_ask_the_agent_for_what_was_asked(
    plane: Plane, http: httpx.AsyncClient, agent: FakeAgent
) -> None:
    asked: list[wire.OpenStream] = []

    async def note(request: wire.OpenStream, socket: WebSocket) -> None:
        asked.append(request)
        await socket.send(wire.encoder.encode(wire.StreamEnd(status=0)))

    agent.on_stream = note
    for path in ("exec", "run"):
        async with await connect(plane.home.api_socket, f"/v1/{path}?service=notes&command=ls&command=-l", 10) as shell:
            assert wire.on_stream.decode(await shell.receive()) == wire.StreamEnd(status=0)
    assert [one.request for one in asked] == [
        wire.ExecRequest(service="notes", id="a", command=("ls", "-l")),
        wire.RunRequest(service="notes", id="a", command=("ls", "-l")),
    ]


async def test_a_client_that_leaves_ends_the_command(plane: Plane, http: httpx.AsyncClient, agent: FakeAgent) -> None:
    over = asyncio.Event()

    async def wait_for_the_end(_request: wire.OpenStream, socket: WebSocket) -> None:
        try:
            await socket.receive()
        except Unreachable:
            over.set()

    agent.on_stream = wait_for_the_end
    async with await connect(plane.home.api_socket, "/v1/exec?service=notes&command=sleep", 10):
        pass
    async with asyncio.timeout(8):
        await over.wait()


async def test_an_agent_that_breaks_off_leaves_a_last_word(
    plane: Plane, http: httpx.AsyncClient, agent: FakeAgent
) -> None:
    async def break_off(_request: wire.OpenStream, socket: WebSocket) -> None:
        await socket.send(data(b"so far", 1))

    agent.on_stream = break_off
    async with await connect(plane.home.api_socket, "/v1/run?service=notes&command=x", 10) as shell:
        await shell.receive()
        last = wire.on_stream.decode(await shell.receive())
        assert isinstance(last, wire.StreamEnd)
        assert "ended the stream early" in last.error


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("/v1/exec?service=notes", "name a command"),
        ("/v1/exec?service=nothing&command=x", "no service 'nothing'"),
        ("/v1/exec?service=notes&id=z&command=x", "no instance 'z'"),
        ("/v1/exec?service=notes&command=x", "the agent of here is not connected"),
        ("/v1/agent/streams/0123", "no stream of that id"),
    ],
)
async def test_a_refused_shell_says_why(plane: Plane, http: httpx.AsyncClient, target: str, message: str) -> None:
    await applied(http, a_fleet(a_service()))
    with pytest.raises(Unreachable, match=message):
        await connect(plane.home.api_socket, target, 10)


async def test_a_streams_id_is_valid_once(plane: Plane, http: httpx.AsyncClient, agent: FakeAgent) -> None:
    asked: list[str] = []

    async def note(request: wire.OpenStream, socket: WebSocket) -> None:
        asked.append(request.id)
        with pytest.raises(Unreachable, match="no stream of that id"):
            await connect(plane.home.api_socket, f"/v1/agent/streams/{request.id}", 5)
        await socket.send(wire.encoder.encode(wire.StreamEnd(status=0)))

    agent.on_stream = note
    await lines(http)
    assert len(asked) == 1


# --- events -----------------------------------------------------------------------------------------------------------


async def test_events_are_paged_and_filtered(http: httpx.AsyncClient) -> None:
    await applied(http, a_fleet(a_service(), a_service("other")))
    everything = await get(http, "events", tuple[api.Event, ...], limit=1000)
    assert [event.number for event in everything] == list(range(1, len(everything) + 1))
    page = await get(http, "events", tuple[api.Event, ...], after=1, limit=2)
    assert [event.number for event in page] == [2, 3]
    (added,) = await get(http, "events", tuple[api.Event, ...], kind="service_added", service="other")
    assert added.subject == "service:other"
    assert (await get(http, "events", tuple[api.Event, ...], newest=1, limit=1))[0].number >= len(everything)


async def test_events_are_followed_without_gaps_and_resumed(http: httpx.AsyncClient) -> None:
    await applied(http, a_fleet(a_service()))
    query, accept = {"after": "0", "kind": "fleet_applied"}, {"accept": "text/event-stream"}
    found: list[api.Event] = []
    async with asyncio.timeout(15):
        async with http.stream("GET", "/v1/events", params=query, headers=accept) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            async for event in documents(answer, api.Event):
                found.append(event)
                if len(found) == 3:
                    break
                await applied(http, a_fleet(a_service(memory_limit_mb=64 + len(found))), len(found))
        assert [event.after["revision"] for event in found] == [1, 2, 3]
        resumed = {**accept, "last-event-id": str(found[1].number)}
        async with http.stream("GET", "/v1/events", params=query, headers=resumed) as answer:
            async for event in documents(answer, api.Event):
                assert event == found[2]
                break


async def test_a_silent_stream_shows_that_it_lives(http: httpx.AsyncClient) -> None:
    async with asyncio.timeout(12):
        async with http.stream(
            "GET", "/v1/events", params={"kind": "nothing"}, headers={"accept": "text/event-stream"}
        ) as answer:
            async for line in answer.aiter_lines():
                assert line == ": still here"
                break


# --- explain ----------------------------------------------------------------------------------------------------------


async def test_explain_gathers_reports_events_and_last_lines(http: httpx.AsyncClient, agent: FakeAgent) -> None:
    agent.on_stream = saying("a 1700000000.000 boom")
    await agent.report(
        agent.instance("notes", Phase.BACKOFF, "a", detail="exit 1"),
        agent.instance("notes", Phase.HEALTHY, "b"),
        full=True,
    )
    await agent.say(wire.Note(kind="instance_exited", service="notes", id="a", at=time.time(), detail="exit 1"))

    async def noted() -> bool:
        found = await get(http, "explain/notes", api.Explanation)
        return found.events[-1].kind == "instance_exited"

    await eventually(noted)
    found = await get(http, "explain/notes", api.Explanation)
    assert [view.report.phase for view in found.instances] == [Phase.BACKOFF, Phase.HEALTHY]
    assert [line.text for line in found.logs] == ["boom"]
    assert found.desired.startswith("revision 1, release ")
    kinds = [event.kind for event in found.events]
    assert "service_added" in kinds
    assert "machine_created" in kinds
    assert [event.number for event in found.events] == sorted(event.number for event in found.events)


async def test_explain_asks_for_the_lines_of_the_generation_that_failed(
    http: httpx.AsyncClient, agent: FakeAgent
) -> None:
    asked: list[int | None] = []

    async def note(request: wire.OpenStream, socket: WebSocket) -> None:
        assert isinstance(request.request, wire.LogsRequest)
        asked.append(request.request.generation)
        await socket.send(wire.encoder.encode(wire.StreamEnd(status=0)))

    agent.on_stream = note
    well = agent.instance("notes", Phase.HEALTHY, "b")
    cases: tuple[tuple[int | None, int | None, list[int | None]], ...] = (
        (1, 3, [3]),
        (1, None, [0]),
        (None, 3, [3, None]),
    )
    for serving, generation, expected in cases:
        failed = agent.instance("notes", Phase.FAILED, "a", serving=serving, generation=generation)
        await agent.report(failed, well, full=True)

        async def told(failed: wire.InstanceReport = failed) -> bool:
            return (await get(http, "explain/notes", api.Explanation)).instances[0].report == failed

        await eventually(told)
        asked.clear()
        await get(http, "explain/notes", api.Explanation)
        assert asked == expected


async def test_explain_of_an_unknown_service_names_the_nearest(http: httpx.AsyncClient) -> None:
    await applied(http, a_fleet(a_service()))
    answer = await http.get("/v1/explain/note")
    assert answer.status_code == 404
    assert problem(answer).code == "bad_input"
    assert "did you mean 'notes'?" in problem(answer).message
    assert problem(answer).hint == "`slum ps` lists them"
