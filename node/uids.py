"""Which uid (and gid, the same number) each service of this machine runs as: Home.agent/uids.json, written atomically.

A service keeps its uid for as long as it has data here: files that outlive the service must not become readable to
the next one. So uids are given out lowest-free-first from UID_FIRST and return only by an explicit `free`. Used when slum
is root; must never give out two services' names the same uid, nor one outside of the range, which firewall rules name.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import msgspec

from slum.errors import SlumError

UID_FIRST = 200_000
UID_LAST = 265_535
ROUTER_UID = 199_999
FRONT_UID = 199_998
"""Not the router's: what services lead that one to must not reach the API's socket, which believes the front."""


class Uids:
    """The table, one open at a time (the agent's). *file* is created with the first uid, in its existing folder."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._table: dict[str, int] = {}
        if file.exists():
            try:
                self._table = msgspec.json.decode(file.read_bytes(), type=dict[str, int])
            except msgspec.DecodeError as error:
                raise SlumError(
                    f"{file} is damaged: {error}",
                    hint="restore it from a backup, or write it anew from the owners of the services' data folders",
                ) from error

    def uid_of(self, service: str) -> int:
        """Return *service*'s uid; the first time, take the lowest free one and have it on disk before returning."""
        if service not in self._table:
            self.give((service,))
        return self._table[service]

    def give(self, services: Iterable[str]) -> None:
        """As ``uid_of`` for each of *services*, with one write to the disk for all."""
        missing = [service for service in dict.fromkeys(services) if service not in self._table]
        if not missing:
            return
        taken = set(self._table.values())
        free = [uid for uid in range(UID_FIRST, UID_LAST + 1) if uid not in taken][: len(missing)]
        if len(free) < len(missing):
            raise SlumError(
                f"all {len(taken)} uids from {UID_FIRST} to {UID_LAST} are in use",
                hint="remove the data of services that are gone",
            )
        self._write(self._table | dict(zip(missing, free, strict=True)))

    def free(self, service: str) -> None:
        """Give *service*'s uid back; only once nothing on disk belongs to it. Unknown names are fine."""
        if service in self._table:
            self._write({name: uid for name, uid in self._table.items() if name != service})

    def all(self) -> dict[str, int]:
        """Return a copy of the table."""
        return dict(self._table)

    def _write(self, table: dict[str, int]) -> None:
        unfinished = self._file.with_suffix(".new")
        with open(unfinished, "wb", opener=_private) as out:
            out.write(msgspec.json.format(msgspec.json.encode(table, order="sorted")))
            out.flush()
            os.fsync(out.fileno())
        unfinished.rename(self._file)
        folder = os.open(self._file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        self._table = table


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
