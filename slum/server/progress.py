"""The progress stream: tells each step of an apply (or stop, start, restart) until everything is settled.

Steps come from settled.steps, again at each change; only what differs is sent. The first steps that fail carry the last log
lines of their generation: each costs the agent a process, and forty would hide the cause. The stream ends with "done"; while an agent is away it says so and goes on.
"""

from __future__ import annotations

import asyncio

from msgspec.structs import replace

from slum import api, log, wire
from slum.errors import SlumError
from slum.server.agents import instances_of
from slum.server.control import Control
from slum.server.problems import Missing
from slum.server.settled import done, releases_of, steps
from slum.server.sse import Emit
from slum.server.streams import log_lines

WAKE_S = 5.0
CALM_S = 0.03
"""So long after a change before looking again: reports come in bursts."""
LOG_LINES = 10
LOGGED_MAX = 5
"""So many failed steps carry log lines, all asked for at once."""
LOG_S = 3.0


async def follow(control: Control, revision: int, emit: Emit) -> None:
    """Emit Progress documents towards *revision* until the one with what = "done"."""
    world = control.world()
    if revision > world.revision or revision < 0:
        raise Missing(f"there is no revision {revision}; the newest is {world.revision}")
    since = _since(control)
    releases = releases_of(world.fleet)
    told: dict[str, api.Progress] = {}
    logged: set[str] = set()
    while True:
        seen = control.changed.count
        world = control.world()
        if world.revision != revision:
            why = f"revision {revision} was replaced by revision {world.revision} of {world.actor}"
            await emit(api.Progress(what="done", ok=False, final=True, detail=why))
            return
        found = steps(world, control.hub.seen, control.hub.desired, control.known_troubles, releases, since=since)
        news = [step for step in found if _is_news(told.get(step.name), step)]
        told |= {step.name: step for step in news}
        failed = [step for step in news if step.what == "instance" and not step.ok]
        logged |= {step.name for step in failed[: max(0, LOGGED_MAX - len(logged))]}
        lines = await _logs(control, [step.name for step in failed if step.name in logged])
        for step in news:
            await emit(replace(step, logs=lines.get(step.name, ())))
        for name in told.keys() - {step.name for step in found}:
            gone = told.pop(name)
            if gone.state == "leaving":
                await emit(replace(gone, state="removed", final=True))
        last = done(found)
        if last is not None:
            await emit(last)
            return
        await control.changed.wait(seen, WAKE_S)
        await asyncio.sleep(CALM_S)


def _since(control: Control) -> float:
    """Return when the newest fleet or the newest stop, start or restart was committed."""
    asked = control.view.reader.events(kind="override_set", limit=1, newest=True)
    return max([control.world().at, *(event.at for event in asked)])


def _is_news(before: api.Progress | None, step: api.Progress) -> bool:
    return before is None or replace(before, took_s=0.0) != replace(step, took_s=0.0)


async def _logs(control: Control, names: list[str]) -> dict[str, tuple[str, ...]]:
    """Return the last log lines of the instances *names*, each "machine/service/id"."""
    tasks: dict[str, asyncio.Task[tuple[api.LogLine, ...]]] = {}
    async with asyncio.TaskGroup() as group:
        for name in names:
            machine, service, instance = name.split("/")
            report = instances_of(control.hub.seen, machine).get((service, instance))
            if report is not None:
                tasks[name] = group.create_task(last_lines(control, machine, report), name=f"last words of {name}")
    return {name: tuple(line.text for line in task.result()) for name, task in tasks.items()}


async def last_lines(control: Control, machine: str, report: wire.InstanceReport) -> tuple[api.LogLine, ...]:
    """Return the last log lines of the newest generation of what *report* is about, however much an older one goes on.

    All of the instance's when that one wrote nothing and no other serves; none when its agent does not give them in time.
    """
    if report.serving not in (None, report.generation):
        # What no generation wrote is a one-off's, like a pre_deploy that failed before there was one.
        return await _tail(control, machine, report, report.generation or 0)
    own = await _tail(control, machine, report, report.generation)
    return own or await _tail(control, machine, report, None)


async def _tail(
    control: Control, machine: str, report: wire.InstanceReport, generation: int | None
) -> tuple[api.LogLine, ...]:
    service = report.service
    request = wire.LogsRequest(service=service, id=report.id, tail=LOG_LINES, generation=generation)
    lines: list[api.LogLine] = []
    try:
        async with asyncio.timeout(LOG_S):
            async with control.streams.open(control.hub.session(machine), request) as end:
                lines += [line async for line in log_lines(end, service)]
    except (SlumError, TimeoutError) as error:
        log.get().info("last_lines_missing", machine=machine, service=service, why=str(error))
    return tuple(lines[-LOG_LINES:])
