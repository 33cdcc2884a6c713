"""plan: what is shown for each kind of change, what counts as drift, that secrets stay out, and that it is a function."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slum import actions, wire
from slum.actions import (
    AddOperator,
    AddService,
    AddTenement,
    Change,
    ChangeFleet,
    ChangeOperator,
    ChangeService,
    ChangeTenement,
    Counts,
    Drift,
    DriftKind,
    Plan,
    RemoveOperator,
    RemoveService,
    RemoveTenement,
)
from slum.api import InstanceView, State, TenementView
from slum.drift import Observed, SeenInstance, observed_of
from slum.model import (
    Deploy,
    EnvVar,
    Fleet,
    FlyOperator,
    Label,
    Level,
    Listen,
    LocalOperator,
    Secret,
    Service,
    Settings,
    SshHost,
    SshOperator,
    Tenement,
    release_of,
)
from slum.plan import plan
from slum.wire import Phase

DOC = (Path(__file__).resolve().parents[1] / "docs" / "plan.md").read_text()
LOCAL = LocalOperator(name="local")


def web(**fields: Any) -> Service:
    return Service(**{"name": "web", "command": ("python3", "app.py"), **fields})


def fleet(*services: Service, **fields: Any) -> Fleet:
    tenement = Tenement(**{"name": "here", "operator": "local", "services": services, **fields})
    return Fleet(name="test", operators=(LOCAL,), tenements=(tenement,))


def running(found: Fleet, **changed: SeenInstance) -> Observed:
    """All of *found* healthy, but what *changed* says by id."""
    return Observed(
        machines={machine: "ready" for t in found.tenements for machine in t.machine_names},
        instances={
            (machine, s.name, name): changed.get(name, SeenInstance(phase=Phase.HEALTHY, release=release_of(s)))
            for t in found.tenements
            for machine in t.machine_names
            for s in t.services
            for name in s.instances
        },
    )


def changes(before: Service, after: Service) -> dict[str, tuple[str, str]]:
    (action,) = plan(fleet(after), fleet(before)).actions
    assert isinstance(action, ChangeService)
    return {change.key: (change.before, change.after) for change in action.changes}


def test_a_first_apply() -> None:
    worker = web(name="worker", listen=Listen.NONE, instances=("a", "b"), isolation=Level.PROCESS)
    found = plan(fleet(web(memory_limit_mb=256), worker), Fleet())
    assert found.actions == (
        AddOperator(operator="local", type="local"),
        AddTenement(tenement="here", operator="local", type="local", machines=("here",)),
        AddService(
            tenement="here",
            service="web",
            isolation="namespace",
            listen="socket",
            memory_limit_mb=256,
            instances=("main",),
            url="http://web.localhost:8080",
        ),
        AddService(
            tenement="here",
            service="worker",
            isolation="process",
            listen="none",
            memory_limit_mb=None,
            instances=("a", "b"),
            url="",
        ),
    )
    assert (found.revision_from, found.revision_to, found.changes) == (0, 1, True)
    assert found.summary.services == Counts(add=2)
    assert found.summary.instances == Counts(add=3)


@pytest.mark.parametrize(
    ("listen", "url"),
    [
        ("127.0.0.1:8080", "http://web.localhost:8080"),
        ("0.0.0.0:80", "http://web.localhost"),
        ("[::]:443", "https://web.localhost"),
    ],
)
def test_urls(listen: str, url: str) -> None:
    added = plan(fleet(web(), routing_listen=(listen,)), Fleet()).actions[-1]
    assert isinstance(added, AddService)
    assert added.url == url


def test_nothing_to_do() -> None:
    asked = fleet(web())
    found = plan(asked, asked, running(asked), revision=7)
    assert found == Plan(
        fleet="test",
        revision_from=7,
        revision_to=7,
        changes=False,
        summary=actions.Summary(
            operators=Counts(same=1),
            tenements=Counts(same=1),
            services=Counts(same=1),
            instances=Counts(same=1),
            drift=0,
        ),
    )


def test_fields_are_told_one_by_one_in_the_words_of_the_file() -> None:
    before = web(memory_limit_mb=256, env=(EnvVar(name="A", value="1"), EnvVar(name="B", value="1")))
    after = web(
        command=("python3", "my app.py"),
        isolation=Level.PROCESS,
        drain_timeout_s=1.5,
        env=(EnvVar(name="B", value="2"), EnvVar(name="C", value="x\n\x1b[2J")),
        depends_on=("db",),
        bundle="ab" * 32,
        deploy=Deploy.REPLACE,
    )
    assert changes(before, after) == {
        "command": ('"python3 app.py"', "\"python3 'my app.py'\""),
        "isolation": ("namespace", "process"),
        "bundle": ("none", "abababababab"),
        "env.A": ('"1"', "none"),
        "env.B": ('"1"', '"2"'),
        "env.C": ("none", '"x\\n\\u001b[2J"'),
        "depends_on": ("[]", '["db"]'),
        "deploy": ("overlap", "replace"),
        "drain_timeout": ("30", "1.5"),
        "memory_limit_mb": ("256", "none"),
    }


def test_no_secret_is_ever_shown() -> None:
    before = web(
        env=(EnvVar(name="DB_PASSWORD", value="hunter2"), EnvVar(name="URL", value="pg://me:hunter2@db/x")),
        secrets=(Secret(name="KEY", source="file:/etc/hunter2"),),
    )
    after = web(
        command=("app", "--password=hunter2", "--token", "hunter2", "pg://me:hunter2@db"),
        env=(EnvVar(name="DB_PASSWORD", value="hunter2!"), EnvVar(name="API_KEY", value="hunter2")),
        secrets=(Secret(name="KEY", source="env:hunter2"), Secret(name="NEW", source="env:hunter2")),
    )
    told = changes(before, after)
    assert told["env.DB_PASSWORD"] == told["secrets.KEY"] == ("(hidden)", "(hidden)")
    assert told["env.API_KEY"] == told["secrets.NEW"] == ("none", "(hidden)")
    assert told["env.URL"] == ("(hidden)", "none")
    for pair in ((before, after), (after, before)):
        for current in (fleet(pair[0]), Fleet()):
            assert b"hunter2" not in msgspec.json.encode(plan(fleet(pair[1]), current))


def test_more_and_fewer_instances_restart_nothing() -> None:
    found = plan(fleet(web(instances=("b", "c"))), fleet(web(instances=("a", "b"))))
    assert found.actions == (
        ChangeService(
            tenement="here",
            service="web",
            changes=(),
            restarts=False,
            instances_added=("c",),
            instances_removed=("a",),
        ),
    )
    assert found.summary.instances == Counts(add=1, remove=1, same=1)


def test_the_order_of_ids_decides_who_answers_for_the_service() -> None:
    assert changes(web(instances=("a", "b")), web(instances=("b", "a"))) == {"instances": ('["a", "b"]', '["b", "a"]')}


@pytest.mark.parametrize(
    ("field", "restarts"), [({"source": "./y"}, False), ({"memory_limit_mb": 1}, True), ({"bundle": "0" * 64}, True)]
)
def test_what_restarts_is_what_makes_a_new_release(field: dict[str, Any], restarts: bool) -> None:
    before, after = web(source="./x"), web(**{"source": "./x", **field})
    (action,) = plan(fleet(after), fleet(before)).actions
    assert isinstance(action, ChangeService)
    assert action.restarts is restarts is (release_of(before) != release_of(after))


def test_removals() -> None:
    found = plan(Fleet(name="test"), fleet(web(instances=("a", "b"))))
    assert found.actions == (
        RemoveOperator(operator="local", type="local"),
        RemoveTenement(tenement="here", operator="local", machines=("here",)),
        RemoveService(tenement="here", service="web", instances=("a", "b")),
    )
    assert found.summary.instances == Counts(remove=2)


def test_operators_and_tenements_change() -> None:
    hosts = (SshHost(host="a"), SshHost(host="b", user="me", port=2222))
    before = Fleet(
        operators=(FlyOperator(name="f", org="x", region="iad"), SshOperator(name="s", hosts=hosts[:1])),
        tenements=(Tenement(name="t", operator="s", services=(web(),)),),
    )
    after = Fleet(
        domain="example.com",
        operators=(LocalOperator(name="f"), SshOperator(name="s", hosts=hosts)),
        tenements=(
            Tenement(
                name="t",
                operator="s",
                count=2,
                labels=(Label(name="a", value="b"),),
                settings=Settings(data_dir="/srv"),
                routing_listen=("0.0.0.0:80",),
                services=(web(),),
            ),
        ),
    )
    found = plan(after, before)
    assert found.actions == (
        ChangeFleet(changes=(Change(key="domain", before='"localhost"', after='"example.com"'),)),
        ChangeOperator(operator="f", changes=(Change(key="type", before="fly", after="local"),)),
        ChangeOperator(operator="s", changes=(Change(key="hosts", before="[a:22]", after="[a:22, me@b:2222]"),)),
        ChangeTenement(
            tenement="t",
            changes=(
                Change(key="count", before="1", after="2"),
                Change(key="labels.a", before="none", after='"b"'),
                Change(key="settings.data_dir", before="none", after='"/srv"'),
                Change(key="routing.listen", before='["127.0.0.1:8080", "[::1]:8080"]', after='["0.0.0.0:80"]'),
            ),
            machines_added=("t-1", "t-2"),
            machines_removed=("t",),
        ),
    )
    assert found.summary.instances == Counts(add=2, remove=1)


def test_a_larger_count_adds_machines_and_leaves_the_others() -> None:
    found = plan(fleet(web(), count=3), fleet(web(), count=2))
    assert found.summary.instances == Counts(add=1, same=2)
    assert found.summary.services == Counts(same=1)


# --- drift ------------------------------------------------------------------------------------------------------------


def drift(observed: Observed, current: Fleet, desired: Fleet | None = None) -> list[tuple[str, str, str]]:
    found = plan(desired or current, current, observed)
    assert found.changes is bool(found.drift or found.actions)
    assert found.summary.drift == len(found.drift)
    return [(d.kind, "/".join(filter(None, (d.machine, d.service, d.id))), d.detail) for d in found.drift]


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        (
            SeenInstance(phase=Phase.FAILED, release="x", detail="exit 2"),
            [("instance_failing", "here/web/main", "failed: exit 2")],
        ),
        (SeenInstance(phase=Phase.BACKOFF, release="x"), [("instance_failing", "here/web/main", "backoff")]),
        (SeenInstance(phase=Phase.UNHEALTHY, release="x"), [("instance_failing", "here/web/main", "unhealthy")]),
        (SeenInstance(phase=Phase.STARTING, release=None), []),
        (SeenInstance(phase=Phase.PENDING, release=None), []),
        (SeenInstance(phase=Phase.STOPPING, release="x"), []),
        (SeenInstance(phase=Phase.HEALTHY, release=release_of(web())), []),
        (SeenInstance(phase=Phase.DEGRADED, release=release_of(web())), []),
        (SeenInstance(phase=Phase.EXITED, release=release_of(web())), []),
    ],
)
def test_an_instance_by_its_phase(seen: SeenInstance, expected: list[tuple[str, str, str]]) -> None:
    assert drift(running(fleet(web()), main=seen), fleet(web())) == expected


def test_an_instance_of_another_release() -> None:
    seen = SeenInstance(phase=Phase.HEALTHY, release="f" * 64)
    ((kind, where, detail),) = drift(running(fleet(web()), main=seen), fleet(web()))
    assert (kind, where) == ("instance_outdated", "here/web/main")
    assert detail == f"runs release {'f' * 12}, not {release_of(web())[:12]}"


def test_missing_stray_and_stopped_instances() -> None:
    asked = fleet(web(instances=("a", "b", "c")))
    seen = running(fleet(web(instances=("a", "x")), web(name="old")))
    assert (
        drift(seen, asked)
        == [
            ("instance_stray", "here/old/main", "healthy"),
            ("instance_missing", "here/web/b", ""),
            ("instance_missing", "here/web/c", ""),
            ("instance_stray", "here/web/x", "healthy"),
        ]
        or drift(seen, asked)[0][0] == "instance_stray"
    )
    stopped = msgspec.structs.replace(seen, stopped=frozenset({("here", "web", "b"), ("here", "web", "c")}))
    assert "instance_missing" not in {kind for kind, _, _ in drift(stopped, asked)}


def test_machines() -> None:
    asked = fleet(web(), count=3)
    seen = running(asked)
    machines = {"here-1": "ready", "here-2": "unknown", "gone": "ready"}
    assert drift(msgspec.structs.replace(seen, machines=machines), asked) == [
        ("machine_stray", "gone", "ready"),
        ("machine_not_ready", "here-2", "unknown"),
        ("machine_missing", "here-3", ""),
    ]


def test_what_the_plan_changes_anyway_is_no_drift() -> None:
    before, after = fleet(web(), web(name="gone")), fleet(web(memory_limit_mb=1), web(name="new"))
    failed = SeenInstance(phase=Phase.FAILED, release="x")
    assert drift(running(before, main=failed), before, after) == []
    assert drift(Observed(machines={}, instances={}), Fleet(name="test"), after) == []


def test_removing_a_tenement_finds_no_drift_in_it() -> None:
    assert drift(running(fleet(web())), fleet(web()), Fleet(name="test")) == []


def test_observed_of_state() -> None:
    asked = fleet(web(instances=("a", "b")))
    report = wire.InstanceReport(
        service="web", id="a", phase=Phase.FAILED, release="new", serving_release="old", detail="exit 1"
    )
    state = State(
        revision=1,
        fleet=asked,
        seq=1,
        tenements=(TenementView(name="here", tenement="here", operator="local", state="ready"),),
        instances=(InstanceView(tenement="here", isolation="namespace", report=report),),
        overrides={
            "here": (
                wire.Override(service="web", id="b", stopped=True),
                wire.Override(service="web", id="a", restarts=1),
            )
        },
    )
    assert observed_of(state) == Observed(
        machines={"here": "ready"},
        instances={("here", "web", "a"): SeenInstance(phase=Phase.FAILED, release="old", detail="exit 1")},
        stopped=frozenset({("here", "web", "b")}),
    )


def test_apply_twice_has_nothing_to_do_the_second_time() -> None:
    """What an agent reports right after a healthy apply: serving the release, a worker running, a job done."""
    asked = fleet(web(), web(name="job", listen=Listen.NONE), web(name="worker", listen=Listen.NONE))
    phases = {"web": Phase.HEALTHY, "worker": Phase.RUNNING, "job": Phase.EXITED}
    state = State(
        revision=1,
        fleet=asked,
        seq=9,
        tenements=(TenementView(name="here", tenement="here", operator="local", state="ready"),),
        instances=tuple(
            InstanceView(
                tenement="here",
                isolation="namespace",
                report=wire.InstanceReport(
                    service=service.name,
                    id="main",
                    phase=phases[service.name],
                    release=release_of(service),
                    serving_release=None if service.name == "job" else release_of(service),
                ),
            )
            for service in asked.tenements[0].services
        ),
    )
    found = plan(asked, state.fleet, observed_of(state), revision=state.revision)
    assert (found.changes, found.actions, found.drift) == (False, (), ())


# --- as a document ----------------------------------------------------------------------------------------------------


def test_the_json_in_the_reference_is_what_comes_out() -> None:
    worker = web(name="worker", listen=Listen.NONE)
    before, after = (
        fleet(web(name="notes", memory_limit_mb=256), worker),
        fleet(web(name="notes", memory_limit_mb=512), worker),
    )
    found = msgspec.structs.replace(plan(after, before, running(before), revision=1), fleet="quickstart")
    block = re.search(r"\n\n((?:    .*\n)+)", DOC)
    assert block is not None
    assert json.loads(block[1]) == json.loads(msgspec.json.encode(found))
    assert list(json.loads(block[1])) == list(json.loads(msgspec.json.encode(found)))


def test_every_action_and_kind_of_drift_is_in_the_reference() -> None:
    rows = {
        name: tuple(re.findall(r"`([a-z_]+)`", fields))
        for names, fields in re.findall(r"^\| (`[a-z_`, ]+`) \| (.*) \|$", DOC, re.MULTILINE)
        for name in re.findall(r"`([a-z_]+)`", names)
        if "_" in name and "machine" not in name and "instance" not in name
    }
    kinds = actions.AnyAction.__args__
    assert rows == {kind.__struct_config__.tag: kind.__struct_fields__ for kind in kinds}
    assert {str(kind) for kind in DriftKind} <= set(re.findall(r"^\| `([a-z_]+)`", DOC, re.MULTILINE))
    schema = msgspec.json.schema(Plan)
    assert set(schema["$defs"]) >= {"Plan", "Summary", "Counts", "Drift", "Change"}


# --- properties -------------------------------------------------------------------------------------------------------

WORD = st.sampled_from(["a", "b", "c"])
SERVICE = st.builds(
    Service,
    name=WORD,
    command=st.sampled_from([("x",), ("y", "z")]),
    instances=st.lists(WORD, min_size=1, max_size=3, unique=True).map(tuple),
    listen=st.sampled_from(Listen),
    env=st.lists(
        st.builds(EnvVar, name=st.sampled_from(["A", "TOKEN"]), value=WORD), max_size=2, unique_by=lambda v: v.name
    ).map(tuple),
    memory_limit_mb=st.none() | st.integers(1, 3),
)
OPERATOR = st.one_of(
    st.builds(LocalOperator, name=WORD),
    st.builds(FlyOperator, name=WORD, org=WORD, region=st.just("iad")),
    st.builds(SshOperator, name=WORD, hosts=st.lists(st.builds(SshHost, host=WORD), max_size=2).map(tuple)),
)


def unique(items: list[Any]) -> tuple[Any, ...]:
    return tuple(sorted({item.name: item for item in items}.values(), key=lambda item: item.name))


TENEMENT = st.builds(
    Tenement, name=WORD, operator=WORD, count=st.integers(1, 3), services=st.lists(SERVICE, max_size=3).map(unique)
)
FLEET = st.builds(
    Fleet,
    operators=st.lists(OPERATOR, max_size=3).map(unique),
    tenements=st.lists(TENEMENT, max_size=3).map(unique),
)
SEAT = st.tuples(st.sampled_from(["a", "b", "a-1", "a-2", "x"]), WORD, WORD)
OBSERVED = st.builds(
    Observed,
    machines=st.dictionaries(st.sampled_from(["a", "b", "a-1", "a-2", "x"]), st.sampled_from(["ready", "unknown"])),
    instances=st.dictionaries(
        SEAT, st.builds(SeenInstance, phase=st.sampled_from(Phase), release=st.none() | WORD), max_size=6
    ),
    stopped=st.frozensets(SEAT, max_size=2),
)


def copied(value: Any) -> Any:
    return msgspec.msgpack.decode(msgspec.msgpack.encode(value), type=type(value))


@settings(max_examples=150, deadline=None)
@given(FLEET)
def test_a_fleet_against_itself_has_no_changes(found: Fleet) -> None:
    planned = plan(copied(found), found, running(found))
    assert (planned.changes, planned.actions, planned.drift) == (False, (), ())
    assert planned.revision_to == planned.revision_from


@settings(max_examples=150, deadline=None)
@given(FLEET, FLEET, st.none() | OBSERVED)
def test_equal_inputs_give_equal_bytes(desired: Fleet, current: Fleet, observed: Observed | None) -> None:
    again = observed and msgspec.structs.replace(
        observed,
        machines=dict(reversed(observed.machines.items())),
        instances=dict(reversed(observed.instances.items())),
    )
    one = msgspec.json.encode(plan(desired, current, observed))
    assert one == msgspec.json.encode(plan(copied(desired), copied(current), again))
    assert msgspec.json.decode(one, type=Plan) == plan(desired, current, observed)


@settings(max_examples=150, deadline=None)
@given(FLEET, FLEET)
def test_counts_add_up(desired: Fleet, current: Fleet) -> None:
    """What is there before is removed, changed or stays; what is there after was added, changed or stayed."""

    def count(found: Fleet) -> dict[str, int]:
        services = [(t, s) for t in found.tenements for s in t.services]
        return {
            "operators": len(found.operators),
            "tenements": len(found.tenements),
            "services": len(services),
            "instances": sum(t.count * len(s.instances) for t, s in services),
        }

    summary = plan(desired, current).summary
    for what, before in count(current).items():
        counts: Counts = getattr(summary, what)
        assert counts.remove + counts.change + counts.same == before, what
        assert counts.add + counts.change + counts.same == count(desired)[what], what
    assert plan(desired, current).changes is (desired != current)
    assert bool(plan(desired, current).actions) is (desired != current)


def test_ten_thousand_instances_as_declared_are_nothing_to_do() -> None:
    services = tuple(web(name=f"s{n}", bundle=f"{n:064x}") for n in range(100))
    tenements = tuple(Tenement(name=f"t{n}", operator="local", services=services) for n in range(100))
    asked = Fleet(operators=(LOCAL,), tenements=tenements)
    seen, copy = running(asked), copied(asked)
    assert not plan(copy, asked, seen).changes


def test_drift_is_ordered() -> None:
    found = plan(
        fleet(web(instances=("b", "a"))),
        fleet(web(instances=("b", "a"))),
        Observed(machines={"here": "ready"}, instances={}),
    )
    assert [d.id for d in found.drift] == ["a", "b"]
    assert isinstance(found.drift[0], Drift)
