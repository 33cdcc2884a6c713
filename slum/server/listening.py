"""A listening unix socket that nobody can reach before it is ready, nor anybody who may not."""

from __future__ import annotations

import os
import socket
from pathlib import Path


def listen_at(path: Path, backlog: int, *, gid: int | None = None) -> socket.socket:
    """Return a socket listening at *path*, 0600, or 0660 for group *gid*; it takes the name only once it listens."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        bound.bind(str(temporary))
    finally:
        os.umask(before)
    if gid is not None:
        os.chown(temporary, -1, gid)
        temporary.chmod(0o660)
    bound.listen(backlog)
    temporary.rename(path)
    return bound
