"""The Hetzner operator against a service that behaves like the real one: rules, errors, limits, lies, and a paused leader."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from cloud_support import a_spec, frames_of_ours, prism, rounds, stop_before_call
from fakes.cloud import Answer, QuickClock, SimClock
from fakes.hetzner import FakeHetzner
from operator_runs import CLUSTER, NEIGHBOUR, a_plane, run

from slum.errors import ConfigError, OperatorError
from slum.model import HetznerOperator
from slum.operators import naming
from slum.operators.hetzner import Hetzner

CANARY = "canary" * 10
SEEDS = 50


@contextmanager
def a_project(**fields: object) -> Iterator[tuple[FakeHetzner, Hetzner]]:
    fake = FakeHetzner(token=CANARY, clock=QuickClock())
    with fake.serving() as url:
        yield fake, an_operator(fake, f"{url}/v1", **fields)


def an_operator(fake: FakeHetzner, url: str, **fields: object) -> Hetzner:
    definition = HetznerOperator(name="eu", **{"location": "fsn1", "server_type": "cx23", **fields})  # type: ignore[arg-type]
    return Hetzner(definition, clock=fake.clock, env={"HCLOUD_TOKEN": fake.token, "HCLOUD_ENDPOINT": url})


def name(machine: str = "w-1", incarnation: int = 1) -> str:
    return naming.name_of(CLUSTER, f"{machine}.{incarnation}")


async def test_every_exchange_is_as_the_official_description_says(tmp_path: Path) -> None:
    fake = FakeHetzner(token=CANARY, clock=QuickClock())
    with fake.serving() as url, prism("hetzner-cloud.openapi.json", f"{url}/v1", tmp_path) as (proxy, violations):
        operator = an_operator(fake, proxy)
        assert await operator.problems() == ()
        made = await operator.create(a_spec(ports=(80, 443)))
        assert await operator.create(a_spec(ports=(80, 443))) == made
        assert await operator.observe(CLUSTER) == (made,)
        fake.alive()[made.id]["labels"].clear()
        await operator.create(a_spec(ports=(80, 443)))
        fake.alive()[made.id]["status"] = "off"
        await operator.create(a_spec(ports=(80, 443)))
        await operator.destroy(made.id)
        await operator.destroy(made.id)
        fake.planned = [fake.error(423, "locked", "locked")]
        with pytest.raises(OperatorError, match="locked"):
            await operator.observe(CLUSTER)
        assert violations() == []
        broken = Answer(200, {"servers": [{"id": "no number"}]})
        fake.planned = [broken]
        with pytest.raises(OperatorError) as caught:
            await operator.observe(CLUSTER)
        assert caught.value.status == 500, "prism lets everything pass"
        assert len(fake.calls) > 20


@pytest.mark.timeout(300)
async def test_a_liar_and_kills_leave_no_orphan_and_no_double(tmp_path: Path) -> None:
    reports = [await run("hetzner", seed, tmp_path) for seed in range(SEEDS)]
    assert [report for report in reports if report.problems] == []
    assert sum(report.lives for report in reports) > 2 * SEEDS


async def test_a_stopped_leader_with_a_create_in_hand(tmp_path: Path) -> None:
    """It wakes, and creates, after the user has changed their mind under the next leader."""
    with a_plane("hetzner", tmp_path) as (plane, fake, clock):
        assert isinstance(clock, SimClock)
        plane.wanted = {"w-1"}
        held = await stop_before_call(plane, clock)
        plane.wanted = set()
        await rounds(plane, clock, 3)
        assert fake.alive() == {}
        held.until = clock.at
        await plane.wake()
        assert set(fake.alive()) == {name()}
        await rounds(plane, clock)
        assert fake.alive() == {}
        assert fake.leftovers() == []


async def test_a_stopped_leader_with_a_destroy_in_hand(tmp_path: Path) -> None:
    with a_plane("hetzner", tmp_path) as (plane, fake, clock):
        plane.wanted = {"w-1"}
        await rounds(plane, clock, 3)
        plane.wanted = set()
        held = await stop_before_call(plane, clock)
        plane.wanted = {"w-1"}
        await rounds(plane, clock, 15)
        assert set(fake.alive()) == {name(incarnation=2)}, "the old incarnation was dead from the intent on"
        held.until = clock.at
        await plane.wake()
        await rounds(plane, clock)
        assert set(fake.alive()) == {name(incarnation=2)}


async def test_a_stopped_leader_wakes_after_its_deadline(tmp_path: Path) -> None:
    with a_plane("hetzner", tmp_path) as (plane, fake, clock):
        plane.wanted = {"w-1"}
        held = await stop_before_call(plane, clock)
        plane.wanted = set()
        await rounds(plane, clock)
        before = fake.mutations()
        held.until = clock.at
        await plane.wake()
        assert fake.mutations() == before
        assert fake.alive() == {}


CODES = {
    "locked": 423,
    "conflict": 409,
    "resource_unavailable": 412,
    "rate_limit_exceeded": 429,
    "resource_limit_exceeded": 403,
    "unauthorized": 401,
    "invalid_input": 422,
    "maintenance": 503,
}


@pytest.mark.parametrize("code", sorted(CODES))
async def test_each_error_keeps_what_the_provider_said_and_says_what_to_do(code: str) -> None:
    with a_project() as (fake, operator):
        fake.planned = [None, None, fake.error(CODES[code], code, "so it is")]
        with pytest.raises(OperatorError, match="so it is") as caught:
            await operator.create(a_spec())
    error = caught.value
    assert (error.status, error.provider_code) == (CODES[code], code)
    assert error.request_id
    assert error.hint
    assert (error.retry_after_s is not None) == (code == "rate_limit_exceeded")


async def test_a_name_that_somebody_else_has_is_an_error_and_is_not_touched() -> None:
    with a_project() as (fake, operator):
        fake.add_server(name(), {naming.CLUSTER: NEIGHBOUR, naming.KEY: "w-1.1"})
        with pytest.raises(OperatorError, match="labelled as another fleet's"):
            await operator.create(a_spec())
        with pytest.raises(OperatorError, match="labelled as another fleet's"):
            await operator.destroy(name())
        assert set(fake.alive()) == {name()}


async def test_after_a_429_no_call_of_the_account_is_sent_until_its_time() -> None:
    with a_project() as (fake, operator):
        refused = fake.error(429, "rate_limit_exceeded", "limit reached")
        refused.headers["Retry-After"] = "30"
        fake.planned = [refused]
        with pytest.raises(OperatorError) as first:
            await operator.observe(CLUSTER)
        again = an_operator(fake, f"{fake.url}/v1", location="nbg1")
        with pytest.raises(OperatorError) as second:
            await again.create(a_spec())
        assert first.value.retry_after_s == 30
        assert 29 < (second.value.retry_after_s or 0) <= 30
        assert len(fake.calls) == 1
        await fake.clock.sleep(31)
        await again.observe(CLUSTER)


async def test_an_empty_bucket_is_respected() -> None:
    fake = FakeHetzner(token=CANARY, clock=SimClock(), limit=20)
    with fake.serving() as url:
        operator = an_operator(fake, f"{url}/v1")
        for _ in range(20):
            await operator.observe(CLUSTER)
        with pytest.raises(OperatorError) as caught:
            await operator.observe(CLUSTER)
        assert caught.value.retry_after_s == 5
        with pytest.raises(OperatorError):
            await operator.observe(CLUSTER)
    assert len(fake.calls) == 21


async def test_settings_that_the_provider_lacks_are_told_with_what_is_near() -> None:
    with a_project(server_type="cx21", location="fsn", image="debian-11", ssh_keys=("laptop",)) as (fake, operator):
        fake.ssh_keys.append(
            {
                "id": 1,
                "name": "laptop-2",
                "fingerprint": "a",
                "public_key": "b",
                "labels": {},
                "created": "2026-01-01T00:00:00Z",
            }
        )
        assert await operator.problems() == (
            'server_type: "cx21" is not known; nearest: cx23, cpx22, cax11, cx33',
            'location: "fsn" is not known; nearest: fsn1',
            'image: "debian-11" is not known; nearest: debian-13, debian-12, debian-12',
            'ssh_keys: "laptop" is not known; nearest: laptop-2',
        )
    with a_project(server_type="cax11", location="nbg1", image="ubuntu-24.04") as (_, operator):
        assert await operator.problems() == (
            'location: "nbg1" has no cax11 to order; nearest: fsn1',
            'image: "ubuntu-24.04" is no image for arm; nearest: debian-12',
        )


async def test_all_pages_are_read_and_neighbours_are_invisible() -> None:
    with a_project() as (fake, operator):
        for number in range(1, 61):
            labels = naming.labels_of(a_spec(f"w-{number}"))
            fake.add_server(name(f"w-{number}"), labels)
            fake.add_server(naming.name_of(NEIGHBOUR, f"w-{number}.1"), {**labels, naming.CLUSTER: NEIGHBOUR})
        seen = await operator.observe(CLUSTER)
        assert len(seen) == len({machine.key for machine in seen}) == 60
        assert len(fake.calls) == 2


async def test_a_clone_with_our_labels_is_no_machine_of_ours() -> None:
    with a_project() as (fake, operator):
        fake.add_server("copy-of-w-1", naming.labels_of(a_spec()))
        (stray,) = await operator.observe(CLUSTER)
        assert (stray.id, stray.key) == ("copy-of-w-1", "")
        await operator.destroy(stray.id)
        assert set(fake.alive()) == {"copy-of-w-1"}


async def test_only_what_is_asked_for_is_let_in_and_nothing_is_left() -> None:
    with a_project(ssh_keys=("laptop",)) as (fake, operator):
        fake.ssh_keys.append({"id": 1, "name": "laptop"})
        one, two = await operator.create(a_spec(ports=(443,))), await operator.create(a_spec("w-2", ports=(443,)))
        (firewall,) = fake.firewalls.values()
        assert [(r["protocol"], r["port"]) for r in firewall.body["rules"]] == [
            ("icmp", None),
            ("tcp", "22"),
            ("tcp", "443"),
        ]
        await operator.destroy(one.id)
        assert firewall.seen.died is None
        await operator.destroy(two.id)
        assert firewall.seen.died is not None


async def test_a_protected_server_stays_and_says_why() -> None:
    with a_project() as (fake, operator):
        made = await operator.create(a_spec())
        fake.alive()[made.id]["protection"]["delete"] = True
        with pytest.raises(OperatorError, match="protected") as caught:
            await operator.destroy(made.id)
        assert "take that off" in caught.value.hint


async def test_a_machine_without_a_way_home_is_not_made() -> None:
    with a_project() as (fake, operator):
        with pytest.raises(OperatorError, match="join home"):
            await operator.create(msgspec.structs.replace(a_spec(), join=None))
        assert fake.calls == []


async def test_tokens_and_join_tokens_show_nowhere(tmp_path: Path) -> None:
    spec = a_spec()
    assert spec.join is not None
    assert spec.join.token not in repr(spec)
    with a_project() as (fake, operator):
        answers = [None, fake.error(500, "server_error", f"echo {CANARY}"), fake.error(401, "unauthorized", "no")]
        for answer in answers:
            if answer is None:
                fake.liar = replace(fake.liar, drop=100)
            else:
                fake.liar = replace(fake.liar, drop=0)
                fake.planned = [answer]
            with pytest.raises(OperatorError) as caught:
                await operator.observe(CLUSTER)
            assert CANARY not in frames_of_ours(caught.value)


async def test_where_the_token_comes_from(tmp_path: Path) -> None:
    secret = tmp_path / "token"
    with a_project() as (fake, _):
        secret.write_text(f"{CANARY}\n")
        env = {"HCLOUD_ENDPOINT": f"{fake.url}/v1", "OTHER": CANARY, "ODD": f"{CANARY}\nx", "PLAIN": CANARY}
        for ref in (f"file:{secret}", "env:OTHER"):
            definition = HetznerOperator(name="eu", location="fsn1", server_type="cx23", secrets_ref=ref)
            assert await Hetzner(definition, clock=fake.clock, env=env).observe(CLUSTER) == ()
        wrong = {
            "env:NONE": "holds no token",
            "env:ODD": "is no token",
            "file:/nowhere": "cannot be read",
            "vault:x": "not supported",
        }
        for ref, why in wrong.items():
            definition = HetznerOperator(name="eu", location="fsn1", server_type="cx23", secrets_ref=ref)
            with pytest.raises(ConfigError, match=why) as caught:
                await Hetzner(definition, clock=fake.clock, env=env).observe(CLUSTER)
            assert CANARY not in frames_of_ours(caught.value)
        plain = HetznerOperator(name="eu", location="fsn1", server_type="cx23", token_env="PLAIN")
        with pytest.raises(ConfigError, match="no https address"):
            await Hetzner(plain, env={**env, "HCLOUD_ENDPOINT": "http://example.com/v1"}).observe(CLUSTER)


def test_the_client_is_imported_when_it_is_first_used() -> None:
    look = "import slum.operators.registry, sys; sys.exit('hcloud' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", look], check=False).returncode == 0
