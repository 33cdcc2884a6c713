"""A new member's first step: with an identity and no ledger, get a copy of state.db from any member that knows it.

Who joins is told which cluster and whom to ask (``join.json``, written by whoever arranged the join); the leader is told
the new one's row. After the copy it is a learner like any member whose epoch does not list it, until a Seal does. May be killed
and started again at any moment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from slum.frozen import Frozen
from slum.ledger import folder, identity, journal
from slum.ledger.adopt import adopt
from slum.ledger.commands import PROTOCOL, Member
from slum.ledger.copies import Incoming
from slum.ledger.net import Down, Got, Net, Up
from slum.ledger.peerwire import VERSION, Hello, Part, Ping, WantCopy
from slum.ledger.refusal import Refusal
from slum.ledger.state import State
from slum.ledger.world import Config

JOIN = "join.json"
ASK_AGAIN_S = 0.25
PING_S = 0.3


class Join(Frozen):
    cluster: str
    members: tuple[Member, ...]


def prepare(home: Path, join: Join) -> None:
    """Note in *home*, which has an identity, whom to join."""
    fresh = home / (JOIN + ".new")
    with fresh.open("wb") as file:
        file.write(msgspec.json.encode(join))
        file.flush()
        journal.sync_file(file.fileno())
    fresh.rename(home / JOIN)
    journal.sync_folder(home)


def pending(home: Path) -> Join | None:
    """Return whom *home* is to join; None when it has a ledger, or nothing to join."""
    if not (home / JOIN).exists() or folder.current(home) is not None:
        return None
    return msgspec.json.decode((home / JOIN).read_bytes(), type=Join)


class Joiner:
    def __init__(
        self, home: Path, me: identity.Me, join: Join, config: Config, net: Net, clock: Callable[[], float]
    ) -> None:
        self._home = home
        self._me = me
        self._join = join
        self._config = config
        self._net = net
        self._clock = clock
        self._incoming = Incoming(home, lambda: (0, 0))
        self._up: list[str] = []
        self._asked_at = self._pinged_at = 0.0
        for path in folder.state_files(home):
            # A copy that was renamed before CURRENT named it.
            folder.remove_state_file(path)
        # Whoever has lost its disk may find its own name among them, and is refused there.
        others = tuple(member for member in join.members if member.id != me.id)
        net.set_members(others, self._hello, {member.id for member in others})

    def step(self, wait_s: float) -> bool:
        """Do what can be done, waiting at most *wait_s*; tell whether the ledger is there now."""
        for event in self._net.receive(wait_s):
            match event:
                case Up(peer=peer):
                    self._up.append(peer)
                case Down(peer=peer):
                    self._up = [name for name in self._up if name != peer]
                    self._incoming.reset()
                case Got(peer=peer, message=Part() as part) if self._up and peer == self._up[0]:
                    if self._take(part):
                        return True
        now = self._clock()
        if self._up and now - self._asked_at > ASK_AGAIN_S:
            self._ask_for(self._incoming.wanted())
        if now - self._pinged_at > PING_S:
            self._pinged_at = now
            for peer in self._up:
                self._net.send(peer, Ping(place=(0, 0), seq=0, at=0.0))
        return False

    def close(self) -> None:
        """End the connections: who goes on as a member begins with a hello of its own."""
        self._incoming.reset()
        self._net.set_members((), self._hello, ())

    def _ask_for(self, wanted: Iterable[WantCopy]) -> None:
        self._asked_at = self._clock()
        for message in wanted:
            self._net.send(self._up[0], message)

    def _take(self, part: Part) -> bool:
        taken = self._incoming.take(part)
        if not isinstance(taken, Path):
            self._ask_for(taken or ())
            return False
        state = State.open(taken)
        cluster = state.position.cluster_id
        state.close()
        if cluster != self._join.cluster:
            raise Refusal(f"{self._up[0]} sent a ledger of cluster {cluster}", hint="join with a new token")
        adopt(self._home, taken, self._config).close()
        return True

    def _hello(self) -> Hello:
        return Hello(
            version=VERSION,
            cluster=self._join.cluster,
            member=self._me.id,
            incarnation=self._me.incarnation,
            generation=0,
            epoch=0,
            lineage="",
            chain0="",
            last_index=0,
            last_term=0,
            seq=0,
            protocol=PROTOCOL,
            run="joining",
        )
