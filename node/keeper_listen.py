"""Listening sockets that outlive the programs behind them: bound here, inherited by children, found again by the next keeper.

A unix socket is bound under a temporary name and renamed, so that its path always leads to a listening socket; the
kernel goes on showing the temporary name (``bound``) in /proc/net/unix. Nothing here accepts a connection.

The folder of a socket may belong to a service that puts links there while we bind. So with ``base``, a folder that it
cannot replace, no folder below that is entered through a link, and nothing is changed but the socket itself.
"""

from __future__ import annotations

import errno
import os
import socket
import stat

from slum.node import keeper_proc as proc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

BACKLOG = 1024


class Listener:
    """One listening socket. *record* is its line of the table on disk: the request, and ``inode`` and ``bound``.

    *sock* is None while only a living child holds the socket and we may not take a copy of it.
    """

    __slots__ = ("record", "sock")

    def __init__(self, record: dict[str, Any], sock: socket.socket | None) -> None:
        self.record = record
        self.sock = sock

    @property
    def name(self) -> str:
        return str(self.record["name"])

    def address(self) -> dict[str, str]:
        return {kind: self.record[kind] for kind in ("path", "tcp") if self.record.get(kind) is not None}

    def in_place(self, *, unlink: bool = False) -> bool:
        """Return whether its path leads to this socket (a TCP address always does); then with *unlink* remove the path."""
        if self.record.get("path") is None:
            return True
        name = os.path.basename(self.record["path"])
        try:
            folder = _open_folder(self.record)
        except (FileNotFoundError, NotADirectoryError):
            return False
        try:
            found = os.lstat(name, dir_fd=folder)
            here = bool(self.record["place"] == [found.st_dev, found.st_ino])
            if here and unlink:
                os.unlink(name, dir_fd=folder)
        except FileNotFoundError:
            return False
        finally:
            os.close(folder)
        return here

    def ready(self) -> socket.socket:
        """Return the socket, bound anew when it is nobody's or only a stranger's."""
        if self.sock is None:
            self.sock = bind(self.record)
        return self.sock

    def close(self, *, unlink: bool) -> None:
        if unlink and self.record.get("path") is not None:
            self.in_place(unlink=True)
        if self.sock is not None:
            self.sock.close()
            self.sock = None


def check_listen(raw: dict[str, Any]) -> dict[str, Any]:
    """Return the record of a ``listen`` request; ValueError says what is wrong with it. Pure."""
    record = {field: raw.get(field) for field in ("name", "path", "base", "tcp", "uid", "gid")}
    record |= {"backlog": raw.get("backlog", BACKLOG), "mode": raw.get("mode", 0o600)}
    if (record["path"] is None) == (record["tcp"] is None):
        raise ValueError("listen takes either path or tcp")
    for field in ("path", "base", "tcp"):
        if not isinstance(record[field], str | None):
            raise ValueError(f"{field} is no text")
    for field in ("uid", "gid", "backlog", "mode"):
        number = record[field]
        if number is None and field in ("uid", "gid"):
            continue
        if type(number) is not int or not 0 <= number < 1 << 31:
            raise ValueError(f"{field} is not a number")
    if record["path"] is not None and (not record["path"].startswith("/") or "\0" in record["path"]):
        raise ValueError("path is not absolute")
    if record["base"] is not None and not _is_below(record["path"], record["base"]):
        raise ValueError("path does not lie below base")
    if record["tcp"] is not None:
        split_address(record["tcp"])
    return record


def split_address(address: str) -> tuple[socket.AddressFamily, str, int]:
    """Return family, host and port of ``127.0.0.1:80`` or ``[::1]:80``; ValueError unless it is one of these."""
    host, colon, port = address.rpartition(":")
    family = socket.AF_INET6 if host.startswith("[") and host.endswith("]") else socket.AF_INET
    host = host.strip("[]") if family == socket.AF_INET6 else host
    try:
        socket.inet_pton(family, host)
    except OSError:
        raise ValueError(f"tcp {address!r} is not ADDRESS:PORT with a numeric address ([...] for IPv6)") from None
    if not colon or not port.isdecimal() or len(port) > 5 or int(port) > 65535:
        raise ValueError(f"tcp {address!r} has no port from 0 to 65535")
    return family, host, int(port)


def bind(record: dict[str, Any]) -> socket.socket:
    """Return a socket listening as *record* says, and set its ``inode``, ``bound`` and ``place``; OSError when refused."""
    sock = _bind_unix(record) if record["path"] is not None else _bind_tcp(record)
    record["inode"] = os.fstat(sock.fileno()).st_ino
    return sock


def _bind_unix(record: dict[str, Any]) -> socket.socket:
    folder, name = _open_folder(record), os.path.basename(record["path"])
    temporary = f".{os.urandom(4).hex()}"
    bound = f"/proc/self/fd/{folder}/{temporary}"
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o777 & ~record["mode"])  # born with its mode: a chmod by name could be led elsewhere
    try:
        sock.bind(bound)
        try:
            place = _give(record, folder, temporary)
            sock.listen(record["backlog"])
            os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
        except OSError:
            _unlink(temporary, folder)
            raise
    except OSError:
        sock.close()
        raise
    finally:
        os.umask(mask)
        os.close(folder)
    record["bound"] = bound
    record["place"] = place
    return sock


def _open_folder(record: dict[str, Any]) -> int:
    """Return a descriptor of the folder of its path; OSError when that is missing or, below ``base``, behind a link."""
    folder = os.path.dirname(record["path"])
    base = record.get("base") or folder
    fd = os.open(base, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in folder[len(base) :].split("/"):
            if part:
                below = os.open(part, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
                os.close(fd)
                fd = below
    except OSError:
        os.close(fd)
        raise
    return fd


def _is_below(path: str | None, base: str) -> bool:
    return path is not None and path.startswith(f"{base}/") and ".." not in path.split("/")


def _give(record: dict[str, Any], folder: int, name: str) -> list[int]:
    """Give the new socket *name* its owner and return its device and inode; OSError when something else is there."""
    fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    try:
        made = os.fstat(fd)
        if not stat.S_ISSOCK(made.st_mode) or made.st_uid != os.geteuid():
            raise OSError(errno.EEXIST, "something was put in the place of the new socket", record["path"])
        if record["uid"] is not None or record["gid"] is not None:
            owner = [-1 if record[field] is None else record[field] for field in ("uid", "gid")]
            os.chown(f"/proc/self/fd/{fd}", owner[0], owner[1])
    finally:
        os.close(fd)
    return [made.st_dev, made.st_ino]


def _unlink(name: str, folder: int) -> None:
    try:
        os.unlink(name, dir_fd=folder)
    except (FileNotFoundError, IsADirectoryError):
        return


def _bind_tcp(record: dict[str, Any]) -> socket.socket:
    family, host, port = split_address(record["tcp"])
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((host, port))
        sock.listen(record["backlog"])
    except OSError:
        sock.close()
        raise
    record["bound"] = record["tcp"]
    if port == 0:
        shown = f"[{host}]" if family == socket.AF_INET6 else host
        record["bound"] = f"{shown}:{sock.getsockname()[1]}"
    return sock


def holders(pids: Iterable[int]) -> dict[int, tuple[int, int]]:
    """Return {socket inode: (pid, descriptor)} of all that *pids* and their descendants hold."""
    found = {}
    for root in pids:
        for pid in proc.tree(root):
            found.update({inode: (pid, fd) for inode, fd in proc.sockets_of(pid).items()})
    return found


def take_back(
    record: dict[str, Any], held: dict[int, tuple[int, int]], inherited: int | None = None
) -> tuple[Listener, str | None]:
    """Return the Listener of *record* as the former keeper left it, and why it is not the same socket, if it is not.

    It is looked for in *held* (see holders) unless its descriptor was *inherited*. ValueError or KeyError when *record* is none.
    """
    check_listen(record)
    if inherited is not None:
        return Listener(record, socket.socket(fileno=inherited)), None
    holder = held.get(record["inode"])
    if holder is None:
        return _cold(record)
    try:
        sock = socket.socket(fileno=proc.take_fd(*holder))
    except OSError as error:
        return Listener(record, None), f"pid {holder[0]} holds it and may not be asked for it: {error.strerror}"
    same = os.fstat(sock.fileno()).st_ino == record["inode"]
    if same and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return Listener(record, sock), None
    sock.close()
    return _cold(record)


def _cold(record: dict[str, Any]) -> tuple[Listener, str | None]:
    try:
        return Listener(record, bind(record)), "nobody held it: bound anew"
    except OSError as error:
        return Listener(record, None), f"nobody held it, and it cannot be bound: {error.strerror or error}"
