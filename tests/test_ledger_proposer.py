"""The queue in front of the log: order, bounds, repeats, and what is proposed again."""

from __future__ import annotations

import threading

import pytest
from ledger_support import note, proposal

from slum.errors import QuorumLost
from slum.ledger import proposer as module
from slum.ledger.commands import PROPOSAL_BYTES_MAX, Barrier, Done, Proposal, Rejected, SetDesired
from slum.ledger.proposer import Answer, Proposer


def submit(queue: Proposer, made: Proposal) -> list[Answer]:
    answers: list[Answer] = []
    queue.submit(made, answers.append, seq=9)
    return answers


def release(queue: Proposer) -> None:
    for take, answer in queue.release():
        take(answer)


def big(size: int) -> Proposal:
    return proposal(SetDesired(fleet_zstd=bytes(size), digest="", base_revision=0))


def test_what_arrives_while_an_entry_flies_rides_in_the_next() -> None:
    queue = Proposer()
    first, second, third = (proposal(note()) for _ in range(3))
    answers = [submit(queue, first)]
    assert queue.take_batch() == (first,)
    answers += [submit(queue, second), submit(queue, third)]
    assert queue.in_flight
    queue.applied((first,), (Done(seq=1),))
    assert answers[0] == [], "answers leave by release() only"
    release(queue)
    assert answers[0] == [Done(seq=1)]
    assert queue.take_batch() == (second, third)


def test_an_entry_holds_at_most_one_mebibyte() -> None:
    queue = Proposer()
    made = [big(400_000) for _ in range(3)]
    for each in made:
        submit(queue, each)
    assert queue.take_batch() == (made[0], made[1])
    queue.put_back()
    assert queue.take_batch() == (made[0], made[1])


def test_what_fits_no_entry_is_answered_at_once() -> None:
    queue = Proposer()
    answers = submit(queue, big(PROPOSAL_BYTES_MAX))
    assert isinstance(answers[0], Rejected)
    assert (answers[0].code, answers[0].seq) == ("invalid", 9)
    assert "an entry of the ledger holds" in answers[0].why


def test_a_full_queue_says_when_to_try_again() -> None:
    queue = Proposer(queue_max=3)
    for _ in range(3):
        submit(queue, proposal(note()))
    with pytest.raises(QuorumLost) as caught:
        submit(queue, proposal(note()))
    assert "try again in 1 s" in caught.value.hint
    queue.take_batch()
    submit(queue, proposal(note()))


def test_a_full_queue_counts_bytes_too() -> None:
    queue = Proposer()
    room = module.QUEUE_BYTES_MAX // 1_000_000
    for _ in range(room):
        submit(queue, big(1_000_000))
    with pytest.raises(QuorumLost):
        submit(queue, big(1_000_000))


def test_a_repeat_of_what_waits_gets_the_same_answer() -> None:
    queue = Proposer()
    made = proposal(note())
    answers = [submit(queue, made), submit(queue, made)]
    assert queue.take_batch() == (made,)
    answers.append(submit(queue, made))
    assert queue.queued == 0
    queue.applied((made,), (Done(seq=4),))
    release(queue)
    assert answers == [[Done(seq=4)]] * 3


def test_what_took_no_effect_goes_first_in_its_old_order() -> None:
    queue = Proposer()
    made = [proposal(note()) for _ in range(4)]
    for each in made[:2]:
        submit(queue, each)
    queue.take_batch()
    for each in made[2:]:
        submit(queue, each)
    queue.put_back()
    assert not queue.in_flight
    assert queue.take_batch() == tuple(made)


def test_anothers_entry_answers_only_what_flies_from_here() -> None:
    queue = Proposer()
    made = proposal(note())
    answers = submit(queue, made)
    queue.applied((made,), (Done(seq=1),))
    release(queue)
    assert answers == []
    assert queue.take_batch() == (made,)


def test_refused_ones_are_answered_and_the_rest_goes_on() -> None:
    queue = Proposer()
    low = QuorumLost("the disk is almost full")
    refused, taken = proposal(note()), proposal(Barrier())
    answers = [submit(queue, refused), submit(queue, taken)]
    batch = queue.take_batch(lambda made: low if made is refused else None)
    assert batch == (taken,)
    release(queue)
    assert answers == [[low], []]


def test_closing_answers_everyone() -> None:
    queue = Proposer()
    flying, waiting = proposal(note()), proposal(note())
    answers = [submit(queue, flying)]
    queue.take_batch()
    answers.append(submit(queue, waiting))
    over = QuorumLost("stopping")
    queue.close(over)
    release(queue)
    assert answers == [[over], [over]]
    with pytest.raises(QuorumLost, match="stopping"):
        submit(queue, proposal(note()))


def test_any_thread_may_submit() -> None:
    queue = Proposer()
    threads = [threading.Thread(target=lambda: [submit(queue, proposal(note())) for _ in range(50)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    seen: set[str] = set()
    while any(thread.is_alive() for thread in threads) or queue.queued:
        batch = queue.take_batch()
        seen.update(made.request_id for made in batch)
        queue.applied(batch, tuple(Done(seq=1) for _ in batch))
    for thread in threads:
        thread.join()
    assert len(seen) == 200
    assert len(queue.release()) == 200
