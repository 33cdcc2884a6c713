"""What a leader does of an entry before it is committed: seen by nobody, undone by anything else, the same in the end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from ledger_support import Scribe, desired, fleet, new_state, note, proposal, service

from slum.ledger.applying import Applied
from slum.ledger.commands import PROTOCOL, AnyCommand, Entry, Header, Seal, SetProtocol
from slum.ledger.perform import StateFailed
from slum.ledger.reader import Reader


class Foreseen:
    """A state that foresees entries, and one beside it that only applies them."""

    def __init__(self, folder: Path) -> None:
        (folder / "CURRENT").write_text("state-1.db\n")
        self.state, self.other = new_state(folder / "state-1.db"), new_state(folder / "state-2.db")
        self.reader = Reader(folder)
        self.scribe = Scribe(self.other)
        self.scribe.lead()
        self.state.apply(self.scribe.entries[-1])

    def entry(self, *commands: AnyCommand) -> bytes:
        """Apply *commands* to the other one, and return the entry."""
        self.scribe.apply(*commands)
        return self.scribe.entries[-1]

    def check(self) -> None:
        assert self.state.position == self.other.position
        assert self.state.row_hash() == self.other.row_hash()
        assert self.reader.cluster().seq == self.state.position.seq

    def close(self) -> None:
        for one in (self.reader, self.state, self.other):
            one.close()


@pytest.fixture
def foreseen(tmp_path: Path) -> Iterator[Foreseen]:
    made = Foreseen(tmp_path)
    yield made
    made.close()


def test_what_is_foreseen_is_seen_once_it_is_applied(foreseen: Foreseen) -> None:
    data, state, was = foreseen.entry(note(why="soon"), note()), foreseen.state, foreseen.state.position
    state.foresee(data)
    assert state.position is was
    assert state.shown == foreseen.reader.cluster().seq == was.seq
    applied: list[Applied] = []
    assert state.apply(data, applied.append) in applied
    assert state.shown == was.seq + 1
    foreseen.check()


def test_what_is_foreseen_and_does_not_come_is_undone(foreseen: Foreseen) -> None:
    foreseen.state.foresee(msgspec.msgpack.encode(_entry_of(foreseen, desired(fleet(service("gone")), 0))))
    foreseen.state.apply(foreseen.entry(desired(fleet(service("web")), 0)))
    foreseen.check()


@pytest.mark.parametrize("look", ["commit", "checkpoint", "row_hash", "history", "newest_event_at", "fleet_bytes"])
def test_who_looks_sees_nothing_of_what_is_foreseen(foreseen: Foreseen, look: str) -> None:
    foreseen.state.apply(foreseen.entry(desired(fleet(service("web")), 0)))
    plain = getattr(foreseen.state, look)()
    foreseen.scribe.at += 1
    data = foreseen.entry(desired(fleet(service("web", memory_limit_mb=64), service("more")), 1))
    foreseen.state.foresee(data)
    assert getattr(foreseen.state, look)() == plain
    foreseen.state.apply(data)
    foreseen.check()


def test_a_seal_and_what_follows_held_entries_are_not_foreseen(foreseen: Foreseen) -> None:
    state = foreseen.state
    state.hold()
    state.apply(foreseen.entry(note()))
    state.foresee(foreseen.entry(note()))
    state.apply(foreseen.scribe.entries[-1])
    data = foreseen.entry(Seal(members=state.position.members))
    state.foresee(data)
    state.commit()
    state.foresee(data)
    applied = state.apply(data, lambda found: None)
    assert applied.sealed is not None
    foreseen.check()


def test_what_cannot_be_foreseen_is_for_apply_to_say(foreseen: Foreseen) -> None:
    strange = msgspec.msgpack.encode(_entry_of(foreseen, SetProtocol(version=PROTOCOL + 1)))
    foreseen.state.foresee(strange)
    foreseen.check()
    with pytest.raises(StateFailed, match="this slum speaks"):
        foreseen.state.apply(strange)


def _entry_of(foreseen: Foreseen, *commands: AnyCommand) -> Entry:
    """An entry that the other one is not told of."""
    at = foreseen.state.position
    header = Header(generation=at.generation, epoch=at.epoch, term=at.term, member="m1", at=1.0)
    return Entry(header=header, proposals=tuple(proposal(command) for command in commands))
