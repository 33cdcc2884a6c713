"""Find out, by doing it, which cgroup controllers limit services on this machine.

cgroup v1 (each controller in a hierarchy of its own) and v2 (one for all) are tried alike, together on hybrid machines:
make a group, set limits, let a process enter, read, remove. Inputs: /proc/self/mountinfo, /proc/self/cgroup and the cgroup
file systems. In v2 a group either has processes or hands controllers on, so in a container, whose root group has
processes, these first move into a leaf. Must never move processes of a group that we are not in ourselves, nor leave
anything behind but our base folders.
"""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from slum.node.limits.groups import CPU, CPUACCT, MEMORY, PIDS, Limits, Place, settings, write
from slum.paths import Home

WANTED = (MEMORY, CPU, PIDS)
LEAF = "keeper"
"""The unit's DelegateSubgroup, where systemd starts slum's own processes."""
CONTAINER_LEAF = "init"
"""Where the processes of a container's root group go, as Docker in Docker does it."""
MOVE_ROUNDS_MAX = 5
"""Processes may fork while they are being moved."""
TRIAL_TIMEOUT_S = 5.0
FIX = "run as root with cgroups writable, or in a systemd unit as docs/isolation.md shows"


@dataclass(frozen=True, slots=True, kw_only=True)
class Hierarchy:
    """One mounted cgroup file system: all of v2, or the v1 *controllers* that are mounted together."""

    mount: Path
    unified: bool
    own: str
    """This process's group in it, as an absolute path below *mount*."""
    controllers: frozenset[str] = frozenset()


def detect(home: Home, *, name: str | None = None) -> Limits:
    """Return what works here, for the slum of *home*; leaves its base folders (called *name*), which later calls find again."""
    places: list[Place] = []
    failures: list[str] = []
    name = name or base_name(home)
    hierarchies = read_hierarchies(Path("/proc/self/mountinfo").read_text(), Path("/proc/self/cgroup").read_text())
    for hierarchy in sorted(hierarchies, key=lambda h: (not h.unified, h.mount)):
        if hierarchy.controllers == {CPUACCT} and any(place.unified for place in places):
            continue  # every v2 group measures CPU time by itself
        try:
            places.append(try_unified(hierarchy, name) if hierarchy.unified else try_v1(hierarchy, name))
        except (OSError, subprocess.SubprocessError) as error:
            denied = isinstance(error, PermissionError)
            failures.append("this user may not make cgroups" if denied else f"{hierarchy.mount}: {error}")
    works = {controller for place in places for controller in place.controllers}
    lacking = [controller for controller in WANTED if controller not in works]
    why = f"no {', '.join(lacking)} controller can be used" if lacking else ""
    if not hierarchies:
        why = "no cgroup file system is mounted"
    return Limits(tuple(places), why="; ".join((why, *dict.fromkeys(failures))) if why else "", fix=FIX if why else "")


def base_name(home: Home) -> str:
    """Return what our folder is called: "slum" for root's usual run folder, else with a mark of its own."""
    if str(home.run) == "/run/slum":
        return "slum"
    return f"slum-{hashlib.sha256(os.fsencode(home.run)).hexdigest()[:8]}"


def read_hierarchies(mountinfo: str, cgroup: str) -> tuple[Hierarchy, ...]:
    """Return the mounted hierarchies; the first mount of each counts. Pure.

    mountinfo: ``36 35 0:31 /root /mount/point options ... - type source superoptions`` (proc(5)); cgroup:
    ``4:memory:/own/path``, ``0::/own/path`` for v2. A mount that shows only a part of a hierarchy (its root is not "/")
    has our own path relative to that part.
    """
    own: dict[str, str] = {}
    for line in cgroup.splitlines():
        _, named, path = line.split(":", 2)
        own.update(dict.fromkeys(named.split(","), path))
    found: dict[frozenset[str], Hierarchy] = {}
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        root, mount = before.split(" ")[3:5]
        names = frozenset(options.split(",")) & {*WANTED, CPUACCT} if kind == "cgroup" else frozenset()
        if kind != "cgroup2" and not names:
            continue
        path = own.get(min(names, default=""), "/")
        if root != "/" and (path + "/").startswith(root + "/"):
            path = path[len(root) :] or "/"
        found.setdefault(names, Hierarchy(mount=Path(mount), unified=kind == "cgroup2", own=path, controllers=names))
    return tuple(found.values())


def try_v1(hierarchy: Hierarchy, name: str) -> Place:
    """Prove a v1 hierarchy: below its root for root, else below our own group (which somebody may have given us)."""
    parent = hierarchy.mount if os.geteuid() == 0 else hierarchy.mount / hierarchy.own.lstrip("/")
    place = Place(base=parent / name, unified=False, controllers=hierarchy.controllers)
    prove(place)
    return place


def try_unified(hierarchy: Hierarchy, name: str) -> Place:
    """Prove v2 with as many controllers as it gives us. Without any, it still kills whole groups at once."""
    own = hierarchy.mount / hierarchy.own.lstrip("/")
    handed = subtree_of(own, hierarchy.mount)
    if handed is None and os.geteuid() != 0:
        raise PermissionError(f"{own} was not handed to this user")
    parent = handed or hierarchy.mount
    there = set((parent / "cgroup.controllers").read_text().split())
    for controller in (controller for controller in WANTED if controller in there):
        with suppress(OSError):
            enable(parent, controller, leaf=parent / CONTAINER_LEAF if parent == own else None)
    base = parent / name
    base.mkdir(exist_ok=True)
    given = set((base / "cgroup.controllers").read_text().split()) & set(WANTED)
    working = set()
    for controller in sorted(given):
        with suppress(OSError):
            write(base / "cgroup.subtree_control", f"+{controller}")
            working.add(controller)
    place = Place(base=base, unified=True, controllers=frozenset(working))
    prove(place)
    return place


def subtree_of(own: Path, mount: Path) -> Path | None:
    """Return the group that was handed to us whole, or None.

    By systemd with Delegate=yes and DelegateSubgroup=keeper: without the latter a unit whose group hands controllers on cannot
    be started again while services live in it. Without root, the topmost group that our user owns, which is where the
    user's own systemd begins.
    """
    if own.name == LEAF and marked(own.parent):
        return own.parent
    if os.geteuid() == 0:
        return None
    above = [folder for folder in (own, *own.parents) if folder.is_relative_to(mount)]
    owned = [folder for folder in above if folder.stat().st_uid == os.geteuid()]
    return owned[-1] if owned else None


def marked(folder: Path) -> bool:
    for attribute in ("user.delegate", "trusted.delegate"):
        with suppress(OSError):
            return os.getxattr(folder, attribute) == b"1"
    return False


def enable(parent: Path, controller: str, *, leaf: Path | None) -> None:
    """Hand *controller* on to the groups below *parent*; processes that stand in the way move to *leaf*, if one is given.

    The true root of the machine is exempt from that rule; a container's root and a unit's group are not.
    """
    file = parent / "cgroup.subtree_control"
    for last in (False,) * (MOVE_ROUNDS_MAX - 1) + (True,):
        if controller in file.read_text().split():
            return
        try:
            write(file, f"+{controller}")
        except OSError as error:
            if error.errno != errno.EBUSY or leaf is None or last:
                raise
            leaf.mkdir(exist_ok=True)
            for pid in (parent / "cgroup.procs").read_text().split():
                with suppress(ProcessLookupError):
                    write(leaf / "cgroup.procs", pid)


def prove(place: Place) -> None:
    """Make a group with limits below *place*, let a process enter, and remove it; OSError when any of it fails."""
    trial = place.base / f"trial-{os.getpid()}-{os.urandom(4).hex()}"
    trial.mkdir(parents=True)
    try:
        for file, value, needed in settings(place, 64, 100, 10):
            write(trial / file, value, needed=needed)
        entered = subprocess.run(
            ["/bin/sh", "-c", 'echo 0 > "$1"', "sh", str(trial / "cgroup.procs")],
            capture_output=True,
            text=True,
            timeout=TRIAL_TIMEOUT_S,
            check=False,
        )
        if entered.returncode:
            raise PermissionError(f"no process can enter {trial.parent}: {entered.stderr.strip()}")
    finally:
        trial.rmdir()
