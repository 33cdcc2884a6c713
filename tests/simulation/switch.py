"""A simulated network: connections between members that keep order, take time, break, stall, and come back.

With *strays*, it also delivers some frames twice, the second time late, out of order, and even on the next connection: more than
TCP ever does, because what the members promise must not hang on it.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from slum.ledger.commands import Member
from slum.ledger.net import Down, Event, Got, Up
from slum.ledger.peerwire import Append, AskVote, Hello, Message, NextIndex, Splitter, Vote, pack, unpack

IDLE_S = 1.2
REDIAL_S = 0.15
LOOK_S = 0.05
STRAYS = (Append, NextIndex, AskVote, Vote)
STRAY_S = (0.01, 0.1, 0.5, 2.0, 6.0)
SPIKES, SPIKE_S_MAX = 0.03, 0.4
NEVER = float("inf")


class Clock:
    def __init__(self) -> None:
        self.at = 1000.0

    def now(self) -> float:
        return self.at


class SimWake:
    """Ends the waiting of one member: it has something to do that it was not told of by the network."""

    descriptor = -1

    def __init__(self) -> None:
        self.is_set = False

    def set(self) -> None:
        self.is_set = True


@dataclass
class Direction:
    queue: deque[tuple[float, bytes]] = field(default_factory=deque)
    last_at: float = 0.0
    blocked: bool = False
    heard_at: float = 0.0

    @property
    def next_at(self) -> float:
        return self.queue[0][0] if self.queue and not self.blocked else NEVER


@dataclass
class Pair:
    connected: bool = False
    cut: bool = False
    redial_at: float = 0.0
    ways: dict[str, Direction] = field(default_factory=dict)
    """By the name of the receiver."""


class Switch:
    def __init__(self, clock: Clock, chance: random.Random, delay_s: float, *, strays: float = 0.0) -> None:
        self.clock = clock
        self.chance = chance
        self.delay_s = delay_s
        self.strays = strays
        self.nets: dict[str, SimNet] = {}
        self.pairs: dict[tuple[str, str], Pair] = {}
        self.look_at = 0.0
        """When connections are looked at again."""
        self._count = 0

    def pair(self, a: str, b: str) -> Pair:
        key = (a, b) if a < b else (b, a)
        found = self.pairs.get(key)
        if found is None:
            found = self.pairs[key] = Pair()
        return found

    def send(self, source: str, to: str, message: Message) -> None:
        pair = self.pair(source, to)
        if not pair.connected:
            return
        way = pair.ways[to]
        takes_s = self.delay_s * (0.2 + self.chance.random())
        if self.chance.random() < SPIKES:
            # What follows waits behind it, while answers to what came before are on their way.
            takes_s = min(takes_s * 10, SPIKE_S_MAX)
        way.last_at = max(way.last_at, self.clock.at + takes_s)
        frame = pack(message)
        way.queue.append((way.last_at, frame))
        net = self.nets.get(to)
        if net is None:
            return
        if not way.blocked:
            net.arrival = min(net.arrival, way.queue[0][0])
        if self.strays and isinstance(message, STRAYS) and self.chance.random() < self.strays:
            at = way.last_at + self.chance.choice(STRAY_S) * self.chance.random()
            self._count += 1
            heapq.heappush(net.strays, (at, self._count, source, frame))
            net.arrival = min(net.arrival, at)

    def due(self, to: str) -> list[Event]:
        """Return what arrives at *to* now."""
        found: list[Event] = []
        now, arrival, net = self.clock.at, NEVER, self.nets[to]
        for (a, b), pair in self.pairs.items():
            if not pair.connected or to not in (a, b):
                continue
            way = pair.ways[to]
            while way.next_at <= now:
                found.append(Got(b if to == a else a, opened(way.queue.popleft()[1])))
                way.heard_at = now
            arrival = min(arrival, way.next_at)
        while net.strays and net.strays[0][0] <= now:
            _, _, source, frame = heapq.heappop(net.strays)
            found.append(Got(source, opened(frame)))
        net.arrival = min(arrival, net.strays[0][0]) if net.strays else arrival
        return found

    def recount(self) -> None:
        """Connections or blocks have changed: when does what arrive?"""
        for name, net in self.nets.items():
            ways = (pair.ways[name] for key, pair in self.pairs.items() if name in key and pair.connected)
            first = net.strays[0][0] if net.strays else NEVER
            net.arrival = min((way.next_at for way in ways), default=NEVER)
            net.arrival = min(net.arrival, first)

    def keep(self) -> None:
        """Break what is silent or cut, connect what can be."""
        now = self.clock.at
        if now < self.look_at:
            return
        self.look_at = now + LOOK_S
        for a, b in sorted(self.pairs):
            pair = self.pairs[a, b]
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
                    events[:] = [event for event in events if event.peer != other or isinstance(event, Up)]
                    events.append(Down(other, "broken"))


class SimNet:
    """One member's end of the switch."""

    def __init__(self, switch: Switch, name: str) -> None:
        self.wake = SimWake()
        self.switch = switch
        self.name = name
        self.members: dict[str, Member] = {}
        self.events: list[Event] = []
        self.arrival = NEVER
        """When the next frame arrives."""
        self.strays: list[tuple[float, int, str, bytes]] = []
        self.paused = False
        self._hello: Callable[[], Hello] | None = None
        switch.nets[name] = self
        switch.look_at = 0.0

    def hello(self) -> Hello:
        assert self._hello is not None
        return self._hello()

    def set_members(self, members: Sequence[Member], hello: Callable[[], Hello], dial: Collection[str]) -> None:
        self.members = {member.id: member for member in members}
        self._hello = hello
        self.switch.look_at = 0.0
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
        self.wake.is_set = False
        events, self.events = self.events, []
        return events + self.switch.due(self.name) if self.arrival <= self.switch.clock.at else events

    def close(self) -> None:
        self.switch.nets.pop(self.name, None)


def opened(frame: bytes) -> Message:
    """Return the message in *frame*, by the same way that bytes of a real connection take."""
    splitter = Splitter(1 << 30)
    splitter.feed(frame)
    body = splitter.take()
    assert body is not None
    return unpack(body)
