"""What every operator must do, whatever it stands for: find, make and destroy machines, each call safe to repeat.

A new operator adds a bench to BENCHES: how to make it against something that behaves like its provider.
"""

from __future__ import annotations

import secrets
import shutil
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import ssh_support
from fakes.cloud import QuickClock
from fakes.fly import FakeFly
from fakes.hetzner import FakeHetzner
from ssh_hosts import Shape, require
from ssh_hosts import a_site as a_site_of

from slum import model
from slum.errors import OperatorError
from slum.node.keeperclient import KeeperClient, start_detached
from slum.node.types import Respawn, Spawn
from slum.operators.base import Join, MachineSpec, Operator
from slum.operators.fly import Fly
from slum.operators.hetzner import Hetzner
from slum.operators.local import Local, Site
from slum.operators.ssh import Ssh
from slum.paths import Home
from slum.server.boot import down

CLUSTER = "c0ffee"


@dataclass(frozen=True)
class Bench:
    """An operator under test, and a second object of it, as after a restart."""

    operator: Operator
    again: Operator


def spec(name: str = "here", incarnation: int = 1, cluster: str = CLUSTER) -> MachineSpec:
    join = Join(server="https://home.example", token="join-me")
    return MachineSpec(cluster=cluster, key=f"{name}.{incarnation}", machine=name, tenement=name, join=join)


@contextmanager
def a_home() -> Iterator[Home]:
    token = secrets.token_hex(4)
    home = Home(data=Path(f"/tmp/slum-o-{token}"), run=Path(f"/tmp/so{token}"))
    start_detached(home)
    try:
        yield home
    finally:
        down(home, services=True, grace_s=2.0)
        shutil.rmtree(home.data)
        shutil.rmtree(home.run)


def a_site(home: Home) -> Site:
    sleep = Spawn(name="agent", argv=(sys.executable, "-c", "import time; time.sleep(600)"), env={}, respawn=Respawn())
    return Site(home=home, member="m1", agent=sleep)


@contextmanager
def local_bench() -> Iterator[Bench]:
    with a_home() as home:
        yield Bench(operator=Local(a_site(home)), again=Local(a_site(home)))


@contextmanager
def hetzner_bench() -> Iterator[Bench]:
    clock = QuickClock()
    fake = FakeHetzner(clock=clock)
    with fake.serving() as url:
        env = {"HCLOUD_TOKEN": fake.token, "HCLOUD_ENDPOINT": f"{url}/v1"}
        definition = model.HetznerOperator(name="eu", location="fsn1", server_type="cx23")
        yield Bench(*(Hetzner(definition, clock=clock, env=env) for _ in range(2)))


@contextmanager
def fly_bench() -> Iterator[Bench]:
    clock = QuickClock()
    fake = FakeFly(clock=clock)
    with fake.serving() as url:
        env = {"FLY_API_TOKEN": fake.token, "FLY_FLAPS_BASE_URL": url}
        definition = model.FlyOperator(name="prod", org="mine", region="iad", image="registry.fly.io/slum:1")
        yield Bench(*(Fly(definition, clock=clock, env=env) for _ in range(2)))


@contextmanager
def ssh_bench() -> Iterator[Bench]:
    require()
    with a_site_of(Shape(), Shape()) as hosts, TemporaryDirectory() as folder:
        definition = ssh_support.a_definition(hosts.key, [host.address for host in hosts.hosts])
        place = ssh_support.a_site(Path(folder))
        yield Bench(
            *(Ssh(definition, place, houses=ssh_support.StandIns(ssh_support.shared_wheels())) for _ in range(2))
        )


BENCHES: dict[str, Callable[[], object]] = {
    "fly": fly_bench,
    "hetzner": hetzner_bench,
    "local": local_bench,
    "ssh": ssh_bench,
}


@pytest.fixture(
    params=[pytest.param(name, marks=pytest.mark.root if name == "ssh" else ()) for name in sorted(BENCHES)]
)
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    with BENCHES[request.param]() as made:  # type: ignore[attr-defined]
        yield made


async def test_what_is_created_is_observed_by_its_label(bench: Bench) -> None:
    assert await bench.operator.observe(CLUSTER) == ()
    machine = await bench.operator.create(spec())
    assert machine.id
    assert (machine.cluster, machine.key, machine.machine, machine.tenement) == (CLUSTER, "here.1", "here", "here")
    assert await bench.again.observe(CLUSTER) == (machine,)
    assert await bench.operator.observe("another") == ()


async def test_creating_the_same_key_again_gives_the_same_machine(bench: Bench) -> None:
    first = await bench.operator.create(spec())
    assert await bench.again.create(spec()) == first
    assert await bench.operator.observe(CLUSTER) == (first,)


async def test_destroying_is_final_and_repeatable(bench: Bench) -> None:
    machine = await bench.operator.create(spec())
    await bench.operator.destroy(machine.id)
    assert await bench.operator.observe(CLUSTER) == ()
    await bench.again.destroy(machine.id)


async def test_another_machines_id_destroys_nothing(bench: Bench) -> None:
    machine = await bench.operator.create(spec())
    await bench.operator.destroy("nobody:else")
    assert await bench.operator.observe(CLUSTER) == (machine,)


async def test_a_destroyed_machine_comes_back_as_a_new_incarnation(bench: Bench) -> None:
    first = await bench.operator.create(spec())
    await bench.operator.destroy(first.id)
    second = await bench.operator.create(spec(incarnation=2))
    assert second.key == "here.2"
    assert await bench.operator.observe(CLUSTER) == (second,)


async def test_a_machine_name_with_a_number_is_not_another_incarnation(
    bench: Bench, request: pytest.FixtureRequest
) -> None:
    if "local" in request.node.name:
        await bench.operator.create(spec("w-1"))
        return  # one machine is all it holds
    first, second = await bench.operator.create(spec("w", 12)), await bench.operator.create(spec("w-1", 2))
    await bench.operator.destroy(first.id)
    assert await bench.again.observe(CLUSTER) == (second,)


def test_every_verb_has_a_deadline(bench: Bench) -> None:
    deadlines = bench.operator.deadlines
    assert min(deadlines.observe_s, deadlines.create_s, deadlines.destroy_s) > 0


# --- the local operator's own ------------------------------------------------------------------------------------------


@pytest.fixture
async def home() -> AsyncIterator[Home]:
    with a_home() as made:
        yield made


async def agents(home: Home) -> list[int]:
    async with await KeeperClient.connect(home) as keeper:
        return [child.pid for child in await keeper.list_children() if child.name == "agent" and child.running]


async def test_local_keeps_the_agent_running_while_its_machine_is(home: Home) -> None:
    local = Local(a_site(home))
    machine = await local.create(spec())
    (pid,) = await agents(home)
    await local.create(spec())
    assert await agents(home) == [pid]
    assert home.identity.stat().st_mode & 0o777 == 0o600
    await local.destroy(machine.id)
    assert await agents(home) == []
    assert not home.identity.exists()


async def test_local_holds_one_tenement(home: Home) -> None:
    local = Local(a_site(home))
    await local.create(spec())
    with pytest.raises(OperatorError, match="'here' of the fleet already"):
        await local.create(spec("there"))


async def test_local_takes_over_from_a_control_plane_that_is_gone(home: Home) -> None:
    local = Local(a_site(home))
    await local.create(spec(cluster="old"))
    machine = await local.create(spec("there", cluster=CLUSTER))
    assert await local.observe(CLUSTER) == (machine,)


async def test_local_without_a_keeper_is_an_operator_error() -> None:
    token = secrets.token_hex(4)
    home = Home(data=Path(f"/tmp/slum-o-{token}"), run=Path(f"/tmp/so{token}"))
    try:
        with pytest.raises(OperatorError, match="the agent cannot be started"):
            await Local(a_site(home)).create(spec())
    finally:
        shutil.rmtree(home.data)
