"""How the ledger stands as one member sees it: the types of status(), and the pure function that makes them.

Everything in it is this member's own knowledge: a member that is cut off tells an old story, and *age_s* says how old.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from slum.frozen import Sparse
from slum.ledger.commands import Member

if TYPE_CHECKING:
    from slum.ledger.schema import Position

LEADER, FOLLOWER, LEARNER, DOWN, FENCED, REFUSED = "leader", "follower", "learner", "down", "fenced", "refused"
NO_LEADER_S = 2.0
REPLACED = "has replaced"
"""Stands in the refusal of a member whose generation is over."""


class Alarm(Sparse):
    """Something that somebody should look at. *kind* is stable (docs/ledger.md lists them)."""

    kind: str
    member: str
    why: str
    hint: str = ""


class MemberStatus(Sparse):
    """One member as the one that tells knows it; None is: never heard since its process started."""

    id: str
    role: str
    """leader, follower, learner (follows the log, has no vote), down, fenced (of a generation that was replaced), refused."""
    address: str
    incarnation: str = ""
    epoch: int | None = None
    seq: int | None = None
    lag: int | None = None
    """Entries that it lacks of what the one that tells has. Exact when the leader tells; else up to 0.3 s old."""
    contact_s: float | None = None
    """Since it was last heard; 0 for the one that tells."""
    clock_off_s: float | None = None
    """Its clock minus ours."""
    protocol: int | None = None
    """The newest that its slum speaks; the one in force is in LedgerStatus."""


class LedgerStatus(Sparse):
    """The answer to status()."""

    member: str
    """The one that tells."""
    cluster: str
    role: str
    leader: str | None
    """None while nobody leads, as far as is known."""
    generation: int
    epoch: int
    lineage: str
    term: int
    seq: int
    age_s: float
    """How old what it shows may be: since it last had all that a leader had committed; 0 when it leads."""
    majority: bool
    """A majority is in reach from here: changes can be committed."""
    protocol: int
    queued: int
    """Proposals that wait."""
    members: tuple[MemberStatus, ...]
    """In the order of the members list, then learners."""
    alarms: tuple[Alarm, ...] = ()
    silence_s: float = 0.0
    """Since it last heard a leader, or began to listen; 0 when it leads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """What is known of a peer. *heard_at* is by the monotonic clock."""

    up: bool = False
    epoch: int | None = None
    seq: int | None = None
    heard_at: float | None = None
    clock_off_s: float | None = None
    protocol: int | None = None
    refused: str = ""


def report(
    me: Member,
    position: Position,
    *,
    sights: Mapping[str, Sight],
    learners: Iterable[Member],
    leader: str | None,
    lags: Mapping[str, int | None],
    now: float,
    age_s: float,
    silence_s: float,
    queued: int,
    alarms: tuple[Alarm, ...],
) -> LedgerStatus:
    """Return how the ledger stands for *me*.

    *sights* has us and our peers; *learners* are those that follow without a vote; *lags* how many entries a peer lacks by the
    leader's count, where that is known.
    """
    voters = {row.id: row for row in position.members}
    rows = {**voters, **{row.id: row for row in learners}}
    rows.setdefault(me.id, me)
    members = []
    for name, row in rows.items():
        sight = sights.get(name, Sight())
        lag = lags.get(name)
        if lag is None and sight.seq is not None:
            lag = max(0, position.seq - sight.seq)
        members.append(
            MemberStatus(
                id=name,
                role=_role(name, sight, leader=leader, votes=name in voters),
                address=row.address,
                incarnation=row.incarnation,
                epoch=sight.epoch,
                seq=sight.seq,
                lag=lag,
                contact_s=None if sight.heard_at is None else max(0.0, now - sight.heard_at),
                clock_off_s=0.0 if name == me.id else sight.clock_off_s,
                protocol=sight.protocol,
            )
        )
    up = {name for name, sight in sights.items() if sight.up}
    return LedgerStatus(
        member=me.id,
        cluster=position.cluster_id,
        role=next(member.role for member in members if member.id == me.id),
        leader=leader,
        generation=position.generation,
        epoch=position.epoch,
        lineage=position.lineage,
        term=position.term,
        seq=position.seq,
        age_s=age_s,
        majority=len(up & voters.keys()) * 2 > len(voters),
        protocol=position.protocol,
        queued=queued,
        members=tuple(members),
        alarms=(*_leaderless(me.id, leader, silence_s), *alarms, *_refusals(rows.values(), sights)),
        silence_s=silence_s,
    )


def _role(name: str, sight: Sight, *, leader: str | None, votes: bool) -> str:
    if sight.up:
        if not votes:
            return LEARNER
        return LEADER if name == leader else FOLLOWER
    if sight.refused:
        return FENCED if REPLACED in sight.refused else REFUSED
    return DOWN


def _leaderless(me: str, leader: str | None, silent_s: float) -> tuple[Alarm, ...]:
    """Between two leaders, or at a seal, there is none for a moment; that is nothing to look at."""
    if leader is not None or silent_s < NO_LEADER_S:
        return ()
    why = f"nobody has led for {silent_s:.0f} s, as far as this member knows: nothing can be changed"
    return (Alarm(kind="no_leader", member=me, why=why, hint="bring a majority of the members back"),)


def _refusals(members: Iterable[Member], sights: Mapping[str, Sight]) -> tuple[Alarm, ...]:
    hint = "look at its log; if it has lost its disk or its history, remove it and let it join as new"
    return tuple(
        Alarm(kind="peer_refused", member=row.id, why=sight.refused, hint=hint)
        for row in members
        if (sight := sights.get(row.id, Sight())).refused and not sight.up
    )
