"""The API's routes about the desire: the fleet, its revisions, and stop, start, restart. All that commits is here."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

import msgspec

from slum import api
from slum.errors import ConfigError, Conflict
from slum.frozen import Frozen
from slum.ledger.commands import Done, SetDesired, SetOverride, pack_fleet
from slum.server.admission import admit
from slum.server.control import rejection
from slum.server.explain import no_service
from slum.server.problems import Missing
from slum.server.route import Call
from slum.server.view import World

FLEET_BYTES_MAX = 16 << 20
VERBS = ("stop", "start", "restart")
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
    if world.revision > 0 and world.fleet.name != asked.fleet.name:
        raise Conflict(
            f"this control plane holds the fleet {world.fleet.name!r}, not {asked.fleet.name!r}",
            hint="one control plane holds one fleet: name it so in [fleet], or use another --data-dir and --run-dir",
        )
    admit(asked.fleet, control.blobs, control.hub.seen, await control.link.members())
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
    """Stop, start or restart instances, beside their release; `stop` holds until `start`."""
    asked: api.ActionRequest = call.body
    _check_request_id(asked.request_id)
    if asked.verb not in VERBS:
        raise ConfigError(f"{asked.verb!r} is none of {', '.join(VERBS)}")
    control = call.control
    chosen = placed(control.world(), asked.service, asked.id, asked.tenement)
    result = await control.commit(
        SetOverride(verb=asked.verb, instances=chosen), asked.request_id, call.peer.actor(asked.host)
    )
    if not isinstance(result, Done):
        raise rejection(result)
    return api.Acted(seq=result.seq, instances=tuple("/".join(key) for key in chosen))


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
