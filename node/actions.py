"""The words in which supervise.py is asked and answers: what is wanted, what surrounds it, and the actions. Pure data.

Actions never run themselves: the agent prints, performs and repeats them.
"""

from __future__ import annotations

from slum.frozen import Frozen
from slum.model import Key, Service, Settings
from slum.node.observed import Mark, Target


class Want(Frozen):
    """One desired instance."""

    key: Key
    release: str
    service: Service
    restarts: int = 0
    stopped: bool = False

    @property
    def target(self) -> Target:
        return Target(release=self.release, restarts=self.restarts, stopped=self.stopped)


# --- how far a release is from being startable ------------------------------------------------------------------------


class Missing(Frozen):
    """Its bundle is not here, or it is not built. *why* tells of the last attempt; the next one is at *retry_at*."""

    retry_at: float = 0.0
    why: str = ""


class Working(Frozen):
    """*what* is under way: "fetching", "building", "pre_deploy"."""

    what: str


class Prepared(Frozen):
    """Startable, but for its pre_deploy while *pre_deployed* is false."""

    pre_deployed: bool = True


class Broken(Frozen):
    """Its build or pre_deploy failed; becomes Missing again when the release is asked for anew."""

    why: str


Preparation = Missing | Working | Prepared | Broken
PREPARED = Prepared()


class Around(Frozen):
    """What else bears on one instance."""

    settings: Settings
    wanted: Preparation = PREPARED
    fallback: Preparation = PREPARED
    """Of the last healthy release, where it is another one."""
    waits_for: str = ""
    """The dependency that is not healthy yet."""
    dependents_live: bool = False
    """A removed service that depends on this one still runs."""


# --- actions ----------------------------------------------------------------------------------------------------------


class Prepare(Frozen):
    """Fetch and build *release*."""

    key: Key
    release: str


class PreDeploy(Frozen):
    key: Key
    release: str


class Start(Frozen):
    """Start generation *number* on socket *socket* (its own number, or that of a crashed generation's listener)."""

    key: Key
    number: int
    socket: int
    release: str
    restarts: int
    service: Service


class Publish(Frozen):
    """Point the route at generation *number*."""

    key: Key
    number: int


class Unpublish(Frozen):
    key: Key


class Drain(Frozen):
    key: Key
    number: int


class Terminate(Frozen):
    """Send SIGTERM. *why* is empty unless it is stopped for failing."""

    key: Key
    number: int
    why: str = ""


class Kill(Frozen):
    key: Key
    number: int


class Reap(Frozen):
    """Forget the record of a generation that has ended."""

    key: Key
    number: int


class CloseSocket(Frozen):
    key: Key
    socket: int


class GiveUp(Frozen):
    key: Key
    mark: Mark


class Forget(Frozen):
    """Nothing is left of a removed instance but its data and logs."""

    key: Key


Action = (
    Prepare | PreDeploy | Start | Publish | Unpublish | Drain | Terminate | Kill | Reap | CloseSocket | GiveUp | Forget
)


class Decision(Frozen):
    actions: tuple[Action, ...] = ()
    wake_at: float | None = None
    """Ask again then, if nothing was observed before."""


class Plan(Frozen):
    """The decisions for several instances, ordered by key."""

    actions: tuple[Action, ...] = ()
    wakes: dict[Key, float] = {}
    """When to ask again about which instance."""
