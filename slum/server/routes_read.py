"""The API's routes that only show: health, status, state, instances, explain, events. They change nothing."""

from __future__ import annotations

import time

from slum import __version__, api
from slum.errors import QuorumLost
from slum.frozen import Frozen
from slum.ledger.status import LedgerStatus
from slum.server import observed
from slum.server.control import Control
from slum.server.explain import explain
from slum.server.problems import json_response
from slum.server.route import Call
from slum.server.sse import Emit, EventStream

EVENTS_MAX = 1000
LEADER_S = 1.0
"""How long the ledger is asked who leads, before the answer is made without it."""
WAKE_S = 30.0
FRESH_S = 5.0


class Health(Frozen):
    """Answered while the server runs; *ledger* tells whether it can commit and read."""

    ok: bool
    ledger: bool


class StateQuery(Frozen, forbid_unknown_fields=True):
    fresh: bool = False
    """Linearizable: what was answered to anybody before this request is in it. 503 where no majority is in reach."""


class EventsQuery(Frozen, forbid_unknown_fields=True):
    after: int = 0
    """Only events with a higher number."""
    limit: int = 100
    kind: str | None = None
    service: str | None = None
    actor: str | None = None
    newest: bool = False
    """The last *limit* events instead of the first, still oldest first."""


async def get_health(call: Call) -> Health:
    return Health(ok=True, ledger=call.control.link.is_up and call.control.view.is_readable())


async def get_status(call: Call) -> api.Status:
    control = call.control
    world = control.world()
    try:
        told = await control.link.leader(deadline_s=LEADER_S)
    except QuorumLost as error:
        if error.lasting:
            raise
        told = None
    cluster, leader = world.cluster, told.member if told else world.cluster.leader or None
    standing = await _standing(control) if told and len(cluster.members) > 1 else None
    return api.Status(
        version=__version__,
        fleet=world.fleet.name,
        domain=world.fleet.domain,
        revision=world.revision,
        pid=control.pid,
        data_dir=str(control.home.data),
        started_at=control.started_at,
        now=time.time(),
        ledger=api.LedgerView(
            cluster=cluster.cluster_id,
            generation=told.generation if told else cluster.generation,
            epoch=told.epoch if told else cluster.epoch,
            term=told.term if told else cluster.term,
            seq=world.seq,
            leader=leader,
            members=tuple(
                api.MemberView(
                    id=member.id,
                    role="leader" if member.id == leader else "follower",
                    address=member.address,
                )
                for member in cluster.members
            ),
            silent_s=None if told else round(control.link.silent_s, 3),
            majority=standing.majority and any(row.id == control.me for row in cluster.members) if standing else True,
            age_s=round(standing.age_s, 3) if standing else 0.0,
        ),
        tenements=control.tenements(),
        counts=observed.counts(control.instances()),
        paused="" if world.paused is None else world.paused.why,
    )


async def _standing(control: Control) -> LedgerStatus | None:
    """Return how this member's ledger sees the others; None when it does not say in time."""
    try:
        return await control.link.status(deadline_s=LEADER_S)
    except QuorumLost:
        return None


async def get_machines(call: Call) -> tuple[api.MachineView, ...]:
    """Answer as the leader would, who asks the operators; without one from what is known here."""
    control = call.control
    told = await control.relay.of_leader("machines", tuple[api.MachineView, ...])
    if told is not None:
        return told
    return observed.machines(control.world(), control.sights, control.known_troubles, time.monotonic())


async def get_state(call: Call) -> api.State:
    control = call.control
    query: StateQuery = call.query
    at_least = await control.link.barrier(deadline_s=FRESH_S) if query.fresh else 0
    world = control.world()
    if world.seq < at_least:
        raise QuorumLost(f"this member shows seq {world.seq}, and {at_least} was committed", hint="ask again")
    return api.State(
        revision=world.revision,
        fleet=world.fleet,
        seq=world.seq,
        tenements=control.tenements(),
        instances=control.instances(),
        overrides=dict(world.overrides),
    )


async def get_instances(call: Call) -> tuple[api.InstanceView, ...]:
    return call.control.instances()


async def get_explain(call: Call) -> api.Explanation:
    return await explain(call.control, call.connection.path_params["service"])


async def get_events(call: Call) -> object:
    """Answer a page of events, or follow them where the client accepts text/event-stream."""
    query: EventsQuery = call.query
    if "text/event-stream" not in call.connection.headers.get("accept", ""):
        found = call.control.view.reader.events(
            after=query.after,
            limit=max(1, min(query.limit, EVENTS_MAX)),
            kind=query.kind,
            service=query.service,
            actor=query.actor,
            newest=query.newest,
        )
        return json_response(found)
    resumed = call.connection.headers.get("last-event-id", "")
    after = int(resumed) if resumed.isdecimal() and len(resumed) < 19 else query.after
    control = call.control

    async def produce(emit: Emit) -> None:
        await _follow_events(control, query, after, emit)

    return EventStream(produce)


async def _follow_events(control: Control, query: EventsQuery, after: int, emit: Emit) -> None:
    """Emit matching events above *after* for ever, each once, in order."""
    while True:
        seen = control.committed.count
        reader = control.view.reader
        newest = reader.events(limit=1, newest=True)
        while True:
            batch = reader.events(after=after, limit=200, kind=query.kind, service=query.service, actor=query.actor)
            for event in batch:
                await emit(event, id=str(event.number))
                after = event.number
            if len(batch) < 200:
                break
        # What the filter left out needs no second look.
        after = max(after, newest[0].number if newest else 0)
        await control.committed.wait(seen, WAKE_S)


async def get_verified(call: Call) -> api.Verified:
    return call.control.view.reader.verify()
