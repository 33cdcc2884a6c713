"""When members that are not waited for are sent new entries: never later than said, and sooner when they are needed."""

from __future__ import annotations

import math

import pytest

from slum.ledger.later import LAG_S, LATER_BYTES, LATER_S, Later


@pytest.fixture
def later() -> Later:
    return Later()


def test_nothing_is_due_while_nothing_is_owed(later: Later) -> None:
    assert later.due_at(commit=9) == math.inf
    later.owe(5, 1000, now=100.0)
    later.settle()
    assert later.due_at(commit=1) == math.inf


def test_the_first_that_is_owed_sets_the_time(later: Later) -> None:
    later.owe(5, 1000, now=100.0)
    later.owe(7, 1100, now=100.0 + LATER_S / 2)
    assert later.due_at(commit=7) == 100.0 + LATER_S


def test_what_the_others_do_not_acknowledge_is_due_sooner(later: Later) -> None:
    later.owe(5, 1000, now=100.0)
    later.owe(7, 1100, now=100.0 + LAG_S / 2)
    assert later.due_at(commit=6) == 100.0 + LAG_S / 2 + LAG_S, "as long as the newest of them is not committed"
    later.owe(8, 1100, now=100.0 + LATER_S)
    assert later.due_at(commit=7) == 100.0 + LATER_S, "and never later than that"


def test_much_is_not_kept(later: Later) -> None:
    assert not later.is_much(1 << 30)
    later.owe(5, 1000, now=100.0)
    later.owe(6, 1500, now=100.0)
    assert not later.is_much(999 + LATER_BYTES)
    assert later.is_much(1000 + LATER_BYTES)
    later.settle()
    assert not later.is_much(1000 + LATER_BYTES)
