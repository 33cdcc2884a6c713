"""Which copies of another member's state.db are taken to go on from: whole ones of our cluster, later, with our own past."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
from ledger_support import Scribe, new_state, note

from slum.ledger.adopt import is_our_future
from slum.ledger.commands import Seal
from slum.ledger.schema import Position
from slum.ledger.state import State
from slum.ledger.world import Config

CONFIG = Config()
Place = tuple[int, int]


@pytest.fixture
def past(tmp_path: Path) -> tuple[Position, dict[Place, str]]:
    state = new_state(tmp_path / "past.db")
    try:
        return state.position, state.history()
    finally:
        state.close()


@pytest.fixture
def later(tmp_path: Path) -> Path:
    """The same ledger an epoch later, as one file."""
    path = tmp_path / "later.db"
    state = new_state(path)
    scribe = Scribe(state)
    scribe.lead()
    for number in range(50):
        scribe.apply(*(note(why=f"{number}/{n}") for n in range(5)))
    scribe.apply(Seal(members=state.position.members))
    state.close()
    return path


def test_a_later_one_with_our_past_is(past: tuple[Position, dict[Place, str]], later: Path) -> None:
    assert is_our_future(later, *past, CONFIG)


def test_none_is_that_is_not_later(past: tuple[Position, dict[Place, str]], tmp_path: Path, later: Path) -> None:
    assert not is_our_future(tmp_path / "past.db", *past, CONFIG)
    state = State.open(later)
    position, history = state.position, state.history()
    state.close()
    assert not is_our_future(later, position, history, CONFIG)


def test_none_of_another_cluster_or_with_another_past(past: tuple[Position, dict[Place, str]], later: Path) -> None:
    position, history = past
    assert not is_our_future(later, msgspec.structs.replace(position, cluster_id="other"), history, CONFIG)
    assert not is_our_future(later, position, dict.fromkeys(history, "0" * 64), CONFIG)


def test_none_with_a_page_that_is_wrong(past: tuple[Position, dict[Place, str]], later: Path) -> None:
    data = bytearray(later.read_bytes())
    with closing(sqlite3.connect(later)) as db:
        (free,) = db.execute("PRAGMA freelist_count").fetchone()
    refused = 0
    pages = range(1, len(data) // 1024)
    for page in pages:
        broken = data.copy()
        broken[page * 1024 : page * 1024 + 8] = b"\xff" * 8
        later.write_bytes(broken)
        refused += not is_our_future(later, *past, CONFIG)
    assert refused >= len(pages) - free, "what lies in a free page is nobody's"
    assert free < 5
    later.write_bytes(data[: len(data) // 2])
    assert not is_our_future(later, *past, CONFIG)
    later.write_bytes(b"")
    assert not is_our_future(later, *past, CONFIG)
