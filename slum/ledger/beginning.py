"""How a cluster begins: its uuid, generation, lineage, first member, first journal and state.db.

A kill at any point leaves either no CURRENT, and then the next start clears what is there and begins anew, or a whole
ledger. The generation is the time in milliseconds, so that a cluster made anew on the same machine outranks what agents
remember of the old one. A state file or journal with entries in it is never removed, whatever CURRENT says.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slum.frozen import Frozen
from slum.ledger import events, folder, identity, journal
from slum.ledger.commands import PROTOCOL
from slum.ledger.commands import Member as MemberRow
from slum.ledger.refusal import RESTORE, Refusal
from slum.ledger.schema import Position, new_epoch
from slum.ledger.state import State, bootstrap

FIRST_MEMBER = "m1"
UNFINISHED = "unfinished.db"
Note = Callable[..., Any]
"""Called with the name of a log event and its fields."""


class Beginning(Frozen):
    """All that the first state.db of a cluster depends on."""

    cluster: str
    lineage: str
    generation: int
    members: tuple[MemberRow, ...]
    at: float


def current_or_new(home: Path, epoch_bytes: int, at: float, note: Note) -> Path:
    """Return the path of the current state file in *home*, that of a new cluster when there is none."""
    path = folder.current(home)
    if path is not None:
        return path
    _clear_unfinished(home)
    me = identity.load(home)
    first = MemberRow(id=FIRST_MEMBER, incarnation=uuid.uuid4().hex[:16]) if me is None else identity.row(home, me)
    beginning = Beginning(
        cluster=str(uuid.uuid4()), lineage=uuid.uuid4().hex[:16], generation=int(at * 1000), members=(first,), at=at
    )
    path = begin(home, beginning, epoch_bytes)
    note("cluster_created", cluster=beginning.cluster, generation=beginning.generation)
    return path


def begin(home: Path, beginning: Beginning, epoch_bytes: int) -> Path:
    """Lay down the ledger that *beginning* describes in *home*, and return its state file; the same on every member."""
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    cluster = beginning.cluster
    position = Position(
        cluster_id=cluster,
        generation=beginning.generation,
        epoch=1,
        lineage=beginning.lineage,
        term=0,
        applied=0,
        seq=0,
        chain=hashlib.sha256(cluster.encode()).hexdigest(),
        members=beginning.members,
        protocol=PROTOCOL,
        leader="",
        revision=0,
        events=0,
        events_hash=events.first_hash(cluster),
        results=0,
        results_floor=0,
    )
    epoch = new_epoch(position, 1)
    journal.create(folder.journal_path(home, epoch), folder.journal_id(cluster, epoch), epoch_bytes).close()
    fresh, path = home / UNFINISHED, home / folder.FIRST_STATE
    bootstrap(fresh, position, actor=f"ledger@{beginning.members[0].id}", at=beginning.at)
    fresh.rename(path)
    journal.sync_folder(home)
    folder.move_current(home, path.name)
    return path


def _clear_unfinished(home: Path) -> None:
    """Remove what a killed bootstrap left; Refusal when a state file holds entries, so that CURRENT must have been lost."""
    folder.remove_state_file(home / UNFINISHED)
    for path in folder.state_files(home):
        if _entries_in(path):
            raise Refusal(
                f"{home / 'CURRENT'} is gone, but {path.name} holds a ledger",
                hint=f"write {path.name!r} and a newline into CURRENT, if that is the newest state file; else {RESTORE}",
            )
        folder.remove_state_file(path)
    for path in folder.journals(home).values():
        _require_empty(path)
        path.unlink()


def _require_empty(path: Path) -> None:
    found = journal.open_journal(path, 0)
    entries = len(found)
    found.close()
    if entries:
        raise Refusal(f"{path} holds {entries} entries, but its state.db and CURRENT are gone", hint=RESTORE)


def _entries_in(path: Path) -> int:
    state = State.open(path)
    try:
        return state.position.seq
    finally:
        state.close()
