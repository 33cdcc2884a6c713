"""What members decide about each other: hellos, overlapping appends, pre-votes; and what never gets past the wire."""

from __future__ import annotations

import pickle
import random
import struct

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slum.errors import InvariantError
from slum.ledger.commands import Member
from slum.ledger.election import Election
from slum.ledger.judge import Ahead, Behind, Fenced, Refuse, Same, Verdict, judge
from slum.ledger.overlap import fit
from slum.ledger.peerwire import (
    FRAME_BYTES_MAX,
    HELLO_BYTES_MAX,
    VERSION,
    Append,
    AskPreVote,
    BadFrame,
    Hello,
    LogEntry,
    PreVote,
    Splitter,
    Tail,
    pack,
    unpack,
)

PLACE = (7, 3)
M2 = Member(id="m2", incarnation="i2")


def hello(member: str, **fields: object) -> Hello:
    made = Hello(
        version=VERSION,
        cluster="c",
        member=member,
        incarnation=f"i{member[1:]}",
        generation=7,
        epoch=3,
        lineage="l",
        chain0="aa",
        last_index=10,
        last_term=2,
        seq=100,
        protocol=1,
        run="r",
    )
    return msgspec.structs.replace(made, **fields)


def judged(theirs: Hello, known: Member | None = M2, acknowledged: int = 0) -> Verdict:
    history = {(7, 1): "11", (7, 2): "22", PLACE: "aa"}
    return judge(hello("m1"), theirs, known=known, history=history, acknowledged=acknowledged)


# --- hellos -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "verdict"),
    [
        ({}, Same()),
        ({"epoch": 2, "chain0": "22"}, Behind()),
        ({"epoch": 4, "chain0": "44"}, Ahead()),
        ({"epoch": 0, "generation": 0, "lineage": "", "chain0": ""}, Behind()),
    ],
)
def test_where_another_stands(fields: dict[str, object], verdict: Verdict) -> None:
    assert judged(hello("m2", **fields)) == verdict


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"version": 99}, "version 99"),
        ({"cluster": "other"}, "is of cluster other"),
        ({"incarnation": "new"}, "has lost its disk"),
        ({"generation": 6}, "which 7 has replaced"),
        ({"lineage": "k"}, "began twice"),
        ({"chain0": "ab"}, "another history before epoch 3"),
        ({"epoch": 2, "chain0": "23"}, "another history before epoch 2"),
    ],
)
def test_who_is_refused(fields: dict[str, object], why: str) -> None:
    verdict = judged(hello("m2", **fields))
    assert isinstance(verdict, Refuse)
    assert why in verdict.why


def test_a_later_generation_ends_ours() -> None:
    assert judged(hello("m2", generation=8)) == Fenced(8)
    assert isinstance(judged(hello("m2", generation=8), known=None), Refuse), "a stranger fences nobody"
    assert isinstance(judged(hello("m2", generation=8, cluster="other")), Refuse)


def test_strangers_and_doubles_are_refused() -> None:
    assert isinstance(judged(hello("m2"), known=None), Refuse)
    assert isinstance(judged(hello("m1"), known=Member(id="m1", incarnation="i1")), Refuse)


def test_who_forgot_what_it_acknowledged_is_refused() -> None:
    assert judged(hello("m2", last_index=10), acknowledged=10) == Same()
    verdict = judged(hello("m2", last_index=9), acknowledged=10)
    assert isinstance(verdict, Refuse)
    assert "forgot" in verdict.why


# --- overlap ----------------------------------------------------------------------------------------------------------


class ListLog:
    def __init__(self, *terms: int) -> None:
        self.terms = list(terms)

    def __len__(self) -> int:
        return len(self.terms)

    def term_of(self, index: int) -> int:
        return self.terms[index - 1]

    def entry(self, index: int) -> LogEntry:
        return entry(index, self.terms[index - 1])


def entry(index: int, term: int) -> LogEntry:
    return (b"\0" + f"{index}/{term}".encode(), index, term)


def append(prev: int, prev_term: int, *terms: int, commit: int = 1, term: int = 9) -> Append:
    entries = tuple(entry(prev + 1 + n, found) for n, found in enumerate(terms))
    return Append(place=PLACE, term=term, commit=commit, prev_index=prev, prev_term=prev_term, entries=entries)


def test_new_entries_pass_as_they_are() -> None:
    message = append(3, 1, 1, 2, commit=4)
    fitted = fit(message, ListLog(0, 1, 1), committed=2)
    assert (fitted.message, fitted.next, fitted.matches) == (message, 6, True)


def test_what_is_held_is_neither_cut_nor_added_again() -> None:
    fitted = fit(append(2, 1, 1, 1, commit=99), ListLog(0, 1, 1, 1, 1, 1), committed=2)
    assert fitted.message == append(6, 1, commit=4), "the log's own end: nothing lies behind it that could be cut"
    assert fitted.next == 5, "only what the message covers is acknowledged"


def test_a_heartbeat_cuts_nothing_and_acknowledges_nothing_of_the_tail() -> None:
    fitted = fit(append(2, 1, commit=6), ListLog(0, 1, 1, 1), committed=1)
    assert (fitted.message.prev_index, fitted.message.entries) == (4, ())
    assert (fitted.message.commit, fitted.next) == (2, 3)


def test_a_conflict_cuts_from_the_first_entry_that_differs() -> None:
    fitted = fit(append(2, 1, 1, 3, 3), ListLog(0, 1, 1, 2, 2, 2, 2), committed=3)
    assert (fitted.message.prev_index, fitted.message.entries) == (3, (entry(4, 3), entry(5, 3)))
    assert fitted.next == 6


def test_a_gap_and_a_conflict_before_ask_for_what_follows_the_committed() -> None:
    assert fit(append(9, 1, 1), ListLog(0, 1, 1), committed=2).next == 3
    fitted = fit(append(5, 3, 3), ListLog(0, 1, 1, 2, 2, 2), committed=3)
    assert (fitted.matches, fitted.next, fitted.message.entries) == (False, 4, ())


def test_a_contradiction_of_what_is_committed_is_fatal() -> None:
    with pytest.raises(InvariantError, match="replaces entry 3"):
        fit(append(2, 1, 5), ListLog(0, 1, 1, 1), committed=4)
    with pytest.raises(InvariantError, match="contradicts entry 3"):
        fit(append(3, 2, 5), ListLog(0, 1, 1, 1), committed=4)
    other = msgspec.structs.replace(append(2, 1), entries=((b"\0other", 3, 1),))
    with pytest.raises(InvariantError, match="two different entries"):
        fit(other, ListLog(0, 1, 1, 1), committed=1)


@given(st.data())
def test_a_leader_that_sends_in_parts_always_gets_on(data: st.DataObject) -> None:
    """Parts are sent together, from where the last answer said; however the logs differ, they come to agree."""
    leader = ListLog(0, *sorted(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=20))), 9)
    committed = data.draw(st.integers(1, len(leader) - 1))
    shared = data.draw(st.integers(committed, len(leader) - 1))
    mine = ListLog(*leader.terms[:shared], *sorted(data.draw(st.lists(st.integers(5, 8), max_size=20))))
    part, start = data.draw(st.integers(1, 5)), data.draw(st.integers(2, len(leader)))
    for _ in range(6):
        answers = []
        for prev in range(start - 1, len(leader), part):
            sent = leader.terms[prev : prev + part]
            fitted = fit(append(prev, leader.term_of(prev), *sent), mine, committed=committed)
            if fitted.matches:
                del mine.terms[fitted.message.prev_index :]
                mine.terms += [term for _, _, term in fitted.message.entries]
            answers.append(fitted.next)
        start = min(answers[-1] if answers else start, len(leader))
    assert mine.terms[: len(leader)] == leader.terms


@given(st.data())
def test_fitting_any_window_of_the_leaders_log_never_loses_a_match(data: st.DataObject) -> None:
    """Whatever window comes, in whatever order: the longest prefix shared with the leader never gets shorter."""
    terms = sorted(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=12)))
    leader = ListLog(0, *terms)
    shared = data.draw(st.integers(1, len(leader)))
    tail = data.draw(st.lists(st.integers(5, 6), max_size=5))
    mine = ListLog(*leader.terms[:shared], *sorted(tail))
    best = shared
    for _ in range(data.draw(st.integers(1, 8))):
        prev = data.draw(st.integers(1, len(leader)))
        count = data.draw(st.integers(0, len(leader) - prev))
        fitted = fit(
            append(prev, leader.term_of(prev), *leader.terms[prev : prev + count], commit=99), mine, committed=1
        )
        message = fitted.message
        if fitted.matches:
            # As PySyncObj does it: cut behind prev_index, add the entries.
            del mine.terms[message.prev_index :]
            mine.terms += [term for _, _, term in message.entries]
            assert fitted.next == prev + count + 1
            assert mine.terms[: fitted.next - 1] == leader.terms[: fitted.next - 1], "only what matches is acknowledged"
            assert message.commit <= fitted.next - 1
        now = next((n for n, (a, b) in enumerate(zip(mine.terms, leader.terms, strict=False)) if a != b), None)
        held = now if now is not None else min(len(mine), len(leader))
        assert held >= best, "an entry that matched was cut"
        best = held


# --- elections --------------------------------------------------------------------------------------------------------


def election(peers: tuple[str, ...] = ("m2", "m3")) -> Election:
    return Election(place=PLACE, peers=peers, min_s=0.4, max_s=0.8, chance=random.Random(1), now=100.0)


def ask(made: Election, now: float = 101.0) -> AskPreVote:
    asked = made.tick(now, leads=False, term=4, last=(4, 10))
    assert asked is not None
    return asked


def test_it_asks_after_the_timeout_and_stands_with_a_majority() -> None:
    made = election()
    assert made.tick(100.3, leads=False, term=4, last=(4, 10)) is None
    asked = ask(made)
    assert (asked.term, asked.last_index) == (4, 10)
    assert not made.must_stand
    made.granted("m2", PreVote(place=PLACE, round=asked.round))
    assert made.must_stand


def test_old_rounds_strangers_and_repeats_do_not_count() -> None:
    made = election(("m2", "m3", "m4", "m5"))
    old = ask(made)
    asked = ask(made, 103.0)
    for peer, found in (("m2", old), ("m9", asked), ("m3", asked), ("m3", asked)):
        made.granted(peer, PreVote(place=PLACE, round=found.round))
    assert not made.must_stand
    made.granted("m4", PreVote(place=PLACE, round=asked.round))
    assert made.must_stand


def test_a_leader_that_is_heard_ends_the_round() -> None:
    made = election()
    asked = ask(made)
    made.heard_leader(101.1)
    made.granted("m2", PreVote(place=PLACE, round=asked.round))
    assert not made.must_stand


def test_who_loses_its_leader_asks_at_once_and_in_turn() -> None:
    first, second = election(), election()
    for made, rank in ((first, 0), (second, 1)):
        made.heard_leader(101.0)
        assert made.hears_leader(101.01)
        made.lost_leader("m2", 101.01, rank)
        assert not made.hears_leader(101.01), "it votes for another at once"
    ask(first, 101.01)
    assert second.tick(101.05, leads=False, term=4, last=(4, 10)) is None
    ask(second, 101.12)
    assert first.tick(101.12, leads=False, term=4, last=(4, 10)) is None, "one that gets no majority waits as ever"


def test_a_leader_that_is_found_again_is_waited_for() -> None:
    made = election()
    made.heard_leader(101.0)
    made.lost_leader("m2", 101.01, 0)
    made.found_leader("m3", 101.02)
    assert not made.hears_leader(101.03), "that is another one"
    made.found_leader("m2", 101.03)
    assert made.hears_leader(101.04)
    assert made.tick(101.1, leads=False, term=4, last=(4, 10)) is None


def test_whom_it_would_vote_for() -> None:
    made = election()
    asked = AskPreVote(place=PLACE, term=4, round=1, last_index=10, last_term=4)

    def would(now: float = 101.0, leads: bool = False, term: int = 4, last: tuple[int, int] = (4, 10)) -> bool:
        return made.would_vote(asked, now, leads=leads, term=term, last=last)

    assert would()
    assert not would(leads=True)
    assert not would(term=5)
    assert not would(last=(4, 11))
    assert not would(last=(5, 1))
    made.heard_leader(101.0)
    assert not would(101.3)
    assert would(101.5)


# --- frames -----------------------------------------------------------------------------------------------------------


def test_messages_survive_the_wire() -> None:
    message = append(3, 1, 1, 2)
    splitter = Splitter(FRAME_BYTES_MAX)
    data = pack(message) * 2
    for at in range(0, len(data), 7):
        splitter.feed(data[at : at + 7])
    assert [unpack(splitter.take() or b""), unpack(splitter.take() or b"")] == [message, message]
    assert splitter.take() is None


def test_a_length_is_checked_before_anything_is_taken() -> None:
    for length in (HELLO_BYTES_MAX + 1, 0x7FFFFFFF, 0xFFFFFFFF):
        splitter = Splitter()
        splitter.feed(struct.pack(">I", length))
        with pytest.raises(BadFrame, match="at most 4096"):
            splitter.take()


@pytest.mark.parametrize(
    "entries",
    [
        ((b"", 4, 1),),
        ((b"\2" + pickle.dumps(["add", "evil:1"]), 4, 1),),
        ((b"\3" + pickle.dumps(9), 4, 1),),
        ((b"\1x", 4, 1),),
        ((b"\0x", 5, 1),),
        ((b"\0x", 4, 0),),
        ((b"\0x", 4, 10),),
        ((b"\0x", 4, 2), (b"\0x", 5, 1)),
    ],
)
def test_entries_that_no_sound_member_sends_are_refused(entries: tuple[LogEntry, ...]) -> None:
    message = msgspec.structs.replace(append(3, 1), entries=entries)
    with pytest.raises(BadFrame):
        unpack(msgspec.msgpack.encode(message))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        pickle.dumps({"type": "append_entries"}),
        msgspec.msgpack.encode({"t": "apply_command", "command": b"x"}),
        msgspec.msgpack.encode({"t": "append", "place": [1, 1], "serialized": b"x"}),
        msgspec.msgpack.encode(Tail(place=PLACE, prev_index=0, prev_term=0)),
    ],
)
def test_junk_is_refused(body: bytes) -> None:
    with pytest.raises(BadFrame):
        unpack(body)
