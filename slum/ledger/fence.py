"""A member that must not serve any more: replaced by a newer generation, or with rows that are not the others'.

It says so in a mark in its folder, so that no restart forgets it; a replaced one first saves what its log holds as lines of JSON,
for somebody to read what never got further. The way back is to join as new: `set_aside` moves all of it out of the way. Nothing
is ever removed here.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from slum.frozen import Frozen
from slum.ledger import folder, journal
from slum.ledger.commands import Entry, Member
from slum.ledger.group import command_entry
from slum.ledger.refusal import MARK, REJOIN, Refusal

FORMER = "former.json"
"""Of the one that recovered: the members of the generation before, to be told."""


class Mark(Frozen):
    why: str
    hint: str


class SavedEntry(Frozen):
    """One line of what is saved. *applied*: state.db had it; it may still be missing in the newer generation."""

    index: int
    term: int
    applied: bool
    entry: Entry


def refuse_for_good(home: Path, why: str, hint: str) -> Refusal:
    """Make every start of the ledger in *home* fail with *why* from now on; return the error that says so."""
    _write(home / MARK, msgspec.json.encode(Mark(why=why, hint=hint)))
    return Refusal(why, hint=hint)


def check(home: Path) -> None:
    """Raise the Refusal that was marked in *home*, if one was."""
    try:
        mark = msgspec.json.decode((home / MARK).read_bytes(), type=Mark)
    except FileNotFoundError:
        return
    except msgspec.MsgspecError as error:
        raise Refusal(f"{home / MARK} cannot be read: {error}", hint=REJOIN) from error
    raise Refusal(mark.why, hint=f"{mark.hint}; `slum server leave` ends it here")


def replaced(home: Path, log: journal.Journal, applied: int, *, by: str, generation: int, mine: int) -> Refusal:
    """Save what *log* holds and mark *home* as replaced by *generation*, in which *by* is; return the error that says so.

    *applied* of its entries are in state.db.
    """
    path = home / f"replaced-{mine}.jsonl"
    waiting = save(log, applied, path)
    return refuse_for_good(
        home,
        f"generation {generation}, in which {by} is, has replaced generation {mine}: this member is fenced. "
        f"The log of its last epoch is saved in {path}; {waiting} of its entries were never committed here",
        REJOIN,
    )


def save(log: journal.Journal, applied: int, path: Path) -> int:
    """Write the entries of *log* to *path*, one JSON object a line; return how many are not among the first *applied*."""
    lines, number = [], 0
    for command, index, term in log[0:]:
        data = command_entry(command)
        if data is not None:
            number += 1
            entry = msgspec.msgpack.decode(data, type=Entry)
            lines.append(SavedEntry(index=index, term=term, applied=number <= applied, entry=entry))
    _write(path, b"".join(msgspec.json.encode(line) + b"\n" for line in lines))
    return max(0, number - applied)


def keep_former(home: Path, rows: tuple[Member, ...]) -> None:
    """Note, durably, who was a member before the generation that begins now."""
    _write(home / FORMER, msgspec.json.encode((*former(home), *rows)))


def former(home: Path) -> tuple[Member, ...]:
    """Return the members of replaced generations, which are told so when they call."""
    try:
        return msgspec.json.decode((home / FORMER).read_bytes(), type=tuple[Member, ...])
    except FileNotFoundError:
        return ()
    except msgspec.MsgspecError as error:
        raise Refusal(f"{home / FORMER} cannot be read: {error}", hint=f"move {home / FORMER} away") from error


def set_aside(home: Path, at: float) -> Path:
    """Move all of *home* out of the way, so that this machine can join as new; return where it lies now."""
    with folder.locked(home):
        target = home.with_name(f"{home.name}-replaced-{int(at)}")
        home.rename(target)
        journal.sync_folder(home.parent)
    return target


def _write(path: Path, data: bytes) -> None:
    fresh = path.with_name(path.name + ".new")
    descriptor = folder.create_private(fresh)
    with open(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        journal.sync_file(file.fileno())
    fresh.rename(path)
    journal.sync_folder(path.parent)
