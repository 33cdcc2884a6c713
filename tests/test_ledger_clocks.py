"""Whose clock is wrong, decided from what peers say."""

from __future__ import annotations

import pytest

from slum.ledger.clocks import Offset, differ, wrong

YEAR = 365 * 86400.0


@pytest.mark.parametrize(
    ("offsets", "found"),
    [
        ({}, {}),
        ({"m2": YEAR}, {}),
        ({"m2": 0.5, "m3": -4.9}, {}),
        ({"m2": 0.0, "m3": YEAR}, {"m3": YEAR}),
        ({"m2": -YEAR, "m3": -YEAR - 1}, {"m1": YEAR}),
        ({"m2": 6.0, "m3": 6.5, "m4": 6.2, "m5": 5.9}, {"m1": -6.0}),
        ({"m2": 0.1, "m3": YEAR, "m4": -YEAR, "m5": 0.2}, {"m3": YEAR - 0.1, "m4": -YEAR - 0.1}),
    ],
)
def test_the_median_of_all_tells(offsets: dict[str, float], found: dict[str, float]) -> None:
    assert wrong(offsets, "m1") == pytest.approx(found)


def test_of_two_nobody_can_tell() -> None:
    assert differ({"m2": YEAR}, "m1") == {"m2": YEAR}
    assert differ({"m2": 1.0}, "m1") == {}
    assert differ({"m2": YEAR, "m3": YEAR}, "m1") == {}


def test_words_that_waited_do_not_count() -> None:
    """A process that was stopped for ten seconds reads all that came meanwhile at once."""
    offset = Offset()
    for late in (10.0, 9.7, 9.4, 9.1):
        offset.say(100.0, -late)
    assert offset.seconds is None
    offset.say(100.6, -0.01)
    assert offset.seconds == -0.01
