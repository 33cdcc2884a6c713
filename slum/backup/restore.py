"""From a backup to a ledger that can start: fetched, checked whole, in a new generation with one member, paused.

Everything is made in a folder beside and moved into place by one rename, so a restore that fails, or is killed, has
changed nothing. The new generation outranks all that the backup knows of: what old members, agents and operators hold of the
old one is fenced. Nothing is started here, and nobody but the store is asked.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import sqlite3
import uuid
from contextlib import closing, suppress
from pathlib import Path

import msgspec

from slum.backup import bundles, mirror, points
from slum.backup.config import Keys, Settings
from slum.backup.points import Point, Tell
from slum.backup.store import Store
from slum.errors import ConfigError, SlumError
from slum.frozen import Frozen
from slum.ledger import folder, journal
from slum.ledger.commands import Member
from slum.ledger.events import EventWriter
from slum.ledger.schema import EpochRow, Position
from slum.ledger.state import State
from slum.ledger.world import Config
from slum.paths import Home

OURS = frozenset(
    (
        *("agent", "boot.json", "bundles", "caches", "front", "logs", "router", "services", "wheels"),
        *("backup", "server.env", "server.toml", "state"),
    )
)
"""What may lie in a data folder that has lost its control plane: services there live on."""

PREFIX = ".restore-"
"""Of the folder in which all is made."""
CONFIG = Config()
Sealed = tuple[bytes, str]
"""(the authority's key in its box, whom it is sealed to beside the recovery key)"""


class Restored(Frozen):
    """What was put in place. *missing* are bundles that the store lacks: the revisions that name them cannot be deployed."""

    cluster: str
    generation: int
    was_generation: int
    seq: int
    chain: str
    at: float
    revision: int
    member: str
    url: str
    missing: tuple[str, ...]
    authority: str
    """"none", "sealed" (to other keys: nobody here can sign), or "opened"."""


def check_empty(home: Home) -> None:
    """ConfigError unless nothing in *home*'s data folder would be in a restored ledger's way."""
    if not home.data.exists():
        return
    if home.state.is_dir() and any(home.state.iterdir()):
        raise ConfigError(
            f"{home.state} is not empty; nothing was changed",
            hint="a restore never replaces a ledger: name another --data-dir, or move that folder away first",
        )
    # What was held before is put aside as state.something.
    foreign = sorted(
        path.name for path in home.data.iterdir() if path.name not in OURS and not path.name.startswith((".", "state."))
    )
    if foreign:
        raise ConfigError(
            f"{home.data} is not empty: {', '.join(foreign[:5])}; nothing was changed",
            hint="name a --data-dir that is empty, or one that has lost its control plane",
        )


def member_here(home: Home) -> str | None:
    """Return the name of the member whose local machine the agent of *home* is, if there is one."""
    with suppress(OSError, msgspec.MsgspecError, TypeError):
        machine = msgspec.json.decode(home.identity.read_bytes(), type=dict[str, object]).get("machine")
        kind, _, name = str(machine).partition(":")
        return name if kind == "local" and name else None
    return None


def restore(
    home: Home,
    store: Store,
    settings: Settings,
    keys: Keys,
    *,
    seq: int | None,
    at: float | None,
    claim: str | None = None,
    member: str | None,
    recovery_key: str | None,
    actor: str,
    now: float,
    tell: Tell,
    config: Config = CONFIG,
) -> Restored:
    """Put the ledger of the point that is asked for into *home*; it may be started then. See points.restored for errors."""
    check_empty(home)
    is_ours = not home.data.exists()
    home.data.mkdir(mode=0o711 if os.geteuid() == 0 else 0o700, parents=True, exist_ok=True)
    _remove_what_is_left(home)
    temporary = home.data / f"{PREFIX}{secrets.token_hex(6)}"
    temporary.mkdir(mode=0o700)
    lock = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    fcntl.flock(lock, fcntl.LOCK_EX)
    work = Home(data=temporary, run=home.run)
    work.state.mkdir(mode=0o700)
    try:
        point = points.restored(store, settings, keys, temporary, seq=seq, at=at, claim=claim, tell=tell)
        _check_machine(home, point)
        name = member or member_here(home) or point.member or "m1"
        path = work.state / folder.FIRST_STATE
        mirror.strip(point.path)
        point.path.rename(path)
        authority, sealed = _authority(work, path, recovery_key)
        was = point.position
        fresh = _begin(
            work.state,
            path,
            point,
            _row(work, name),
            actor=actor,
            now=now,
            url=settings.url,
            config=config,
            sealed=sealed,
        )
        tell("fetching bundles")
        missing = bundles.bring(store, work.blobs, bundles.named(path))
        folder.move_current(work.state, path.name)
        check_empty(home)
        if home.state.exists():
            home.state.rmdir()
        work.state.rename(home.state)
        journal.sync_folder(home.data)
    except OSError as error:
        raise SlumError(
            f"{home.data} cannot be written: {error.strerror}; nothing was changed", hint="look at its disk and rights"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(lock)
        if is_ours:
            # Only an empty one goes: of a restore that failed nothing stays.
            with suppress(OSError):
                home.data.rmdir()
    return Restored(
        cluster=fresh.cluster_id,
        generation=fresh.generation,
        was_generation=was.generation,
        seq=was.seq,
        chain=was.chain,
        at=point.at,
        revision=fresh.revision,
        member=name,
        url=settings.url,
        missing=tuple(sorted(missing)),
        authority=authority,
    )


def _remove_what_is_left(home: Home) -> None:
    """Remove what a restore that was killed has left: nobody holds its lock."""
    for left in home.data.glob(f"{PREFIX}*"):
        lock = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left)
        except BlockingIOError:
            continue
        finally:
            os.close(lock)


def _check_machine(home: Home, point: Point) -> None:
    """ConfigError when the agent in *home* runs services of another cluster."""
    try:
        cached = msgspec.json.decode((home.agent / "desired.json").read_bytes(), type=dict[str, object])
    except (OSError, msgspec.MsgspecError):
        return
    theirs = cached.get("cluster")
    if theirs and theirs != point.position.cluster_id:
        raise ConfigError(
            f"this machine runs services of cluster {str(theirs)[:8]}, the backup is of {point.position.cluster_id[:8]}; "
            "nothing was changed",
            hint="name the backup of that cluster, or an empty --data-dir",
        )


def _begin(
    state_folder: Path,
    path: Path,
    point: Point,
    row: Member,
    *,
    actor: str,
    now: float,
    url: str,
    config: Config,
    sealed: Sealed | None,
) -> Position:
    generation = max(point.position.generation + 1, point.generation + 1, int(now * 1000))

    def make_journal(epoch: EpochRow) -> None:
        identity = folder.journal_id(point.position.cluster_id, epoch)
        journal.create(folder.journal_path(state_folder, epoch), identity, config.epoch_bytes).close()

    def seal(db: sqlite3.Connection, events: EventWriter) -> None:
        if sealed is not None:
            db.execute("UPDATE authority SET box = ?, recipients = ?", sealed)
            events.add(
                "authority_sealed", "cluster:authority", actor=actor, why="restore", after={"sealed_to": [sealed[1]]}
            )

    state = State.open(path, pages=False)
    try:
        return state.begin_generation(
            generation,
            uuid.uuid4().hex[:16],
            actor=actor,
            at=now,
            make=make_journal,
            members=(row,),
            paused=f"restored sequence {point.position.seq} from {url}",
            also=seal,
        )
    finally:
        state.close()


def _row(work: Home, name: str) -> Member:
    """Return the new only member: a new disk is a new incarnation, whatever it is called."""
    recipient = ""
    if work.member_age.exists():
        from slum.pki.authority import recipient_of

        recipient = recipient_of(work.member_age.read_text())
    return Member(id=name, incarnation=uuid.uuid4().hex[:16], recipient=recipient)


def _authority(work: Home, path: Path, recovery_key: str | None) -> tuple[str, Sealed | None]:
    """Return how it stands with the authority, and its key sealed to the new member if the recovery key opens it."""
    with closing(sqlite3.connect(path)) as db:
        rows = db.execute("SELECT certificate, box, recovery FROM authority").fetchall()
    if not rows:
        if recovery_key is not None:
            raise ConfigError("the backup holds no authority to open", hint="leave --recovery-key-file away")
        return "none", None
    if recovery_key is None:
        return "sealed", None
    from slum.pki import authority
    from slum.server import trust

    ((certificate, box, recovery),) = rows
    own = trust.own_recipient(work)
    try:
        sealed = authority.reseal(box, recovery_key, {recovery, own})
    except ConfigError as error:
        raise ConfigError(
            "this recovery key does not open the authority of the fleet in the backup; nothing was changed",
            hint="it is the one that `slum server init` gave when the fleet's control plane was made",
        ) from error
    trust.write(work.authority_certificate, certificate.encode())
    return "opened", (sealed, own)
