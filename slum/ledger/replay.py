"""An epoch's journal and state.db, opened together: are they of one history, and where does applying go on.

PySyncObj applies a journal from its start at every start. What state.db has applied already is skipped, while the chain is
computed again over those entries and the hashes of their results; it must come out the same. After a copy of state.db was
taken from another member its journal is still empty and is filled by replication: then the chain is compared when the
skipping ends. A mismatch is damage; nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import msgspec

from slum.errors import InvariantError
from slum.frozen import Frozen
from slum.ledger import folder, journal
from slum.ledger.applying import next_chain
from slum.ledger.beginning import Note
from slum.ledger.group import command_entry
from slum.ledger.peerwire import Place
from slum.ledger.refusal import Damaged
from slum.ledger.schema import EpochRow
from slum.ledger.state import State

_COPIED = "copied.json"


class Copied(Frozen):
    """state.db came from another member at this point, so that this epoch's journal may end before it."""

    generation: int
    epoch: int
    applied: int


class Skip:
    """Counts down the entries that state.db has applied, and checks their chain when that was not done at the start."""

    def __init__(self, state: State, *, checked: bool) -> None:
        self.left = state.position.applied
        self._state = state
        self._checked = checked
        self._chain = state.epochs(1)[0].chain0
        self._number = 0

    def take(self, data: bytes) -> bool:
        """Tell whether the entry *data* is to be skipped; raise Damaged when what was skipped is not what was applied."""
        if self.left == 0:
            return False
        self.left -= 1
        if not self._checked:
            self._number += 1
            self._chain = next_chain(self._chain, data, self._state.results_hash(self._number))
            if self.left == 0 and self._chain != self._state.position.chain:
                raise Damaged(
                    "the copy of state.db that was taken does not follow from the entries that the members hold"
                )
        return True


class Retained:
    """The journal of the epoch before, for members that are behind: kept open when we ran it, opened again when asked for."""

    def __init__(self, home: Path, epoch_bytes: int) -> None:
        self._home = home
        self._epoch_bytes = epoch_bytes
        self._kept: tuple[Place, journal.Journal] | None = None

    def keep(self, place: Place, ended: journal.Journal) -> None:
        """Take over the journal of an epoch that has ended; the one before it is closed."""
        self.close()
        self._kept = (place, ended)

    def journal_of(self, place: Place, before: Iterable[EpochRow]) -> journal.Journal | None:
        """Return the journal of *place* when it is that of the epoch *before*, whose file may be gone."""
        if self._kept is None:
            for row in before:
                path = folder.journal_path(self._home, row)
                if path.exists():
                    self._kept = ((row.generation, row.epoch), journal.open_journal(path, self._epoch_bytes))
        return self._kept[1] if self._kept is not None and self._kept[0] == place else None

    def close(self) -> None:
        if self._kept is not None:
            self._kept[1].close()
        self._kept = None


def open_epoch(home: Path, state: State, epoch_bytes: int, note: Note) -> tuple[journal.Journal, Skip]:
    """Open the journal that state.db names and check that state.db is what comes of it."""
    (epoch,) = state.epochs(1)
    position = state.position
    path = folder.journal_path(home, epoch)
    opened = journal.open_journal(path, epoch_bytes)
    try:
        if opened.torn:
            note("torn_frame_was_cut", journal=str(path))
        if opened.identity != folder.journal_id(position.cluster_id, epoch):
            raise Damaged(f"{path}: this journal is of another history than state.db")
        replayed = _Regular(opened)
        why = state.is_replay_of(islice(replayed, position.applied))
        short = replayed.count < position.applied and _was_copied(home, state)
        if why and not short:
            raise Damaged(f"{path}: {why}")
        opened.raise_commit(replayed.index)
    except BaseException:
        opened.close()
        raise
    return opened, Skip(state, checked=not short)


def mark_copied(home: Path, state: State) -> None:
    """Note, durably, that *state*'s journal begins empty."""
    at = state.position
    mark = Copied(generation=at.generation, epoch=at.epoch, applied=at.applied)
    fresh = home / (_COPIED + ".new")
    with fresh.open("wb") as file:
        file.write(msgspec.json.encode(mark))
        file.flush()
        journal.sync_file(file.fileno())
    fresh.rename(home / _COPIED)
    journal.sync_folder(home)


def _was_copied(home: Path, state: State) -> bool:
    try:
        mark = msgspec.json.decode((home / _COPIED).read_bytes(), type=Copied)
    except FileNotFoundError:
        return False
    except msgspec.MsgspecError as error:
        raise InvariantError(f"{home / _COPIED} cannot be read: {error}") from error
    at = state.position
    return (mark.generation, mark.epoch, mark.applied) == (at.generation, at.epoch, at.applied)


class _Regular:
    """The entries that append() wrote, without PySyncObj's no-ops; *index* is the log index of the last one given."""

    def __init__(self, log: journal.Journal) -> None:
        self._log = log
        self.index = 1
        self.count = 0

    def __iter__(self) -> Iterator[bytes]:
        for command, index, _ in self._log[0:]:
            data = command_entry(command)
            if data is not None:
                self.index = index
                self.count += 1
                yield data
