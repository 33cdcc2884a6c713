"""What the agent keeps on its disk: the newest desired config, and of each instance what a new agent must know.

Files in Home.agent (0700): desired.json, written atomically and fsynced, so that a reboot without a control plane restores
the services; instances.jsonl, to which a line is appended for each change of an instance (generation counter, past exits,
what was given up, what was last healthy), the last one of an instance counting. It is on its way to the disk before a start,
but not fsynced: losing its end costs some history, never a double start, since the keeper's table is lost with it. A
marker in the run folder tells a new agent from a reboot. Never holds the value of a secret.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import msgspec

from slum.frozen import Frozen, Sparse
from slum.model import Key, Service
from slum.node.observed import Good, Mark, Observed, Past, Target
from slum.paths import Home
from slum.wire import Desired

LOG_BYTES_MAX = 8 << 20
"""The log of instances is written anew when it is larger, and at each start."""


class Identity(Frozen):
    """Who this machine is in the fleet: Home.identity, written by the operator."""

    tenement: str
    machine: str


class Memory(Sparse):
    """The part of an Observed that outlives the agent; *services* defines the releases of what may be running."""

    key: Key
    counter: int = 0
    serving: int | None = None
    target: Target | None = None
    since: float = 0.0
    past: tuple[Past, ...] = ()
    marks: tuple[Mark, ...] = ()
    good: Good | None = None
    restarts: int = 0
    services: dict[str, Service] = {}
    forgotten: bool = False
    """Nothing is left of it."""


class Store:
    """The agent's folder. One agent at a time."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._instances = home.agent / "instances.jsonl"
        self._marker = home.private / "agent.up"
        self._saved: dict[Key, Memory] = {}
        self._lock = -1
        self._log = -1
        self._log_bytes = 0

    def lock(self) -> bool:
        """Claim the folder for this process's whole life; False while another agent has it."""
        if self._lock < 0:
            self._lock = os.open(self._home.agent / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def first_since_boot(self) -> bool:
        """Tell whether the run folder is new, that is: after a reboot. True once."""
        if self._marker.exists():
            return False
        self._marker.parent.mkdir(parents=True, mode=0o700, exist_ok=True)
        self._marker.touch(mode=0o600)
        return True

    def identity(self) -> Identity | None:
        """Return who we are; None while the operator has not said so."""
        with suppress(FileNotFoundError, msgspec.DecodeError):
            return msgspec.json.decode(self._home.identity.read_bytes(), type=Identity)
        return None

    def desired(self) -> Desired | None:
        """Return the newest desired config that was kept; None when there is none or it cannot be read."""
        try:
            return msgspec.json.decode((self._home.agent / "desired.json").read_bytes(), type=Desired)
        except (FileNotFoundError, msgspec.DecodeError):
            return None

    def keep_desired(self, desired: Desired) -> None:
        """Have *desired* on disk before returning."""
        write_atomically(self._home.agent / "desired.json", msgspec.json.encode(desired), sync=True)

    def memories(self) -> tuple[list[Memory], int]:
        """Return all instances that were kept, and how many lines of the log could not be read. Call once, first."""
        bad = 0
        with suppress(FileNotFoundError):
            for line in self._instances.read_bytes().splitlines():
                try:
                    memory = msgspec.json.decode(line, type=Memory)
                except msgspec.DecodeError:
                    bad += 1
                    continue
                self._saved[memory.key] = memory
        self._saved = {key: memory for key, memory in self._saved.items() if not memory.forgotten}
        return list(self._saved.values()), bad

    def compact(self) -> None:
        """Have one line an instance on disk; OSError when it is full, and then each later writing tries it again."""
        self._rewrite()

    def save(self, seen: Observed) -> None:
        """Keep what must outlive this agent, when it changed."""
        memory = memory_of(seen)
        if self._saved.get(seen.key) != memory:
            self._saved[seen.key] = memory
            self._append(memory)

    def forget(self, key: Key) -> None:
        if self._saved.pop(key, None) is not None:
            self._append(Memory(key=key, forgotten=True))

    def close(self) -> None:
        if self._log >= 0:
            os.close(self._log)
            self._log = -1

    def service(self, key: Key, release: str) -> Service | None:
        """Return the definition of a release that ran here, as it was kept."""
        memory = self._saved.get(key)
        return memory.services.get(release) if memory else None

    def pre_deployed(self) -> set[str]:
        """Return the releases whose pre_deploy was done here."""
        with suppress(FileNotFoundError, msgspec.DecodeError):
            return set(msgspec.json.decode((self._home.agent / "pre_deployed.json").read_bytes(), type=list[str]))
        return set()

    def keep_pre_deployed(self, releases: set[str]) -> None:
        data = msgspec.json.encode(sorted(releases))
        write_atomically(self._home.agent / "pre_deployed.json", data, sync=True)

    def _append(self, memory: Memory) -> None:
        line = msgspec.json.encode(memory) + b"\n"
        if self._log < 0 or self._log_bytes + len(line) > LOG_BYTES_MAX:
            self._rewrite()
            return
        written = 0
        try:
            written = os.write(self._log, line)
        finally:
            if written < len(line):  # the disk is full: once there is room the whole is written anew
                self.close()
        self._log_bytes += len(line)

    def _rewrite(self) -> None:
        """Write the log anew with one line an instance, and keep it open for more."""
        self.close()
        data = _lines(self._saved.values())
        write_atomically(self._instances, data, sync=False)
        self._log = os.open(self._instances, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        self._log_bytes = len(data)


def _lines(memories: Iterable[Memory]) -> bytes:
    return b"".join(msgspec.json.encode(memory) + b"\n" for memory in memories)


def memory_of(seen: Observed) -> Memory:
    return Memory(
        key=seen.key,
        counter=seen.counter,
        serving=seen.serving,
        target=seen.target,
        since=seen.since,
        past=seen.past,
        marks=seen.marks,
        good=seen.good,
        restarts=seen.restarts,
        services={g.release: g.service for g in seen.generations},
    )


def observed_of(memory: Memory) -> Observed:
    """Return *memory* as the beginning of an Observed; its generations are then adopted from the keeper."""
    return Observed(
        key=memory.key,
        counter=memory.counter,
        serving=memory.serving,
        target=memory.target,
        since=memory.since,
        past=memory.past,
        marks=memory.marks,
        good=memory.good,
        restarts=memory.restarts,
    )


def write_atomically(file: Path, data: bytes, *, sync: bool) -> None:
    """Replace *file* by *data* as a whole, or leave it (OSError); with *sync*, on disk before returning."""
    unfinished = file.with_suffix(".new")
    try:
        with open(unfinished, "wb", opener=_private) as out:  # buffered: it writes on after a write that was cut short
            out.write(data)
            out.flush()
            if sync:
                os.fsync(out.fileno())
        unfinished.rename(file)
    except OSError:
        with suppress(OSError):  # what failed first is what is told
            unfinished.unlink()
        raise
    if sync:
        folder = os.open(file.parent, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
