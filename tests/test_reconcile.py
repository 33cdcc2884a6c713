"""Which machines are made and destroyed: the pure decision by example and by property, then the loop against a real ledger."""

from __future__ import annotations

import os
import signal

import httpx
from fakes.agent import FakeAgent
from hypothesis import given
from hypothesis import strategies as st
from server_support import Plane, a_fleet, a_service, applied, eventually, get

from slum import api, wire
from slum.model import Fleet
from slum.node.keeperclient import start_detached
from slum.operators.base import Machine
from slum.server.decide import Create, Destroy, Known, Recognise, Situation, Wanted, decide, key_of

HERE = Wanted(machine="here", tenement="here", operator="local")


def known(state: str, *, machine: str = "here", incarnation: int = 1, id: str = "local:m1", **fields: object) -> Known:
    base = {"machine": machine, "tenement": machine, "operator": "local", "incarnation": incarnation, "state": state}
    return Known(**{**base, "machine_id": id, "action": "a1", "arrives_until": 0.0, **fields})  # type: ignore[arg-type]


def seen(machine: str = "here", incarnation: int = 1, id: str = "local:m1") -> Machine:
    return Machine(id=id, cluster="c", key=key_of(machine, incarnation), machine=machine, tenement=machine)


def situation(*wanted: Wanted, **fields: object) -> Situation:
    base = {
        "wanted": wanted,
        "known": (),
        "observed": {"local": ()},
        "settled_at": {"local": 50.0},
        "hosts": {"local": "local:m1"},
    }
    return Situation(**{**base, **fields})  # type: ignore[arg-type]


def create(machine: str = "here", incarnation: int = 1) -> Create:
    return Create(machine=machine, tenement=machine, operator="local", incarnation=incarnation)


def destroy(machine: str = "here", incarnation: int = 1, id: str = "local:m1") -> Destroy:
    return Destroy(machine=machine, tenement=machine, operator="local", incarnation=incarnation, machine_id=id)


def test_a_wanted_machine_is_created() -> None:
    assert decide(situation(HERE)) == (create(),)


def test_a_machine_that_is_there_is_left_alone() -> None:
    assert decide(situation(HERE, known=(known("created"),), observed={"local": (seen(),)})) == ()


def test_an_operator_that_does_not_answer_gets_no_action() -> None:
    assert decide(situation(HERE, observed={})) == ()
    assert decide(situation(known=(known("created"),), observed={}, drained=frozenset({"here"}))) == ()


def test_one_silent_operator_does_not_hold_up_another() -> None:
    far = Wanted(machine="far", tenement="far", operator="fly")
    assert decide(situation(far, HERE)) == (create(),)


def test_a_machine_deleted_by_hand_is_made_again() -> None:
    assert decide(situation(HERE, known=(known("created"),))) == (create(),)


def test_an_unknown_outcome_is_settled_by_what_is_seen() -> None:
    open_intent = known("creating", id="")
    found = decide(situation(HERE, known=(open_intent,), observed={"local": (seen(),)}))
    assert found == (Recognise(machine="here", action="a1", machine_id="local:m1"),)
    assert decide(situation(HERE, known=(open_intent,))) == (create(),)


def test_a_failed_creation_is_tried_again_with_the_same_incarnation() -> None:
    assert decide(situation(HERE, known=(known("failed", id=""),))) == (create(),)


def test_an_unwanted_machine_is_destroyed_only_when_drained() -> None:
    left = situation(known=(known("created"),), observed={"local": (seen(),)})
    assert decide(left) == ()
    drained = situation(known=(known("created"),), observed={"local": (seen(),)}, drained=frozenset({"here"}))
    assert decide(drained) == (destroy(),)


def test_a_destroy_without_outcome_is_tried_again_even_if_the_name_is_wanted_again() -> None:
    assert decide(situation(HERE, known=(known("destroying"),))) == (destroy(),)


def test_a_destroyed_name_comes_back_as_a_higher_incarnation() -> None:
    assert decide(situation(HERE, known=(known("destroyed", incarnation=3),))) == (create(incarnation=4),)


def test_a_creation_that_may_still_arrive_is_not_forgotten_before_its_deadline() -> None:
    unknown = (known("creating", id="", arrives_until=100.0),)
    assert decide(situation(known=unknown, settled_at={"local": 99.0})) == ()
    assert decide(situation(known=unknown, settled_at={"local": 101.0})) == (destroy(id=""),)


def test_a_machine_that_is_there_may_be_made_once_more_by_an_earlier_call_and_so_is_not_destroyed_yet() -> None:
    made = (known("created", arrives_until=100.0),)
    left = {"known": made, "observed": {"local": (seen(),)}, "drained": frozenset({"here"})}
    assert decide(situation(**left, settled_at={"local": 99.0})) == ()  # type: ignore[arg-type]
    assert decide(situation(**left, settled_at={"local": 101.0})) == (destroy(),)  # type: ignore[arg-type]


def test_what_is_not_there_needs_no_draining() -> None:
    assert decide(situation(known=(known("created"),))) == (destroy(),)


def test_a_local_machine_is_left_before_it_is_taken_under_another_name() -> None:
    there = Wanted(machine="there", tenement="there", operator="local")
    old = known("created")
    assert decide(situation(there, known=(old,), observed={"local": (seen(),)})) == ()
    assert decide(situation(there, known=(known("destroying"),))) == (destroy(),)
    assert decide(situation(there, known=(known("destroyed"),))) == (create("there"),)


def test_a_machine_moves_to_another_operator_by_leaving_the_old() -> None:
    moved = Wanted(machine="here", tenement="here", operator="other")
    where = {"local": (seen(),), "other": ()}
    assert decide(situation(moved, known=(known("created"),), observed=where)) == ()
    drained = situation(moved, known=(known("created"),), observed=where, drained=frozenset({"here"}))
    assert decide(drained) == (destroy(),)


def test_a_resting_machine_gets_no_action() -> None:
    assert decide(situation(HERE, resting=frozenset({"here"}))) == ()


NAMES = ("a", "b", "c")
STATES = ("creating", "created", "failed", "destroying", "destroyed")


@st.composite
def situations(draw: st.DrawFn) -> Situation:
    wanted = draw(st.sets(st.sampled_from(NAMES)))
    rows = draw(st.lists(st.sampled_from(NAMES), unique=True))
    known_rows = tuple(
        known(
            draw(st.sampled_from(STATES)),
            machine=name,
            incarnation=draw(st.integers(1, 3)),
            id=draw(st.sampled_from(("", name))),
            arrives_until=draw(st.sampled_from((0.0, 100.0))),
        )
        for name in rows
    )
    there = tuple(seen(r.machine, r.incarnation, r.machine) for r in known_rows if draw(st.booleans()))
    return situation(
        *(Wanted(machine=name, tenement=name, operator="local") for name in sorted(wanted)),
        known=known_rows,
        observed={"local": there} if draw(st.booleans()) else {},
        settled_at={"local": draw(st.sampled_from((50.0, 150.0)))},
        hosts={"local": "h"} if draw(st.booleans()) else {},
        drained=frozenset(draw(st.sets(st.sampled_from(NAMES)))),
        resting=frozenset(draw(st.sets(st.sampled_from(NAMES)))),
    )


@given(situations())
def test_decisions_keep_the_rules(now: Situation) -> None:
    actions = decide(now)
    assert decide(now) == actions
    rows = {row.machine: row for row in now.known}
    wanted = {want.machine for want in now.wanted}
    there = {(m.machine, int(m.key.rpartition(".")[2])) for m in now.observed.get("local", ())}
    assert len({a.machine for a in actions}) == len(actions)
    assert not {a.machine for a in actions} & now.resting
    if not now.observed:
        assert actions == ()
    for action in actions:
        row = rows.get(action.machine)
        match action:
            case Create():
                assert action.machine in wanted
                assert row is None or row.state not in ("destroying",)
                if row is not None and row.state == "destroyed":
                    assert action.incarnation > row.incarnation
            case Destroy():
                assert row is not None
                assert row.state != "destroyed"
                assert row.state == "destroying" or action.machine not in wanted
                if row.state != "destroying":
                    assert row.arrives_until < now.settled_at["local"]
                    assert action.machine in now.drained or (action.machine, row.incarnation) not in there
            case Recognise():
                assert row is not None
                assert row.state == "creating"


@given(situations())
def test_doing_what_was_decided_arrives(start: Situation) -> None:
    """With every call succeeding and every machine drained, the fleet is as wanted after a few rounds."""
    rows = {row.machine: row for row in start.known}
    there = {(r.machine, r.incarnation) for r in start.known if r.state == "created"}
    wanted = {want.machine for want in start.wanted}
    for _ in range(12):
        actions = decide(
            situation(
                *start.wanted,
                known=tuple(rows.values()),
                observed={"local": tuple(seen(name, number, name) for name, number in sorted(there))},
                settled_at={"local": 1000.0},
                hosts={},
                drained=frozenset(NAMES),
            )
        )
        for action in actions:
            match action:
                case Create():
                    there.add((action.machine, action.incarnation))
                    rows[action.machine] = known(
                        "created", machine=action.machine, incarnation=action.incarnation, id=action.machine
                    )
                case Destroy():
                    there.discard((action.machine, action.incarnation))
                    rows[action.machine] = known("destroyed", machine=action.machine, incarnation=action.incarnation)
                case Recognise():
                    rows[action.machine] = known(
                        "created",
                        machine=action.machine,
                        incarnation=rows[action.machine].incarnation,
                        id=action.machine,
                    )
    assert {name for name, row in rows.items() if row.state != "destroyed"} == wanted
    assert {name for name, _ in there} == wanted


# --- the loop, with a real ledger, server and keeper ------------------------------------------------------------------


async def state_of(http: httpx.AsyncClient, machine: str) -> str:
    status = await get(http, "status", api.Status)
    return next((t.state for t in status.tenements if t.name == machine), "gone")


async def kinds(http: httpx.AsyncClient) -> list[str]:
    events = await get(http, "events", tuple[api.Event, ...], limit=1000)
    return [event.kind for event in events if event.kind.startswith("machine_")]


async def test_a_tenement_comes_and_goes(plane: Plane, http: httpx.AsyncClient) -> None:
    await applied(http, a_fleet(a_service()))
    async with FakeAgent(plane.home.api_socket) as agent:
        await agent.until(lambda a: a.desired)
        assert await state_of(http, "here") == "ready"
        assert b'"tenement":"here"' in plane.home.identity.read_bytes()

        await applied(http, a_fleet(tenement=""), 1)
        last = await agent.until(lambda a: a.desired[-1] if len(a.desired) > 1 else None)
        assert last.services == ()
        await agent.until(lambda a: a.ended)
    await eventually(lambda: gone(http))
    assert not plane.home.identity.exists()
    assert await kinds(http) == [
        "machine_create_intended",
        "machine_created",
        "machine_destroy_intended",
        "machine_destroyed",
    ]


async def gone(http: httpx.AsyncClient) -> bool:
    return await state_of(http, "here") == "gone"


async def test_a_machine_is_not_destroyed_while_its_services_run(plane: Plane, http: httpx.AsyncClient) -> None:
    await applied(http, a_fleet(a_service()))
    async with FakeAgent(plane.home.api_socket) as agent:
        await agent.until(lambda a: a.instances)
        agent.obedient = False
        await applied(http, a_fleet(tenement=""), 1)
        await agent.until(lambda a: len(a.desired) > 1)
        await agent.report(agent.instances["notes", "main"])
        assert await state_of(http, "here") == "draining"
        await agent.say(wire.Note(kind="still_here", service="notes", id="main", at=1.0, detail=""))
        await eventually(lambda: said(http, "still_here"))
        assert "machine_destroy_intended" not in await kinds(http)
        agent.instances.clear()
        await agent.report(full=True)
        await eventually(lambda: gone(http))


async def said(http: httpx.AsyncClient, kind: str) -> bool:
    return bool(await get(http, "events", tuple[api.Event, ...], kind=kind))


async def test_a_renamed_local_tenement_is_left_then_taken(plane: Plane, http: httpx.AsyncClient) -> None:
    await applied(http, a_fleet(a_service()))
    async with FakeAgent(plane.home.api_socket) as agent:
        await agent.until(lambda a: a.instances)
        await applied(http, a_fleet(a_service(), tenement="there"), 1)
        await agent.until(lambda a: a.ended)
    await eventually(lambda: is_joining(http))
    assert b'"tenement":"there"' in plane.home.identity.read_bytes()
    async with FakeAgent(plane.home.api_socket, tenement="there") as agent:
        assert (await agent.until(lambda a: a.desired))[-1].tenement == "there"


async def is_joining(http: httpx.AsyncClient) -> bool:
    return await state_of(http, "there") in ("joining", "unknown")


async def test_an_identity_removed_by_hand_is_written_again(plane: Plane, http: httpx.AsyncClient) -> None:
    await applied(http, a_fleet(a_service()))
    await eventually(lambda: exists(plane))
    plane.home.identity.unlink()
    plane.kill("server")
    plane.start("server")
    await plane.ready()
    await eventually(lambda: exists(plane))


async def exists(plane: Plane) -> bool:
    return plane.home.identity.exists()


async def test_a_server_killed_at_any_moment_of_a_creation_finishes_it_later(
    plane: Plane, http: httpx.AsyncClient
) -> None:
    for revision in range(3):
        fleet: Fleet = a_fleet(a_service(memory_limit_mb=64 + revision))
        await applied(http, fleet, revision)
        plane.kill("server")
        plane.start("server")
        await plane.ready()
    await eventually(lambda: exists(plane))
    async with FakeAgent(plane.home.api_socket) as agent:
        await agent.until(lambda a: a.desired)
    assert (await kinds(http)).count("machine_created") == 1


async def test_without_a_keeper_the_trouble_is_told_and_tried_again(plane: Plane, http: httpx.AsyncClient) -> None:
    os.kill(plane.keeper.pid, signal.SIGKILL)
    await applied(http, a_fleet(a_service()))

    async def trouble() -> str:
        status = await get(http, "status", api.Status)
        return status.tenements[0].detail

    async def told() -> bool:
        return "agent cannot be started" in await trouble()

    await eventually(told)
    start_detached(plane.home)
    await eventually(lambda: is_created(http))


async def is_created(http: httpx.AsyncClient) -> bool:
    return await state_of(http, "here") in ("joining", "unknown", "ready")
