"""Going on from another member's state.db: is the copy of our future, and how it becomes ours without a moment of neither.

The copy gets a new name, an empty journal for its epoch is made, and CURRENT moves last: a kill before that leaves the old
state, one after it the new. Also tells which member a folder belongs to.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

from slum.ledger import folder, identity, journal, replay
from slum.ledger.commands import Member
from slum.ledger.peerwire import Place
from slum.ledger.refusal import Refusal
from slum.ledger.schema import Position
from slum.ledger.state import State
from slum.ledger.world import Config


def is_our_future(path: Path, was: Position, history: Mapping[Place, str], config: Config) -> bool:
    """Tell whether the copy at *path* is of our cluster, later than *was*, and begins with our own history.

    Its bytes are those that were sent. Whether their rows are the others' too is compared at the next epoch, as for every member.
    """
    try:
        if not _is_whole(path):
            return False
        fresh = State.open(path, results_kept=config.results_kept, pages=False)
    except (Refusal, sqlite3.DatabaseError):
        return False
    at, theirs = fresh.position, fresh.history()
    fresh.close()
    place = (was.generation, was.epoch)
    return at.cluster_id == was.cluster_id and at.fence[:2] > place and theirs.get(place) == history[place]


def _is_whole(path: Path) -> bool:
    """Tell whether SQLite finds all pages right.

    They are read through a mapping, which takes two thirds of the time. Where the disk cannot read, that kills the process, so
    this is for a file that has just been written.
    """
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as db:
        db.execute(f"PRAGMA mmap_size={path.stat().st_size}").close()
        (verdict,) = db.execute("PRAGMA quick_check(1)").fetchone()
    return bool(verdict == "ok")


def adopt(home: Path, path: Path, config: Config) -> State:
    """Make the copy at *path*, whose pages were checked, the current state file, with an empty journal for its epoch.

    Every step is durable.
    """
    old = folder.current(home)
    state = State.open(path, results_kept=config.results_kept, pages=False)
    name = f"state-{state.position.seq}.db"
    (epoch,) = state.epochs(1)
    made = folder.journal_id(state.position.cluster_id, epoch)
    journal.create(folder.journal_path(home, epoch), made, config.epoch_bytes).close()
    replay.mark_copied(home, state)
    state.close()
    folder.remove_state_file(home / name)
    path.rename(home / name)
    journal.sync_folder(home)
    folder.move_current(home, name)
    if old is not None and old.name != name:
        folder.remove_state_file(old)
    return State.open(home / name, results_kept=config.results_kept, pages=False)


def who(home: Path, position: Position) -> Member:
    """Return the row of the member that folder *home* belongs to."""
    me = identity.load(home)
    if me is not None:
        found = next((row for row in position.members if row.id == me.id), None)
        if found is not None and (found.incarnation == me.incarnation or len(position.members) == 1):
            # The only member got an identity after it began: it puts that into the list by itself.
            return found
        return Member(id=me.id, incarnation=me.incarnation, address=me.address)
    if len(position.members) != 1:
        raise Refusal(
            f"the ledger has {len(position.members)} members, and {home / identity.ME} does not say which this is",
            hint="put it back from where the member was made, or join as a new member",
        )
    return position.members[0]
