"""A copy of state.db on its way: asked for ahead, whole whatever is lost, doubled or changed on the way."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from slum.ledger import folder
from slum.ledger.beginning import Beginning, begin
from slum.ledger.commands import Member
from slum.ledger.copies import AHEAD, FRESH_S, PART_BYTES, Incoming, Outgoing
from slum.ledger.peerwire import Part, WantCopy
from slum.ledger.state import State

PARTS = 5
BEHIND, HERE, LATER = (1, 1), (1, 3), (1, 5)


@pytest.fixture
def out(tmp_path: Path) -> Outgoing:
    """A copy of some parts, made when it was asked for."""
    home = tmp_path / "out"
    member = Member(id="m1", incarnation="i", address="")
    begin(home, Beginning(cluster="c", lineage="l", generation=1, members=(member,), at=1.0), 1 << 20)
    state = State.open(folder.current(home) or home)
    state._db.execute("CREATE TABLE _filler (id INTEGER PRIMARY KEY, data BLOB)")
    for _ in range(PARTS - 1):
        state._db.execute("INSERT INTO _filler (data) VALUES (randomblob(?))", (PART_BYTES,))
    state.close()
    made = Outgoing(home, lambda make: make(), lambda: 0.0)
    made.part(WantCopy(name="", offset=0), HERE)
    return made


def carried(out: Outgoing, home: Path, carry: Callable[[Part], list[Part]]) -> Path | None:
    """Let a new Incoming ask until it has all; *carry* tells what comes of a part."""
    home.mkdir(exist_ok=True)
    incoming = Incoming(home, lambda: BEHIND)
    under_way = incoming.wanted()
    for _ in range(200):
        if not under_way:
            under_way = incoming.wanted()
        assert len(under_way) <= 2 * AHEAD
        wanted = under_way.pop(0)
        given = out.part(wanted, HERE)
        assert given is not None
        for part in carry(given):
            taken = incoming.take(part)
            if isinstance(taken, Path):
                return taken
            under_way += taken or ()
    return None


def test_it_is_asked_for_ahead_and_comes_as_it_is(out: Outgoing, tmp_path: Path) -> None:
    offsets = []

    def carry(part: Part) -> list[Part]:
        offsets.append(part.offset)
        return [part]

    path = carried(out, tmp_path / "in", carry)
    assert path is not None
    assert path.read_bytes() == (tmp_path / "out" / "outgoing.db").read_bytes()
    assert offsets == [n * PART_BYTES for n in range(len(offsets))], "each part once"
    assert len(offsets) == PARTS
    State.open(path).close()


def test_the_first_tells_how_many_may_be_under_way(out: Outgoing, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    incoming = Incoming(tmp_path / "in", lambda: BEHIND)
    (first,) = incoming.wanted()
    more = incoming.take(out.part(first, HERE))
    assert isinstance(more, list)
    assert [wanted.offset for wanted in more] == [PART_BYTES, 2 * PART_BYTES]
    assert incoming.take(out.part(first, HERE)) == [], "it came twice"
    assert [wanted.offset for wanted in incoming.wanted()] == [PART_BYTES, 2 * PART_BYTES], "asked again from there"


def test_another_copy_is_asked_for_from_its_beginning(out: Outgoing, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    incoming = Incoming(tmp_path / "in", lambda: BEHIND)
    (first,) = incoming.wanted()
    part = out.part(first, HERE)
    assert incoming.take(msgspec.structs.replace(part, name="")) is None, "none is there yet"
    incoming.take(part)
    assert incoming.take(msgspec.structs.replace(part, name="other", offset=PART_BYTES)) is None
    assert incoming.wanted() == [first]


def test_the_last_part_waits_for_the_digest_of_all(out: Outgoing, tmp_path: Path) -> None:
    digest, out._digest = out._digest, ("", "")
    without: list[Part] = []

    def carry(part: Part) -> list[Part]:
        if not part.data:
            without.append(part)
            out._digest = digest if len(without) == 3 else out._digest
        return [part]

    path = carried(out, tmp_path / "in", carry)
    assert path is not None
    assert path.read_bytes() == (tmp_path / "out" / "outgoing.db").read_bytes()
    assert [part.offset for part in without] == [(PARTS - 1) * PART_BYTES] * 3


def test_who_has_come_as_far_as_the_copy_gets_another_one(out: Outgoing) -> None:
    def name(place: tuple[int, int]) -> str:
        given = out.part(WantCopy(name="", offset=0, place=place), LATER)
        assert given is not None
        return given.name

    first = name(BEHIND)
    assert name(BEHIND) == first
    second = name(HERE)
    assert second != first
    assert name(HERE) == name(BEHIND) == second


def test_one_that_took_long_is_as_fresh_as_any(tmp_path: Path) -> None:
    folder.move_current(tmp_path, "state-1.db")
    (tmp_path / "state-1.db").touch()
    now, apart = [0.0], []
    made = Outgoing(tmp_path, apart.append, lambda: now[0])

    def name() -> str:
        given = made.part(WantCopy(name="", offset=0), HERE)
        assert given is not None
        return given.name

    assert name() == ""
    now[0] += 100.0
    assert name() == ""
    apart.pop()()
    first = name()
    assert first
    now[0] += FRESH_S + 0.1
    assert name() == ""
    assert not apart[1:], "one at a time"


def test_parts_that_are_lost_or_doubled_do_no_harm(out: Outgoing, tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    for number in range(20):
        path = carried(out, tmp_path / str(number), lambda part: [part] * chance.choice((0, 1, 1, 1, 2)))
        assert path is not None
        assert path.read_bytes() == (tmp_path / "out" / "outgoing.db").read_bytes()


def test_one_wrong_byte_makes_it_begin_again(out: Outgoing, tmp_path: Path) -> None:
    broken = [2]

    def carry(part: Part) -> list[Part]:
        if broken and part.offset == broken[0] * PART_BYTES:
            broken.clear()
            data = bytearray(part.data)
            data[1000] ^= 1
            return [msgspec.structs.replace(part, data=bytes(data))]
        return [part]

    path = carried(out, tmp_path / "in", carry)
    assert not broken
    assert path is not None
    assert path.read_bytes() == (tmp_path / "out" / "outgoing.db").read_bytes()
