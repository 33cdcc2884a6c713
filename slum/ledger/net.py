"""What a member needs of a network: send to a peer, and be told what came, who is there, who is gone.

Links (links.py) is the real one, Alone is that of a member without peers, and a simulation brings its own. All calls are
made by the ledger's thread; only the Wake is set from elsewhere.
"""

from __future__ import annotations

import select
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from slum.ledger.commands import Member
from slum.ledger.group import Wake
from slum.ledger.peerwire import Hello, Message


@dataclass(frozen=True, slots=True)
class Up:
    """A connection to *peer*, whose key is the one on record, has begun; the only one to it."""

    peer: str
    hello: Hello


@dataclass(frozen=True, slots=True)
class Down:
    peer: str
    why: str


@dataclass(frozen=True, slots=True)
class Got:
    peer: str
    message: Message


Event = Up | Down | Got


class Net(Protocol):
    wake: Wake

    def set_members(self, members: Sequence[Member], hello: Callable[[], Hello], dial: Collection[str]) -> None:
        """Keep connections to these, drop all others; *hello* is what we say when one begins, *dial* whom we call."""
        ...

    def send(self, peer: str, message: Message) -> None:
        """Send in order, or drop it when there is no connection; never waits."""
        ...

    def drop(self, peer: str, why: str) -> None:
        """End the connection to *peer*, telling it why; another one may begin later. A Down follows."""
        ...

    def receive(self, wait_s: float) -> list[Event]:
        """Return what happened, waiting at most *wait_s* for the first of it or for the wake."""
        ...

    def wait_for(self, descriptor: int, ready: Callable[[], None]) -> None:
        """From now on receive() also ends its wait when *descriptor* can be read, and calls *ready* then."""
        ...

    def close(self) -> None: ...


class Alone:
    """The network of a member that has no peers."""

    def __init__(self) -> None:
        self.wake = Wake()
        self._others: dict[int, Callable[[], None]] = {}
        self._poll = select.poll()
        self._poll.register(self.wake.descriptor, select.POLLIN)

    def set_members(self, members: Sequence[Member], hello: Callable[[], Hello], dial: Collection[str]) -> None:
        """There is nobody to connect to."""

    def send(self, peer: str, message: Message) -> None:
        """There is nobody to send to."""

    def drop(self, peer: str, why: str) -> None:
        """There is nobody to drop."""

    def receive(self, wait_s: float) -> list[Event]:
        for descriptor, _ in self._poll.poll(wait_s * 1000):
            if descriptor == self.wake.descriptor:
                self.wake.clear()
            else:
                self._others[descriptor]()
        return []

    def wait_for(self, descriptor: int, ready: Callable[[], None]) -> None:
        self._others[descriptor] = ready
        self._poll.register(descriptor, select.POLLIN)

    def close(self) -> None:
        self.wake.close()
