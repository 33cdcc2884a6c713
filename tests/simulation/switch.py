"""A simulated network: connections between members that keep order, take time, break, stall, and come back."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from slum.ledger.commands import Member
from slum.ledger.net import Down, Event, Got, Up
from slum.ledger.peerwire import Hello, Message, Splitter, pack, unpack

IDLE_S = 1.2
REDIAL_S = 0.15


class Clock:
    def __init__(self) -> None:
        self.at = 1000.0

    def now(self) -> float:
        return self.at


class SilentWake:
    """The simulation looks at members often enough."""

    descriptor = -1

    def set(self) -> None:
        pass


@dataclass
class Direction:
    queue: deque[tuple[float, bytes]] = field(default_factory=deque)
    last_at: float = 0.0
    blocked: bool = False
    heard_at: float = 0.0


@dataclass
class Pair:
    connected: bool = False
    cut: bool = False
    redial_at: float = 0.0
    ways: dict[str, Direction] = field(default_factory=dict)
    """By the name of the receiver."""


class Switch:
    def __init__(self, clock: Clock, chance: random.Random, delay_s: float) -> None:
        self.clock = clock
        self.chance = chance
        self.delay_s = delay_s
        self.nets: dict[str, SimNet] = {}
        self.pairs: dict[tuple[str, str], Pair] = {}

    def pair(self, a: str, b: str) -> Pair:
        key = (a, b) if a < b else (b, a)
        if key not in self.pairs:
            self.pairs[key] = Pair()
        return self.pairs[key]

    def send(self, source: str, to: str, message: Message) -> None:
        pair = self.pair(source, to)
        if not pair.connected:
            return
        way = pair.ways[to]
        way.last_at = max(way.last_at, self.clock.at + self.delay_s * (0.2 + self.chance.random()))
        way.queue.append((way.last_at, pack(message)))

    def due(self, to: str) -> list[Event]:
        """Return what arrives at *to* now."""
        found: list[Event] = []
        for (a, b), pair in sorted(self.pairs.items()):
            if to not in (a, b) or not pair.connected:
                continue
            source = b if to == a else a
            way = pair.ways[to]
            while way.queue and way.queue[0][0] <= self.clock.at and not way.blocked:
                _, frame = way.queue.popleft()
                splitter = Splitter(1 << 30)
                splitter.feed(frame)
                body = splitter.take()
                assert body is not None
                way.heard_at = self.clock.at
                found.append(Got(source, unpack(body)))
        return found

    def next_at(self, to: str) -> float:
        """When the next message arrives at *to*."""
        return min(
            (
                pair.ways[to].queue[0][0]
                for (a, b), pair in self.pairs.items()
                if to in (a, b) and pair.connected and pair.ways[to].queue and not pair.ways[to].blocked
            ),
            default=float("inf"),
        )

    def keep(self) -> None:
        """Break what is silent or cut, connect what can be."""
        now = self.clock.at
        for (a, b), pair in sorted(self.pairs.items()):
            if pair.connected:
                silent = any(
                    now - pair.ways[name].heard_at > IDLE_S and name in self.nets and not self.nets[name].paused
                    for name in (a, b)
                )
                if silent or a not in self.nets or b not in self.nets:
                    self.break_(a, b)
            elif not pair.cut and now >= pair.redial_at and a in self.nets and b in self.nets:
                one, other = self.nets[a], self.nets[b]
                if b in one.members and a in other.members and not one.paused and not other.paused:
                    pair.connected = True
                    pair.ways = {name: Direction(heard_at=now, last_at=now) for name in (a, b)}
                    one.events.append(Up(b, other.hello()))
                    other.events.append(Up(a, one.hello()))

    def break_(self, a: str, b: str) -> None:
        pair = self.pair(a, b)
        if pair.connected:
            pair.connected = False
            pair.redial_at = self.clock.at + REDIAL_S
            for name, other in ((a, b), (b, a)):
                if name in self.nets:
                    events = self.nets[name].events
                    events[:] = [event for event in events if event.peer != other]
                    events.append(Down(other, "broken"))


class SimNet:
    """One member's end of the switch."""

    def __init__(self, switch: Switch, name: str) -> None:
        self.wake = SilentWake()
        self.switch = switch
        self.name = name
        self.members: dict[str, Member] = {}
        self.events: list[Event] = []
        self.paused = False
        self._hello: Callable[[], Hello] | None = None
        switch.nets[name] = self

    def hello(self) -> Hello:
        assert self._hello is not None
        return self._hello()

    def set_members(self, members: Sequence[Member], hello: Callable[[], Hello], dial: Collection[str]) -> None:
        self.members = {member.id: member for member in members}
        self._hello = hello
        for name in list(self.switch.nets):
            if name != self.name:
                self.switch.pair(self.name, name)
                if name not in self.members:
                    self.switch.break_(self.name, name)

    def send(self, peer: str, message: Message) -> None:
        self.switch.send(self.name, peer, message)

    def drop(self, peer: str, why: str) -> None:
        self.switch.break_(self.name, peer)

    def receive(self, wait_s: float) -> list[Event]:
        events, self.events = self.events, []
        return events + self.switch.due(self.name)

    def close(self) -> None:
        self.switch.nets.pop(self.name, None)
