"""Bundles on the node: there, whole and read-only under their digest, or not there at all; and removed when unneeded.

<data>/bundles/SERVICE/DIGEST holds a service's unpacked bundle, DIGEST-BUILD its built copy (builds.py): the same bytes for
two services are two folders, since each belongs to its service's group. Names with a dot are unfinished or on their
way out. Unpacking runs in a child (unpack.py). Fetching is the caller's; a bundle is refused by its digest, whoever sent it.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path

import msgspec

from slum.errors import ConfigError
from slum.model import Service
from slum.node import trees
from slum.paths import Home

UNPACK_TIMEOUT_S = 600.0
INCOMING = ".incoming"
BUILT = ".built"
"""Ends the name of the marker beside a finished build."""

Fetch = Callable[[str, Path], Awaitable[Path]]
"""Given a digest and a folder, brings that blob into the folder and returns where it is."""


def bundle_path(home: Home, service: str, digest: str) -> Path:
    """Return where the unpacked bundle *digest* of *service* lies, if it is there."""
    return home.bundles / service / digest


def build_path(home: Home, service: Service) -> Path:
    """Return where the built copy of *service*'s bundle lies. It is named after all that a build depends on.

    A change of anything else (a limit, a health path) leaves the name, so nothing is built again for it.
    """
    of = (service.build, service.isolation, service.image, service.rootfs, service.env)
    digest = hashlib.sha256(msgspec.json.encode(of)).hexdigest()[:12]
    return home.bundles / service.name / f"{service.bundle or 'empty'}-{digest}"


def build_marker(home: Home, service: Service) -> Path:
    """Return the file whose presence says that the build at ``build_path`` finished; a service cannot write it."""
    path = build_path(home, service)
    return path.with_name(f"{path.name}{BUILT}")


async def ensure(home: Home, service: str, digest: str, gid: int | None, fetch: Fetch) -> Path:
    """Return the folder of the bundle, after fetching, verifying and unpacking it where it is not there yet.

    ConfigError when it is not what its digest says, or unsafe; what *fetch* raises passes. May be repeated and crashed out
    of at any point.
    """
    final = bundle_path(home, service, digest)
    if final.is_dir():
        return final
    await asyncio.to_thread(make_folder, home, service, gid)
    incoming = Path(await asyncio.to_thread(tempfile.mkdtemp, dir=home.bundles / INCOMING))
    try:
        blob = await fetch(digest, incoming)
        await _unpack(blob, digest, final, gid)
    finally:
        await asyncio.to_thread(shutil.rmtree, incoming)
    return final


def make_folder(home: Home, service: str, gid: int | None) -> Path:
    """Make the folder of a service's bundles, passable by its group and written by slum alone, and return it."""
    home.bundles.mkdir(mode=0o711, exist_ok=True)
    (home.bundles / INCOMING).mkdir(mode=0o700, exist_ok=True)
    folder = home.bundles / service
    folder.mkdir(mode=0o700, exist_ok=True)
    if gid is not None:
        os.chown(folder, -1, gid)
    folder.chmod(trees.FOLDER_MODE)
    return folder


def collect(home: Home, needed: Iterable[Service]) -> tuple[Path, ...]:
    """Remove all bundles, builds, build caches and leftovers but those of *needed*; return what was removed.

    Not while one is being fetched, unpacked or built. Blocks: for a thread.
    """
    keep, names = set(), {INCOMING}
    for service in needed:
        names.add(service.name)
        if service.bundle is not None:
            keep.add(bundle_path(home, service.name, service.bundle))
        if service.build is not None:
            keep |= {build_path(home, service), build_marker(home, service)}
    gone = [
        *(path for path in _entries(home.bundles, 2) if path not in keep),
        *(path for folder in (home.bundles, caches(home)) for path in _entries(folder, 1) if path.name not in names),
        *_entries(home.bundles / INCOMING, 1),
    ]
    # A build's marker goes before its folder: at no moment is half a folder said to be finished.
    for path in sorted(gone, key=lambda path: not path.name.endswith(BUILT)):
        trees.remove(path)
    return tuple(gone)


def caches(home: Home) -> Path:
    """Return the folder of the services' build caches."""
    return home.data / "caches"


def _entries(folder: Path, depth: int) -> list[Path]:
    """Return what lies *depth* levels below *folder*, hidden folders left out on the way."""
    if not folder.is_dir() or folder.is_symlink():
        return []
    inside = sorted(folder.iterdir())
    if depth == 1:
        return inside
    return [path for each in inside if not each.name.startswith(".") for path in _entries(each, depth - 1)]


async def _unpack(blob: Path, digest: str, final: Path, gid: int | None) -> None:
    why = await trees.run_child(
        "slum.node.unpack",
        blob,
        digest,
        final,
        -1 if gid is None else gid,
        timeout_s=UNPACK_TIMEOUT_S,
        doing=f"unpacking {final}",
    )
    if why:
        raise ConfigError(f"bundle {digest[:12]} cannot be unpacked: {why}", hint="apply again from an intact source")
