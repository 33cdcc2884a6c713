"""state.db as everyone but the ledger process sees it: read-only queries, thread-bound, following CURRENT.

A reader sees what is committed on this member at the time of each call; a read that must be newest asks for a barrier
first. Never writes, and holds no transaction between calls, so it never keeps the writer's WAL from being reused.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from slum import api
from slum.errors import QuorumLost
from slum.frozen import Frozen
from slum.ledger import events, folder, schema
from slum.ledger.commands import Member, unpack_fleet
from slum.model import Fleet
from slum.wire import Override

EVENTS_MAX = 10_000


class ClusterRow(Frozen):
    """Where the ledger stands."""

    cluster_id: str
    generation: int
    epoch: int
    lineage: str
    term: int
    seq: int
    members: tuple[Member, ...]
    protocol: int
    leader: str
    """The member that leads by what is committed; empty before the first one."""
    revision: int


class MachineRow(Frozen):
    """One incarnation of a machine. *state*: creating, created, failed, destroying, destroyed."""

    machine: str
    tenement: str
    operator: str
    incarnation: int
    state: str
    machine_id: str
    action: str
    deadline_at: float
    arrives_until: float
    """Until when a call to create it, whose answer nobody has heard, may still arrive; 0 when there is none."""


class IntentRow(Frozen):
    """An intent whose outcome is not committed. *leader* is who committed it; another one waits out *deadline_at*."""

    action: str
    kind: str
    machine: str
    tenement: str
    operator: str
    incarnation: int
    machine_id: str
    deadline_at: float
    leader: str


class AuthorityRow(Frozen):
    """The fleet's certificate authority: see commands.SetAuthority."""

    certificate: str
    box: bytes
    recovery: str
    recipients: tuple[str, ...]


class TokenRow(Frozen):
    """A join token; *key_hash*, *serial* and *certificate* are empty until it is used."""

    id: str
    kind: str
    subject: str
    role: str
    expires_at: float
    made_at: float
    made_by: str
    used_at: float
    key_hash: str
    serial: str
    certificate: str


class CertificateRow(Frozen):
    """A certificate that the fleet gave out. *revoked_at* is 0 for one that holds."""

    serial: str
    subject: str
    role: str
    key_hash: str
    not_after: float
    made_at: float
    revoked_at: float


class HostRow(Frozen):
    """The key that a host with SSH is known by; an empty one was forgotten, and the next that it shows is pinned."""

    host: str
    key: str
    at: float
    actor: str


class PauseRow(Frozen):
    """Since when, by whom and why machines and services are left as they are."""

    since: float
    actor: str
    why: str


DesiredRow = tuple[int, Fleet, str, float, str]
"""(revision, fleet, digest, at, actor)"""


class Reader:
    """Reads the ledger in *db_path*'s folder (or in *db_path* itself when it is a folder). Use it in one thread.

    Every method raises QuorumLost while there is no ledger to read.
    """

    def __init__(self, db_path: Path) -> None:
        self._folder = db_path if db_path.is_dir() else db_path.parent
        self._db: sqlite3.Connection | None = None
        self._is_at: tuple[str, int] | None = None
        self._fleet: DesiredRow | None = None

    def close(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db, self._is_at, self._fleet = None, None, None

    def seq(self) -> int:
        """Return how many entries were applied, for ever."""
        return int(self._rows("SELECT seq FROM ledger")[0][0])

    def cluster(self) -> ClusterRow:
        with self._reading() as db:
            at = schema.read_position(db)
        return ClusterRow(
            cluster_id=at.cluster_id,
            generation=at.generation,
            epoch=at.epoch,
            lineage=at.lineage,
            term=at.term,
            seq=at.seq,
            members=at.members,
            protocol=at.protocol,
            leader=at.leader.partition("/")[0],
            revision=at.revision,
        )

    def fleet(self, revision: int | None = None) -> DesiredRow | None:
        """Return (revision, fleet, digest, at, actor) of the newest or the given revision; None when there is none.

        The last fleet that was asked for is kept, so asking again costs one small query.
        """
        where = "ORDER BY revision DESC LIMIT 1" if revision is None else "WHERE revision = ?"
        found = self._rows(
            f"SELECT revision, digest, at, actor FROM revisions {where}", () if revision is None else (revision,)
        )
        if not found:
            return None
        number, digest, at, actor = found[0]
        if self._fleet is not None and (self._fleet[0], self._fleet[2]) == (number, digest):
            return self._fleet
        packed = self._rows("SELECT fleet FROM revisions WHERE revision = ?", (number,))
        if not packed:
            return None
        self._fleet = (number, unpack_fleet(packed[0][0]), digest, at, actor)
        return self._fleet

    def revisions(self) -> tuple[api.Revision, ...]:
        """Return the kept revisions, newest first."""
        rows = self._rows("SELECT revision, at, actor, why, summary, digest FROM revisions ORDER BY revision DESC")
        return tuple(_structs(api.Revision, rows))

    def point(self, *, seq: int | None = None, at: float | None = None) -> tuple[int, float, int | None]:
        """Return (seq, time, revision) of the last event that is not after *seq*, or *at*; of 0 before the first.

        The revision is None when the one that was in force then is not kept any more.
        """
        where, value = ("seq <= ?", seq) if seq is not None else ("at <= ?", at)
        found = self._rows(f"SELECT seq, at FROM events WHERE {where} ORDER BY number DESC LIMIT 1", (value,))
        there, when = found[0] if found else (0, 0.0)
        upto = there if seq is None else seq
        kept = self._rows("SELECT revision FROM revisions WHERE seq <= ? ORDER BY revision DESC LIMIT 1", (upto,))
        if kept:
            return upto, when, kept[0][0]
        first = self._rows("SELECT min(revision) FROM revisions")[0][0]
        return upto, when, 0 if first in (None, 1) else None

    def overrides(self) -> dict[str, tuple[Override, ...]]:
        """Return what was asked of instances, by machine name."""
        by_machine: dict[str, list[Override]] = {}
        for machine, service, instance, stopped, restarts in self._rows("SELECT * FROM overrides ORDER BY 1, 2, 3"):
            override = Override(service=service, id=instance, stopped=bool(stopped), restarts=restarts)
            by_machine.setdefault(machine, []).append(override)
        return {machine: tuple(found) for machine, found in by_machine.items()}

    def machines(self) -> tuple[MachineRow, ...]:
        """Return every incarnation of every machine, destroyed ones too, by name and incarnation."""
        columns = ", ".join(f"machines.{name}" for name in MachineRow.__struct_fields__ if name != "arrives_until")
        rows = self._rows(
            f"SELECT {columns}, coalesce(max(intents.deadline_at), 0) FROM machines LEFT JOIN intents"
            " ON intents.machine = machines.machine AND intents.incarnation = machines.incarnation"
            " AND intents.kind = 'create' AND intents.state IN ('open', 'superseded')"
            " GROUP BY machines.machine, machines.incarnation ORDER BY machines.machine, machines.incarnation"
        )
        return tuple(_structs(MachineRow, rows))

    def paused(self) -> PauseRow | None:
        """Return the pause of the reconcile loop that is in force, None when there is none."""
        rows = self._rows(
            "SELECT kind, at, actor, why FROM events WHERE kind IN (?, ?) AND subject = ? ORDER BY number DESC LIMIT 1",
            (events.PAUSED, events.RESUMED, events.RECONCILE),
        )
        if not rows or rows[0][0] != events.PAUSED:
            return None
        return PauseRow(since=rows[0][1], actor=rows[0][2], why=rows[0][3])

    def open_intents(self) -> tuple[IntentRow, ...]:
        """Return the intents without an outcome, oldest first."""
        columns = ", ".join(IntentRow.__struct_fields__)
        rows = self._rows(f"SELECT {columns} FROM intents WHERE state = 'open' ORDER BY seq, action")
        return tuple(_structs(IntentRow, rows))

    def events(
        self,
        after: int = 0,
        limit: int = 100,
        kind: str | None = None,
        service: str | None = None,
        actor: str | None = None,
        newest: bool = False,
    ) -> tuple[api.Event, ...]:
        """Return at most *limit* events with a number above *after*, oldest first; the last such ones if *newest*.

        *service* finds events of the service and of its instances.
        """
        wanted = {"kind": kind, "service": service, "actor": actor}
        where = "".join(f" AND {name} = ?" for name, value in wanted.items() if value is not None)
        values = [value for value in wanted.values() if value is not None]
        rows = self._rows(
            "SELECT seq, number, at, actor, kind, subject, why, before, after, hash FROM events"
            f" WHERE number > ?{where} ORDER BY number {'DESC' if newest else 'ASC'} LIMIT ?",
            (after, *values, max(0, min(limit, EVENTS_MAX))),
        )
        return tuple(_event(row) for row in (reversed(rows) if newest else rows))

    def verify(self) -> api.Verified:
        """Check the chain of events from the first one to the ledger row."""
        with self._reading() as db:
            db.execute("BEGIN")
            try:
                at = schema.read_position(db)
                first_bad, why = events.first_bad(db, at.cluster_id, at.events, at.events_hash)
            finally:
                db.execute("ROLLBACK")
        return api.Verified(ok=first_bad is None, events=at.events, seq=at.seq, first_bad=first_bad, why=why)

    def authority(self) -> AuthorityRow | None:
        rows = self._rows("SELECT certificate, box, recovery, recipients FROM authority")
        for certificate, box, recovery, recipients in rows:
            return AuthorityRow(
                certificate=certificate, box=box, recovery=recovery, recipients=tuple(recipients.split())
            )
        return None

    def hosts(self) -> tuple[HostRow, ...]:
        """Return what the ledger knows of hosts' keys, by host; nothing before protocol 2."""
        if not self._has_hosts():
            return ()
        return tuple(_structs(HostRow, self._rows("SELECT host, key, at, actor FROM hosts ORDER BY host")))

    def host(self, host: str) -> HostRow | None:
        if not self._has_hosts():
            return None
        rows = self._rows("SELECT host, key, at, actor FROM hosts WHERE host = ?", (host,))
        return next(_structs(HostRow, rows), None)

    def _has_hosts(self) -> bool:
        return bool(self._rows("SELECT protocol FROM ledger")[0][0] >= schema.HOSTS_PROTOCOL)

    def tokens(self) -> tuple[TokenRow, ...]:
        """Return the kept tokens, oldest first."""
        return tuple(_structs(TokenRow, self._rows(f"SELECT {_TOKEN} FROM tokens ORDER BY made_at, id")))

    def token(self, hash: bytes) -> TokenRow | None:
        """Return the token whose secret has this sha256."""
        return next(_structs(TokenRow, self._rows(f"SELECT {_TOKEN} FROM tokens WHERE hash = ?", (hash,))), None)

    def certificates(self) -> tuple[CertificateRow, ...]:
        """Return every certificate on record, revoked ones too, by subject and age."""
        columns = ", ".join(CertificateRow.__struct_fields__)
        rows = self._rows(f"SELECT {columns} FROM certificates ORDER BY subject, made_at, serial")
        return tuple(_structs(CertificateRow, rows))

    def certificate(self, serial: str) -> CertificateRow | None:
        columns = ", ".join(CertificateRow.__struct_fields__)
        return next(
            _structs(CertificateRow, self._rows(f"SELECT {columns} FROM certificates WHERE serial = ?", (serial,))),
            None,
        )

    def revoked(self) -> frozenset[str]:
        """Return the serials of all revoked certificates on record."""
        return frozenset(row[0] for row in self._rows("SELECT serial FROM certificates WHERE revoked_at > 0"))

    def blobs_named(self) -> set[str]:
        """Return the digests of the bundles that any kept revision names."""
        with self._reading() as db:
            return schema.blobs_named(db)

    def _rows(self, query: str, values: Iterable[Any] = ()) -> list[Any]:
        with self._reading() as db:
            return db.execute(query, tuple(values)).fetchall()

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """Yield a connection to the state file that CURRENT names now; errors of SQLite become QuorumLost."""
        try:
            yield self._connection()
        except sqlite3.Error as error:
            self.close()
            raise QuorumLost(
                f"the ledger's state in {self._folder} cannot be read: {error}",
                hint="the ledger process says more in its log",
            ) from error

    def _connection(self) -> sqlite3.Connection:
        path = folder.current(self._folder)
        if path is None:
            raise QuorumLost(
                f"there is no ledger in {self._folder} yet", hint="the ledger process makes it when it starts"
            )
        try:
            is_at = (path.name, path.stat().st_ino)
        except FileNotFoundError as error:
            raise QuorumLost(f"{path} is gone", hint="the ledger process says more in its log") from error
        if self._db is None or is_at != self._is_at:
            self.close()
            self._db = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, isolation_level=None, timeout=5.0)
            self._is_at = is_at
        return self._db


_TOKEN = ", ".join(TokenRow.__struct_fields__)


def _structs(kind: type[Any], rows: list[Any]) -> Iterator[Any]:
    return (kind(**dict(zip(kind.__struct_fields__, row, strict=True))) for row in rows)


def _event(row: tuple[Any, ...]) -> api.Event:
    seq, number, at, actor, kind, subject, why, before, after, hashed = row
    return api.Event(
        seq=seq,
        number=number,
        at=at,
        actor=actor,
        kind=kind,
        subject=subject,
        why=why,
        before=msgspec.json.decode(before) if before is not None else None,
        after=msgspec.json.decode(after) if after is not None else None,
        hash=hashed,
    )
