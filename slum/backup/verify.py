"""A restore that is only tried: to a temporary folder, with every check, and what came of it."""

from __future__ import annotations

import sqlite3
import tempfile
import time
from pathlib import Path

from slum.backup import points
from slum.backup.config import Keys, Settings
from slum.backup.manifest import Verified
from slum.backup.store import Store
from slum.errors import SlumError


def verified(store: Store, settings: Settings, keys: Keys) -> Verified:
    """Restore the newest point to a temporary folder, check all of it, and tell; never raises for a bad backup."""
    began = time.monotonic()
    seq = -1
    try:
        with tempfile.TemporaryDirectory(prefix="slum-verify-") as folder:
            seq = points.restored(store, settings, keys, Path(folder)).position.seq
    except (SlumError, OSError, sqlite3.Error) as error:
        return Verified(
            at=time.time(),
            seq=seq,
            ok=False,
            why=str(error),
            hint=getattr(error, "hint", ""),
            took_s=time.monotonic() - began,
        )
    return Verified(at=time.time(), seq=seq, ok=True, took_s=time.monotonic() - began)
