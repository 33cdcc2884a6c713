"""Who is asked by a member that is behind: who is ahead, or who that one names; and another one when it is silent."""

from __future__ import annotations

from pathlib import Path

import pytest

from slum.ledger.catchup import ASK_AGAIN_S, CatchUp
from slum.ledger.journal import Journal
from slum.ledger.peerwire import Message, Place, Tail, WantCopy, WantTail

HERE: Place = (1, 1)


class Behind:
    """A member that stands in an old epoch, its clock, and what it has sent."""

    place, commit, is_sound = HERE, 7, True

    def __init__(self, home: Path) -> None:
        self.now = 0.0
        self.up = {"m1", "m2"}
        self.named = ""
        self.sent: list[tuple[str, Message]] = []
        self.catch_up = CatchUp(
            home,
            self,
            post=lambda peer, message: self.sent.append((peer, message)),
            clock=lambda: self.now,
            apart=lambda work: work(),
            note=lambda event, **fields: None,
        )

    def journal_of(self, place: Place) -> Journal | None:
        return None

    def stand_in(self, peer: str) -> str:
        return self.named

    def reaches(self, peer: str) -> bool:
        return peer in self.up

    def feed(self, peer: str, tail: Tail) -> None:
        raise AssertionError("there is no tail")

    def adopt(self, path: Path) -> bool:
        raise AssertionError("there is no copy")

    def hears(self, peer: str, other: str) -> list[tuple[str, Message]]:
        """Let *peer* say that the tail is gone, and return what is asked then."""
        self.sent.clear()
        self.catch_up.take(peer, Tail(place=HERE, prev_index=7, prev_term=0, gone=True, other=other))
        return self.sent


@pytest.fixture
def behind(tmp_path: Path) -> Behind:
    made = Behind(tmp_path)
    made.catch_up.from_peer("m1")
    assert made.sent == [("m1", WantTail(place=HERE, after=7))]
    return made


COPY = WantCopy(name="", offset=0, place=HERE)


def test_who_has_no_tail_is_asked_for_a_copy(behind: Behind) -> None:
    assert behind.hears("m1", "") == [("m1", COPY)]


def test_who_is_named_is_asked_in_its_stead(behind: Behind) -> None:
    assert behind.hears("m1", "m2") == [("m2", COPY)]
    behind.now += ASK_AGAIN_S
    assert behind.hears("m1", "m2") == [], "one at a time"


def test_who_is_out_of_reach_is_not_asked(behind: Behind) -> None:
    behind.up = {"m1"}
    assert behind.hears("m1", "m2") == [("m1", COPY)]


def test_when_who_was_named_is_silent_whoever_is_ahead_is_asked_itself(behind: Behind) -> None:
    behind.hears("m1", "m2")
    behind.now += ASK_AGAIN_S
    behind.catch_up.tick()
    assert not behind.catch_up.busy
    behind.catch_up.from_peer("m1")
    assert behind.sent == [("m2", COPY), ("m1", COPY)]
    behind.catch_up.begin_epoch()
    behind.catch_up.from_peer("m1")
    assert behind.hears("m1", "m2") == [("m2", COPY)], "another epoch, another chance"


def test_what_is_gone_is_said_with_who_else_has_it(behind: Behind) -> None:
    behind.named = "m3"
    behind.catch_up.take("m2", WantTail(place=(1, 0), after=3))
    assert behind.sent[-1] == ("m2", Tail(place=(1, 0), prev_index=3, prev_term=0, gone=True, other="m3"))


def test_who_cannot_make_a_copy_is_silent_and_tries_again_later(behind: Behind) -> None:
    behind.sent.clear()
    answers = []
    for _ in range(4):
        behind.catch_up.take("m2", COPY)
        answers.append(len(behind.sent))
    assert answers == [1, 1, 2, 2], "there is no state.db: every second time it is tried again"
