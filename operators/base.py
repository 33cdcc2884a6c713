"""What an operator is: three verbs that find, make and destroy machines, each safe to repeat, and no policy.

The reconciler decides, commits an intent, calls with the operator's deadline, and commits the outcome; so after any
crash the next leader knows what may exist. An operator never retries across calls, places nothing, and raises only
SlumError (OperatorError with the provider's status, code and request id). Optional powers are protocols of their own.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from slum.frozen import Frozen

NO_WAY_HOME = "machines are made only with a join token; see docs/operators.md"


class Join(Frozen):
    """How a new machine joins home. *token* is for that machine alone and is shown by no repr."""

    server: str
    """The URLs of the control plane's members, a blank between two."""
    token: str

    def __repr__(self) -> str:
        return f"Join(server={self.server!r}, token=(hidden))"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [("server", self.server)]


class MachineSpec(Frozen):
    """The machine that is asked for. *key* is the machine's name with its incarnation and unique for ever in *cluster*."""

    cluster: str
    key: str
    machine: str
    """Its name in the fleet: "here", "workers-2"."""
    tenement: str
    join: Join | None = None
    """None for a machine that has another way home (a local one)."""
    ports: tuple[int, ...] = ()
    """TCP ports that shall be reachable from anywhere."""


class Machine(Frozen):
    """A machine that exists and carries our label. *id* is the provider's and never reused for another machine."""

    id: str
    cluster: str
    key: str
    machine: str
    tenement: str
    created_at: float | None = None
    """Unix seconds, where the provider tells."""


class Held(Frozen):
    """A machine that the ledger knows and that is not destroyed. *id* is as its intent foretold it."""

    id: str
    key: str
    machine: str
    tenement: str
    is_made: bool
    """False while what became of making it is not known."""


class Deadlines(Frozen):
    """How long a caller shall wait for each verb; after that its outcome is unknown, not failed."""

    observe_s: float = 30.0
    create_s: float = 300.0
    destroy_s: float = 120.0
    settle_s: float = 0.0
    """How long after its deadline a call may still show in what observe returns: a request under way, a stale list.

    Below zero where a late call to create is refused by what it reaches, once the machine was destroyed there."""


class Operator(Protocol):
    @property
    def deadlines(self) -> Deadlines: ...

    async def observe(self, cluster: str) -> tuple[Machine, ...]:
        """Return the machines that carry *cluster*'s label, whether we remember having made them or not."""
        ...

    async def create(self, spec: MachineSpec) -> Machine:
        """Make sure that the machine of spec.key exists and starts an agent; the same key gives the same machine."""
        ...

    async def destroy(self, machine_id: str) -> None:
        """Make sure that no machine *machine_id* exists; absent is success."""
        ...


@runtime_checkable
class Foretold(Protocol):
    def machine_id(self, spec: MachineSpec) -> str:
        """Return the id that the machine of spec.key has as soon as it exists, so that an intent can name it before."""
        ...


@runtime_checkable
class Checked(Protocol):
    async def problems(self) -> tuple[str, ...]:
        """Ask the provider and return what it would refuse in this operator's definition, "KEY: why", with what is near."""
        ...


class Resize(Protocol):
    async def resize(self, machine_id: str, size: str) -> None: ...


@runtime_checkable
class Power(Protocol):
    async def is_off(self, machine_id: str) -> bool:
        """Tell whether the provider vouches that the machine does not run: what replacing a silent one waits for."""
        ...


class Snapshot(Protocol):
    async def snapshot(self, machine_id: str, name: str) -> str: ...
