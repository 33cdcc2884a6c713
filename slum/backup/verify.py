"""A restore that is only tried: to a temporary folder, with every check, and what came of it."""

from __future__ import annotations

import sqlite3
import tempfile
import time
from pathlib import Path

from slum.backup import bundles, points
from slum.backup.config import Keys, Settings
from slum.backup.manifest import Verified
from slum.backup.store import Store
from slum.errors import SlumError

PREFIX = "slum-verify-"


def verified(store: Store, settings: Settings, keys: Keys, folder: Path | None = None) -> Verified:
    """Restore the newest point below *folder* (default: that of temporary files), check all of it, and tell.

    Bundles are looked for, not fetched; *why* tells of those that are not there, which does not make the state any worse.
    Never raises for a bad backup. Nothing stays behind; what a killed one left begins with PREFIX.
    """
    began = time.monotonic()
    seq, why = -1, ""
    try:
        with tempfile.TemporaryDirectory(prefix=PREFIX, dir=folder) as place:
            point = points.restored(store, settings, keys, Path(place))
            seq = point.position.seq
            missing = bundles.named(point.path) - bundles.in_store(store)
            if missing:
                why = f"bundles not in the store: {len(missing)}; services that need one cannot be deployed anew"
    except (SlumError, OSError, sqlite3.Error) as error:
        return Verified(
            at=time.time(),
            seq=seq,
            ok=False,
            why=str(error),
            hint=getattr(error, "hint", ""),
            took_s=time.monotonic() - began,
        )
    return Verified(at=time.time(), seq=seq, ok=True, why=why, took_s=time.monotonic() - began)
