"""What one entry does to the rows: a deterministic function of them and its bytes, the same on every member.

Time, ids and randomness come from the entry; a command that cannot be applied yields a Rejected, which is a result like
any other. Each entry also moves *chain*, by its bytes and its results, so that members that disagree about an outcome find out.
Runs inside a transaction of the caller (state.py). Only a disk that fails, or an entry of a newer slum, raises.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import msgspec

from slum.ledger import schema
from slum.ledger.commands import (
    PROTOCOL,
    AnyCommand,
    Barrier,
    Entry,
    LeaderStarted,
    Proposal,
    Result,
    Seal,
)
from slum.ledger.events import EventWriter
from slum.ledger.perform import StateFailed, perform, seal, start_leader
from slum.ledger.results import RequestId, ResultBook, parse_request_id
from slum.ledger.schema import EpochRow, Position
from slum.ledger.turn import Turn

_INPUT_ERRORS = (ArithmeticError, LookupError, TypeError, ValueError, AttributeError, sqlite3.IntegrityError)
"""What a strange command can cause, the same on every member; any other error is the machine's and ends the process."""

_decode_entry = msgspec.msgpack.Decoder(Entry).decode
_encode = msgspec.msgpack.Encoder().encode
PerformOne = Callable[[Turn, AnyCommand], Result]


@dataclass(frozen=True, slots=True)
class Applied:
    """What one entry did. *results* are in the order of its proposals."""

    position: Position
    proposals: tuple[Proposal, ...]
    results: tuple[Result, ...]
    stale: bool
    """The header was an older leader's: nothing was done, no request id was used up."""
    sealed: EpochRow | None
    """The next epoch, when this was a Seal."""


def apply_entry(db: sqlite3.Connection, was: Position, entry: Entry, data: bytes, results_kept: int) -> Applied:
    """Apply *entry*, which *data* was read as, to rows that stand at *was*.

    First as one whole, and when some command of it turns out to make no sense, one by one.
    """
    db.execute("SAVEPOINT entry")
    try:
        applied = _applied(db, was, entry, data, results_kept, perform)
    except _INPUT_ERRORS:
        db.execute("ROLLBACK TO entry")
        applied = _applied(db, was, entry, data, results_kept, _attempt)
    db.execute("RELEASE entry")
    return applied


def _applied(
    db: sqlite3.Connection, was: Position, entry: Entry, data: bytes, results_kept: int, perform_one: PerformOne
) -> Applied:
    seq = was.seq + 1
    events = EventWriter(db, number=was.events, head=was.events_hash, seq=seq, at=entry.header.at)
    turn = Turn(
        db=db,
        header=entry.header,
        seq=seq,
        events=events,
        revision=was.revision,
        leader=was.leader,
        protocol=was.protocol,
        members=was.members,
    )
    stale = is_stale(entry, was)
    requests = [parse_request_id(proposal.request_id) for proposal in entry.proposals]
    book = ResultBook(db, was.results, was.results_floor, [made.key for made in requests if made])
    results: list[Result] = []
    for proposal, request in zip(entry.proposals, requests, strict=True):
        if stale:
            results.append(turn.rejected("stale", "its leader had been replaced"))
        elif isinstance(proposal.command, Barrier | LeaderStarted | Seal):
            results.append(_own(turn, proposal, alone=len(entry.proposals) == 1))
        else:
            results.append(_answer(turn, proposal, request, book, perform_one))
    turn.events.flush()
    book.flush(results_kept)
    results_hash = hashlib.sha256(_encode(results)).digest()
    chain = next_chain(was.chain, data, results_hash)
    position = msgspec.structs.replace(
        was,
        term=entry.header.term if not stale else was.term,
        applied=was.applied + 1,
        seq=seq,
        chain=chain,
        leader=turn.leader,
        protocol=turn.protocol,
        revision=turn.revision,
        events=events.number,
        events_hash=events.head,
        results=book.number,
        results_floor=book.floor,
    )
    epoch = None
    if turn.sealed:
        epoch = schema.new_epoch(position, was.epoch + 1)
        position = msgspec.structs.replace(position, epoch=epoch.epoch, term=0, applied=0, members=turn.members)
        schema.write_epoch(db, epoch)
        db.execute("DELETE FROM entries")
    else:
        db.execute("INSERT INTO entries VALUES (?, ?)", (position.applied, results_hash))
    return Applied(position, entry.proposals, tuple(results), stale, epoch)


def _attempt(turn: Turn, command: AnyCommand) -> Result:
    """Apply *command*, undoing all of it when it turns out to make no sense."""
    turn.events.flush()
    before = (turn.revision, turn.protocol)
    number, head = turn.events.number, turn.events.head
    turn.db.execute("SAVEPOINT attempt")
    try:
        result = perform(turn, command)
        turn.events.flush()
    except _INPUT_ERRORS as error:
        turn.db.execute("ROLLBACK TO attempt")
        turn.events.forget(number, head)
        turn.revision, turn.protocol = before
        result = turn.rejected("invalid", f"{type(command).__name__} cannot be applied: {type(error).__name__}")
    turn.db.execute("RELEASE attempt")
    return result


def _own(turn: Turn, proposal: Proposal, *, alone: bool) -> Result:
    """Apply a command of the ledger itself, which has no request id."""
    turn.actor = proposal.actor
    match proposal.command:
        case LeaderStarted() as command if alone:
            return start_leader(turn, command)
        case Seal() as command if alone:
            return seal(turn, command)
        case Barrier():
            return turn.done()
        case _:
            return turn.rejected("invalid", "this command stands alone in its entry")


def _answer(
    turn: Turn,
    proposal: Proposal,
    request: RequestId | None,
    book: ResultBook,
    perform_one: PerformOne,
) -> Result:
    """Return the first answer to this request id, or apply the command and keep its answer."""
    turn.actor = proposal.actor
    if request is None:
        return turn.rejected("invalid", f"{proposal.request_id[:80]!r} is not a request id")
    first = book.find(request.key)
    if first is not None:
        return first
    if request.seen < book.floor:
        return turn.rejected(
            "too_old", f"the request was made at sequence {request.seen}, answers are kept from {book.floor} on"
        )
    if request.seen >= turn.seq:
        return turn.rejected("invalid", f"the request claims to have seen sequence {request.seen}, this is {turn.seq}")
    result = perform_one(turn, proposal.command)
    book.keep(request.key, turn.seq, result)
    return result


def may_seal(entry: Entry) -> bool:
    return any(isinstance(proposal.command, Seal) for proposal in entry.proposals)


def read_entry(data: bytes, seq: int) -> Entry:
    try:
        return _decode_entry(data)
    except msgspec.MsgspecError as error:
        raise StateFailed(
            f"entry {seq} cannot be read: {error}",
            hint=f"it is of a newer protocol than {PROTOCOL}; install the version of slum that the other members run",
        ) from error


def is_stale(entry: Entry, position: Position) -> bool:
    """Tell whether *entry*'s header is not the one that may write now.

    The current leader's header equals the position's; a new leader's first entry, LeaderStarted, comes with a higher term.
    """
    fence = (entry.header.generation, entry.header.epoch, entry.header.term)
    if len(entry.proposals) == 1 and isinstance(entry.proposals[0].command, LeaderStarted):
        return fence[:2] != position.fence[:2] or fence[2] <= position.term
    return fence != position.fence


def next_chain(chain: str, entry: bytes, results_hash: bytes) -> str:
    return hashlib.sha256(chain.encode() + hashlib.sha256(entry).digest() + results_hash).hexdigest()


def replayed_chain(chain0: str, entries: Iterable[bytes], answers: Iterable[tuple[int, bytes]]) -> tuple[str, int]:
    """Return the chain after as many of an epoch's first *entries* as have *answers* on record, and how many these are.

    *answers* are (number from 1, hash of the results), in order.
    """
    chain, number = chain0, 0
    for entry, (found, results_hash) in zip(entries, answers, strict=False):
        if found != number + 1:
            break
        number = found
        chain = next_chain(chain, entry, results_hash)
    return chain, number
