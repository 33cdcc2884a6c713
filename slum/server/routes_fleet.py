"""The API's routes about the desire: the fleet, its revisions, and stop, start, restart. All that commits is here."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Iterable

import msgspec

from slum import api
from slum.errors import ConfigError, Conflict, OperatorError
from slum.frozen import Frozen
from slum.ledger.commands import Done, SetDesired, SetOverride, pack_fleet
from slum.model import Fleet, Operator
from slum.operators.base import Checked
from slum.operators.local import Site
from slum.operators.registry import make_operator
from slum.problem import nearest
from slum.server.admission import admit
from slum.server.blobs import DIGEST
from slum.server.boot import operator_site
from slum.server.control import rejection
from slum.server.explain import no_service
from slum.server.problems import Missing
from slum.server.route import Call
from slum.server.routes_pause import refuse_while_paused
from slum.server.view import World

FLEET_BYTES_MAX = 16 << 20
VERBS = ("stop", "start", "restart")
MACHINE_VERBS = ("drain", "undrain")
CHECK_S = 15.0
REQUEST_ID = re.compile(r"[0-9a-f]{32}:[0-9]{1,18}")
WHY_MAX = 200


class FleetQuery(Frozen, forbid_unknown_fields=True):
    revision: int | None = None
    """None: the newest. The last 20 are kept."""


async def get_fleet(call: Call) -> api.FleetDoc:
    world, wanted = call.control.world(), call.query.revision
    if wanted is None or wanted == world.revision:
        return api.FleetDoc(
            revision=world.revision, fleet=world.fleet, digest=world.digest, at=world.at, actor=world.actor
        )
    found = call.control.view.reader.fleet(wanted)
    if found is None:
        raise Missing(f"there is no revision {wanted}", hint="`slum status` names the newest; the last 20 are kept")
    revision, fleet, digest, at, actor = found
    return api.FleetDoc(revision=revision, fleet=fleet, digest=digest, at=at, actor=actor)


async def get_revisions(call: Call) -> tuple[api.Revision, ...]:
    return tuple(call.control.view.reader.revisions())


async def put_fleet(call: Call) -> api.Applied:
    """Commit a new desired fleet, whole or not at all; only on the revision that it was planned on."""
    asked: api.ApplyRequest = call.body
    control, actor = call.control, call.peer.actor(asked.host)
    _check_request_id(asked.request_id)
    world = control.world()
    refuse_while_paused(world)
    if world.revision > 0 and world.fleet.name != asked.fleet.name:
        raise Conflict(
            f"this control plane holds the fleet {world.fleet.name!r}, not {asked.fleet.name!r}",
            hint="one control plane holds one fleet: name it so in [fleet], or use another --data-dir and --run-dir",
        )
    is_open = control.view.reader.authority() is not None
    for digest in {service.bundle for tenement in asked.fleet.tenements for service in tenement.services}:
        if digest is not None and DIGEST.fullmatch(digest):
            await control.copies.touch(digest)
    admit(asked.fleet, control.blobs, control.hub.seen, world.cluster.members, is_open=is_open)
    body = msgspec.msgpack.encode(asked.fleet)
    command = SetDesired(
        fleet_zstd=pack_fleet(asked.fleet),
        digest=hashlib.sha256(body).hexdigest(),
        base_revision=asked.base_revision,
        why=asked.why[:WHY_MAX],
    )
    result = await control.commit(command, asked.request_id, actor)
    if not isinstance(result, Done):
        raise rejection(result)
    revision = result.value if result.value is not None else control.world().revision
    return api.Applied(revision=revision, seq=result.seq, changed=revision != asked.base_revision)


async def post_actions(call: Call) -> api.Acted:
    """Stop, start or restart instances, beside their release; `stop` holds until `start`, drain until undrain."""
    asked: api.ActionRequest = call.body
    _check_request_id(asked.request_id)
    control, world = call.control, call.control.world()
    refuse_while_paused(world)
    if asked.verb in MACHINE_VERBS:
        machines = _machines(world, asked.tenement or "")
        concerned = tuple((m, s.name, each) for m, _, s, each in world.placed() if m in machines)
        chosen = tuple((machine, "", "") for machine in machines)
    elif asked.verb in VERBS:
        chosen = concerned = placed(world, asked.service, asked.id, asked.tenement)
    else:
        raise ConfigError(f"{asked.verb!r} is none of {', '.join((*VERBS, *MACHINE_VERBS))}")
    result = await control.commit(
        SetOverride(verb=asked.verb, instances=chosen), asked.request_id, call.peer.actor(asked.host)
    )
    if not isinstance(result, Done):
        raise rejection(result)
    return api.Acted(seq=result.seq, instances=tuple("/".join(key) for key in concerned))


async def post_check(call: Call) -> api.FleetCheck:
    """Ask the operators' providers what they would refuse in the fleet of the body; commits nothing."""
    fleet: Fleet = call.body
    used = {tenement.operator for tenement in fleet.tenements}
    site = operator_site(call.control.home, "")
    async with asyncio.TaskGroup() as group:
        checks = [
            group.create_task(_asked(definition, site), name=f"check {definition.name}")
            for definition in fleet.operators
            if definition.name in used
        ]
    found = [check.result() for check in checks]
    return api.FleetCheck(
        problems=tuple(line for one in found for line in one.problems),
        warnings=tuple(line for one in found for line in one.warnings),
    )


async def _asked(definition: Operator, site: Site) -> api.FleetCheck:
    """Return what the provider of *definition* says; one that cannot be asked now is a warning, a bad token a problem."""
    at = f"operators.{definition.name}"
    try:
        operator = make_operator(definition, site)
        if not isinstance(operator, Checked):
            return api.FleetCheck()
        async with asyncio.timeout(CHECK_S):
            return api.FleetCheck(problems=tuple(f"{at}.{line}" for line in await operator.problems()))
    except ConfigError as error:
        return api.FleetCheck(problems=(error.message if at in error.message else f"{at}: {error.message}",))
    except OperatorError as error:
        line = f"{at}: {error.message}"
        return api.FleetCheck(problems=(line,)) if error.status in (401, 403) else api.FleetCheck(warnings=(line,))
    except TimeoutError:
        return api.FleetCheck(warnings=(f"{at}: no answer within {CHECK_S:g} s; its settings were not checked",))


def _machines(world: World, name: str) -> tuple[str, ...]:
    """Return the machines that *name* means: one, or all of a [tenement.X]; Missing when there is none."""
    found = tuple(m for t in world.fleet.tenements for m in t.machine_names if name in (m, t.name))
    if not found:
        names = {m for t in world.fleet.tenements for m in (t.name, *t.machine_names)}
        raise Missing(f"there is no tenement {name!r}{nearest(name, names)}", hint="`slum status` lists them")
    return found


def placed(world: World, service: str, instance: str | None, tenement: str | None) -> tuple[tuple[str, str, str], ...]:
    """Return (machine, service, id) of what is asked for, in the fleet's order; Missing when there is none.

    *tenement* is a machine's name or that of the [tenement.X] it is one of.
    """
    everywhere = [(machine, t.name, each) for machine, t, s, each in world.placed() if s.name == service]
    if not everywhere:
        raise no_service(world, service)
    here = [(machine, each) for machine, name, each in everywhere if tenement in (None, machine, name)]
    if not here:
        raise Missing(f"{service} is not on {tenement}", hint=f"it is on {_listed(m for m, _, _ in everywhere)}")
    chosen = tuple((machine, service, each) for machine, each in here if instance in (None, each))
    if not chosen:
        raise Missing(f"{service} has no instance {instance!r}", hint=f"its ids: {_listed(each for _, each in here)}")
    return chosen


def _listed(names: Iterable[str]) -> str:
    return ", ".join(list(dict.fromkeys(names))[:10])


def _check_request_id(request_id: str) -> None:
    if not REQUEST_ID.fullmatch(request_id):
        raise ConfigError("request_id is not 32 hex digits, a colon and the last ledger seq seen")
