"""Sockets of services, touched without trusting them: open one to connect to, make its folder, count its connections.

A service owns the folder that its socket lies in, so it may put anything there. No path below a trusted base is followed
through a symbolic link, and what is opened must be a socket that belongs to the service. Counting reads /proc/net/unix
(and /proc/net/tcp for ports) once for all that are draining. Must never connect to, or change the mode of, anything
else than the service's own socket.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterable
from pathlib import Path

ACCEPTED, QUEUED = "03", "02"
"""State column of /proc/net/unix: connected, and connecting, that is waiting to be accepted (net/unix/af_unix.c)."""
TCP_ESTABLISHED = "01"
LISTENING = 0x10000


class Planted(OSError):
    """There is something else than the service's own socket at its path."""


def open_socket(path: Path, *, base: Path, uid: int | None) -> int:
    """Return an O_PATH descriptor of the socket at *path*; connect to it by /proc/self/fd/N.

    *base* is a folder that the service cannot replace. FileNotFoundError while nothing is there, Planted when it is not a
    socket, lies behind a link, or (*uid* given) belongs to neither that user nor slum.
    """
    folder = _open_folder(path, base)
    try:
        fd = _open_below(folder, path.name, 0)
    finally:
        os.close(folder)
    status = os.fstat(fd)
    wrong = ""
    if not stat.S_ISSOCK(status.st_mode):
        wrong = "is not a socket"
    elif uid is not None and status.st_uid not in (uid, os.geteuid()):
        wrong = f"belongs to uid {status.st_uid}, not to the service"
    if wrong:
        os.close(fd)
        raise Planted(f"{path} {wrong}")
    return fd


def open_to_router(fd: int, gid: int) -> None:
    """Let the router's group connect to the socket behind O_PATH descriptor *fd*, if its mode does not already."""
    status = os.fstat(fd)
    if (status.st_gid == gid and status.st_mode & stat.S_IWGRP) or status.st_mode & stat.S_IWOTH:
        return
    os.chmod(f"/proc/self/fd/{fd}", 0o666)


def make_run_folder(folder: Path, *, uid: int | None, router_gid: int) -> None:
    """Make the folder of an instance's sockets: as root the service's own, passable by the router's group, else 0700.

    Set-group-id, so that sockets made in it belong to the router's group.
    """
    folder.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
    _make_folder(folder, uid, router_gid, 0o700 if uid is None else 0o2710)


def make_data_folder(folder: Path, *, uid: int | None, gid: int | None) -> None:
    """Make an instance's own folder (0700); the folders above it stay slum's, passable by all as root."""
    folder.parent.mkdir(mode=0o711 if uid is not None else 0o700, parents=True, exist_ok=True)
    if not folder.exists():
        _make_folder(folder, uid, gid if gid is not None else -1, 0o700)


def open_to_traversal(folder: Path, router_gid: int) -> None:
    """Let the router's group pass *folder*, because a socket that the service chose lies in it; it still cannot list it."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fchown(fd, -1, router_gid)
        os.fchmod(fd, 0o2710)
    finally:
        os.close(fd)


def remove_socket(path: Path, base: Path) -> None:
    """Remove the socket at *path*, if one is there and no link below *base* leads to it; anything else stays."""
    try:
        folder = _open_folder(path, base)
    except (FileNotFoundError, NotADirectoryError, Planted):
        return
    try:
        if stat.S_ISSOCK(os.stat(path.name, dir_fd=folder, follow_symlinks=False).st_mode):
            os.unlink(path.name, dir_fd=folder)
    except FileNotFoundError:
        return
    finally:
        os.close(folder)


def remove_folder(folder: Path) -> None:
    """Remove *folder* and what is in it, following no link; absent is fine."""
    if folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder)


def connections(paths: Iterable[str], table: str | None = None) -> dict[str, int]:
    """Return, for each socket path, how many connections are accepted or wait to be; one reading for all.

    *table* is the text of /proc/net/unix; read when None.
    """
    counts = dict.fromkeys(paths, 0)
    text = Path("/proc/net/unix").read_text() if table is None else table
    for line in text.splitlines()[1:]:
        fields = line.split(None, 7)
        if len(fields) == 8 and fields[7] in counts and fields[5] in (ACCEPTED, QUEUED):
            counts[fields[7]] += 1
    return counts


def queued(path: str) -> int:
    """Return how many connections to the socket at *path* wait to be accepted."""
    count = 0
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split(None, 7)
        count += len(fields) == 8 and fields[7] == path and fields[5] == QUEUED
    return count


def port_connections(ports: Iterable[int]) -> dict[int, int]:
    """Return, for each local TCP port, how many connections are established."""
    counts = dict.fromkeys(ports, 0)
    for name in ("/proc/net/tcp", "/proc/net/tcp6"):
        file = Path(name)
        for line in file.read_text().splitlines()[1:] if file.exists() else ():
            fields = line.split(None, 4)
            port = int(fields[1].rpartition(":")[2], 16)
            if port in counts and fields[3] == TCP_ESTABLISHED:
                counts[port] += 1
    return counts


def _open_folder(path: Path, base: Path) -> int:
    """Return an O_PATH descriptor of the folder of *path*, reached from *base* through no link."""
    folder = os.open(base, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in path.relative_to(base).parts[:-1]:
            below = _open_below(folder, part, os.O_DIRECTORY)
            os.close(folder)
            folder = below
    except OSError:
        os.close(folder)
        raise
    return folder


def _open_below(folder: int, name: str, flags: int) -> int:
    fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC | flags, dir_fd=folder)
    if stat.S_ISLNK(os.fstat(fd).st_mode):
        os.close(fd)
        raise Planted(f"{name} is a symbolic link")
    return fd


def _make_folder(folder: Path, uid: int | None, gid: int, mode: int) -> None:
    """Make *folder* or take it over as it is; changes go through a descriptor, so a link in its place is refused."""
    if not os.path.lexists(folder):
        folder.mkdir(mode=0o700)
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if uid is not None:
            os.fchown(fd, uid, gid)
        os.fchmod(fd, mode)
    finally:
        os.close(fd)
