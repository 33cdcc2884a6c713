"""Builds: `build = "..."` runs once, in a writable copy of the bundle, behind the service's own wall with network.

The copy lies where it will be run from, since virtual environments hold their own path: it is built there, sealed there,
and a marker beside it, in a folder that the service cannot write to, says that it is finished. Without the marker it is
no build, whatever is in it: ``prepare`` starts over. Running the build is the caller's; a build never sees secrets or the
instance's data, only its copy and a cache folder of the service's own as HOME.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from slum.model import Service
from slum.node import trees
from slum.node.bundles import build_marker, build_path, bundle_path, caches, make_folder
from slum.node.types import Instance
from slum.paths import Home

SHELL = "/bin/sh"


def built(home: Home, service: Service) -> Path | None:
    """Return the finished build of *service*'s bundle, None when there is none yet."""
    path = build_path(home, service)
    return path if build_marker(home, service).exists() and path.is_dir() else None


def prepare(home: Home, service: Service, uid: int | None, gid: int | None) -> Path:
    """Make a fresh writable copy of the bundle, and the cache folder; return the copy's path. Blocks: for a thread.

    What an interrupted build left is removed first. None for *uid* and *gid* means slum's own user.
    """
    folder, cache = build_path(home, service), cache_folder(home, service)
    build_marker(home, service).unlink(missing_ok=True)
    make_folder(home, service.name, gid)
    if folder.exists():
        trees.in_child("remove", folder)
    owner = (-1 if uid is None else uid, -1 if gid is None else gid)
    if service.bundle is not None:
        trees.in_child("copy", bundle_path(home, service.name, service.bundle), folder, *owner)
    else:
        folder.mkdir(mode=trees.FOLDER_MODE)
        os.chown(folder, *owner)
    caches(home).mkdir(mode=0o711, exist_ok=True)
    if not cache.exists():
        cache.mkdir(mode=0o700)
        os.chown(cache, *owner)
    return folder


def as_build(home: Home, instance: Instance) -> Instance:
    """Return *instance* (a one-off's description) as the build of its service: other command, folders and environment."""
    service = instance.service
    folder, cache = build_path(home, service), cache_folder(home, service)
    secrets = {secret.name for secret in service.secrets}
    env = {name: value for name, value in instance.env.items() if name not in secrets}
    env |= {
        "HOME": str(cache),
        # The cache is another mount, and sealing must not reach into it through hard links.
        "UV_LINK_MODE": "copy",
        # A Python that uv downloads has to be there when the service runs, too.
        "UV_PYTHON_INSTALL_DIR": str(folder / ".python"),
    }
    return msgspec.structs.replace(
        instance,
        command=(SHELL, "-c", service.build or "true"),
        env=env,
        bundle=None,
        data=cache,
        workdir=folder,
        listener=None,
        network=True,
        writable=(folder,),
    )


def finish(home: Home, service: Service, gid: int | None) -> Path:
    """Seal the copy after a build that ended well, have it on disk, mark it finished; return its path. For a thread."""
    folder, marker = build_path(home, service), build_marker(home, service)
    trees.in_child("seal", folder, -1 if gid is None else gid)
    with open(marker, "wb") as out:
        os.fsync(out.fileno())
    trees.sync_folder(marker.parent)
    return folder


def discard(home: Home, service: Service) -> None:
    """Remove what a failed build left; its cache stays. For a thread."""
    build_marker(home, service).unlink(missing_ok=True)
    trees.in_child("remove", build_path(home, service))


def cache_folder(home: Home, service: Service) -> Path:
    """Return the folder that all builds of *service* share as HOME, for what pip and uv download."""
    return caches(home) / service.name
