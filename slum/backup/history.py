"""The fleet as it was at a point: from the ledger of this machine where it keeps enough, else from the backup.

The ledger keeps its last revisions whole and every event for ever, so what is newest costs no download: between two events
of a kind nothing of that kind changed. Reads only.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from slum.backup import points
from slum.backup.config import Keys, Settings
from slum.backup.points import Tell
from slum.backup.store import Store
from slum.errors import ConfigError, QuorumLost, SlumError, Unreachable
from slum.frozen import Frozen
from slum.ledger import folder
from slum.ledger.reader import MachineRow, Reader
from slum.model import Fleet
from slum.paths import Home

Reach = Callable[[], tuple[Settings, Keys, Store]]


class Then(Frozen):
    """The fleet at *seq*. *stopped* are instances that were stopped on purpose, "machine/service/id"."""

    seq: int
    at: float
    revision: int
    fleet: Fleet
    digest: str
    actor: str
    stopped: tuple[str, ...]
    machines: tuple[MachineRow, ...]
    source: str
    """"ledger" or "backup"."""


class History:
    """Answers for points; what it fetches is in a temporary folder until close()."""

    def __init__(self, home: Home, reach: Reach, *, tell: Tell, backup_only: bool) -> None:
        self._home = home
        self._reach = reach
        self._tell = tell
        self._backup_only = backup_only
        self._folder: Path | None = None

    def close(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def at(self, *, seq: int | None = None, at: float | None = None) -> Then:
        """Return the fleet at *seq*, or as of *at*; ConfigError when neither ledger nor backup holds the point."""
        if self._backup_only or folder.current(self._home.state) is None:
            return self._from_backup(seq, at)
        with closing(Reader(self._home.state)) as reader:
            now = reader.seq()
            if seq is not None and seq > now:
                raise ConfigError(f"the ledger has come to sequence {now}, {seq} is still to come")
            found = _unchanged(reader, now, seq, at)
            if found is not None:
                return found
            try:
                return self._from_backup(seq, at)
            except (ConfigError, Unreachable) as error:
                found = _by_revision(reader, seq, at)
                if found is None:
                    raise
                self._tell(f"{error.message}; told by the ledger's own records, without machines")
                return found

    def _from_backup(self, seq: int | None, at: float | None) -> Then:
        settings, keys, store = self._reach()
        self._folder = self._folder or Path(tempfile.mkdtemp(prefix="slum-at-"))
        place = Path(tempfile.mkdtemp(dir=self._folder))
        point = points.restored(store, settings, keys, place, seq=seq, at=at, tell=self._tell)
        state = place / folder.FIRST_STATE
        point.path.rename(state)
        folder.move_current(place, state.name)
        with closing(Reader(place)) as reader:
            return _read(reader, point.position.seq, point.at, "backup")


def _unchanged(reader: Reader, now: int, seq: int | None, at: float | None) -> Then | None:
    """Return the point if nothing at all has changed since; else None."""
    newest, when, _ = reader.point(seq=now)
    there, _, _ = reader.point(seq=seq, at=at)
    found = reader.events(limit=1, newest=True)
    if there < (found[-1].seq if found else 0):
        return None
    return _read(reader, newest if seq is None else seq, when, "ledger")


def _by_revision(reader: Reader, seq: int | None, at: float | None) -> Then | None:
    """Return what the ledger's own records tell of the point: the fleet and what was stopped, but no machines."""
    there, when, revision = reader.point(seq=seq, at=at)
    if revision is None:
        return None
    found = reader.fleet(revision) if revision else None
    number, fleet, digest, _, actor = found or (0, Fleet(), "", 0.0, "")
    seats = {
        f"{machine}/{service.name}/{instance}"
        for tenement in fleet.tenements
        for machine in tenement.machine_names
        for service in tenement.services
        for instance in service.instances
    }
    stopped: dict[str, bool] = {}
    after = 0
    while page := reader.events(after=after, limit=1000, kind="override_set"):
        for event in page:
            if event.seq <= there and isinstance(event.after, dict):
                stopped[event.subject.partition(":")[2]] = bool(event.after.get("stopped"))
        after = page[-1].number
    return Then(
        seq=there,
        at=when,
        revision=number,
        fleet=fleet,
        digest=digest,
        actor=actor,
        stopped=tuple(sorted(seat for seat, is_stopped in stopped.items() if is_stopped and seat in seats)),
        machines=(),
        source="ledger",
    )


def _read(reader: Reader, seq: int, at: float, source: str) -> Then:
    try:
        revision, fleet, digest, _, actor = reader.fleet() or (0, Fleet(), "", 0.0, "")
        stopped = tuple(
            "/".join(part for part in (machine, one.service, one.id) if part)
            for machine, asked in sorted(reader.overrides().items())
            for one in asked
            if one.stopped
        )
        machines = tuple(row for row in reader.machines() if row.state != "destroyed")
    except QuorumLost as error:
        raise SlumError(error.message, hint=error.hint) from error
    return Then(
        seq=seq,
        at=at,
        revision=revision,
        fleet=fleet,
        digest=digest,
        actor=actor,
        stopped=stopped,
        machines=machines,
        source=source,
    )
