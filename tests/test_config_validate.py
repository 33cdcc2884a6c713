"""validate over fleets that no file wrote: everything dangerous is caught, nothing raises; and what machines can do."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slum import validate
from slum.model import (
    EnvVar,
    Fleet,
    FlyOperator,
    Level,
    Listen,
    LocalOperator,
    Secret,
    Service,
    Settings,
    SshHost,
    SshOperator,
    Tenement,
)
from slum.validate import check_capabilities, check_fleet, parse_listen
from slum.wire import LevelStatus


def fleet(*services: Service, **fields: Any) -> Fleet:
    tenement = Tenement(**{"name": "here", "operator": "local", "services": services, **fields})
    return Fleet(operators=(LocalOperator(name="local"),), tenements=(tenement,))


def web(**fields: Any) -> Service:
    return Service(**{"name": "web", "command": ("x",), **fields})


def told(found: Fleet) -> str:
    return "\n".join(map(str, check_fleet(found)))


def test_a_sound_fleet_has_no_problems() -> None:
    assert check_fleet(fleet(web(), Service(name="db", command=("y",), listen=Listen.NONE, deploy="replace"))) == ()  # type: ignore[arg-type]  # StrEnum
    assert check_fleet(Fleet()) == ()


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (Fleet(name="../x"), 'fleet.name: "../x" is no name'),
        (Fleet(name="a\n"), "fleet.name: "),
        (Fleet(domain="x/y"), "fleet.domain: "),
        (Fleet(domain="a\n"), "fleet.domain: "),
        (Fleet(domain=""), "fleet.domain: "),
        (Fleet(domain="a." * 100 + "a"), "fleet.domain: "),
        (fleet(web(name="../../etc")), 'tenement.here.service."../../etc": '),
        (fleet(web(name="web\n")), "is no name"),
        (fleet(web(instances=("../x",))), "instances: "),
        (fleet(web(instances=("x\n",))), "instances: "),
        (fleet(web(), web()), 'tenement.here.service: "web" is given twice'),
        (fleet(name="a/b"), 'tenement."a/b": "a/b" is no name'),
        (fleet(operator="nope"), 'tenement.here.operator: "nope" is no operator'),
        (fleet(web(bundle="../../etc/passwd")), "service.web.bundle: "),
        (fleet(web(bundle="A" * 64)), "service.web.bundle: "),
        (fleet(web(workdir="a/../../..")), "service.web.workdir: "),
        (fleet(web(workdir="a\0b")), "service.web.workdir: holds a control character"),
        (fleet(web(workdir="")), "service.web.workdir: is empty"),
        (fleet(web(workdir="x" * 5000)), "service.web.workdir: is longer than 1,024"),
        (fleet(web(command=())), "service.web.command: is empty"),
        (fleet(web(command=("a\0",))), "service.web.command: holds a NUL"),
        (fleet(web(command=("x" * 70_000,))), "service.web.command: is longer"),
        (
            fleet(web(env=(EnvVar(name="A", value="1"), EnvVar(name="A", value="2")))),
            "service.web.env.A: is given twice",
        ),
        (fleet(web(env=(EnvVar(name="A=B", value="1"),))), 'service.web.env."A=B": '),
        (fleet(web(env=(EnvVar(name="A\n", value="1"),))), "is no variable name"),
        (fleet(web(env=(EnvVar(name="A", value="x\0"),))), "service.web.env.A: holds a NUL"),
        (fleet(web(env=(EnvVar(name="LISTEN_PID", value="1"),))), "is set by slum itself"),
        (fleet(web(secrets=(Secret(name="A", source="file:../x"),))), "service.web.secrets.A: "),
        (fleet(web(secrets=(Secret(name="A", source="env:A\n"),))), "service.web.secrets.A: "),
        (fleet(web(socket="/run/slum/p/keeper.sock", deploy="replace")), "service.web.socket: "),
        (fleet(web(socket="{data_dir}/../../x", deploy="replace")), "service.web.socket: "),
        (fleet(web(memory_limit_mb=-1)), "service.web.memory_limit_mb: -1"),
        (fleet(web(memory_limit_mb=1 << 62)), "service.web.memory_limit_mb: "),
        (fleet(web(drain_timeout_s=math.nan)), "service.web.drain_timeout: nan"),
        (fleet(web(stop_timeout_s=math.inf)), "service.web.stop_timeout: inf"),
        (fleet(web(request_timeout_s=0.0)), "service.web.request_timeout: 0.0"),
        (fleet(settings=Settings(data_dir="/")), "settings.data_dir: "),
        (fleet(settings=Settings(data_dir="relative")), "settings.data_dir: "),
        (fleet(settings=Settings(data_dir="/srv/{id}")), "settings.data_dir: "),
        (fleet(settings=Settings(restart_window_s=-math.inf)), "settings.restart_window: "),
        (fleet(routing_listen=("0.0.0.0:22\n",)), "routing.listen: "),
        (fleet(routing_listen=("unix:/x",)), "routing.listen: "),
        (fleet(routing_listen=("[::]:80", "[0:0::0]:80")), "routing.listen: "),
        (fleet(count=0), "tenement.here.count: 0"),
        (fleet(count=1 << 62), "tenement.here.count: "),
        (fleet(config="\x1b[2J"), "tenement.here.config: "),
        (fleet(web(depends_on=("web",))), "depends_on: a service cannot depend on itself"),
        (fleet(web(depends_on=("db",))), 'depends_on: "db" is no service'),
        (Fleet(operators=(SshOperator(name="s", hosts=(SshHost(host="-x"),)),)), "operators.s.hosts.0: "),
        (Fleet(operators=(SshOperator(name="s", hosts=(SshHost(host="h\n"),)),)), "operators.s.hosts.0: "),
        (
            Fleet(operators=(SshOperator(name="s", hosts=(SshHost(host="h", fingerprint="x"),)),)),
            "operators.s.hosts.0: ",
        ),
        (Fleet(operators=(SshOperator(name="s", hosts=(SshHost(host="h"),), key="k"),)), "operators.s.key: "),
        (Fleet(operators=(FlyOperator(name="f", org="x", region="iad", cpus=0),)), "operators.f.cpus: 0"),
        (Fleet(operators=(FlyOperator(name="f", org="x", region="iad", image="a b"),)), "operators.f.image: "),
        (Fleet(operators=(LocalOperator(name="l", member="../m"),)), "operators.l.member: "),
        (Fleet(operators=(LocalOperator(name="l"), LocalOperator(name="l"))), 'operators: "l" is given twice'),
    ],
)
def test_dangerous_fleets_are_refused(found: Fleet, expected: str) -> None:
    assert expected in told(found)


@pytest.mark.timeout(60)
def test_fleets_of_any_size_are_refused_and_hang_nothing() -> None:
    many = tuple(Tenement(name=f"t{n}", operator="local") for n in range(200_000))
    chain = [web(name=f"s{n}", depends_on=(f"s{n + 1}",), listen=Listen.NONE, deploy="replace") for n in range(1999)]
    huge = [
        (Fleet(tenements=many), "200,000 tenements are more than 1,000"),
        (fleet(*(web(name=f"s{n}") for n in range(2001))), "2,001 services in one tenement are more than 2,000"),
        (fleet(*(web(name=f"s{n}", instances=tuple(map(str, range(9999)))) for n in range(11))), "109,989 instances"),
        (fleet(web(instances=("a",) * 10_001)), "10,001 ids are more than 10,000"),
        (fleet(*chain, web(name="s1999", depends_on=("s0",))), "is a cycle: s0 -> s1 -> s2 -> s3"),
    ]
    for found, expected in huge:
        assert expected in told(found)


TEXT = st.one_of(st.text(max_size=8), st.sampled_from(["web", "db", "{id}", "{", "~", "/", "a" * 33, "127.0.0.1:80"]))
FLOAT = st.floats(allow_nan=True, allow_infinity=True)
SERVICE = st.builds(
    Service,
    name=TEXT,
    command=st.lists(TEXT, max_size=3).map(tuple),
    instances=st.lists(TEXT, max_size=3).map(tuple),
    isolation=st.sampled_from(Level),
    workdir=st.none() | TEXT,
    bundle=st.none() | TEXT,
    build=st.none() | TEXT,
    env=st.lists(st.builds(EnvVar, name=TEXT, value=TEXT), max_size=2).map(tuple),
    secrets=st.lists(st.builds(Secret, name=TEXT, source=TEXT), max_size=2).map(tuple),
    listen=st.sampled_from(Listen),
    socket=st.none() | TEXT,
    port=st.none() | st.integers(-(2**63), 2**63),
    health=st.none() | TEXT,
    depends_on=st.lists(TEXT, max_size=2).map(tuple),
    drain_timeout_s=FLOAT,
    idle_timeout_s=st.none() | FLOAT,
    memory_limit_mb=st.none() | st.integers(-(2**63), 2**63),
    image=st.none() | TEXT,
)
TENEMENT = st.builds(
    Tenement,
    name=TEXT,
    operator=TEXT,
    count=st.integers(-(2**63), 2**63),
    services=st.lists(SERVICE, max_size=3).map(tuple),
    settings=st.builds(Settings, data_dir=st.none() | TEXT, restart_window_s=FLOAT),
    routing_listen=st.lists(TEXT, max_size=2).map(tuple),
)


@settings(max_examples=150, deadline=None)
@given(st.builds(Fleet, name=TEXT, domain=TEXT, tenements=st.lists(TENEMENT, max_size=3).map(tuple)))
def test_no_fleet_raises(found: Fleet) -> None:
    assert all(str(problem).isprintable() for problem in check_fleet(found))


def status(level: str, *, available: bool = True) -> dict[str, LevelStatus]:
    return {level: LevelStatus(level=level, available=available, detail="runsc not found", fix="`apt install runsc`")}


def test_what_a_machine_cannot_do_is_refused_with_why_and_fix() -> None:
    asks = fleet(web(isolation=Level.SANDBOX, memory_limit_mb=1, cpu_shares=2, pids_limit=3, storage_quota_mb=4))
    assert [str(p) for p in check_capabilities(asks, "here", status("sandbox", available=False), "")] == [
        'tenement.here.service.web.isolation: "sandbox" is not available on here: runsc not found; `apt install runsc`',
        *(
            f"tenement.here.service.web.{key}: no limits work on here: no cgroup controller is usable; see `slum doctor`"
            for key in ("memory_limit_mb", "cpu_shares", "pids_limit")
        ),
        "tenement.here.service.web.storage_quota_mb: storage quotas are not available on here; remove it",
    ]
    (unknown,) = check_capabilities(fleet(web(isolation=Level.WASM)), "here", status("namespace"), "cgroup v2")
    assert str(unknown).endswith('"wasm" is not available on here: this version of slum has no runner for it')


def test_what_a_machine_can_do_is_fine() -> None:
    assert check_capabilities(fleet(web(memory_limit_mb=1)), "here", status("namespace"), "cgroup v1") == ()
    assert check_capabilities(fleet(web(isolation=Level.VM)), "elsewhere", {}, "") == ()


def test_machines_of_a_counted_tenement_are_known() -> None:
    counted = msgspec.structs.replace(fleet(web()).tenements[0], count=2)
    assert check_capabilities(Fleet(tenements=(counted,)), "here-2", {}, "") != ()
    assert check_capabilities(Fleet(tenements=(counted,)), "here", {}, "") == ()


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:8080", ("127.0.0.1", 8080)),
        ("[::1]:8080", ("::1", 8080)),
        ("[0:0::1]:1", ("::1", 1)),
        ("127.0.0.1:0", None),
        ("127.0.0.1:08", None),
        ("127.1:80", None),
        ("::1:80", None),
        (":80", None),
        ("[127.0.0.1]:80", None),
        ("127.0.0.1:80 ", None),
    ],
)
def test_addresses_of_the_router(text: str, address: tuple[str, int] | None) -> None:
    assert parse_listen(text) == address


def test_the_limits_of_the_whole_are_those_of_the_reference() -> None:
    assert (validate.OPERATORS_MAX, validate.TENEMENTS_MAX, validate.SERVICES_MAX) == (100, 1000, 2000)
