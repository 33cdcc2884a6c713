"""What the ledger says, read from its state.db and kept until its seq moves: the server's only picture of the desire.

Reads only, on the event loop's thread (each query is short; the fleet is decoded once a revision). While state.db cannot
be read, asking raises QuorumLost, which the API answers with 503.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from slum.errors import QuorumLost
from slum.ledger.reader import ClusterRow, MachineRow, PauseRow, Reader
from slum.model import Fleet, Service, Tenement
from slum.wire import Override

EMPTY = Fleet()
"""Revision 0: what there is before the first apply."""


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """One consistent reading of the ledger's state at *seq*."""

    seq: int
    cluster: ClusterRow
    revision: int = 0
    fleet: Fleet = EMPTY
    digest: str = ""
    at: float = 0.0
    actor: str = ""
    overrides: Mapping[str, tuple[Override, ...]] = field(default_factory=dict)
    """What was asked of instances, by machine; on a drained machine every instance is stopped."""
    drained: frozenset[str] = frozenset()
    """Machines that shall run nothing until they are undrained."""
    machines: Mapping[str, MachineRow] = field(default_factory=dict)
    """The newest incarnation of each machine, by its name in the fleet; destroyed ones are left out."""
    rows: tuple[MachineRow, ...] = ()
    """Every incarnation of every machine."""
    paused: PauseRow | None = None
    """Set after a restore, until somebody resumes: agents are told nothing, and nothing is done to machines."""
    declared: Mapping[str, Tenement] = field(init=False)
    """The machines that the fleet declares, each with the [tenement.X] that it is one of; in the fleet's order."""

    def __post_init__(self) -> None:
        declared = {machine: tenement for tenement in self.fleet.tenements for machine in tenement.machine_names}
        object.__setattr__(self, "declared", declared)

    def tenement_of(self, machine: str) -> Tenement | None:
        """Return the [tenement.X] that *machine* is one of, if the fleet declares it."""
        return self.declared.get(machine)

    def placed(self) -> tuple[tuple[str, Tenement, Service, str], ...]:
        """Return (machine, tenement, service, id) of every instance that the fleet declares."""
        return tuple(
            (machine, tenement, service, instance)
            for machine, tenement in self.declared.items()
            for service in tenement.services
            for instance in service.instances
        )


class View:
    """Reads state.db through *reader*, which is there for what World does not hold (events, older revisions)."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self._world: World | None = None

    def is_readable(self) -> bool:
        try:
            self.world()
        except QuorumLost:
            return False
        return True

    def seq(self) -> int:
        """Return the newest seq that was read, 0 before the first reading."""
        return self._world.seq if self._world else 0

    def world(self) -> World:
        """Return the state of now; the same object while the seq has not moved."""
        while True:
            seq = self.reader.seq()
            old = self._world
            if old is not None and old.seq == seq:
                return old
            world = self._read(seq)
            # Each query reads for itself: only when nothing was committed meanwhile they belong together.
            if self.reader.seq() == seq:
                self._world = world
                return world

    def close(self) -> None:
        self.reader.close()

    def _read(self, seq: int) -> World:
        rows = self.reader.machines()
        newest: dict[str, MachineRow] = {}
        for row in rows:
            if row.machine not in newest or row.incarnation > newest[row.machine].incarnation:
                newest[row.machine] = row
        revision, fleet, digest, at, actor = self.reader.fleet() or (0, EMPTY, "", 0.0, "")
        overrides, drained = with_drained(fleet, self.reader.overrides())
        return World(
            seq=seq,
            cluster=self.reader.cluster(),
            revision=revision,
            fleet=fleet,
            digest=digest,
            at=at,
            actor=actor,
            overrides=overrides,
            drained=drained,
            machines={machine: row for machine, row in newest.items() if row.state != "destroyed"},
            rows=rows,
            paused=self.reader.paused(),
        )


def with_drained(
    fleet: Fleet, overrides: Mapping[str, tuple[Override, ...]]
) -> tuple[dict[str, tuple[Override, ...]], frozenset[str]]:
    """Return *overrides* of instances, with those of drained machines all stopped, and which machines are drained."""
    drained = frozenset(
        machine for machine, asked in overrides.items() if any(not o.service and o.stopped for o in asked)
    )
    found = {machine: tuple(one for one in asked if one.service) for machine, asked in overrides.items()}
    for tenement in fleet.tenements:
        for machine in drained.intersection(tenement.machine_names):
            restarts = {(one.service, one.id): one.restarts for one in found[machine]}
            found[machine] = tuple(
                Override(service=s.name, id=each, stopped=True, restarts=restarts.get((s.name, each), 0))
                for s in tenement.services
                for each in s.instances
            )
    return {machine: asked for machine, asked in found.items() if asked}, drained
