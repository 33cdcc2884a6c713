"""The keeper's table: a Child for each name, and on disk one JSON file a child or listener, from which the next keeper takes over.

Files are replaced whole by rename and need no fsync: the table is of use only while the machine stays up, and records of
another boot are dropped. The environment of a child is in its record only when the keeper must start it again.
"""

from __future__ import annotations

import errno
import json
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from typing import Any

    from slum.node.keeper_clients import Refused
    from slum.node.keeper_log import Output
    from slum.node.keeper_loop import Timer

_KEPT = ("name", "listeners", "log", "respawn", "signalling", "meta")
CHILD = "c."
LISTENER = "l."


def file_name(name: str) -> str:
    """Return a file name for *name*, which holds no ``+`` of its own."""
    return name.replace("/", "+")


class Child:
    """One name of the table. *spawn* is whole for a respawned child and otherwise without argv, env and the like."""

    __slots__ = (
        "adopted",
        "control",
        "deadline",
        "delay_ms",
        "done",
        "exited_at",
        "output",
        "own",
        "pid",
        "pidfd",
        "respawns",
        "retry",
        "spawn",
        "start_time",
        "started_at",
        "state",
        "status",
    )

    def __init__(self, spawn: dict[str, Any]) -> None:
        self.spawn = spawn if spawn["respawn"] else kept(spawn)
        self.pid = 0
        self.start_time = 0
        self.started_at = 0.0
        self.state = "running"
        self.status: int | None = None
        self.exited_at: float | None = None
        self.adopted = False
        self.respawns = 0
        self.own = True
        self.pidfd = -1
        self.output: Output | None = None
        self.control: socket.socket | None = None
        self.deadline: Timer | None = None
        self.done: Callable[[Child, Refused | None], None] | None = None
        self.retry: Timer | None = None
        self.delay_ms = 0

    @property
    def name(self) -> str:
        return str(self.spawn["name"])

    @property
    def running(self) -> bool:
        return self.state == "running"

    @property
    def settled(self) -> bool:
        """Whether it has exited for good."""
        return self.state == "exited" and not self.spawn["respawn"]

    def facts(self) -> dict[str, Any]:
        """Return what is both told and remembered of the process."""
        fields = ("pid", "start_time", "state", "status", "exited_at", "started_at", "adopted", "respawns")
        return {field: getattr(self, field) for field in fields}

    def restore(self, record: dict[str, Any]) -> None:
        """Take over the facts of *record*; KeyError when one is missing."""
        for field in self.facts():
            setattr(self, field, record[field])


def kept(spawn: dict[str, Any]) -> dict[str, Any]:
    """Return what is remembered of a *spawn* that is not to be started again. Pure."""
    return {field: spawn[field] for field in _KEPT} | {"respawn": None}


class Table:
    """Records by kind (CHILD, LISTENER) and name, in *folder*."""

    def __init__(self, folder: str, boot_id: str) -> None:
        self._folder = folder
        self._boot_id = boot_id

    def save(self, kind: str, name: str, record: dict[str, Any]) -> None:
        """Replace the record of *name*; OSError when it cannot be written, and then the old one stands.

        A run folder without room (a service may fill it) must not keep the router or the agent from being started
        again: their records are then overwritten where they lie.
        """
        path = self._path(kind, name)
        temporary = f"{self._folder}/.{kind}{file_name(name)}"
        data = json.dumps({**record, "boot_id": self._boot_id}, separators=(",", ":")).encode()
        try:
            with open(temporary, "wb", buffering=0, opener=_private) as file:
                if file.write(data) != len(data):
                    raise OSError(errno.ENOSPC, "no room for the record", temporary)
            os.rename(temporary, path)
        except OSError as error:
            if error.errno != errno.ENOSPC or not _overwrite(path, data):
                raise

    def remove(self, kind: str, name: str) -> None:
        """Make *name* have no record."""
        try:
            os.unlink(self._path(kind, name))
        except FileNotFoundError:
            return

    def load(self, kind: str) -> list[dict[str, Any]]:
        """Return the records of this boot, ordered by name; all else of that kind is removed."""
        records = []
        for entry in sorted(os.listdir(self._folder)):
            path = f"{self._folder}/{entry}"
            if entry.startswith("."):
                os.unlink(path)
            elif entry.startswith(kind):
                record = _read(path)
                if record is None or record.get("boot_id") != self._boot_id:
                    os.unlink(path)
                else:
                    records.append(record)
        return records

    def _path(self, kind: str, name: str) -> str:
        return f"{self._folder}/{kind}{file_name(name)}"


def _overwrite(path: str, data: bytes) -> bool:
    """Put *data* in the place of what *path* holds, by one write into its own blocks; False when it does not fit there."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        there = os.fstat(fd)
        if len(data) > there.st_blocks * 512:
            return False
        padded = data.ljust(there.st_size)  # JSON may end in blanks: nothing is left to cut off
        return os.write(fd, padded) == len(padded)
    finally:
        os.close(fd)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _read(path: str) -> dict[str, Any] | None:
    with open(path, "rb", buffering=0) as file:
        try:
            record = json.loads(file.read())
        except ValueError:
            return None
    return record if isinstance(record, dict) else None
