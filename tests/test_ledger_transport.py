"""The real engine behind its wire, message by message: what leaves, what is corrected, what is not counted."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from slum.errors import InvariantError
from slum.ledger import group, journal
from slum.ledger.election import Election
from slum.ledger.frames import JournalId
from slum.ledger.group import Group, Timing
from slum.ledger.later import LATER_S
from slum.ledger.peerwire import (
    Append,
    AskPreVote,
    AskVote,
    HigherTerm,
    LogEntry,
    Message,
    NextIndex,
    PreVote,
    Tail,
    Vote,
)
from slum.ledger.transport import Wire

PLACE = (7, 3)
COMMAND = b"\0" + msgspec.msgpack.encode((0, (b"x",)))


class Bench:
    """One member of five, and all that it posts."""

    def __init__(self, folder: Path) -> None:
        identity = JournalId(cluster="c", generation=7, epoch=3, lineage="l", salt=b"salt")
        self.journal = journal.create(folder / "journal-7-3", identity, 1 << 16)
        self.posted: list[tuple[str, Message]] = []
        self.applied: list[bytes] = []
        self.ahead_s = 0.0
        """How much later the wire believes it to be."""
        peers = ("m2", "m3", "m4", "m5")
        self.election = Election(
            place=PLACE, peers=peers, min_s=0.4, max_s=0.8, chance=random.Random(1), now=time.monotonic() - 10
        )
        self.wire = Wire(
            place=PLACE,
            peers=peers,
            journal=self.journal,
            election=self.election,
            post=self.post,
            clock=lambda: time.monotonic() + self.ahead_s,
        )
        self.group = Group(
            member="m1",
            peers=peers,
            journal=self.journal,
            transport=self.wire,
            on_entry=self.applied.append,
            timing=Timing(),
            spares=self.wire.spares,
        )
        self.wire.attach(self.group)
        for peer in peers:
            self.wire.up(peer)

    def post(self, peer: str, message: Message) -> None:
        if isinstance(message, NextIndex | AskVote | Vote):
            assert not self.journal.dirty, "a message left before the journal was on disk"
        assert not self.journal.promises, "a message left before a term or vote was on disk"
        self.posted.append((peer, message))

    def last(self) -> Message:
        return self.posted[-1][1]

    def follow(self, *terms: int, term: int) -> None:
        """Hold entries of these terms behind the first, as a leader of *term* sent them."""
        self.wire.take("m2", append(1, 0, *terms, term=term))

    def lead(self) -> None:
        self.group.tick(stand=True)
        term = self.group.term
        for peer in ("m2", "m3"):
            self.wire.take(peer, Vote(place=PLACE, term=term))
        assert self.group.leads


def entry(index: int, term: int) -> LogEntry:
    return (COMMAND, index, term)


def append(prev: int, prev_term: int, *terms: int, term: int, commit: int = 1) -> Append:
    entries = tuple(entry(prev + 1 + n, found) for n, found in enumerate(terms))
    return Append(place=PLACE, term=term, commit=commit, prev_index=prev, prev_term=prev_term, entries=entries)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.group.close()
    made.journal.close()


def test_only_what_a_message_covers_is_acknowledged_and_committed(bench: Bench) -> None:
    bench.follow(1, 1, 1, 1, term=1)
    assert bench.last() == NextIndex(place=PLACE, term=1, next=6, reset=False, success=True)
    bench.wire.take("m3", append(3, 1, term=2, commit=5))
    assert bench.last() == NextIndex(place=PLACE, term=2, next=4, reset=False, success=True)
    assert len(bench.journal) == 5, "nothing conflicted, nothing was cut"
    assert bench.group.commit == 3, "what lies behind may be another leader's"


def test_an_overlap_changes_nothing(bench: Bench) -> None:
    bench.follow(1, 1, 1, term=1)
    bench.wire.take("m2", append(1, 0, 1, 1, term=1, commit=4))
    assert len(bench.journal) == 4
    assert bench.last() == NextIndex(place=PLACE, term=1, next=4, reset=False, success=True)


def test_a_conflict_cuts_and_a_gap_asks(bench: Bench) -> None:
    bench.follow(1, 1, 1, term=1)
    bench.wire.take("m3", append(2, 1, 2, term=2))
    assert [bench.journal.term_of(n + 1) for n in range(len(bench.journal))] == [0, 1, 2]
    bench.wire.take("m3", append(9, 2, 2, term=2))
    assert bench.last() == NextIndex(place=PLACE, term=2, next=2, reset=True, success=False)
    bench.wire.take("m3", append(3, 3, 3, term=3))
    assert bench.last() == NextIndex(place=PLACE, term=3, next=2, reset=True, success=False), "one answer, not one step"


def test_an_older_term_is_told_so(bench: Bench) -> None:
    bench.follow(5, term=5)
    bench.wire.take("m3", append(1, 0, 3, term=3))
    assert bench.last() == HigherTerm(place=PLACE, term=5)
    bench.wire.take("m3", AskPreVote(place=PLACE, term=4, round=1, last_index=9, last_term=4))
    assert bench.last() == HigherTerm(place=PLACE, term=5)
    bench.wire.take("m3", HigherTerm(place=PLACE, term=8))
    assert bench.group.term == 8
    assert bench.journal.getVotedForNodeId() is None


def test_a_peer_has_one_vote_a_term_and_old_ones_do_not_count(bench: Bench) -> None:
    bench.group.tick(stand=True)
    old = bench.group.term
    bench.group.tick(stand=True)
    for peer, term in (("m2", old), ("m3", old), ("m2", old + 1), ("m2", old + 1), ("m3", old), ("m2", old + 1)):
        bench.wire.take(peer, Vote(place=PLACE, term=term))
    assert not bench.group.leads
    bench.wire.take("m3", Vote(place=PLACE, term=old + 1))
    assert bench.group.leads


def test_answers_of_another_term_or_beyond_the_log_commit_nothing(bench: Bench) -> None:
    bench.lead()
    term, end = bench.group.term, len(bench.journal)
    strange = [(term - 1, end + 1), (term + 1, end + 1), (term, end + 2), (term, 0)]
    for found, next_index in strange:
        for peer in ("m2", "m3", "m4"):
            answer = NextIndex(place=PLACE, term=found, next=next_index, reset=False, success=True)
            bench.wire.take(peer, answer)
    bench.group.tick()
    assert bench.group.commit == 1
    for peer in ("m2", "m3"):
        bench.wire.take(peer, NextIndex(place=PLACE, term=term, next=end + 1, reset=False, success=True))
    bench.group.tick()
    assert bench.group.commit == end
    assert bench.wire.acknowledged("m2") == end
    assert bench.wire.acknowledged("m4") == 0


def test_two_leaders_of_one_term_are_a_bug(bench: Bench) -> None:
    bench.lead()
    with pytest.raises(InvariantError, match="leads term"):
        bench.wire.take("m5", append(1, 0, term=bench.group.term))


def test_a_leaders_entries_travel_while_they_are_written(bench: Bench) -> None:
    bench.lead()
    bench.journal.sync()
    bench.posted.clear()
    bench.group.offer(b"x", lambda *_: None)
    bench.group.tick()
    assert sorted(peer for peer, _ in bench.posted) == ["m2", "m3"], "a majority, with us"
    assert all(isinstance(message, Append) and message.entries for _, message in bench.posted)
    assert bench.journal.dirty


def write(bench: Bench) -> list[str]:
    """Append an entry as leader; return to whom it was sent at once."""
    bench.posted.clear()
    bench.group.offer(b"x", lambda *_: None)
    bench.group.tick()
    bench.journal.sync()
    return sorted(peer for peer, _ in bench.posted)


def acknowledge(bench: Bench, *peers: str) -> None:
    end = len(bench.journal)
    for peer in peers:
        bench.wire.take(peer, NextIndex(place=PLACE, term=bench.group.term, next=end + 1, reset=False, success=True))
    bench.group.tick()


def test_who_is_not_needed_gets_entries_a_little_later_and_together(bench: Bench) -> None:
    bench.lead()
    bench.journal.sync()
    acknowledge(bench, "m2", "m3", "m4", "m5")
    for _ in range(3):
        assert write(bench) == ["m2", "m3"]
        acknowledge(bench, "m2", "m3")
    assert bench.wire.due_at <= time.monotonic() + LATER_S
    bench.posted.clear()
    bench.ahead_s = LATER_S
    bench.wire.tick()
    assert sorted(peer for peer, _ in bench.posted) == ["m4", "m5"]
    assert [len(message.entries) for _, message in bench.posted if isinstance(message, Append)] == [3, 3]
    assert bench.wire.due_at == math.inf


def test_who_lags_is_not_waited_for_any_more(bench: Bench) -> None:
    bench.lead()
    bench.journal.sync()
    acknowledge(bench, "m2", "m3", "m4", "m5")
    assert write(bench) == ["m2", "m3"]
    acknowledge(bench, "m4", "m3")
    assert write(bench) == ["m3", "m4"]
    acknowledge(bench, "m2", "m3", "m4", "m5")
    assert write(bench) == ["m3", "m4"], "no change without need"
    bench.wire.down("m3")
    assert write(bench) == ["m2", "m4"]
    bench.wire.down("m4")
    bench.wire.down("m5")
    assert write(bench) == ["m2"]


def test_what_a_later_leader_replaced_is_not_held_against_who_acknowledged_it(bench: Bench) -> None:
    """m4 had it from us, and has what replaced it not yet: it forgot nothing."""
    bench.lead()
    bench.journal.sync()
    acknowledge(bench, "m2", "m3", "m4")
    committed = len(bench.journal)
    write(bench)
    acknowledge(bench, "m4")
    assert bench.wire.acknowledged("m4") == bench.group.commit == committed
    later = bench.group.term + 1
    commit = committed + 1
    bench.wire.take("m2", append(committed, later - 1, later, term=later, commit=commit))
    bench.group.tick()
    assert bench.group.commit == commit
    assert bench.wire.acknowledged("m4") < commit


def test_what_is_on_its_way_is_not_sent_again_for_an_early_answer(bench: Bench) -> None:
    bench.lead()
    bench.journal.sync()
    acknowledge(bench, "m2", "m3", "m4", "m5")
    end = len(bench.journal)
    write(bench)
    write(bench)
    bench.wire.take("m2", NextIndex(place=PLACE, term=bench.group.term, next=end + 2, reset=False, success=True))
    assert bench.group.next_of("m2") == end + 3
    # Lost on the way: the follower says from where it lacks them.
    bench.wire.take("m2", NextIndex(place=PLACE, term=bench.group.term, next=end + 2, reset=True, success=False))
    assert bench.group.next_of("m2") == end + 2


def test_what_is_committed_is_told_with_new_entries_or_a_little_later(bench: Bench) -> None:
    bench.lead()
    one, term = bench.group, bench.group.term
    bench.journal.sync()
    one.tick()
    for peer in ("m2", "m3"):
        bench.wire.take(peer, NextIndex(place=PLACE, term=term, next=3, reset=False, success=True))
    bench.posted.clear()
    one.tick()
    assert one.commit == 2
    assert not bench.posted
    assert one.tell_at < time.monotonic() + 1
    one.tell(at_once=True)
    assert [message.commit for _, message in bench.posted if isinstance(message, Append)] == [2] * 4
    assert one.tell_at == math.inf


def test_who_loses_its_leader_asks_when_it_is_its_turn(bench: Bench) -> None:
    bench.follow(1, term=1)
    bench.group.tick()
    now = time.monotonic()
    bench.wire.down("m3")
    assert bench.election.hears_leader(now), "that was not the leader"
    bench.wire.down("m2")
    assert not bench.election.hears_leader(now)
    assert bench.election.deadline <= time.monotonic(), "the first of those that are left"


def test_it_never_stands_by_itself(bench: Bench) -> None:
    for _ in range(5):
        bench.group.tick()
    assert bench.posted == []
    assert bench.group.term == 0
    asked = AskPreVote(place=PLACE, term=0, round=3, last_index=1, last_term=0)
    bench.wire.take("m2", asked)
    assert bench.posted == [("m2", PreVote(place=PLACE, round=3))] or bench.election.hears_leader(time.monotonic())


def test_a_tail_is_committed_and_answered_to_nobody(bench: Bench) -> None:
    bench.wire.feed("m9", Tail(place=PLACE, prev_index=1, prev_term=0, entries=(entry(2, 4), entry(3, 4))))
    bench.journal.sync()
    bench.group.tick()
    assert bench.posted == []
    assert bench.applied == [b"x", b"x"]


def test_a_long_backlog_is_applied_in_turns(bench: Bench) -> None:
    count = group.TURN_ENTRIES + 3
    entries = tuple(entry(2 + n, 1) for n in range(count))
    bench.wire.feed("m3", Tail(place=PLACE, prev_index=1, prev_term=0, entries=entries))
    bench.journal.sync()
    bench.group.tick()
    # The first entry is PySyncObj's own.
    assert len(bench.applied) in (group.TURN_ENTRIES - 1, group.TURN_ENTRIES)
    assert bench.group.commit == count + 1, "what is known to be committed is not forgotten"
    bench.group.tick()
    assert len(bench.applied) == count
    assert bench.group.backlog == 0


def test_who_is_not_up_is_not_heard(bench: Bench) -> None:
    bench.wire.down("m2")
    bench.follow(1, term=1)
    assert (len(bench.journal), bench.posted) == (1, [])
