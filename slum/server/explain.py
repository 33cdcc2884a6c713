"""Everything that is known about one service, gathered for `slum explain`: reports, events, last log lines."""

from __future__ import annotations

import asyncio
import difflib
import time

from slum import api, wire
from slum.model import release_of
from slum.server.control import Control
from slum.server.problems import Missing
from slum.server.progress import last_lines
from slum.server.view import World

EVENTS_MAX = 50
LINES_MAX = 20
WELL = frozenset({wire.Phase.RUNNING, wire.Phase.HEALTHY, wire.Phase.STOPPED, wire.Phase.STARTING})


async def explain(control: Control, service: str) -> api.Explanation:
    """Return what is known of *service*; Missing, with the nearest names, when nothing ever was."""
    world = control.world()
    views = tuple(v for v in control.instances() if v.report.service == service)
    events = _events(control, service, {view.tenement for view in views})
    if not views and not events:
        raise no_service(world, service)
    unwell = [view for view in views if view.report.phase not in WELL and view.stale_s is None]
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(last_lines(control, v.tenement, v.report), name=f"explain {v.tenement}")
            for v in unwell[:4]
        ]
    lines = sorted((line for task in tasks for line in task.result()), key=lambda line: line.at)
    return api.Explanation(
        service=service,
        instances=views,
        events=events,
        logs=tuple(lines[-LINES_MAX:]),
        desired=_desired(world, service),
    )


def no_service(world: World, service: str) -> Missing:
    """Return the error for a service that the fleet does not declare, with the nearest that it does."""
    names = sorted({s.name for tenement in world.fleet.tenements for s in tenement.services})
    near = difflib.get_close_matches(service, names, n=1)
    if near:
        return Missing(f"no service {service!r} in this fleet; did you mean {near[0]!r}?", hint="`slum ps` lists them")
    return Missing(
        f"no service {service!r} in this fleet",
        hint=f"there are: {', '.join(names[:10])}" if names else "it declares none",
    )


def _events(control: Control, service: str, machines: set[str]) -> tuple[api.Event, ...]:
    """Return the newest events of the service, and those of its machines that fall among them, oldest first."""
    reader = control.view.reader
    own = reader.events(service=service, limit=EVENTS_MAX, newest=True)
    if not own:
        return ()
    subjects = {f"tenement:{machine}" for machine in machines}
    around = [event for event in reader.events(after=own[0].number - 1, limit=1000) if event.subject in subjects]
    # An apply's first event names the revision; those of its services follow, with the same seq.
    applies = [
        event for event in reader.events(kind="fleet_applied", limit=EVENTS_MAX, newest=True) if event.seq >= own[0].seq
    ]
    merged = {event.number: event for event in (*own, *around, *applies)}
    return tuple(merged[number] for number in sorted(merged))[-EVENTS_MAX:]


def _desired(world: World, service: str) -> str:
    for tenement in world.fleet.tenements:
        for declared in tenement.services:
            if declared.name == service:
                at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(world.at))
                return f"revision {world.revision}, release {release_of(declared)[:12]}, by {world.actor} at {at}"
    return ""
