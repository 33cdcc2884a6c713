"""Is there an order of the operations of one key that a single copy could have gone through? A search, pure.

Wing and Gong's algorithm with Lowe's memoisation (*Testing for linearizability*, 2017): take any operation that nobody else's
answer precedes, step the model, go back where it does not fit, and never look twice at the same set of operations with
the same state. An operation without an answer may have happened at any later time, or not at all.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from enum import StrEnum

STEPS_MAX = 3_000_000


class Verdict(StrEnum):
    YES = "linearizable"
    NO = "not linearizable"
    UNKNOWN = "not decided"
    """The search was given up: to be taken for a failure."""


@dataclass(frozen=True, slots=True)
class Read:
    value: Hashable


@dataclass(frozen=True, slots=True)
class Swap:
    """Write *new* if the value is *expected*; *done* is what was answered, None when nothing was."""

    expected: Hashable
    new: Hashable
    done: bool | None


@dataclass(frozen=True, slots=True)
class Add:
    """Add one."""


Does = Read | Swap | Add


@dataclass(frozen=True, slots=True)
class Operation:
    invoked: float
    returned: float | None
    """None: nobody knows whether it happened."""
    does: Does


@dataclass(frozen=True, slots=True)
class Found:
    verdict: Verdict
    stuck: tuple[Operation, ...] = ()
    """Where it is not linearizable: what was under way where the longest order that fits ends."""


class _Node:
    """An invocation or an answer in the doubly linked list of those that are not in the order yet."""

    __slots__ = ("after", "answer", "before", "is_answer", "number", "operation")

    def __init__(self, number: int, operation: Operation, *, is_answer: bool) -> None:
        self.number = number
        self.operation = operation
        self.is_answer = is_answer
        self.answer: _Node | None = None
        self.before: _Node | None = None
        self.after: _Node | None = None


def check(operations: Sequence[Operation], start: Hashable, *, steps_max: int = STEPS_MAX) -> Found:
    """Tell whether *operations* on one key, which begins as *start*, are linearizable."""
    head = _linked(operations)
    open_answers = sum(operation.returned is not None for operation in operations)
    state, taken = start, 0
    seen: set[tuple[int, Hashable]] = {(0, start)}
    path: list[tuple[_Node, Hashable]] = []
    deepest, stuck = -1, ()
    node = head.after
    for _ in range(steps_max):
        if open_answers == 0:
            return Found(Verdict.YES)
        if node is None or node.is_answer:
            if len(path) > deepest:
                deepest, stuck = len(path), _under_way(head)
            if not path:
                return Found(Verdict.NO, stuck)
            node, state = path.pop()
            taken &= ~(1 << node.number)
            open_answers += node.answer is not None
            _put_back(node)
            node = node.after
            continue
        fits, then = step(state, node.operation.does)
        key = (taken | 1 << node.number, then)
        if fits and key not in seen:
            seen.add(key)
            path.append((node, state))
            state, taken = then, key[0]
            open_answers -= node.answer is not None
            _take_out(node)
            node = head.after
        else:
            node = node.after
    return Found(Verdict.UNKNOWN)


def step(state: Hashable, does: Does) -> tuple[bool, Hashable]:
    """Return whether *does* may happen to a key that is *state*, and what it is then."""
    match does:
        case Read(value=value):
            return state == value, state
        case Swap(expected=expected, new=new, done=False):
            return state != expected, state
        case Swap(expected=expected, new=new):
            return state == expected, new
        case Add():
            return True, int(state) + 1  # type: ignore[call-overload]  # a counter's


def _linked(operations: Sequence[Operation]) -> _Node:
    moments: list[tuple[float, int, _Node]] = []
    for number, operation in enumerate(operations):
        call = _Node(number, operation, is_answer=False)
        moments.append((operation.invoked, 0, call))
        if operation.returned is not None:
            call.answer = _Node(number, operation, is_answer=True)
            moments.append((operation.returned, 1, call.answer))
    head = last = _Node(-1, Operation(0.0, None, Add()), is_answer=False)
    # Of the same moment the invocation is first: that allows more.
    for _, _, node in sorted(moments, key=lambda moment: moment[:2]):
        last.after, node.before = node, last
        last = node
    return head


def _take_out(node: _Node) -> None:
    for each in (node, node.answer):
        if each is not None:
            if each.before is not None:
                each.before.after = each.after
            if each.after is not None:
                each.after.before = each.before


def _put_back(node: _Node) -> None:
    for each in (node.answer, node):
        if each is not None:
            if each.before is not None:
                each.before.after = each
            if each.after is not None:
                each.after.before = each


def _under_way(head: _Node) -> tuple[Operation, ...]:
    found = []
    node = head.after
    while node is not None and not node.is_answer:
        found.append(node.operation)
        node = node.after
    return (*found, *([node.operation] if node is not None and node.operation not in found else []))
