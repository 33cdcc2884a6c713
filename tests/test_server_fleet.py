"""The desire over HTTP: applying, conflicts, what is refused and why, revisions, stop, start and restart."""

from __future__ import annotations

import hashlib

import httpx
import msgspec
import pytest
from fakes.agent import FakeAgent
from server_support import Plane, a_fleet, a_service, applied, get, problem, put, request_id

from slum import api
from slum.model import Fleet, FlyOperator, Level, Tenement


async def test_an_empty_control_plane_is_at_revision_0(http: httpx.AsyncClient) -> None:
    doc = await get(http, "fleet", api.FleetDoc)
    assert (doc.revision, doc.fleet) == (0, Fleet())
    assert await get(http, "revisions", tuple[api.Revision, ...]) == ()


async def test_apply_commits_once_and_names_the_actor(http: httpx.AsyncClient) -> None:
    fleet = a_fleet(a_service())
    answer = await put(http, fleet, 0, host="laptop", why="first")
    done = msgspec.json.decode(answer.content, type=api.Applied)
    assert (done.revision, done.changed) == (1, True)
    doc = await get(http, "fleet", api.FleetDoc)
    assert doc.fleet == fleet
    assert doc.actor.endswith("@laptop")
    again = await applied(http, fleet, 1)
    assert (again.revision, again.changed) == (1, False)
    (revision,) = await get(http, "revisions", tuple[api.Revision, ...])
    assert (revision.revision, revision.why) == (1, "first")


async def test_the_same_request_id_gives_the_first_answer(http: httpx.AsyncClient) -> None:
    same = request_id()
    first = await put(http, a_fleet(a_service()), 0, request_id=same)
    second = await put(http, a_fleet(a_service()), 0, request_id=same)
    assert (first.status_code, second.status_code) == (200, 200)
    assert first.json()["revision"] == second.json()["revision"] == 1


async def test_a_stale_revision_is_a_conflict_that_says_what_changed(http: httpx.AsyncClient) -> None:
    await applied(http, a_fleet(a_service(memory_limit_mb=256)))
    await put(http, a_fleet(a_service(memory_limit_mb=512)), 1, host="ops")
    answer = await put(http, a_fleet(a_service(memory_limit_mb=128)), 1)
    assert answer.status_code == 409
    found = problem(answer)
    assert found.code == "conflict"
    assert "revision is 2, your plan was made on 1" in found.message
    assert any(line.endswith("@ops changed service notes.memory_limit_mb 256 -> 512") for line in found.details), found
    assert (await get(http, "fleet", api.FleetDoc)).revision == 2


async def test_another_fleets_name_is_a_conflict(http: httpx.AsyncClient) -> None:
    await applied(http, a_fleet(a_service()))
    answer = await put(http, a_fleet(a_service(), name="other"), 1)
    assert answer.status_code == 409
    assert "holds the fleet 'test', not 'other'" in problem(answer).message


async def test_every_problem_is_named_at_once_and_nothing_is_committed(http: httpx.AsyncClient) -> None:
    bad = a_fleet(a_service(memory_limit_mb=-1), a_service("Bad Name"))
    answer = await put(http, bad, 0)
    assert answer.status_code == 400
    details = "\n".join(problem(answer).details)
    assert "memory_limit_mb" in details
    assert "Bad Name" in details
    assert (await get(http, "fleet", api.FleetDoc)).revision == 0


async def test_a_bundle_that_was_not_uploaded_is_refused(http: httpx.AsyncClient) -> None:
    data = b"bundle"
    digest = hashlib.sha256(data).hexdigest()
    fleet = a_fleet(a_service(source="./app", bundle=digest))
    answer = await put(http, fleet, 0)
    assert answer.status_code == 400
    assert "was not uploaded" in problem(answer).details[0]
    assert (await http.put(f"/v1/blobs/{digest}", content=data)).status_code == 201
    await applied(http, fleet)


async def test_machines_elsewhere_need_a_control_plane_that_they_can_reach(http: httpx.AsyncClient) -> None:
    fly = FlyOperator(name="prod", org="me", region="iad")
    unused = msgspec.structs.replace(a_fleet(a_service()), operators=(*a_fleet().operators, fly))
    await applied(http, unused)
    used = msgspec.structs.replace(unused, tenements=(*unused.tenements, Tenement(name="far", operator="prod")))
    answer = await put(http, used, 1)
    assert answer.status_code == 400
    assert problem(answer).details == (
        "tenement.far.operator: its machines join over the network, and this control plane is reachable from its own machine"
        " only: `slum server init --address HOST` opens it",
    )


async def test_a_level_that_the_machine_lacks_is_refused_once_that_is_known(
    plane: Plane, http: httpx.AsyncClient
) -> None:
    await applied(http, a_fleet(a_service()))
    async with FakeAgent(plane.home.api_socket) as agent:
        await agent.until(lambda a: a.desired)
        answer = await put(http, a_fleet(a_service(isolation=Level.SANDBOX, image="x")), 1)
        assert answer.status_code == 400
        assert "runsc not found; apt install runsc" in "\n".join(problem(answer).details)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"fleet": 1}', b"[" * 100_000])
async def test_a_body_that_is_no_request_is_bad_input(http: httpx.AsyncClient, body: bytes) -> None:
    answer = await http.put("/v1/fleet", content=body)
    assert answer.status_code == 400
    assert problem(answer).code == "bad_input"


async def test_a_field_that_the_api_does_not_know_is_refused_with_the_nearest(http: httpx.AsyncClient) -> None:
    asked = api.ApplyRequest(fleet=a_fleet(a_service()), base_revision=0, request_id=request_id())
    body = msgspec.to_builtins(asked)
    body["wy"] = "a slip"
    body["fleet"]["tenements"][0]["services"][0]["memory_limit"] = 64
    body["fleet"]["operators"][0]["membr"] = "m1"
    answer = await http.put("/v1/fleet", content=msgspec.json.encode(body))
    assert answer.status_code == 400
    assert sorted(problem(answer).details) == [
        "fleet.operators[0].membr: unknown field; did you mean `member`?",
        "fleet.tenements[0].services[0].memory_limit: unknown field; did you mean `memory_limit_mb`?",
        "wy: unknown field; did you mean `why`?",
    ]
    assert (await get(http, "fleet", api.FleetDoc)).revision == 0
    act = {"verb": "stop", "service": "notes", "request_id": request_id(), "force": True}
    answer = await http.post("/v1/actions", content=msgspec.json.encode(act))
    assert (answer.status_code, problem(answer).message) == (400, "force: unknown field")


async def test_a_body_over_the_cap_is_refused(http: httpx.AsyncClient) -> None:
    answer = await http.put("/v1/fleet", content=b" " * ((16 << 20) + 1))
    assert answer.status_code == 413
    assert (await http.post("/v1/actions", content=b" " * (65 << 10))).status_code == 413


async def test_old_revisions_can_be_read(http: httpx.AsyncClient) -> None:
    await applied(http, a_fleet(a_service()))
    await applied(http, a_fleet(a_service(), a_service("other")), 1)
    first = await get(http, "fleet", api.FleetDoc, revision=1)
    assert [s.name for s in first.fleet.tenements[0].services] == ["notes"]
    answer = await http.get("/v1/fleet", params={"revision": "9"})
    assert answer.status_code == 404
    assert "no revision 9" in problem(answer).message


async def act(http: httpx.AsyncClient, verb: str, service: str, **fields: str) -> httpx.Response:
    asked = api.ActionRequest(verb=verb, service=service, request_id=request_id(), **fields)  # type: ignore[arg-type]
    return await http.post("/v1/actions", content=msgspec.json.encode(asked))


async def test_stop_start_restart_become_overrides(http: httpx.AsyncClient) -> None:
    await applied(http, a_fleet(a_service(instances=("a", "b"))))
    answer = await act(http, "stop", "notes", id="b")
    assert answer.json()["instances"] == ["here/notes/b"]
    assert (await act(http, "restart", "notes")).json()["instances"] == ["here/notes/a", "here/notes/b"]
    state = await get(http, "state", api.State)
    overrides = {o.id: o for o in state.overrides["here"]}
    assert (overrides["a"].restarts, overrides["b"].restarts) == (1, 1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"service": "note"}, "did you mean 'notes'?"),
        ({"service": "notes", "id": "x"}, "has no instance 'x'"),
        ({"service": "notes", "tenement": "there"}, "notes is not on there"),
    ],
)
async def test_what_is_not_there_is_named(http: httpx.AsyncClient, fields: dict[str, str], message: str) -> None:
    await applied(http, a_fleet(a_service()))
    answer = await act(http, "stop", **fields)  # type: ignore[arg-type]
    assert answer.status_code == 404
    assert message in problem(answer).message


async def test_an_unknown_verb_is_bad_input(http: httpx.AsyncClient) -> None:
    await applied(http, a_fleet(a_service()))
    answer = await act(http, "explode", "notes")
    assert answer.status_code == 400
    assert "none of stop, start, restart" in problem(answer).message
