"""What the chaos run checks, held against histories that are wrong in one way each; and that a seed is a schedule."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import pytest
from chaos.checks import Write, against_the_log, linearizable
from chaos.history import Asked
from chaos.linear import Verdict
from chaos.schedule import KINDS, schedule


def asked(id: str, kind: str, at: float, seq: int, **more: object) -> Asked:
    return Asked(id=id, kind=kind, member="m1", invoked=at, returned=at + 0.5, outcome="done", seq=seq, **more)  # type: ignore[arg-type]


LOG = (
    Write(11, 1, "c1-1", "add", "k1", 1),
    Write(12, 2, "c2-1", "swap", "", "c2-1"),
    Write(13, 3, "c1-2", "add", "k1", 2),
)
HISTORY = (
    asked("c1-1", "add", 1.0, 11, key="k1"),
    asked("c2-1", "swap", 2.0, 12, expected="nobody"),
    asked("c1-2", "add", 3.0, 13, key="k1"),
    asked("c3-1", "fresh", 4.0, 14, register="c2-1", counters={"k1": 2}),
    asked("c3-2", "seen", 5.0, 11, register="nobody", counters={"k1": 1}),
)


def problems(history: tuple[Asked, ...] = HISTORY, log: tuple[Write, ...] = LOG) -> str:
    return "\n".join(against_the_log(history, log))


def but(number: int, **changes: object) -> tuple[Asked, ...]:
    return tuple(replace(each, **changes) if n == number else each for n, each in enumerate(HISTORY))  # type: ignore[arg-type]


def test_a_good_history_has_no_problems() -> None:
    assert problems() == ""
    assert problems(but(2, outcome="unknown", returned=None, seq=0)) == ""
    assert list(linearizable(HISTORY, 1)) == []


@pytest.mark.parametrize(
    ("history", "log", "said"),
    [
        (HISTORY, LOG[:2], "c1-2 was answered with seq 13 and is lost"),
        (HISTORY, (*LOG, Write(14, 4, "c1-2", "add", "k1", 3)), "c1-2 happened 2 times"),
        (HISTORY, (*LOG, Write(15, 4, "c9-9", "add", "k1", 3)), "nobody asked for ['c9-9']"),
        (but(2, seq=12), LOG, "c1-2 was answered with seq 12 and is at 13"),
        (but(2, key="k2"), LOG, "c1-2 was about k2 and changed k1"),
        (but(1, outcome="conflict"), LOG, "c2-1 was answered with conflict and happened"),
        (but(1, outcome="refused", why="what"), LOG[:1], "c2-1 was refused: what"),
        (but(0, invoked=9.0, returned=9.5), LOG, "c1-1 is at seq 11, and c3-1"),
        (but(3, seq=12, counters={"k1": 1}), LOG, "c3-1 read seq 12 after c1-2 was answered with 13"),
        (but(4, register="c2-1"), LOG, "c3-2 read 'c2-1' at seq 11, where the log says 'nobody'"),
        (but(4, counters={"k1": 2}), LOG, "c3-2 read at seq 11 (and by the log): {'k1': (2, 1)}"),
    ],
)
def test_each_wrong_history_is_named(history: tuple[Asked, ...], log: tuple[Write, ...], said: str) -> None:
    assert said in problems(history, log)


def test_the_answers_alone_tell_a_stale_read_too() -> None:
    (line,) = linearizable(but(3, counters={"k1": 1}), 1)
    assert line.startswith(f"k1: {Verdict.NO}")
    (line,) = linearizable(but(3, register="nobody"), 1)
    assert line.startswith(f"the register: {Verdict.NO}")


def test_a_seed_is_a_schedule() -> None:
    first = list(islice(schedule(7), 40))
    assert first == list(islice(schedule(7), 40))
    assert first != list(islice(schedule(8), 40))
    assert {fault.kind for step in first for fault in step.faults} == set(KINDS)
    works = [step.work for step in first if step.work in ("join", "leave")]
    assert works == (["join", "leave"] * len(works))[: len(works)]
