"""A slum's cgroups: one below `base` for each instance, in as many hierarchies as this machine has.

Places come from detect.py, which proved them. Limits are memory (with swap), relative CPU shares and processes; a group
without limits still measures and kills. Groups are named by the asker; every act may be repeated. Must never touch a group
outside of its bases.
"""

from __future__ import annotations

import errno
import os
import re
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from slum.errors import SlumError, invariant
from slum.node.types import Cgroup

MEMORY, CPU, PIDS, CPUACCT = "memory", "cpu", "pids", "cpuacct"
SHARES_DEFAULT = 100
"""What a service without cpu_shares has; cgroup v2's cpu.weight has the same range and default."""
WALL_PROCESSES = 2
"""bubblewrap's monitor and pid 1, which count beside the service's own processes."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class Stats(NamedTuple):
    """One instance's figures; None where no controller of this machine measures it."""

    memory_bytes: int | None
    """In use, without file cache that the kernel can drop at once."""
    cpu_s: float | None
    pids: int | None
    oom_kills: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Our folder in one hierarchy: v2 (*unified*) or one of v1; *controllers* are those that were proven to work."""

    base: Path
    unified: bool
    controllers: frozenset[str] = frozenset()


class Limits:
    """All places together. *why* and *fix* say what does not work, and are empty when everything does."""

    def __init__(self, places: tuple[Place, ...], *, why: str = "", fix: str = "") -> None:
        self._places = places
        self._measured = {controller: place for place in reversed(places) for controller in sorted(place.controllers)}
        self._unified = next((place.base for place in places if place.unified), None)
        self.why = why
        self.fix = fix

    @property
    def controllers(self) -> frozenset[str]:
        """What can be limited: some of memory, cpu and pids."""
        return frozenset({MEMORY, CPU, PIDS} & self._measured.keys())

    @property
    def how(self) -> str:
        """What enforces limits, e.g. "cgroup v2: memory cpu pids"; empty when nothing does."""
        if not self.controllers:
            return ""
        kinds = {place.unified for place in self._places if place.controllers & self.controllers}
        names = " and ".join("v2" if unified else "v1" for unified in sorted(kinds))
        return f"cgroup {names}: {' '.join(c for c in (MEMORY, CPU, PIDS) if c in self.controllers)}"

    def prepare(
        self, name: str, memory_mb: int | None = None, cpu_shares: int | None = None, pids: int | None = None
    ) -> Cgroup:
        """Make the group *name* with exactly these limits (None is none) and return how to enter and kill it.

        *cpu_shares* is 1 to 10,000 against 100 of a service that asks for nothing; *pids* is the service's own, the
        wall's two come on top. A limit whose controller is missing is a SlumError, never ignored. Where nothing works at all
        the Cgroup has no name and no files.
        """
        asked = {MEMORY: memory_mb, CPU: cpu_shares, PIDS: pids}
        refused = [what for what, value in asked.items() if value is not None and what not in self.controllers]
        if refused:
            raise SlumError(f"limits on {', '.join(refused)} are asked for, but {self.why}", hint=self.fix)
        if not self._places:
            return Cgroup(name="", procs_files=())
        folders = [place.base / checked(name) for place in self._places]
        try:
            for place, folder in zip(self._places, folders, strict=True):
                asked_here = settings(place, memory_mb, cpu_shares, pids)
                if made(folder):  # and so limits nothing: what would be written is there
                    unlimited = settings(place, None, None, None)
                    asked_here = tuple(each for each in asked_here if each not in unlimited)
                for file, value, needed in asked_here:
                    write(folder / file, value, needed=needed)
        except OSError as error:
            raise SlumError(f"cgroup {name} cannot be made: {error}", hint="slum doctor") from error
        kill_file = self._unified / name / "cgroup.kill" if self._unified else None
        return Cgroup(
            name=name,
            procs_files=tuple(str(folder / "cgroup.procs") for folder in folders),
            kill_file=str(kill_file) if kill_file and kill_file.exists() else None,
        )

    def stats(self, name: str) -> Stats | None:
        """Return the group's figures, None when there is no such group; some 30 us."""
        if not self._places or not name:
            return None
        try:
            return Stats(self._memory(name), self._cpu(name), self._pids(name), self._oom_kills(name))
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno == errno.ENODEV:  # removed between open and read
                return None
            raise

    def kill(self, name: str) -> None:
        """SIGKILL every process in the group, also such as it is just starting; no group is fine."""
        if not self._places or not name:
            return
        with suppress(FileNotFoundError):
            if self._unified is not None and (file := self._unified / checked(name) / "cgroup.kill").exists():
                write(file, "1")
                return
            procs = self._places[0].base / checked(name) / "cgroup.procs"
            killed: set[str] = set()
            # A process with a deadly signal pending cannot fork, so this ends.
            while new := set(procs.read_text().split()) - killed:
                for pid in new:
                    with suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
                killed |= new

    def remove(self, name: str) -> bool:
        """Remove the group; return False while a process is still in it (try again), True when it is gone."""
        left = [place for place in self._places if name and not removed(place.base / checked(name))]
        return not left

    def clear(self) -> bool:
        """Remove all groups and our base folders, leaving no trace; False while a process is in one."""
        if [name for name in self.list() if not self.remove(name)]:
            return False
        return not [place for place in self._places if not removed(place.base)]

    def list(self) -> tuple[str, ...]:
        """Return the names of all groups there are, in any hierarchy, sorted; for collecting what was left behind."""
        names: set[str] = set()
        for place in self._places:
            with suppress(FileNotFoundError), os.scandir(place.base) as entries:
                names.update(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
        return tuple(sorted(names))

    def _memory(self, name: str) -> int | None:
        if (place := self._measured.get(MEMORY)) is None:
            return None
        folder = f"{place.base}/{name}/"
        used = int(read(folder + ("memory.current" if place.unified else "memory.usage_in_bytes")))
        cache = field(read(folder + "memory.stat"), b"inactive_file" if place.unified else b"total_inactive_file")
        return max(0, used - (cache or 0))

    def _cpu(self, name: str) -> float | None:
        if self._unified is not None:
            microseconds = field(read(f"{self._unified}/{name}/cpu.stat"), b"usage_usec")
            if microseconds is not None:
                return microseconds / 1e6
        if (place := self._measured.get(CPUACCT)) is None:
            return None
        return int(read(f"{place.base}/{name}/cpuacct.usage")) / 1e9

    def _pids(self, name: str) -> int | None:
        if (place := self._measured.get(PIDS)) is None:
            return None
        return int(read(f"{place.base}/{name}/pids.current"))

    def _oom_kills(self, name: str) -> int | None:
        if (place := self._measured.get(MEMORY)) is None:
            return None
        return field(
            read(f"{place.base}/{name}/" + ("memory.events" if place.unified else "memory.oom_control")), b"oom_kill"
        )


def settings(
    place: Place, memory_mb: int | None, cpu_shares: int | None, pids: int | None
) -> tuple[tuple[str, str, bool], ...]:
    """Return (file, value, needed) for *place*, in the order in which the kernel takes them. Pure.

    v1 wants memsw (memory with swap) never below memory, so it is opened first; memsw and memory.swap.max are absent on
    kernels without swap accounting. cpu.shares counts from 1024 where ours counts from 100.
    """
    wanted: list[tuple[str, str, bool]] = []
    if MEMORY in place.controllers and place.unified:
        wanted += [
            ("memory.max", str(memory_mb << 20) if memory_mb else "max", True),
            ("memory.swap.max", "0" if memory_mb else "max", False),
        ]
    elif MEMORY in place.controllers:
        limit = str(memory_mb << 20) if memory_mb else "-1"
        wanted += [
            ("memory.memsw.limit_in_bytes", "-1", False),
            ("memory.limit_in_bytes", limit, True),
            ("memory.memsw.limit_in_bytes", limit, False),
        ]
    if CPU in place.controllers:
        shares = cpu_shares or SHARES_DEFAULT
        wanted += [
            ("cpu.weight", str(shares), True)
            if place.unified
            else ("cpu.shares", str(max(2, shares * 1024 // 100)), True)
        ]
    if PIDS in place.controllers:
        wanted += [("pids.max", str(pids + WALL_PROCESSES) if pids else "max", True)]
    return tuple(wanted)


def made(folder: Path) -> bool:
    """Make the group *folder*; return False when it was there."""
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    except FileNotFoundError:
        folder.mkdir(parents=True, exist_ok=True)
    return True


def removed(folder: Path) -> bool:
    """Remove a group without subgroups; return whether it is gone, False when a process is in it."""
    try:
        folder.rmdir()
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return False
    return True


def checked(name: str) -> str:
    """Return *name*, which must be one folder's plain name."""
    invariant(
        NAME.fullmatch(name), f"cgroup name {name!r} is not made of letters, digits, dots, dashes and underscores"
    )
    return name


def write(file: Path, value: str, *, needed: bool = True) -> None:
    """Write *value* to a kernel file; when not *needed*, its absence is fine."""
    try:
        fd = os.open(file, os.O_WRONLY)
    except FileNotFoundError:
        if needed:
            raise
        return
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)


def read(path: str) -> bytes:
    """Return a kernel file's content (under 16 KiB) by three system calls; this is most of what stats costs."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.read(fd, 16_384)
    finally:
        os.close(fd)


def field(content: bytes, name: bytes) -> int | None:
    """Return the number after *name* in lines of "name number"."""
    at = content.find(b"\n" + name + b" ")
    if at < 0:
        if not content.startswith(name + b" "):
            return None
        at = -1
    start = at + len(name) + 2
    end = content.find(b"\n", start)
    return int(content[start:] if end < 0 else content[start:end])
