"""What the servers of several members say to each other: one WebSocket an errand, msgpack, one message a frame.

The one that wants something dials ``/v1/members/link`` at the other's front and says one Ask; what follows depends on it.
A Feed is answered with Told for ever; Open with the frames of an agent's stream; the rest with one Answer (Fetch with
chunks before it, Store wants them). Unknown fields are ignored, new ones have defaults: neighbouring versions understand each
other. Types only.
"""

from __future__ import annotations

import msgspec

from slum import wire
from slum.api import Problem
from slum.frozen import Sparse
from slum.ledger.commands import Member
from slum.model import Stamp
from slum.operators.base import Machine, MachineSpec

PATH = "/v1/members/link"
CHUNK_BYTES = 1 << 20
Fence = tuple[int, int, int]
"""(generation, epoch, term) of the leader that asks: an older one's word is not obeyed."""


class Ask(Sparse, tag_field="t", tag=str.lower):
    pass


class Feed(Ask):
    """Tell me all that the agents that dialled you say."""


class Open(Ask):
    """Let me speak on a new stream to the agent of *machine*, which dialled you."""

    machine: str
    request: wire.LogsRequest | wire.ExecRequest | wire.RunRequest


class Observe(Ask):
    """Which machine are you, for the local operator of the leader?"""

    cluster: str
    fence: Fence


class Create(Ask):
    spec: MachineSpec
    fence: Fence


class Destroy(Ask):
    machine_id: str
    fence: Fence


class Change(Ask):
    """Change the members; only the leader can."""

    add: Member | None = None
    remove: str | None = None


class Read(Ask):
    """Tell me what only the leader knows: "machines" or "pause", as the API's routes of that name do."""

    what: str


class Fetch(Ask):
    """Give me a bundle: frames of its bytes, then the Answer."""

    digest: str


class Store(Ask):
    """Keep a bundle: frames of its bytes follow, an empty one ends them."""

    digest: str


AnyAsk = Feed | Open | Observe | Create | Destroy | Change | Read | Fetch | Store


class Told(Sparse):
    """What happened among one member's agents since the last Told; the first one of a feed is everything (*whole*)."""

    whole: bool = False
    heard: tuple[tuple[str, bytes], ...] = ()
    """(machine, message), as the agents sent them; in a whole one a hello and a full report for each."""
    lost: tuple[str, ...] = ()
    """Machines whose agent is not connected there any more."""
    at: Stamp = Stamp()
    """How far the ledger was there."""
    behind: tuple[str, ...] = ()
    """Machines whose agent does not act on the config of then yet."""
    restarted: tuple[tuple[str, str, str, int], ...] = ()
    """(machine, service, id, generation) of restarts that were pushed: only a higher generation is the restarted one."""
    troubles: dict[str, str] = {}
    """By machine: why its operator did not do what is wanted; only the leader has any."""


class Answer(Sparse):
    problem: Problem | None = None
    machines: tuple[Machine, ...] = ()
    members: tuple[Member, ...] = ()
    body: bytes = b""
    """JSON, as the API would answer."""


encode = msgspec.msgpack.Encoder().encode
ask = msgspec.msgpack.Decoder(AnyAsk)
told = msgspec.msgpack.Decoder(Told)
answer = msgspec.msgpack.Decoder(Answer)
