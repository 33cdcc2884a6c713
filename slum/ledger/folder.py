"""The ledger's folder on disk: who may open it, which state.db is the current one, which journals belong to it.

    CURRENT                          the name of the state file; moved by rename, so readers follow it and reopen
    state.db (-wal, -shm)            what all applied entries made
    journal-<generation>-<epoch>     one an epoch; the newest and the one before it are kept
    ballast, lock

A state file is never renamed over: a new one gets a new name, then CURRENT moves.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from slum.ledger import journal
from slum.ledger.frames import JournalId
from slum.ledger.refusal import RESTORE, Refusal
from slum.ledger.schema import EpochRow

FIRST_STATE = "state.db"
_STATE_NAME = re.compile(r"state(?:-[0-9]+)?\.db")
_JOURNAL_NAME = re.compile(r"journal-([0-9]+)-([0-9]+)")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make *folder* (0700) and hold its lock; Refusal when another process does."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Refusal(f"{folder}: another ledger process runs on it", hint="stop that one first") from error
        yield
    finally:
        os.close(descriptor)


def create_private(path: Path) -> int:
    """Open a new file at *path* for writing, for us alone, and return its descriptor."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)


def current(folder: Path) -> Path | None:
    """Return the path of the current state file, or None in a folder without a ledger."""
    try:
        name = (folder / "CURRENT").read_text().strip()
    except FileNotFoundError:
        return None
    if not _STATE_NAME.fullmatch(name):
        raise Refusal(f"{folder / 'CURRENT'} names {name[:80]!r}, which is no state file", hint=RESTORE)
    return folder / name


def move_current(folder: Path, name: str) -> None:
    """Make *name*, already durable, the current state file."""
    fresh = folder / "CURRENT.new"
    with fresh.open("w") as file:
        file.write(f"{name}\n")
        file.flush()
        os.fsync(file.fileno())
    fresh.rename(folder / "CURRENT")
    journal.sync_folder(folder)


def state_files(folder: Path) -> tuple[Path, ...]:
    return tuple(sorted(path for path in folder.iterdir() if _STATE_NAME.fullmatch(path.name)))


def journals(folder: Path) -> dict[tuple[int, int], Path]:
    """Return the journals that lie in *folder*, by (generation, epoch)."""
    found = ((path, _JOURNAL_NAME.fullmatch(path.name)) for path in folder.iterdir())
    return {(int(match[1]), int(match[2])): path for path, match in found if match}


def journal_path(folder: Path, epoch: EpochRow) -> Path:
    return folder / f"journal-{epoch.generation}-{epoch.epoch}"


def journal_id(cluster: str, epoch: EpochRow) -> JournalId:
    return JournalId(
        cluster=cluster, generation=epoch.generation, epoch=epoch.epoch, lineage=epoch.lineage, salt=epoch.salt
    )


def remove_old_journals(folder: Path, keep: Iterable[EpochRow]) -> None:
    """Remove journals that are older than all of *keep*."""
    oldest = min((row.generation, row.epoch) for row in keep)
    for key, path in journals(folder).items():
        if key < oldest:
            path.unlink()


def remove_state_file(path: Path) -> None:
    """Remove a state file that nothing names, with SQLite's own files beside it."""
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
