"""What the ledger says, read from its state.db and kept until its seq moves: the server's only picture of the desire.

Reads only, on the event loop's thread (each query is short; the fleet is decoded once a revision). While state.db cannot
be read, asking raises QuorumLost, which the API answers with 503.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from slum.errors import QuorumLost, SlumError
from slum.ledger.reader import ClusterRow, IntentRow, MachineRow, Reader
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
    machines: Mapping[str, MachineRow] = field(default_factory=dict)
    """The newest incarnation of each machine, by its name in the fleet; destroyed ones are left out."""
    rows: tuple[MachineRow, ...] = ()
    """Every incarnation of every machine."""
    intents: tuple[IntentRow, ...] = ()

    def tenement_of(self, machine: str) -> Tenement | None:
        """Return the [tenement.X] that *machine* is one of, if the fleet declares it."""
        return next((t for t in self.fleet.tenements if machine in t.machine_names), None)

    def placed(self) -> tuple[tuple[str, Tenement, Service, str], ...]:
        """Return (machine, tenement, service, id) of every instance that the fleet declares."""
        return tuple(
            (machine, tenement, service, instance)
            for tenement in self.fleet.tenements
            for machine in tenement.machine_names
            for service in tenement.services
            for instance in service.instances
        )


class View:
    """Reads state.db in the ledger's folder; opened when first needed, reopened after any failure."""

    def __init__(self, open_reader: Callable[[], Reader]) -> None:
        self._open = open_reader
        self._reader: Reader | None = None
        self._world: World | None = None

    def reader(self) -> Reader:
        """Return the reader; QuorumLost while there is nothing to read."""
        if self._reader is None:
            try:
                self._reader = self._open()
            except (sqlite3.Error, OSError, SlumError) as error:
                raise _away(error) from error
        return self._reader

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
        reader = self.reader()
        try:
            return self._read(reader)
        except (sqlite3.Error, OSError) as error:
            self.close()
            raise _away(error) from error

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _read(self, reader: Reader) -> World:
        while True:
            seq = reader.seq()
            old = self._world
            if old is not None and old.seq == seq:
                return old
            world = self._read_at(reader, seq, old)
            if reader.seq() == seq:
                self._world = world
                return world

    def _read_at(self, reader: Reader, seq: int, old: World | None) -> World:
        rows = tuple(reader.machines())
        newest: dict[str, MachineRow] = {}
        for row in rows:
            if row.machine not in newest or row.incarnation > newest[row.machine].incarnation:
                newest[row.machine] = row
        world = World(
            seq=seq,
            cluster=reader.cluster(),
            overrides=reader.overrides(),
            rows=rows,
            machines={machine: row for machine, row in newest.items() if row.state != "destroyed"},
            intents=tuple(reader.open_intents()),
        )
        found = reader.fleet()
        if found is None:
            return world
        revision, fleet, digest, at, actor = found
        if old is not None and old.revision == revision:
            fleet = old.fleet
        return replace(world, revision=revision, fleet=fleet, digest=digest, at=at, actor=actor)


def _away(error: Exception) -> QuorumLost:
    return QuorumLost(
        f"the ledger's state cannot be read: {error}", hint="the ledger is restarted by itself; try again"
    )
