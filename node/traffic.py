"""Counting requests by service from the router's access log, without the router's or the agent's doing much.

The log is sampled (see caddyconfig): in each second every one of the first lines stands for one request, each later one
for LOGGED_AFTER. Playing the sampler's clock again from the lines' own times gives the weights back, so totals are exact
to less than LOGGED_AFTER a second, and shares between services are estimates only above LOGGED_A_SAMPLE requests/s.
Reads forward only, a bounded amount a call; host names that nobody asked about are never kept.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Collection, Mapping
from pathlib import Path

import msgspec

from slum.node.caddyconfig import LOGGED_A_SAMPLE, LOGGED_AFTER, SAMPLE_S

CHUNK_BYTES = 128 << 10
READ_BYTES_MAX = 4 << 20
"""In one call; more than the log can grow in half a minute."""

Counts = dict[tuple[str, str | None], int]


class RequestCounter:
    """Follows one access log from its end at the first call, across rotations."""

    def __init__(self, access_log: Path) -> None:
        self._path = access_log
        self._fd = -1
        self._rest = b""
        self._clocks: dict[str, _Clock] = {}
        self._skip_to_end = True

    def read(self, domain: str, services: Mapping[str, Collection[str]]) -> Counts:
        """Return how many requests came since the last call: {(service, id or None for the service's own name): n}.

        *services* maps those that may be counted to their ids. Repeats are cheap; a log that is not there yet is empty.
        """
        counts: Counts = {}
        budget = READ_BYTES_MAX
        while budget > 0 and self._is_open():
            chunk = os.read(self._fd, CHUNK_BYTES)
            if chunk:
                budget -= len(chunk)
                self._count(chunk, domain, services, counts)
            elif not self._rotated():
                break
            else:
                self.close()
        self._skip_to_end = False
        return counts

    def close(self) -> None:
        """Let go of the file; the next call reads it from its beginning."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._rest = -1, b""

    def _is_open(self) -> bool:
        if self._fd >= 0:
            return True
        try:
            self._fd = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ELOOP):
                raise
            return False
        if self._skip_to_end:
            os.lseek(self._fd, 0, os.SEEK_END)
        return True

    def _rotated(self) -> bool:
        """Whether another file has taken the name of the one that is open, after its last line was written."""
        try:
            now = os.stat(self._path, follow_symlinks=False)
        except FileNotFoundError:
            return False
        mine = os.fstat(self._fd)
        return now.st_ino != mine.st_ino and os.lseek(self._fd, 0, os.SEEK_CUR) >= mine.st_size

    def _count(self, chunk: bytes, domain: str, services: Mapping[str, Collection[str]], counts: Counts) -> None:
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            try:
                entry = _entry.decode(line)
            except msgspec.DecodeError:
                continue  # the beginning of a line whose file was opened at its end
            weight = self._clocks.setdefault(entry.level, _Clock()).weight(entry.ts)
            name = _named(entry.request.host, domain, services)
            if name is not None:
                counts[name] = counts.get(name, 0) + weight
        if len(self._rest) > CHUNK_BYTES:
            self._rest = b""


class _Clock:
    """zap's sampler for one level, played again: a tick begins with the first line after the last one's end."""

    def __init__(self) -> None:
        self._ends = 0.0
        self._logged = 0

    def weight(self, at: float) -> int:
        if at >= self._ends:
            self._ends, self._logged = at + SAMPLE_S, 0
        self._logged += 1
        return 1 if self._logged <= LOGGED_A_SAMPLE else LOGGED_AFTER


def _named(host: str, domain: str, services: Mapping[str, Collection[str]]) -> tuple[str, str | None] | None:
    name = host.partition(":")[0].lower().removesuffix(f".{domain}")
    instance, dot, service = name.rpartition(".")
    if service not in services or (dot and instance not in services[service]):
        return None
    return service, instance if dot else None


class _Request(msgspec.Struct):
    host: str


class _Entry(msgspec.Struct):
    level: str
    ts: float
    request: _Request


_entry = msgspec.json.Decoder(_Entry)
