"""The checker of histories: what it lets pass and what not, held against trying every order."""

from __future__ import annotations

import itertools
import random

import pytest
from chaos.linear import Add, Does, Operation, Read, Swap, Verdict, check, step


def op(invoked: float, returned: float | None, does: Does) -> Operation:
    return Operation(invoked, returned, does)


def fits_by_trying(operations: list[Operation], start: object) -> bool:
    """Try every order of every choice of the unanswered ones."""
    sure = [each for each in operations if each.returned is not None]
    maybe = [each for each in operations if each.returned is None]
    for count in range(len(maybe) + 1):
        for extra in itertools.combinations(maybe, count):
            for order in itertools.permutations([*sure, *extra]):
                if all(
                    later.returned is None or later.returned >= sooner.invoked
                    for sooner, later in itertools.combinations(order, 2)
                ) and _steps(order, start):
                    return True
    return False


def _steps(order: tuple[Operation, ...], start: object) -> bool:
    state = start
    for each in order:
        fits, state = step(state, each.does)
        if not fits:
            return False
    return True


def test_a_read_may_not_show_what_was_overwritten_before_it_began() -> None:
    writes = [op(0, 1, Swap("", "a", True)), op(2, 3, Swap("a", "b", True))]
    assert check([*writes, op(4, 5, Read("b"))], "").verdict is Verdict.YES
    stale = check([*writes, op(4, 5, Read("a"))], "")
    assert (stale.verdict, stale.stuck) == (Verdict.NO, (op(4, 5, Read("a")),))
    assert check([*writes, op(2.5, 5, Read("a"))], "").verdict is Verdict.YES


def test_what_was_never_answered_may_happen_late_or_not_at_all() -> None:
    lost = op(0, None, Swap("", "a", None))
    assert check([lost, op(1, 2, Read("")), op(3, 4, Read("a"))], "").verdict is Verdict.YES
    assert check([lost, op(1, 2, Read("")), op(3, 4, Read(""))], "").verdict is Verdict.YES
    assert check([lost, op(1, 2, Read("a")), op(3, 4, Read(""))], "").verdict is Verdict.NO


def test_two_swaps_of_the_same_value_do_not_both_win() -> None:
    both = [op(0, 10, Swap("", "a", True)), op(0, 10, Swap("", "b", True))]
    assert check(both, "").verdict is Verdict.NO
    assert check([both[0], op(0, 10, Swap("", "b", False))], "").verdict is Verdict.YES
    assert check([op(0, 1, Swap("", "b", False))], "").verdict is Verdict.NO


def test_an_addition_counts_once() -> None:
    adds = [op(0, 1, Add()), op(0, 1, Add())]
    assert check([*adds, op(2, 3, Read(2))], 0).verdict is Verdict.YES
    for wrong in (1, 3):
        assert check([*adds, op(2, 3, Read(wrong))], 0).verdict is Verdict.NO


def test_a_search_that_is_given_up_says_so() -> None:
    assert check([op(0, 1, Add()), op(0, 1, Add())], 0, steps_max=1).verdict is Verdict.UNKNOWN


def test_long_histories_are_decided() -> None:
    """Five clients, 1,500 operations; then one read made wrong."""
    chance = random.Random(1)
    operations, count = [], 0
    for moment in range(1500):
        begin = moment + chance.uniform(-2, 0)
        if chance.random() < 0.5:
            count += 1
            operations.append(op(begin, None if chance.random() < 0.004 else moment + chance.uniform(0, 2), Add()))
        else:
            operations.append(op(begin, moment + chance.uniform(0, 2), Read(count)))
    assert check(operations, 0).verdict is Verdict.YES
    last = next(n for n in range(1400, 1500) if isinstance(operations[n].does, Read))
    operations[last] = op(operations[last].invoked, operations[last].returned, Read(count + 5))
    assert check(operations, 0).verdict is not Verdict.YES


@pytest.mark.parametrize("part", range(4))
def test_it_says_what_trying_every_order_says(seed: int, part: int) -> None:
    chance = random.Random(seed + part)
    verdicts = set()
    for _ in range(100):
        values = ["", "a", "b"]
        operations = []
        for _ in range(chance.randrange(1, 6)):
            begin = chance.randrange(8)
            end = None if chance.random() < 0.2 else begin + chance.randrange(1, 5)
            if chance.random() < 0.4 and end is not None:
                does: Does = Read(chance.choice(values))
            else:
                done = None if end is None else chance.random() < 0.7
                does = Swap(chance.choice(values), chance.choice(values), done)
            operations.append(op(begin, end, does))
        expected = Verdict.YES if fits_by_trying(operations, "") else Verdict.NO
        assert check(operations, "").verdict is expected, operations
        verdicts.add(expected)
    assert verdicts == {Verdict.YES, Verdict.NO}
