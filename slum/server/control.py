"""What every request handler is given: the ledger to write to, the view to read from, the agents, streams and blobs.

One a process. ``world`` is the one way to read the desire; it also hands what is newer to the agents' hub, so that an
answer and a push never disagree for long.
"""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass

from slum import api
from slum.errors import ConfigError, Conflict, QuorumLost, SlumError
from slum.ledger import identity
from slum.ledger.beginning import FIRST_MEMBER
from slum.ledger.commands import AnyCommand, Done, Proposal, Rejected
from slum.operators.base import Machine
from slum.paths import Home
from slum.server import observed
from slum.server.agents import Hub
from slum.server.attempts import Attempts
from slum.server.blobs import Blobs
from slum.server.cluster import REMOVED_HINT, Adding
from slum.server.copies import Copies
from slum.server.decide import Action
from slum.server.elsewhere import Elsewhere
from slum.server.guard import Sessions
from slum.server.link import Link
from slum.server.notes import Notes
from slum.server.pulse import Pulse
from slum.server.relay import Dial, Relay
from slum.server.streams import Streams
from slum.server.view import View, World

PROPOSE_S = 5.0
RETRY_S = 0.2
LASTING_S = 2.0
"""For so long without a majority a member may just have started, or lost its leader."""


@dataclass(frozen=True, slots=True)
class Sight:
    """What an operator was seen to have."""

    machines: tuple[Machine, ...] | None
    """None when the operator did not answer."""
    at: float
    """Monotonic, when it answered."""
    until: float
    """Monotonic, how long it may be used."""
    settled_at: float
    """Unix seconds: a call that ended before shows in it."""


class Control:
    def __init__(self, home: Home, link: Link, view: View, dial: Dial) -> None:
        self.home = home
        identified = identity.load(home.state)
        self.me = identified.id if identified is not None else FIRST_MEMBER
        """Which member this is."""
        self.link = link
        self.view = view
        self.committed = Pulse()
        """Beats when the ledger's seq moved."""
        self.changed = Pulse()
        """Beats when the ledger's seq moved, an agent reported, came or went."""
        self.notes = Notes()
        self.hub = Hub(self.changed, self.notes)
        self.relay = Relay(self.me, link, self.committed, lambda relay: Elsewhere(self.hub, relay.opened), dial)
        self.streams = Streams()
        self.blobs = Blobs(home.blobs)
        self.copies = Copies(self.blobs, self.relay, view, self.committed)
        self.sessions = Sessions()
        self.attempts = Attempts()
        self.adding = Adding(self)
        self.troubles: dict[str, str] = {}
        """By machine: why its operator did not do what is wanted."""
        self.sights: dict[str, Sight] = {}
        """By operator: what it was last seen to have, where the reconcile loop runs."""
        self.foretold: tuple[Action, ...] | None = None
        """While it is paused: what the reconcile loop would do to machines; None where it does not run."""
        self.started_at = time.time()
        self.pid = os.getpid()

    def world(self) -> World:
        """Return the newest committed state; what changed with it is pushed to the agents."""
        world = self.view.world()
        self.hub.take(world)
        return world

    @property
    def known_troubles(self) -> dict[str, str]:
        """By machine: why its operator did not do what is wanted, whichever member leads."""
        return {**self.relay.elsewhere.troubles, **self.troubles}

    def instances(self) -> tuple[api.InstanceView, ...]:
        return observed.instances(self.world(), self.hub.seen, time.monotonic())

    def tenements(self) -> tuple[api.TenementView, ...]:
        return observed.tenements(self.world(), self.hub.seen, self.known_troubles, time.monotonic(), self.hub.started)

    async def commit(
        self, command: AnyCommand, request_id: str, actor: str, deadline_s: float = PROPOSE_S
    ) -> Done | Rejected:
        """Propose *command*; afterwards ``world`` shows its effect. QuorumLost when it cannot be committed now."""
        proposal = Proposal(command=command, request_id=request_id, actor=actor)
        result = await self.link.propose(proposal, deadline_s=deadline_s)
        self.world()
        return result

    async def require_majority(self) -> None:
        """Return unless this member has reached no majority for a while: then QuorumLost, at once and not to be repeated."""
        members = {row.id for row in self.world().cluster.members}
        if len(members) < 2 or self.me not in members:  # one that has left may still finish leaving
            return
        status = await self.link.status()
        if status.majority or status.silence_s < LASTING_S:
            return
        if self.relay.refusing:
            names = ", ".join(sorted(self.relay.refusing))
            raise QuorumLost(
                f"{self.me} was removed from the members, say {names}: nothing can be changed from here",
                hint=REMOVED_HINT,
                lasting=True,
            )
        reached = sum(member.role in ("leader", "follower") for member in status.members)
        raise QuorumLost(
            f"{self.me} reaches {reached} of {len(members)} members: nothing can be changed from here",
            hint="what runs goes on; `slum status --cluster` shows who is missing, docs/cluster.md what to do",
            lasting=True,
        )

    async def watch(self) -> None:
        """Notice every move of the ledger's seq, for ever: push to the agents, wake who waits."""
        seq = 0
        while True:
            try:
                newest = await self.link.wait(seq, deadline_s=30.0)
                if newest > seq:
                    self.world()
            except QuorumLost:
                await asyncio.sleep(RETRY_S)
                continue
            if newest > seq:
                seq = newest
                self.committed.beat()
                self.changed.beat()


def rejection(result: Rejected) -> SlumError:
    """Return the error that stands for *result* where no better words are known."""
    match result.code:
        case "conflict":
            return Conflict(result.why, hint="look at `slum plan` and apply again", changes=result.details)
        case "too_old" | "stale" | "fenced":
            return QuorumLost(result.why, hint="nothing was changed: do it again")
    return ConfigError(result.why, problems=result.details)
