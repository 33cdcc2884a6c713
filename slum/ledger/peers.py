"""Who is there, in which epoch, and what is to be done with what they send: the desk between network, wire and catch-up.

Lives across epochs, as connections do. Frames of an older epoch are dropped, those of a newer one are kept (at most
STASH_MAX a peer) until this member gets there. Decides nothing about hellos, elections or logs itself: judge.py,
election.py and overlap.py do. All in the ledger's one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from slum.ledger.beginning import Note
from slum.ledger.clocks import Offset
from slum.ledger.commands import Member
from slum.ledger.judge import Fenced, Refuse, judge
from slum.ledger.net import Down, Event, Got, Net, Up
from slum.ledger.peerwire import (
    STASH_MAX,
    Append,
    AskPreVote,
    AskVote,
    Hello,
    HigherTerm,
    Message,
    NextIndex,
    OfEpoch,
    Part,
    Ping,
    Place,
    PreVote,
    Relay,
    RelayRefused,
    Tail,
    Vote,
    WantCopy,
    WantTail,
)
from slum.ledger.rows import Rows, RowsAt
from slum.ledger.status import Sight
from slum.ledger.transport import Wire

PING_S = 0.3
_OF_EPOCH = (Append, NextIndex, AskVote, Vote, AskPreVote, PreVote, HigherTerm)


class Desk(Protocol):
    """What a member does with what is not the wire's."""

    def on_behind(self, peer: str) -> None: ...

    def on_catch_up(self, peer: str, message: WantTail | Tail | WantCopy | Part) -> None: ...

    def on_relay(self, peer: str, message: Relay) -> None: ...

    def on_relay_refused(self, peer: str, message: RelayRefused) -> None: ...

    def on_fenced(self, peer: str, generation: int) -> None:
        """*peer* is of a later generation than we are."""
        ...


@dataclass(slots=True)
class _Peer:
    place: Place
    seq: int
    protocol: int
    heard_at: float
    stash: list[OfEpoch] = field(default_factory=list)
    clock: Offset = field(default_factory=Offset)


class Peers:
    def __init__(
        self,
        net: Net,
        desk: Desk,
        *,
        rows: Rows,
        clock: Callable[[], float],
        now: Callable[[], float],
        note: Note,
    ) -> None:
        self.rows = rows
        self._net = net
        self._desk = desk
        self._clock = clock
        self._now = now
        self._note = note
        self._peers: dict[str, _Peer] = {}
        self._known: dict[str, Member] = {}
        self._history: Mapping[Place, str] = {}
        self._hello: Callable[[], Hello] | None = None
        self._wire: Wire | None = None
        self._place: Place = (0, 0)
        self._next_ping = 0.0
        self._told_rows: RowsAt | None = None
        self._refused: dict[str, str] = {}
        self._heard: dict[str, float] = {}
        """When those that are gone were last heard."""

    def begin(
        self,
        *,
        place: Place,
        known: Mapping[str, Member],
        history: Mapping[Place, str],
        hello: Callable[[], Hello],
        wire: Wire | None,
    ) -> None:
        """From now on this member is in epoch *place*, whose *wire* is None when it has no peers there."""
        self._place, self._wire, self._hello = place, wire, hello
        self._known, self._history = dict(known), history
        self._next_ping = 0.0
        for name in [name for name in self._peers if name not in known]:
            del self._peers[name]
        for name, peer in list(self._peers.items()):
            stash, peer.stash = peer.stash, []
            if peer.place == place and wire is not None:
                wire.up(name)
            for message in stash:
                self._of_epoch(name, peer, message)

    def know(self, known: Mapping[str, Member]) -> None:
        """From now on these are let in: the members, and learners."""
        self._known = dict(known)

    @property
    def up(self) -> tuple[str, ...]:
        return tuple(self._peers)

    @property
    def ping_at(self) -> float:
        """When the others are pinged next."""
        return self._next_ping

    def seq_of(self, peer: str) -> int | None:
        """Return how far *peer* was when it last said so; None when it is not connected."""
        found = self._peers.get(peer)
        return found.seq if found else None

    def place_of(self, peer: str) -> Place | None:
        found = self._peers.get(peer)
        return found.place if found else None

    def sight(self, peer: str) -> Sight:
        """Return all that is known of *peer*."""
        found = self._peers.get(peer)
        refused = self._refused.get(peer, "")
        if found is None:
            return Sight(heard_at=self._heard.get(peer), refused=refused)
        return Sight(
            up=True,
            epoch=found.place[1],
            seq=found.seq,
            heard_at=found.heard_at,
            clock_off_s=found.clock.seconds,
            protocol=found.protocol,
        )

    @property
    def offsets(self) -> dict[str, float]:
        """How far the clocks of those that are connected are from ours, in seconds, where that is known."""
        known = ((name, peer.clock.seconds) for name, peer in self._peers.items())
        return {name: off for name, off in known if off is not None}

    def tick(self, seq: int) -> None:
        """Ping everyone when it is time, and when there are rows to tell of: who differs must say so before it ends."""
        now, mine = self._clock(), self.rows.mine
        if now >= self._next_ping or mine is not self._told_rows:
            self._next_ping, self._told_rows = now + PING_S, mine
            ping = Ping(
                place=self._place,
                seq=seq,
                at=self._now(),
                rows_at=mine.place if mine else (0, 0),
                rows=mine.hash if mine else "",
            )
            for name in self._peers:
                self._net.send(name, ping)

    def handle(self, event: Event) -> None:
        match event:
            case Up():
                self._up(event)
            case Down():
                gone = self._peers.pop(event.peer, None)
                if gone is not None:
                    self._heard[event.peer] = gone.heard_at
                    if self._wire is not None:
                        self._wire.down(event.peer)
            case Got():
                peer = self._peers.get(event.peer)
                if peer is not None:
                    peer.heard_at = self._clock()
                    self._got(event.peer, peer, event.message)

    def _up(self, event: Up) -> None:
        assert self._hello is not None
        name, theirs = event.peer, event.hello
        if self._peers.pop(name, None) is not None and self._wire is not None:
            self._wire.down(name)
        verdict = judge(
            self._hello(),
            theirs,
            known=self._known.get(name),
            history=self._history,
            acknowledged=self._wire.acknowledged(name) if self._wire is not None else 0,
        )
        if isinstance(verdict, Fenced):
            self._desk.on_fenced(name, verdict.generation)
            return
        if isinstance(verdict, Refuse):
            if self._refused.get(name) != verdict.why:
                self._refused[name] = verdict.why
                self._note("peer_was_refused", peer=name, why=verdict.why)
            self._net.drop(name, verdict.why)
            return
        self._refused.pop(name, None)
        self._peers[name] = _Peer(place=theirs.place, seq=theirs.seq, protocol=theirs.protocol, heard_at=self._clock())
        self.rows.heard(name, theirs.rows_at, theirs.rows)
        self._look(name, self._peers[name])

    def _got(self, name: str, peer: _Peer, message: Message) -> None:
        match message:
            case Ping():
                peer.place, peer.seq = max(peer.place, message.place), message.seq
                self.rows.heard(name, message.rows_at, message.rows)
                peer.clock.say(peer.heard_at, message.at - self._now())
                self._look(name, peer)
            case WantTail() | Tail() | WantCopy() | Part():
                self._desk.on_catch_up(name, message)
            case Relay():
                self._desk.on_relay(name, message)
            case RelayRefused():
                self._desk.on_relay_refused(name, message)
            case _ if isinstance(message, _OF_EPOCH):
                self._of_epoch(name, peer, message)

    def _of_epoch(self, name: str, peer: _Peer, message: OfEpoch) -> None:
        if message.place < self._place:
            return
        peer.place = max(peer.place, message.place)
        if message.place > self._place:
            if len(peer.stash) < STASH_MAX:
                peer.stash.append(message)
            self._desk.on_behind(name)
        elif self._wire is not None:
            self._wire.up(name)
            self._wire.take(name, message)

    def _look(self, name: str, peer: _Peer) -> None:
        if peer.place > self._place:
            self._desk.on_behind(name)
        elif peer.place == self._place and self._wire is not None:
            self._wire.up(name)
