"""The API's routes about the pause that a restore begins with: what resuming would do, and resuming.

A restored state may be older than what runs. Until somebody who has seen the steps resumes, agents are told nothing, no
operator is called, and the desire is not changed. The pause is a fact of the ledger, so it holds on every member.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from slum import api
from slum.errors import Conflict, QuorumLost
from slum.ledger import events
from slum.ledger.commands import Done, NoteEvent, Record
from slum.model import release_of
from slum.server import observed
from slum.server.control import Control, rejection
from slum.server.decide import Create, Destroy
from slum.server.route import Call
from slum.server.view import World


async def get_pause(call: Call) -> api.PauseView:
    control = call.control
    world = control.world()
    if world.paused is None:
        return api.PauseView(paused=False)
    if control.foretold is None:
        told = await control.relay.of_leader("pause", api.PauseView)
        if told is not None:
            return told
        leader = await control.link.leader()
        if not leader.is_self:
            raise QuorumLost(
                f"this member does not lead, {leader.member or 'nobody'} does, and only the leader sees the machines",
                hint=f"ask on the machine of {leader.member}" if leader.member else "try again",
            )
    return api.PauseView(
        paused=True,
        since=world.paused.since,
        actor=world.paused.actor,
        why=world.paused.why,
        steps=(*_machine_steps(control, world), *_service_steps(control, world)),
        waiting=tuple(_waiting(control, world)),
    )


async def post_resume(call: Call) -> api.Resumed:
    """Commit that the pause is over; from then on the fleet is made what the ledger says."""
    asked: api.ResumeRequest = call.body
    control = call.control
    world = control.world()
    if world.paused is None:
        return api.Resumed(seq=world.seq, changed=False)
    note = NoteEvent(kind=events.RESUMED, subject=events.RECONCILE, at=time.time())
    result = await control.commit(Record(events=(note,)), asked.request_id, call.peer.actor(asked.host))
    if not isinstance(result, Done):
        raise rejection(result)
    return api.Resumed(seq=result.seq, changed=True)


def refuse_while_paused(world: World) -> None:
    """Raise Conflict while a restore is not resumed: what is asked would be committed, and nothing would come of it."""
    if world.paused is not None:
        raise Conflict(
            f"machines and services are left as they are since the restore ({world.paused.why})",
            hint="`slum resume` shows what would be done, and goes on",
        )


def _machine_steps(control: Control, world: World) -> Iterator[api.PauseStep]:
    for action in control.foretold or ():
        if isinstance(action, Create):
            again = action.machine in world.machines
            detail = f"by {action.operator}" + (", which does not see it any more" if again else "")
            yield api.PauseStep(what="create", machine=action.machine, detail=detail)
        elif isinstance(action, Destroy):
            yield api.PauseStep(
                what="destroy", machine=action.machine, detail=f"{action.machine_id} by {action.operator}"
            )
    for view in observed.machines(world, control.sights, control.troubles, time.monotonic()):
        if view.drift in ("stray", "left"):
            detail = f"{view.id} of {view.operator}: not in the restored state; slum will not touch it"
            yield api.PauseStep(what="leave", machine=view.name, detail=detail)


def _service_steps(control: Control, world: World) -> Iterator[api.PauseStep]:
    """What agents that have reported would start, change and stop."""
    wanted: dict[str, dict[tuple[str, str], str]] = {}
    for machine, _tenement, service, instance in world.placed():
        wanted.setdefault(machine, {})[service.name, instance] = release_of(service)
    for machine, seen in sorted(control.hub.seen.items()):
        if not seen.is_reported:
            continue
        desired = wanted.get(machine, {})
        for service_name, instance in sorted(desired.keys() | seen.instances.keys()):
            key = (service_name, instance)
            what = "start" if key not in seen.instances else "stop" if key not in desired else ""
            detail = ""
            if not what and seen.instances[key].release != desired[key]:
                what, detail = "change", f"{(seen.instances[key].release or 'none')[:12]} -> {desired[key][:12]}"
            if what:
                yield api.PauseStep(what=what, machine=machine, service=service_name, id=instance, detail=detail)


def _waiting(control: Control, world: World) -> Iterator[str]:
    if control.foretold is None:
        yield "the reconcile loop has not looked yet"
    for name in sorted({row.operator for row in world.machines.values()} | {t.operator for t in world.fleet.tenements}):
        sight = control.sights.get(name)
        if sight is None or sight.machines is None:
            yield f"operator {name} has not been seen"
    for machine, row in sorted(world.machines.items()):
        seen = control.hub.seen.get(machine)
        if row.state == "created" and (seen is None or not seen.is_reported):
            yield f"the agent of {machine} has not reported"
