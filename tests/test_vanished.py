"""When machines are gone at their operators: one is made again, many at once are not, and a new leader waits."""

from __future__ import annotations

import pytest

from slum.operators.base import Machine
from slum.server.decide import Create, Known, Situation, Wanted, decide
from slum.server.vanished import GRACE_S, vanished


def known(number: int, *, operator: str = "cloud", state: str = "created") -> Known:
    return Known(
        machine=f"w{number}",
        tenement="w",
        operator=operator,
        incarnation=1,
        state=state,
        machine_id=f"id-{number}",
        action="a",
        arrives_until=0.0,
    )


def there(*numbers: int) -> dict[str, tuple[Machine, ...]]:
    made = (Machine(id=f"id-{n}", cluster="c", key=f"w{n}.1", machine=f"w{n}", tenement="w") for n in numbers)
    return {"cloud": tuple(made)}


def judged(total: int, gone: int, led_s: float = GRACE_S) -> tuple[frozenset[str], str]:
    rows = [known(number) for number in range(total)]
    return vanished(rows, {row.machine for row in rows}, there(*range(gone, total)), (), led_s)


@pytest.mark.parametrize(("total", "gone"), [(1, 1), (3, 1), (20, 2), (40, 4)])
def test_few_that_are_gone_are_made_again(total: int, gone: int) -> None:
    assert judged(total, gone) == (frozenset(), "")


@pytest.mark.parametrize(("total", "gone"), [(2, 2), (3, 2), (19, 2), (40, 5)])
def test_more_than_a_tenth_at_once_are_not(total: int, gone: int) -> None:
    held, why = judged(total, gone)
    assert held == {f"w{number}" for number in range(gone)}
    assert f"{gone} of {total}" in why


def test_a_new_leader_believes_nothing_gone_at_first() -> None:
    held, why = judged(3, 1, led_s=GRACE_S - 1)
    assert (held, why) == ({"w0"}, "")


def test_only_what_was_made_is_wanted_and_could_be_seen_counts() -> None:
    rows = [known(0), known(1, state="creating"), known(2, operator="local"), known(3, operator="silent"), known(4)]
    observed = {"cloud": (), "local": ()}
    assert vanished(rows, {"w0", "w1", "w2", "w3"}, observed, ("local",), GRACE_S) == (frozenset(), "")


def test_what_is_held_is_not_made_again() -> None:
    want = Wanted(machine="w0", tenement="w", operator="cloud")
    now = Situation(wanted=(want,), known=(known(0),), observed=there())
    assert decide(now) == (Create(machine="w0", tenement="w", operator="cloud", incarnation=1),)
    assert decide(Situation(wanted=(want,), known=(known(0),), observed=there(), held=frozenset({"w0"}))) == ()
