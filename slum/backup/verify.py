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

PREFIX = "slum-verify-"


def verified(store: Store, settings: Settings, keys: Keys, folder: Path | None = None) -> Verified:
    """Restore the newest point below *folder* (default: that of temporary files), check all of it, and tell.

    Never raises for a bad backup. Nothing stays behind; what a killed one left begins with PREFIX.
    """
    began = time.monotonic()
    seq = -1
    try:
        with tempfile.TemporaryDirectory(prefix=PREFIX, dir=folder) as place:
            seq = points.restored(store, settings, keys, Path(place)).position.seq
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
