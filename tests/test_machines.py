"""Machines beyond services: draining one, listing what operators have, asking providers about a fleet before it is applied."""

from __future__ import annotations

import os

import httpx
import msgspec
from fakes.agent import FakeAgent
from fakes.hetzner import FakeHetzner
from server_support import Plane, a_fleet, a_service, applied, eventually, get, request_id

from slum import api
from slum.ledger.reader import MachineRow
from slum.model import Fleet, HetznerOperator, Tenement
from slum.operators import registry
from slum.operators.base import Machine
from slum.server.control import Sight
from slum.server.observed import machines
from slum.server.view import World


async def act(http: httpx.AsyncClient, verb: str, tenement: str) -> httpx.Response:
    asked = api.ActionRequest(verb=verb, tenement=tenement, request_id=request_id())
    return await http.post("/v1/actions", content=msgspec.json.encode(asked))


async def test_a_drained_machine_is_told_to_stop_everything_also_what_is_declared_later(
    plane: Plane, http: httpx.AsyncClient
) -> None:
    await applied(http, a_fleet(a_service(instances=("a", "b"))))
    async with FakeAgent(plane.home.api_socket) as agent:
        await agent.until(lambda a: a.desired)
        answer = await act(http, "drain", "here")
        assert answer.json()["instances"] == ["here/notes/a", "here/notes/b"]
        told = await agent.until(lambda a: a.desired[-1] if a.desired[-1].overrides else None)
        assert [(o.service, o.id, o.stopped) for o in told.overrides] == [("notes", "a", True), ("notes", "b", True)]
        assert (await get(http, "status", api.Status)).tenements[0].state == "drained"

        await applied(http, a_fleet(a_service(), a_service("later")), 1)
        told = await agent.until(lambda a: a.desired[-1] if len(a.desired[-1].services) == 2 else None)
        assert all(o.stopped for o in told.overrides)
        assert [o.service for o in told.overrides] == ["notes", "later"]

        await act(http, "undrain", "here")
        await agent.until(lambda a: not any(o.stopped for o in a.desired[-1].overrides))
    kinds = [e.kind for e in await get(http, "events", tuple[api.Event, ...], limit=1000)]
    assert kinds.index("tenement_drained") < kinds.index("tenement_undrained")


async def test_draining_keeps_what_was_stopped_by_hand_stopped(plane: Plane, http: httpx.AsyncClient) -> None:
    await applied(http, a_fleet(a_service(), a_service("other")))
    stop = api.ActionRequest(verb="stop", service="other", request_id=request_id())
    assert (await http.post("/v1/actions", content=msgspec.json.encode(stop))).status_code == 200
    async with FakeAgent(plane.home.api_socket) as agent:
        await act(http, "drain", "here")
        await agent.until(lambda a: len(a.desired[-1].overrides) == 2 if a.desired else False)
        await act(http, "undrain", "here")
        await agent.until(lambda a: [o.service for o in a.desired[-1].overrides if o.stopped] == ["other"])


async def test_draining_an_unknown_machine_names_the_nearest(http: httpx.AsyncClient) -> None:
    await applied(http, a_fleet(a_service()))
    answer = await act(http, "drain", "heer")
    assert answer.status_code == 404
    assert "there is no tenement 'heer'; did you mean `here`?" in answer.text


async def test_machines_are_listed_with_what_their_operator_sees(plane: Plane, http: httpx.AsyncClient) -> None:
    await applied(http, a_fleet(a_service()))

    async def seen() -> bool:
        found = await get(http, "machines", tuple[api.MachineView, ...])
        return [(m.name, m.id, m.state, m.drift) for m in found] == [("here", "local:m1", "created", "")] and (
            found[0].seen_s is not None
        )

    await eventually(seen)


def row(machine: str, state: str, incarnation: int = 1) -> MachineRow:
    return MachineRow(
        machine=machine,
        tenement="w",
        operator="eu",
        incarnation=incarnation,
        state=state,
        machine_id=f"slum-x-{machine}-{incarnation}",
        action="a",
        deadline_at=0.0,
        arrives_until=0.0,
    )


def test_strays_gone_and_left_machines_are_told_apart() -> None:
    rows = (row("w-1", "created"), row("w-2", "created"), row("w-3", "destroyed"))
    world = World(
        seq=1,
        cluster=None,  # type: ignore[arg-type]  # not looked at
        machines={r.machine: r for r in rows if r.state != "destroyed"},
        rows=rows,
    )

    def there(key: str, machine: str) -> Machine:
        return Machine(id=f"id-{machine}", cluster="c", key=key, machine=machine, tenement="w", created_at=5.0)

    sight = Sight((there("w-1.1", "w-1"), there("w-3.1", "w-3"), there("", "copy")), 90.0, 120.0, 0.0)
    found = machines(world, {"eu": sight}, {"w-2": "no room"}, 100.0)
    assert [(m.name, m.drift, m.created_at, m.detail) for m in found] == [
        ("w-1", "", 5.0, ""),
        ("w-2", "gone", None, "no room"),
        ("w-3", "left", 5.0, "destroyed, and still there"),
        ("copy", "stray", 5.0, "never asked for by this control plane; slum does not touch it"),
    ]
    assert {m.seen_s for m in found} == {10.0}
    silent = machines(world, {"eu": Sight(None, 90.0, 120.0, 0.0)}, {}, 100.0)
    assert [(m.name, m.drift, m.seen_s) for m in silent] == [("w-1", "", None), ("w-2", "", None)]


def cloud_fleet(**fields: str) -> Fleet:
    operator = HetznerOperator(**{"name": "eu", "location": "fsn1", "server_type": "cx23", **fields})  # type: ignore[arg-type]
    return Fleet(name="test", operators=(operator,), tenements=(Tenement(name="far", operator="eu"),))


async def check(http: httpx.AsyncClient, fleet: Fleet) -> api.FleetCheck:
    answer = await http.post("/v1/fleet/check", content=msgspec.json.encode(fleet))
    assert answer.status_code == 200, answer.text
    return msgspec.json.decode(answer.content, type=api.FleetCheck)


async def test_a_provider_is_asked_about_a_fleet_before_it_is_applied(plane: Plane, http: httpx.AsyncClient) -> None:
    missing = await check(http, cloud_fleet())
    assert missing.problems == ("operators.eu: the variable HCLOUD_TOKEN holds no token",)
    fake = FakeHetzner()
    with fake.serving() as url:
        file = registry.secret_file(plane.home)
        file.write_text(f"HCLOUD_TOKEN={fake.token}\nHCLOUD_ENDPOINT={url}/v1\n")
        os.chmod(file, 0o600)
        assert await check(http, cloud_fleet()) == api.FleetCheck()
        wrong = await check(http, cloud_fleet(server_type="cx24"))
        assert len(wrong.problems) == 1
        assert wrong.problems[0].startswith("operators.eu.server_type: ")
        assert "cx23" in wrong.problems[0]
        assert not fake.mutations()
    gone = await check(http, cloud_fleet())
    assert gone.problems == ()
    assert gone.warnings[0].startswith("operators.eu: Hetzner: ")
