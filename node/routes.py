"""Publishing routes: symlinks below <run>/r that name the socket an instance serves on. No process is told.

<run>/r/SERVICE.sock leads to the service's first instance, <run>/r/SERVICE/ID.sock to each. A link is made under another
name and renamed, so at any moment a request finds the old target or the new one, never nothing. Of an instance that
listens on a port the link leads to the router's own second stop, and NAME.port/ beside it holds one file named after the
port. The folders belong to slum, are readable by the router's group and by nobody else, and unwritable to all but slum.
A target lies where a service can write: whether it is that service's own socket is to be proven before publishing
(sockets.open_socket), and what the router's uid could reach by a link planted later is bounded by its permissions. Never
opens a socket.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from slum.frozen import Frozen
from slum.node.uids import ROUTER_UID
from slum.paths import Home

ENDING = ".sock"
PORT = ".port"
PORTS_SOCKET = "ports.sock"
UNFINISHED = ".new-"
"""Begins with a dot, so that no host name can lead to one."""


class Route(Frozen):
    """One link. *id* is None for the service's own name."""

    service: str
    id: str | None
    target: Path


def ports_socket(home: Home) -> Path:
    """Return where the router listens for requests to services that listen on a port."""
    return home.router / PORTS_SOCKET


class Routes:
    """The routes of one machine; all state is the folder itself."""

    def __init__(self, home: Home) -> None:
        self._folder = home.routes
        self._ports = ports_socket(home)

    def publish(self, service: str, id: str, socket_path: Path, first: bool) -> None:
        """Point ID.SERVICE (and SERVICE when *first*) at *socket_path*. Atomic for each name; may be repeated."""
        if not socket_path.is_absolute():
            raise ValueError(f"the target of a route must be absolute: {socket_path}")
        _make_folder(self._folder)
        _make_folder(self._folder / service)
        _point(self._of(service, id), socket_path)
        if first:
            _point(self._of(service, None), socket_path)

    def publish_port(self, service: str, id: str, port: int, first: bool) -> None:
        """As ``publish``, for an instance that listens on *port* of 127.0.0.1."""
        _make_folder(self._folder)
        _make_folder(self._folder / service)
        for link in (self._of(service, id), *([self._of(service, None)] if first else [])):
            _name_port(link.with_suffix(PORT), port)
            _point(link, self._ports)

    def unpublish(self, service: str, id: str) -> None:
        """Withdraw the route of one instance, and the service's own name when it leads there. May be repeated."""
        named = self._of(service, id)
        target = _target(named)
        if target is not None and _target(self._of(service, None)) == target:
            _withdraw(self._of(service, None))
        _withdraw(named)
        _remove_if_empty(self._folder / service)

    def target(self, service: str, id: str | None = None) -> Path | None:
        """Return where a name leads, None when it is not published."""
        return _target(self._of(service, id))

    def published(self) -> tuple[Route, ...]:
        """Return every route, ordered by service and id, the service's own name first."""
        found = [
            Route(service=service, id=instance, target=target)
            for path, service, instance in self._links()
            if (target := _target(path)) is not None
        ]
        return tuple(sorted(found, key=lambda route: (route.service, route.id or "")))

    def prune(self, wanted: Mapping[str, Collection[str]]) -> tuple[Route, ...]:
        """Withdraw what *wanted* (service -> ids) does not name, and leftovers of a crash; return what was withdrawn.

        A service's own name stays for as long as the service is wanted and the link leads where one of its ids does.
        """
        gone = []
        for route in self.published():
            ids = wanted.get(route.service, ())
            targets = {self.target(route.service, instance) for instance in ids}
            if route.id not in ids if route.id is not None else route.target not in targets:
                _withdraw(self._of(route.service, route.id))
                gone.append(route)
        for folder in self._folders():
            for name in os.listdir(folder):
                if name.startswith(UNFINISHED):
                    (folder / name).unlink(missing_ok=True)
                elif name.endswith(PORT) and _target((folder / name).with_suffix(ENDING)) != self._ports:
                    _forget_port(folder / name)
            if folder != self._folder:
                _remove_if_empty(folder)
        return tuple(gone)

    def _of(self, service: str, id: str | None) -> Path:
        return self._folder / f"{service}{ENDING}" if id is None else self._folder / service / f"{id}{ENDING}"

    def _folders(self) -> list[Path]:
        if not self._folder.is_dir():
            return []
        with os.scandir(self._folder) as entries:
            inside = [Path(e.path) for e in entries if e.is_dir(follow_symlinks=False) and not e.name.endswith(PORT)]
        return [*inside, self._folder]

    def _links(self) -> Iterator[tuple[Path, str, str | None]]:
        for folder in self._folders():
            for name in os.listdir(folder):
                stem = name.removesuffix(ENDING)
                if stem != name and not name.startswith(UNFINISHED):
                    own = folder == self._folder
                    yield folder / name, stem if own else folder.name, None if own else stem


def _make_folder(folder: Path) -> None:
    """Make *folder* as the router needs it: as root readable by the router's group, else private."""
    root = os.geteuid() == 0
    mode = 0o750 if root else 0o700
    try:
        if stat.S_IMODE(folder.stat().st_mode) == mode:
            return
    except FileNotFoundError:
        folder.mkdir(mode=0o700)
    if root:
        os.chown(folder, 0, ROUTER_UID)
    folder.chmod(mode)


def _name_port(folder: Path, port: int) -> None:
    """Make *folder* hold one file, named *port*; for a moment beside the former one."""
    _make_folder(folder)
    (folder / str(port)).touch()
    for name in os.listdir(folder):
        if name != str(port):
            (folder / name).unlink(missing_ok=True)


def _withdraw(link: Path) -> None:
    link.unlink(missing_ok=True)
    _forget_port(link.with_suffix(PORT))


def _forget_port(folder: Path) -> None:
    if folder.is_dir():
        for name in os.listdir(folder):
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()


def _point(link: Path, target: Path) -> None:
    if _target(link) == target:
        return
    unfinished = link.with_name(f"{UNFINISHED}{link.name}")
    unfinished.unlink(missing_ok=True)
    unfinished.symlink_to(target)
    unfinished.rename(link)
    if target.name != PORTS_SOCKET:
        _forget_port(link.with_suffix(PORT))


def _target(link: Path) -> Path | None:
    try:
        return Path(os.readlink(link))
    except FileNotFoundError:
        return None


def _remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except FileNotFoundError:
        return
    except OSError as error:
        if not os.path.isdir(folder) or not os.listdir(folder):
            raise error
