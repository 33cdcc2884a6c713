"""What the runners of every level share: descriptor limits, folders that services must be able to reach.

Reads this process's own limits and the modes of folders; starts nothing.
"""

from __future__ import annotations

import os
import resource
import stat
from pathlib import Path

from slum.node.types import Unavailable
from slum.paths import Home

UMASK = 0o007
"""A service's socket lies in a set-group-id folder of the router's group, which so gets write permission on it; in the
service's own folder the group is the service's, so this is as private as 0o077."""
OPEN_FILES_MAX = 65_536
PROBE_UID = 199_998
"""Whom probes run as when slum is root; the router has 199999, services 200000 and above."""


def rlimits() -> dict[str, tuple[int, int]]:
    """Return a service's limits: no core files, and as many descriptors as allowed, up to OPEN_FILES_MAX."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = OPEN_FILES_MAX if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES_MAX)
    return {"core": (0, 0), "nofile": (files, files)}


def unreachable(home: Home) -> Unavailable | None:
    """Return why services' uids could not reach their folders below *home*: a parent that others may not pass."""
    for folder in (home.data, home.run):
        for parent in (folder, *folder.parents):
            if parent.exists() and not parent.stat().st_mode & stat.S_IXOTH:
                why = f"services run under uids of their own, which cannot pass {parent} on the way to {folder}"
                return Unavailable(
                    why=why, fix=f"chmod o+x {parent}, or choose another place with --data-dir or --run-dir"
                )
    return None


def make_private(home: Home) -> Path:
    """Return *home*'s private run folder, made when slum has not been started yet (`slum doctor`, say)."""
    for folder, mode in ((home.run, 0o711 if os.geteuid() == 0 else 0o700), (home.private, 0o700)):
        if not folder.exists():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.chmod(mode)
    return home.private
