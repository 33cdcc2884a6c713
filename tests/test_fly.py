"""The Fly operator against a service that behaves like the real one: one app a machine, leases, volumes, lies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from cloud_support import STATUS_UNKNOWN, a_spec, frames_of_ours, prism
from fakes.cloud import QuickClock
from fakes.fly import FakeFly, FakeMachine
from operator_runs import CLUSTER, JOIN, NEIGHBOUR, run

from slum.errors import ConfigError, OperatorError
from slum.model import FlyOperator
from slum.operators import naming
from slum.operators.fly import Fly

CANARY = "canary" * 10
SEEDS = 50


@contextmanager
def an_organisation(token: str = CANARY, **fields: object) -> Iterator[tuple[FakeFly, Fly]]:
    fake = FakeFly(token=token, clock=QuickClock())
    with fake.serving() as url:
        yield fake, an_operator(fake, url, **fields)


def an_operator(fake: FakeFly, url: str, **fields: object) -> Fly:
    given = {"org": "mine", "region": "iad", "image": "registry.fly.io/slum:1", **fields}
    definition = FlyOperator(name="prod", **given)  # type: ignore[arg-type]
    return Fly(definition, clock=fake.clock, env={"FLY_API_TOKEN": fake.token, "FLY_FLAPS_BASE_URL": url})


def name(machine: str = "w-1") -> str:
    return naming.name_of(CLUSTER, f"{machine}.1")


def only_machine(fake: FakeFly, app: str) -> FakeMachine:
    (machine,) = (m for m in fake.apps[app].machines.values() if m.seen.died is None)
    return machine


async def test_every_exchange_is_as_the_official_description_says(tmp_path: Path) -> None:
    fake = FakeFly(token=CANARY, clock=QuickClock(), as_described=True)
    with fake.serving() as url, prism("fly-machines.swagger.json", url, tmp_path) as (proxy, violations):
        operator = an_operator(fake, proxy)
        assert await operator.problems() == ()
        made = await operator.create(a_spec(ports=(8080,)))
        only_machine(fake, made.id).body["config"]["metadata"].clear()
        assert await operator.create(a_spec(ports=(8080,))) == made
        assert await operator.observe(CLUSTER) == (made,)
        await operator.destroy(made.id)
        await operator.destroy(made.id)
        # It describes hardly any refusal, so 404, 408 and 422 are unknown to it; what they say is ours to read.
        assert [line for line in violations() if STATUS_UNKNOWN not in line] == []
        assert len(fake.calls) > 20
        fake.as_described = False  # a lease as it really comes, with null for what is not set
        with pytest.raises(OperatorError) as caught:
            await operator.create(a_spec())
        assert caught.value.status == 500, "prism lets everything pass"


@pytest.mark.timeout(300)
async def test_a_liar_and_kills_leave_no_orphan_and_no_double(tmp_path: Path) -> None:
    reports = [await run("fly", seed, tmp_path) for seed in range(SEEDS)]
    assert [report for report in reports if report.problems] == []
    assert sum(report.lives for report in reports) > 2 * SEEDS


async def test_a_machine_is_all_that_its_tenement_needs() -> None:
    with an_organisation(memory_mb=1024, volume_gb=7) as (fake, operator):
        made = await operator.create(a_spec(ports=(8080,)))
        config = only_machine(fake, made.id).body["config"]
        (volume,) = fake.apps[made.id].volumes.values()
    assert config["guest"] == {"cpu_kind": "shared", "cpus": 1, "memory_mb": 1024}
    assert config["mounts"] == [{"volume": volume.body["id"], "path": "/var/lib/slum"}]
    assert volume.body["size_gb"] == 7
    assert config["env"]["SLUM_JOIN_TOKEN"] == JOIN.token
    assert config["metadata"][naming.CLUSTER] == CLUSTER
    assert config["services"][0]["internal_port"] == 8080


async def test_it_is_taken_off_the_proxy_before_it_ends() -> None:
    with an_organisation() as (fake, operator):
        made = await operator.create(a_spec())
        before = len(fake.calls)
        await operator.destroy(made.id)
        done = [path.rsplit("/", 1)[-1] for method, path, _ in fake.calls[before:] if method == "POST"]
        assert done == ["lease", "cordon"]
        assert fake.leftovers() == []


async def test_a_machine_that_somebody_else_has_leased_is_left_alone_until_the_lease_ends() -> None:
    with an_organisation() as (fake, operator):
        made = await operator.create(a_spec())
        machine = only_machine(fake, made.id)
        machine.nonce, machine.leased_until = "theirs", fake.at() + 30
        with pytest.raises(OperatorError, match="lease currently held") as caught:
            await operator.destroy(made.id)
        assert caught.value.status == 409
        assert caught.value.request_id
        assert made.id in fake.alive()
        await fake.clock.sleep(31)
        await operator.destroy(made.id)
        assert fake.alive() == {}


async def test_data_outlives_a_machine_that_was_deleted_by_hand() -> None:
    with an_organisation() as (fake, operator):
        made = await operator.create(a_spec())
        (volume,) = fake.apps[made.id].volumes
        fake.remove_server(made.id)
        assert await operator.observe(CLUSTER) == ()
        assert (await operator.create(a_spec())).id == made.id
        assert only_machine(fake, made.id).body["config"]["mounts"][0]["volume"] == volume


async def test_a_volume_of_a_lost_answer_is_removed() -> None:
    with an_organisation() as (fake, operator):
        made = await operator.create(a_spec())
        fake._new_volume(fake.apps[made.id], {"name": "slum", "region": "iad"})
        await operator.create(a_spec())
        assert fake.leftovers() == []


async def test_an_app_of_somebody_else_is_an_error_and_is_not_touched() -> None:
    with an_organisation() as (fake, operator):
        fake.add_server(name(), {})
        fake.apps[name()].org = "theirs"
        with pytest.raises(OperatorError, match="403"):
            await operator.create(a_spec())
        with pytest.raises(OperatorError, match="403"):
            await operator.destroy(name())
        fake.add_server(naming.name_of(NEIGHBOUR, "w-1.1"), {})
        fake.add_server("shop", naming.labels_of(a_spec()))
        assert await operator.observe(CLUSTER) == ()
        await operator.destroy("shop")
        assert "shop" in fake.apps


async def test_no_room_is_told_as_such() -> None:
    with an_organisation() as (fake, operator):
        fake.liar = replace(fake.liar, short_of=100)
        with pytest.raises(OperatorError, match="insufficient resources") as caught:
            await operator.create(a_spec())
        assert caught.value.status == 412
        fake.liar = replace(fake.liar, short_of=0)
        made = await operator.create(a_spec())
        assert len(fake.apps[made.id].volumes) == 1


async def test_a_429_says_how_long_to_stay_away() -> None:
    with an_organisation() as (fake, operator):
        fake.planned = [fake.error(429, "", "rate limit exceeded")]
        with pytest.raises(OperatorError) as caught:
            await operator.observe(CLUSTER)
        assert caught.value.retry_after_s == 5
        with pytest.raises(OperatorError):
            await operator.observe(CLUSTER)
        assert len(fake.calls) == 1


async def test_without_an_image_nothing_is_made() -> None:
    with an_organisation(image=None) as (fake, operator):
        assert await operator.problems() == ("image: is needed: which image has slum inside",)
        before = len(fake.calls)
        with pytest.raises(ConfigError, match="which image has slum inside"):
            await operator.create(a_spec())
        assert len(fake.calls) == before


async def test_an_organisation_that_is_not_there() -> None:
    with an_organisation(org="nobody") as (_, operator):
        assert await operator.problems() == ('org: "nobody" is not there, or this token may not see it',)


async def test_tokens_show_nowhere() -> None:
    with an_organisation() as (fake, operator):
        fake.planned = [fake.error(500, "", f"echo {CANARY}")]
        with pytest.raises(OperatorError) as caught:
            await operator.observe(CLUSTER)
        assert CANARY not in frames_of_ours(caught.value)
        fake.liar = replace(fake.liar, drop=100)
        for verb in (operator.create(a_spec()), operator.destroy(name())):
            with pytest.raises(OperatorError) as caught:
                await verb
            assert CANARY not in frames_of_ours(caught.value)
            assert JOIN.token not in frames_of_ours(caught.value)


async def test_a_macaroon_goes_as_it_is() -> None:
    with an_organisation(token="FlyV1 fm2_abc,fm2_def") as (fake, operator):
        fake.scheme = ""
        assert await operator.observe(CLUSTER) == ()
