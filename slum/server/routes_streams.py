"""The API's routes that stay open: progress, logs, exec, run, and the agents' own connections."""

from __future__ import annotations

import asyncio
import heapq
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

from slum import api, wire
from slum.errors import ConfigError, Unreachable
from slum.frozen import Frozen
from slum.server import progress
from slum.server.control import Control
from slum.server.peer import Guest
from slum.server.route import Call
from slum.server.routes_fleet import placed
from slum.server.sse import Emit, EventStream
from slum.server.streams import Lost, close, log_lines, pipe

COMMAND_WORDS_MAX = 1000
RETRY_S = 0.3
OVERLAP_S = 0.001


class ProgressQuery(Frozen, forbid_unknown_fields=True):
    revision: int


class LogsQuery(Frozen, forbid_unknown_fields=True):
    service: str
    id: str | None = None
    tenement: str | None = None
    since: float | None = None
    tail: int | None = None
    grep: str | None = None
    follow: bool = False


class ShellQuery(Frozen, forbid_unknown_fields=True):
    service: str
    id: str | None = None
    tenement: str | None = None
    tty: bool = False
    rows: int = 24
    columns: int = 80
    command: tuple[str, ...] = ()


async def get_progress(call: Call) -> EventStream:
    control, revision = call.control, call.query.revision

    async def produce(emit: Emit) -> None:
        await progress.follow(control, revision, emit)

    return EventStream(produce)


async def get_logs(call: Call) -> EventStream:
    query: LogsQuery = call.query
    control = call.control
    if query.grep is not None:
        try:
            re.compile(query.grep)
        except re.error as error:
            raise ConfigError(f"grep: {query.grep!r} is no regular expression: {error}") from error
    machines = tuple(
        dict.fromkeys(machine for machine, _, _ in placed(control.world(), query.service, query.id, query.tenement))
    )

    async def produce(emit: Emit) -> None:
        if query.follow:
            async with asyncio.TaskGroup() as group:
                for machine in machines:
                    group.create_task(_follow(control, machine, query, emit), name=f"logs {machine}")
        else:
            await _merged(control, machines, query, emit)

    return EventStream(produce)


def _request(query: LogsQuery, since: float | None, tail: int | None) -> wire.LogsRequest:
    return wire.LogsRequest(
        service=query.service, id=query.id, follow=query.follow, since=since, tail=tail, grep=query.grep
    )


async def _merged(control: Control, machines: tuple[str, ...], query: LogsQuery, emit: Emit) -> None:
    """Emit what all *machines* have, oldest first; afterwards Unreachable if one of them could not be asked."""
    missing: list[Unreachable] = []
    async with AsyncExitStack() as stack:
        sources: list[AsyncIterator[api.LogLine]] = []
        for machine in machines:
            try:
                session = control.hub.session(machine)
                end = await stack.enter_async_context(
                    control.streams.open(session, _request(query, query.since, query.tail))
                )
                sources.append(log_lines(end, query.service))
            except Unreachable as error:
                missing.append(error)
        heads: list[tuple[float, int, api.LogLine]] = []
        for number, source in enumerate(sources):
            async for line in source:
                heads.append((line.at, number, line))
                break
        heapq.heapify(heads)
        while heads:
            _, number, line = heads[0]
            await emit(line)
            try:
                line = await anext(sources[number])
                heapq.heapreplace(heads, (line.at, number, line))
            except StopAsyncIteration:
                heapq.heappop(heads)
    if missing:
        raise missing[0]


async def _follow(control: Control, machine: str, query: LogsQuery, emit: Emit) -> None:
    """Emit one machine's lines for ever; an agent that went away is waited for, and asked for what came since."""
    since, tail = query.since, query.tail
    while True:
        seen = control.changed.count
        try:
            async with control.streams.open(control.hub.session(machine), _request(query, since, tail)) as end:
                async for line in log_lines(end, query.service):
                    await emit(line)
                    since, tail = max(since or 0.0, line.at + OVERLAP_S), None
            return
        except Lost:
            await asyncio.sleep(RETRY_S)
        except Unreachable:
            await control.changed.wait(seen, 5.0)


async def get_exec(call: Call) -> None:
    await _shell(call, wire.ExecRequest)


async def get_run(call: Call) -> None:
    await _shell(call, wire.RunRequest)


def _target(control: Control, query: ShellQuery) -> tuple[str, str]:
    """Return the (machine, id) that a command is for: of several the first whose agent is connected."""
    if not 1 <= len(query.command) <= COMMAND_WORDS_MAX:
        raise ConfigError("command: name a command, one `command=` for each word")
    chosen = placed(control.world(), query.service, query.id, query.tenement)
    for machine, _, instance in chosen:
        known = control.hub.seen.get(machine)
        if known is not None and known.session is not None:
            return machine, instance
    return chosen[0][0], chosen[0][2]


async def _shell(call: Call, kind: type[wire.ExecRequest] | type[wire.RunRequest]) -> None:
    query: ShellQuery = call.query
    control = call.control
    machine, instance = _target(control, query)
    request = kind(
        service=query.service,
        id=instance,
        command=query.command,
        tty=query.tty,
        rows=query.rows,
        columns=query.columns,
    )
    async with control.streams.open(control.hub.session(machine), request) as end:
        await call.websocket.accept()
        await pipe(call.websocket, end)
        await close(call.websocket)


async def get_agent(call: Call) -> None:
    peer = call.peer
    await call.control.hub.serve(call.websocket, peer if isinstance(peer, Guest) else None)


async def get_agent_stream(call: Call) -> None:
    await call.control.streams.serve(call.websocket, call.peer)
