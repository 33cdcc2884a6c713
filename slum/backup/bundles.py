"""Bundles in the store: sent before the HEAD that names them, brought back by a restore, collected after the retention.

Each is named by its sha256, so writing one twice writes the same bytes; what comes back is hashed before it gets its name.
"""

from __future__ import annotations

import hashlib
import os
import re
import sqlite3
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

from slum.backup.manifest import BLOBS
from slum.backup.store import Store
from slum.ledger import journal, schema

_DIGEST = re.compile(r"[0-9a-f]{64}")


def send(store: Store, folder: Path, digests: Iterable[str]) -> tuple[set[str], set[str]]:
    """Send *digests* from *folder*; return (what the store has now, what is not in the folder)."""
    there, missing = set(), set()
    for digest in sorted(digests):
        path = folder / digest
        if not path.is_file():
            missing.add(digest)
            continue
        store.create_file(f"{BLOBS}/{digest}", path)
        there.add(digest)
    return there, missing


def named(state: Path) -> set[str]:
    """Return the digests of all bundles that the state in the file at *state* names."""
    with closing(sqlite3.connect(state)) as db:
        return schema.blobs_named(db)


def in_store(store: Store) -> set[str]:
    return {listed.name.rpartition("/")[2] for listed in store.list(BLOBS)}


def bring(store: Store, folder: Path, digests: Iterable[str]) -> set[str]:
    """Bring *digests* into *folder*, durably; return those that the store does not have, or has damaged."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    missing = set()
    for digest in sorted(digests):
        if not _DIGEST.fullmatch(digest):
            # It names a file on this machine: nothing that a store says may lead elsewhere.
            missing.add(digest)
            continue
        fresh = folder / f".{digest}.new"
        fresh.unlink(missing_ok=True)
        if not store.get_file(f"{BLOBS}/{digest}", fresh):
            missing.add(digest)
            continue
        with fresh.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        if found != digest:
            fresh.unlink()
            missing.add(digest)
            continue
        os.chmod(fresh, 0o600)
        fresh.rename(folder / digest)
    journal.sync_folder(folder)
    return missing
