"""Supervision decided purely: examples of each rule, and properties over random fleets, crashes and changes."""

from __future__ import annotations

import dataclasses
import itertools

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from supervise_world import Nature, World

from slum.model import Deploy, Key, Listen, Restart, Service
from slum.node.actions import Drain, GiveUp, Publish, Start, Terminate, Unpublish
from slum.node.observed import Draining, Ready, rebooted
from slum.node.supervise import waits_for

WEB = Key(tenement="t", service="web", id="main")
WEB_SERVICE = Service(name="web", command=("web",), drain_timeout_s=5, stop_timeout_s=2, startup_timeout_s=3)
DEAD = Nature(healthy_after=None, exits_after=0.05, status=2)


def web(**changes: object) -> Service:
    return msgspec.structs.replace(WEB_SERVICE, **changes)


def running(service: Service = WEB_SERVICE, release: str = "r1", **natures: Nature) -> World:
    """A world in which *release* of *service* was started and serves."""
    world = World(natures=dict(natures))
    world.want(service, release)
    world.run(2)
    assert world.serving(WEB) is not None
    world.done.clear()
    return world


def test_a_start_is_published_when_healthy_and_then_nothing_is_left_to_do() -> None:
    world = running()
    generation = world.serving(WEB)
    assert generation is not None
    assert (generation.number, generation.release) == (1, "r1")
    world.run(100)
    assert world.done == []


def test_an_overlapping_deploy_publishes_first_then_drains_then_stops() -> None:
    world = running()
    world.want(WEB_SERVICE, "r2")
    world.run(10)
    order = [type(a) for a in world.done if isinstance(a, Start | Publish | Drain | Terminate | Unpublish)]
    assert order == [Start, Publish, Drain, Terminate]
    assert world.living(WEB) == ["r2"]


def test_drain_ends_at_its_timeout_and_stop_at_sigkill() -> None:
    world = running(r1=Nature(quiet_after=1e9, stops_after=None))
    world.want(WEB_SERVICE, "r2")
    world.run(1)
    assert world.living(WEB) == ["r1", "r2"]
    world.run(4.5)
    assert world.living(WEB) == ["r1", "r2"]
    world.run(2.5)
    assert world.living(WEB) == ["r2"]


@pytest.mark.parametrize(
    "service", [web(deploy=Deploy.REPLACE), web(listen=Listen.PORT, port=9000), web(socket="/x.sock")]
)
def test_a_replacing_deploy_never_has_two_alive(service: Service) -> None:
    world = running(service)
    world.want(service, "r2")
    for _ in range(60):
        world.run(0.1)
        assert len(world.living(WEB)) <= 1
    assert world.living(WEB) == ["r2"]
    assert world.serving(WEB) is not None


def test_a_failing_overlap_leaves_the_old_generation_serving() -> None:
    world = running(bad=DEAD)
    world.want(WEB_SERVICE, "bad")
    for _ in range(300):
        world.run(0.1)
        serving = world.serving(WEB)
        assert serving is not None
        assert serving.release == "r1"
    starts = [a for a in world.done if isinstance(a, Start)]
    assert len(starts) == 1 + world.settings.max_restarts
    marks = [a.mark for a in world.done if isinstance(a, GiveUp)]
    assert [m.release for m in marks] == ["bad"]
    assert marks[0].why.startswith("exit 2, 4 times in ")


def test_a_failing_replacement_starts_the_last_healthy_release_again() -> None:
    service = web(deploy=Deploy.REPLACE)
    world = running(service, bad=DEAD)
    world.want(service, "bad")
    world.run(20)
    assert world.living(WEB) == ["r1"]
    assert world.serving(WEB) is not None
    world.want(service, "r3")
    world.run(5)
    assert world.living(WEB) == ["r3"]


def test_a_given_up_release_is_tried_again_by_a_restart_and_by_a_new_release() -> None:
    world = World(natures={"bad": DEAD})
    world.want(WEB_SERVICE, "bad")
    world.run(60)
    assert world.living(WEB) == []
    tried = len(world.done)
    world.run(1000)
    assert len(world.done) == tried
    world.want(WEB_SERVICE, "bad", restarts=1)
    world.run(0.01)
    assert world.living(WEB) == ["bad"]
    world.run(60)
    world.want(WEB_SERVICE, "good")
    world.run(5)
    assert world.living(WEB) == ["good"]


def test_backoff_doubles_and_is_capped() -> None:
    world = World(natures={"bad": Nature(healthy_after=None, exits_after=0.0)})
    world.settings = msg(world.settings, max_restarts=8, backoff_base_ms=100, backoff_max_ms=1000)
    world.want(WEB_SERVICE, "bad")
    times = []
    while len(times) < 9:
        known = len([a for a in world.done if isinstance(a, Start)])
        world.run(0.01)
        if len([a for a in world.done if isinstance(a, Start)]) > known:
            times.append(world.now)
    gaps = [round(b - a, 1) for a, b in itertools.pairwise(times)]
    assert gaps == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0, 1.0, 1.0]


def test_a_service_that_crashes_now_and_then_is_restarted_for_ever() -> None:
    world = World(natures={"r1": Nature(exits_after=30.0)})
    world.want(WEB_SERVICE, "r1")
    world.run(3000)
    assert not any(isinstance(a, GiveUp) for a in world.done)
    assert len([a for a in world.done if isinstance(a, Start)]) > 90


def test_a_start_that_never_gets_healthy_counts_as_a_failure() -> None:
    world = World(natures={"r1": Nature(healthy_after=None)})
    world.want(WEB_SERVICE, "r1")
    world.run(100)
    assert world.living(WEB) == []
    assert world.observed[WEB].marks[0].why.startswith("not healthy within 3 s, 4 times")


def test_an_unhealthy_generation_is_restarted_and_in_the_end_given_up() -> None:
    world = World(natures={"r1": Nature(sick_after=1.0)})
    world.want(WEB_SERVICE, "r1")
    world.run(2)
    assert [a.why for a in world.done if isinstance(a, Terminate)] == ["unhealthy: 3 probes failed"]
    world.run(100)
    assert world.living(WEB) == []


def test_many_failures_are_counted_beyond_what_is_kept() -> None:
    world = World(natures={"bad": DEAD})
    world.settings = msg(world.settings, max_restarts=100, backoff_base_ms=1, backoff_max_ms=1)
    world.want(WEB_SERVICE, "bad")
    world.run(60)
    assert len([a for a in world.done if isinstance(a, Start)]) == 101
    assert world.observed[WEB].restarts == 100


@pytest.mark.parametrize(
    ("policy", "status", "starts"),
    [
        (Restart.ALWAYS, 0, 4),
        (Restart.ON_FAILURE, 0, 1),
        (Restart.ON_FAILURE, 1, 4),
        (Restart.NEVER, 0, 1),
        (Restart.NEVER, 1, 1),
    ],
)
def test_restart_policies(policy: Restart, status: int, starts: int) -> None:
    world = World(natures={"r1": Nature(exits_after=0.5, status=status)})
    service = web(restart=policy, listen=Listen.NONE, deploy=Deploy.REPLACE)
    world.want(service, "r1")
    world.run(100)
    assert len([a for a in world.done if isinstance(a, Start)]) == starts
    assert world.observed[WEB].restarts == starts - 1
    world.want(service, "r1", restarts=1)
    world.run(0.1)
    assert world.living(WEB) == ["r1"]
    assert world.observed[WEB].restarts == 0


def test_a_dependent_starts_after_and_stops_before() -> None:
    db = Service(name="db", command=("db",), drain_timeout_s=1, stop_timeout_s=1)
    world = World(natures={"db1": Nature(healthy_after=2.0), "r1": Nature(stops_after=0.5)})
    world.want(web(depends_on=("db",)), "r1")
    world.want(db, "db1")
    world.run(1.9)
    assert world.living(WEB) == []
    world.run(2)
    assert world.living(WEB) == ["r1"]
    world.done.clear()
    world.remove("web")
    world.remove("db")
    world.run(10)
    assert [a.key.service for a in world.done if isinstance(a, Terminate)] == ["web", "db"]
    assert world.observed == {}


def test_a_dependency_that_failed_holds_its_dependents_back() -> None:
    world = World(natures={"db1": DEAD})
    world.want(web(depends_on=("db",)), "r1")
    world.want(Service(name="db", command=("db",)), "db1")
    world.run(100)
    assert world.living(WEB) == []
    world.want(Service(name="db", command=("db",)), "db2")
    world.run(5)
    assert world.living(WEB) == ["r1"]


def test_a_finished_job_satisfies_its_dependents() -> None:
    job = Service(name="db", command=("x",), listen=Listen.NONE, restart=Restart.NEVER)
    for status, expected in ((0, ["r1"]), (1, [])):
        world = World(natures={"job": Nature(healthy_after=None, exits_after=1.0, status=status)})
        world.want(job, "job")
        world.want(WEB_SERVICE, "r0")
        world.run(5)
        want = world.wants[WEB]
        dependent = msg(want, service=web(depends_on=("db",)))
        ids = {"db": [Key(tenement="t", service="db", id="main")]}
        assert (waits_for(dependent, world.wants, world.observed.get, ids) == "") is bool(expected)


def test_a_broken_build_fails_the_release_and_leaves_the_old_one() -> None:
    world = running(bad=Nature(builds=False))
    world.want(WEB_SERVICE, "bad")
    world.run(10)
    assert world.living(WEB) == ["r1"]
    assert world.observed[WEB].marks[0].why == "build: exit 1"
    world.crash(WEB)
    world.run(5)
    assert world.living(WEB) == ["r1"]


def test_stop_and_start() -> None:
    world = running()
    world.want(WEB_SERVICE, "r1", stopped=True)
    world.run(10)
    assert world.living(WEB) == []
    assert world.observed[WEB].serving is None
    assert world.observed[WEB].sockets == ()
    world.want(WEB_SERVICE, "r1")
    world.run(1)
    assert world.living(WEB) == ["r1"]


def test_an_asked_restart_overlaps() -> None:
    world = running()
    world.want(WEB_SERVICE, "r1", restarts=1)
    world.run(0.1)
    assert world.living(WEB) == ["r1", "r1"]
    world.run(5)
    assert [g.restarts for g in world.observed[WEB].living] == [1]


def test_a_crash_reuses_the_listener_that_the_keeper_holds() -> None:
    world = running(web(listen=Listen.FD))
    world.crash(WEB)
    world.run(5)
    generation = world.serving(WEB)
    assert generation is not None
    assert (generation.number, generation.socket) == (2, 1)
    assert not any(isinstance(a, Unpublish | Publish) for a in world.done)
    assert world.observed[WEB].sockets == (1,)


def test_going_back_while_the_old_generation_drains_publishes_it_again() -> None:
    world = running(r1=Nature(quiet_after=100))
    world.want(WEB_SERVICE, "r2")
    world.run(1)
    assert isinstance(world.observed[WEB].generations[0].stage, Draining)
    world.want(WEB_SERVICE, "r1")
    world.settle()
    generation = world.serving(WEB)
    assert generation is not None
    assert generation.number == 1
    assert isinstance(generation.stage, Ready)


def test_adoption_of_what_is_as_desired_does_nothing() -> None:
    world = running()
    seen = world.observed[WEB]
    world.observed[WEB] = msg(seen, generations=tuple(msg(g, stage=Ready(since=world.now)) for g in seen.generations))
    assert world.settle() is None
    assert world.done == []


def test_a_reboot_forgives_failures_and_keeps_finished_jobs_finished() -> None:
    world = World(natures={"r1": Nature(exits_after=0.5, status=0)})
    world.want(web(restart=Restart.NEVER, listen=Listen.NONE), "r1")
    world.run(10)
    world.observed[WEB] = rebooted(world.observed[WEB], Restart.NEVER)
    world.done.clear()
    world.run(10)
    assert world.done == []
    world.observed[WEB] = rebooted(world.observed[WEB], Restart.ON_FAILURE)
    world.run(0.1)
    assert world.living(WEB) == ["r1"]


def msg(struct, **changes):  # type: ignore[no-untyped-def]
    return msgspec.structs.replace(struct, **changes)


# --- properties -------------------------------------------------------------------------------------------------------

NATURES = st.builds(
    Nature,
    healthy_after=st.sampled_from([0.1, 0.1, 0.1, 1.0, None]),
    exits_after=st.sampled_from([None, None, None, 0.05, 5.0]),
    status=st.sampled_from([0, 1]),
    stops_after=st.sampled_from([0.05, 1.0, None]),
    quiet_after=st.sampled_from([0.2, 3.0, 1e6]),
    builds=st.sampled_from([True, True, True, False]),
    sick_after=st.sampled_from([None, None, None, 2.0]),
)
SERVICES = st.builds(
    web,
    deploy=st.sampled_from(Deploy),
    listen=st.sampled_from([Listen.SOCKET, Listen.FD, Listen.NONE]),
    restart=st.sampled_from([Restart.ALWAYS, Restart.ALWAYS, Restart.ON_FAILURE, Restart.NEVER]),
    pre_deploy=st.sampled_from([None, "true"]),
)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("want"), st.sampled_from("abc"), st.sampled_from([0.0, 0.3, 2.0, 20.0])),
        st.tuples(st.just("restart"), st.just(""), st.sampled_from([0.0, 2.0])),
        st.tuples(st.just("stop"), st.just(""), st.sampled_from([0.0, 1.0, 10.0])),
        st.tuples(st.just("remove"), st.just(""), st.sampled_from([0.0, 0.5, 10.0])),
        st.tuples(st.just("crash"), st.just(""), st.sampled_from([0.0, 0.5, 10.0])),
    ),
    min_size=1,
    max_size=8,
)


def play(world: World, service: Service, steps: list[tuple[str, str, float]]) -> None:
    release, restarts = "a", 0
    world.want(service, release)
    for what, arg, wait_s in steps:
        match what:
            case "want":
                release = arg
                world.want(service, release, restarts=restarts)
            case "restart":
                restarts += 1
                world.want(service, release, restarts=restarts)
            case "stop":
                world.want(service, release, restarts=restarts, stopped=True)
            case "remove":
                world.remove("web")
            case "crash":
                world.crash(WEB)
        world.run(wait_s)


@settings(max_examples=150, deadline=None)
@given(service=SERVICES, natures=st.fixed_dictionaries(dict.fromkeys("abc", NATURES)), steps=STEPS)
def test_whatever_happens_no_rule_is_broken_and_it_settles(
    service: Service, natures: dict[str, Nature], steps: list[tuple[str, str, float]]
) -> None:
    world = World(natures=natures)
    play(world, service, steps)
    world.run(120)
    want, seen = world.wants.get(WEB), world.observed.get(WEB)
    if want is None:
        assert seen is None
        return
    assert seen is not None
    if want.stopped:
        assert world.living(WEB) == []
        return
    nature = natures[want.release]
    if nature.exits_after is None and nature.sick_after is None and nature.healthy_after is not None and nature.builds:
        serving = world.serving(WEB)
        assert serving is not None or seen.past, "a healthy release serves"
        assert world.living(WEB).count(want.release) <= 1


@settings(max_examples=100, deadline=None)
@given(
    listen=st.sampled_from([Listen.SOCKET, Listen.FD]),
    natures=st.fixed_dictionaries(dict.fromkeys("bc", NATURES)),
    steps=st.lists(
        st.tuples(st.just("want"), st.sampled_from("abc"), st.sampled_from([0.0, 0.3, 2.0, 20.0])),
        min_size=1,
        max_size=6,
    ),
)
def test_overlap_never_leaves_nobody_serving_while_the_old_one_is_healthy(
    listen: Listen, natures: dict[str, Nature], steps: list[tuple[str, str, float]]
) -> None:
    steady = {r: dataclasses.replace(n, exits_after=None, sick_after=None) for r, n in natures.items()}
    world = World(natures={"a": Nature(), **steady})
    service = web(listen=listen)
    world.want(service, "a")
    world.run(1)
    assert world.serving(WEB) is not None
    for _, release, wait_s in steps:
        world.want(service, release)
        for _ in range(max(1, int(wait_s / 0.25))):
            world.run(min(wait_s, 0.25))
            assert world.serving(WEB) is not None


@settings(max_examples=60, deadline=None)
@given(
    healthy=st.sampled_from([None, 0.1, 1.0]),
    lives=st.floats(0.0, 4.0),
    status=st.integers(1, 3),
    listen=st.sampled_from([Listen.FD, Listen.SOCKET, Listen.NONE]),
)
def test_a_crash_loop_ends_given_up(healthy: float | None, lives: float, status: int, listen: Listen) -> None:
    world = World(natures={"r1": Nature(healthy_after=healthy, exits_after=lives, status=status)})
    world.want(web(listen=listen), "r1")
    world.run(200)
    assert world.living(WEB) == []
    assert len(world.observed[WEB].marks) == 1
    assert world.observed[WEB].sockets == ()
    assert world.observed[WEB].serving is None
