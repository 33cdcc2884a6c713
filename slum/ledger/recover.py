"""Start a new generation from what one member holds: `python -m slum.ledger.recover --data-dir D`, or `slum server recover`.

Two cases. A ledger of one whose journal is damaged or gone: nothing acknowledged is lost, because every answer waited for
state.db's commit. One survivor of several whose majority is lost for good: it goes on alone with all that its own log holds,
committed or not; what only the others held is lost, and examine() says so before. The new generation is higher than any
before, so that whatever the others still do is fenced, and they are told when they come back. Refuses while a member in reach has
more than this one, while a majority is in reach, and unless state.db passes every check of its own. Run it while no ledger
process runs in the folder; a kill at any moment leaves the old generation or the new one, and it may be repeated.
"""

from __future__ import annotations

import argparse
import getpass
import socket
import sqlite3
import sys
import time
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from slum.errors import SlumError
from slum.frozen import Frozen
from slum.ledger import fence, folder, journal, replay
from slum.ledger.adopt import who
from slum.ledger.applying import Applied
from slum.ledger.commands import PROTOCOL, Member
from slum.ledger.group import command_entry
from slum.ledger.peerwire import VERSION, Hello
from slum.ledger.reach import hellos
from slum.ledger.refusal import RESTORE, Refusal
from slum.ledger.schema import EpochRow, Position
from slum.ledger.state import State
from slum.ledger.world import Config

REACH_S = 5.0


class Reached(Frozen):
    """Another member that answers, and how far it is."""

    member: str
    generation: int
    epoch: int
    last_term: int
    last_index: int
    seq: int

    @property
    def place(self) -> tuple[int, int, int, int]:
        return (self.generation, self.epoch, self.last_term, self.last_index)


class Survivor(Frozen):
    """What a member holds that is to go on alone, and what it may lack."""

    member: str
    cluster: str
    generation: int
    epoch: int
    last_term: int
    last_index: int
    seq: int
    """Applied in state.db."""
    unapplied: int
    """Entries of its own log behind these: they are kept too, whether they were ever committed or not."""
    last_at: float
    """Unix seconds of the last event in state.db."""
    members: tuple[str, ...]
    reached: tuple[Reached, ...]
    log_problem: str
    """Why its log cannot be read; "" when it can. Then only what state.db has is kept."""
    obstacle: str
    """Why it must not go on alone now; "" when it may."""
    missing: tuple[str, ...]
    """In words, what may be lost by going on alone; empty when nothing can be."""

    @property
    def place(self) -> tuple[int, int, int, int]:
        return (self.generation, self.epoch, self.last_term, self.last_index)


def examine(home: Path, *, reach_s: float = REACH_S) -> Survivor:
    """Return what the ledger in folder *home* holds, changing nothing; asks the other members for at most *reach_s*."""
    with folder.locked(home), _opened(home) as held:
        return _survivor(home, held, reach_s)


def recover(
    home: Path, *, actor: str, now: float, epoch_bytes: int = Config().epoch_bytes, reach_s: float = REACH_S
) -> Position:
    """Give the ledger in folder *home* a new generation, of this member alone; return where it stands then."""
    with folder.locked(home), _opened(home) as held:
        state = held.state
        state.check_events()
        survivor = _survivor(home, held, reach_s)
        if survivor.obstacle:
            raise Refusal(
                f"{survivor.member} does not go on alone: {survivor.obstacle}",
                hint="nothing was changed; bring the others back, or cut them off for good first",
            )
        alone = len(state.position.members) == 1
        me = who(home, state.position)
        former = tuple(row for row in state.position.members if row.id != me.id)
        if held.log is not None:
            _apply_rest(home, held, epoch_bytes)
        if former:
            fence.keep_former(home, former)
        known = (state.position.generation, *(other.generation for other in survivor.reached))
        generation = max(max(known) + 1, int(now * 1000))

        def make_journal(epoch: EpochRow) -> None:
            made = folder.journal_id(state.position.cluster_id, epoch)
            journal.create(folder.journal_path(home, epoch), made, epoch_bytes).close()

        return state.begin_generation(
            generation,
            uuid.uuid4().hex[:16],
            actor=actor,
            at=now,
            make=make_journal,
            members=None if alone else (me,),
            paused="" if alone else f"{me.id} goes on alone: look at what may be missing first",
        )


@dataclass
class _Held:
    state: State
    log: journal.Journal | None
    problem: str
    last_at: float


@contextmanager
def _opened(home: Path) -> Iterator[_Held]:
    path = folder.current(home)
    if path is None:
        raise Refusal(f"{home} holds no ledger", hint=RESTORE)
    fence.check(home)
    state = State.open(path)
    log = None
    try:
        problem = ""
        try:
            log, _ = replay.open_epoch(home, state, 0, lambda _event, **_fields: None)
        except Refusal as error:
            problem = error.message
        yield _Held(state, log, problem, _last_at(path))
    finally:
        if log is not None:
            log.close()
        state.close()


def _last_at(path: Path) -> float:
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as db:
        row = db.execute("SELECT at FROM events ORDER BY number DESC LIMIT 1").fetchone()
    return float(row[0]) if row else 0.0


def _survivor(home: Path, held: _Held, reach_s: float) -> Survivor:
    position = held.state.position
    me = who(home, position)
    last_term, last_index = held.log.last if held.log is not None else (position.term, position.applied)
    others = [row for row in position.members if row.id != me.id]
    answers, strange = hellos(
        home, others, _hello(position, held.state.epochs(1)[0], me, last_term, last_index), reach_s
    )
    reached = tuple(
        Reached(
            member=name,
            generation=hello.generation,
            epoch=hello.epoch,
            last_term=hello.last_term,
            last_index=hello.last_index,
            seq=hello.seq,
        )
        for name, hello in sorted(answers.items())
    )
    place = (position.generation, position.epoch, last_term, last_index)
    return Survivor(
        member=me.id,
        cluster=position.cluster_id,
        generation=position.generation,
        epoch=position.epoch,
        last_term=last_term,
        last_index=last_index,
        seq=position.seq,
        unapplied=sum(1 for _ in _rest(held)) if held.log is not None else 0,
        last_at=held.last_at,
        members=tuple(row.id for row in position.members),
        reached=reached,
        log_problem=held.problem,
        obstacle=obstacle(me.id, place, position.members, {other.member: other.place for other in reached}, strange),
        missing=missing(me.id, position.members, held.problem),
    )


def obstacle(
    me: str,
    mine: tuple[int, int, int, int],
    members: tuple[Member, ...],
    others: Mapping[str, tuple[int, int, int, int]],
    strange: Collection[str] = (),
) -> str:
    """Return why *me* must not go on alone from *mine*, its (generation, epoch, last term, last index); "" when it may.

    *others* are where those members are that answer; to those in *strange* it is no member.
    """
    if all(row.id != me for row in members):
        return "it is no member"
    if strange:
        return f"{', '.join(sorted(strange))} answer and know no such member any more: it was removed (`slum server leave`)"
    ahead = sorted(name for name, place in others.items() if place > mine)
    if ahead:
        return f"{ahead[0]} answers and has more than this one: recover there"
    if (len(others) + 1) * 2 > len(members) > 1:
        return f"{', '.join(sorted(others))} answer: with this one that is a majority, and nothing is lost"
    return ""


def missing(me: str, members: tuple[Member, ...], log_problem: str) -> tuple[str, ...]:
    """Say what may be lost when *me* goes on alone, whose log has *log_problem*."""
    if len(members) == 1:
        return ()
    others = ", ".join(row.id for row in members if row.id != me)
    found = [f"what was answered by {others} and had not reached {me} when it last heard of them"]
    if log_problem:
        found.append(f"what {me} itself held in its log but had not applied ({log_problem})")
    return tuple(found)


def _rest(held: _Held) -> Iterator[bytes]:
    """Yield the log's entries that state.db has not applied."""
    assert held.log is not None
    entries = (data for command, _, _ in held.log[0:] if (data := command_entry(command)) is not None)
    return islice(entries, held.state.position.applied, None)


def _apply_rest(home: Path, held: _Held, epoch_bytes: int) -> None:
    """Apply all that the log holds, committed or not, up to the epoch's Seal, behind which nothing counts."""
    state, cluster = held.state, held.state.position.cluster_id

    def make(applied: Applied) -> None:
        if applied.sealed is not None:
            path = folder.journal_path(home, applied.sealed)
            journal.create(path, folder.journal_id(cluster, applied.sealed), epoch_bytes).close()

    for data in list(_rest(held)):
        if state.apply(data, make).sealed is not None:
            return


def _hello(position: Position, epoch: EpochRow, me: Member, last_term: int, last_index: int) -> Hello:
    return Hello(
        version=VERSION,
        cluster=position.cluster_id,
        member=me.id,
        incarnation=me.incarnation,
        generation=position.generation,
        epoch=position.epoch,
        lineage=position.lineage,
        chain0=epoch.chain0,
        last_index=last_index,
        last_term=last_term,
        seq=position.seq,
        protocol=PROTOCOL,
        run="recovering",
    )


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m slum.ledger.recover",
        description="Start a new generation of the ledger from one member's files.",
    )
    parser.add_argument("--data-dir", type=Path, required=True)
    home = parser.parse_args(arguments).data_dir / "state"
    try:
        at = recover(home, actor=f"{getpass.getuser()}@{socket.gethostname()}", now=time.time())
    except (SlumError, OSError, sqlite3.Error) as error:
        hint = error.hint.replace("DIR", str(home.parent)) if isinstance(error, SlumError) else ""
        sys.stderr.write(f"{error}\n{hint}\n")
        return 1
    sys.stderr.write(f"generation {at.generation} begins at sequence {at.seq}; start the ledger again\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
