"""Entries for members that are not waited for: joined, in order, never later than said, and sent at once when needed."""

from __future__ import annotations

import math

import pytest

from slum.ledger.later import LATER_BYTES, LATER_S, Later
from slum.ledger.peerwire import Append, LogEntry


class Sent:
    def __init__(self) -> None:
        self.now = 100.0
        self.all: list[tuple[str, Append]] = []
        self.later = Later(lambda peer, append: self.all.append((peer, append)), lambda: self.now)

    @property
    def last(self) -> tuple[int, int, list[int]]:
        """What was sent last: (index before it, commit, indexes)."""
        append = self.all[-1][1]
        return append.prev_index, append.commit, [index for _, index, _ in append.entries]


@pytest.fixture
def sent() -> Sent:
    return Sent()


def entry(index: int, size: int = 10) -> LogEntry:
    return (b"x" * size, index, 3)


def append(first: int, last: int, *, commit: int = 1, term: int = 3, size: int = 10) -> Append:
    entries = tuple(entry(index, size) for index in range(first, last + 1))
    return Append(place=(1, 1), term=term, commit=commit, prev_index=first - 1, prev_term=3, entries=entries)


def test_what_follows_rides_along_and_leaves_in_time(sent: Sent) -> None:
    sent.later.keep("m2", append(5, 5, commit=4))
    due = sent.later.due_at
    assert due == sent.now + LATER_S
    sent.now += LATER_S / 2
    sent.later.keep("m2", append(6, 7, commit=5))
    assert sent.all == []
    assert sent.later.due_at == due, "the first one sets the time"
    sent.later.send_all()
    assert len(sent.all) == 1
    assert sent.last == (4, 5, [5, 6, 7])
    assert sent.later.due_at == math.inf
    sent.later.send_all()
    assert len(sent.all) == 1


def test_what_is_to_be_known_at_once_takes_the_rest_along(sent: Sent) -> None:
    sent.later.keep("m2", append(5, 6))
    sent.later.send("m2", append(7, 6, commit=6))
    assert len(sent.all) == 1
    assert sent.last == (4, 6, [5, 6])
    assert sent.later.due_at == math.inf


def test_what_is_sent_again_stands_there_once(sent: Sent) -> None:
    sent.later.keep("m2", append(5, 7))
    sent.later.send("m2", append(6, 9))
    assert sent.last == (4, 1, [5, 6, 7, 8, 9])


@pytest.mark.parametrize("other", [append(9, 9), append(3, 4), append(7, 7, term=4)], ids=["gap", "before", "term"])
def test_what_does_not_continue_comes_behind_by_itself(sent: Sent, other: Append) -> None:
    kept = append(5, 6)
    sent.later.keep("m2", kept)
    sent.later.send("m2", other)
    assert [append for _, append in sent.all] == [kept, other]


def test_much_is_not_kept(sent: Sent) -> None:
    sent.later.keep("m2", append(5, 5))
    sent.later.keep("m2", append(6, 6, size=LATER_BYTES))
    assert sent.last == (4, 1, [5, 6])
    assert sent.later.due_at == math.inf


def test_each_has_its_own(sent: Sent) -> None:
    sent.later.keep("m2", append(5, 5))
    sent.later.keep("m3", append(5, 5))
    sent.later.forget("m2")
    sent.later.send_all()
    assert [peer for peer, _ in sent.all] == ["m3"]
