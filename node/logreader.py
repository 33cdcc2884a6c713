"""Read logs, as a program: ``python -m slum.node.logreader REQUEST``, lines ``ID UNIX_SECONDS TEXT`` on stdout.

A process of its own, since Python's regular expressions cannot be interrupted from outside and hold the interpreter: a
pattern that takes for ever ends this reader, not the agent. Instances' lines are merged by time. Memory is bounded: files
are streamed, and what `tail` keeps is counted in bytes. Following ends when stdin is closed.
"""

from __future__ import annotations

import heapq
import os
import re
import resource
import select
import signal
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import BinaryIO

import msgspec

from slum.frozen import Frozen
from slum.node import logfiles

POLL_S = 0.2
SEARCH_S = 1.0
"""CPU time that the pattern may take on one line."""
TAIL_BYTES_MAX = 32 << 20
ROUND_BYTES = 256 << 10
MEMORY_BYTES_MAX = 1 << 30
SKIPPED = b"[slum] some lines were rotated away before they could be read"

Line = tuple[float, str, bytes, int]
"""(at, instance id, text, generation or 0)."""


class Request(Frozen):
    """*folder* holds the log folders of the instances *ids*."""

    folder: str
    ids: tuple[str, ...]
    since: float | None = None
    tail: int | None = None
    grep: str | None = None
    follow: bool = False
    generation: int | None = None


class TooSlow(Exception):
    """The pattern does not come to an end."""


class Wanted:
    """Tells which lines are asked for, and watches over the pattern: see SEARCH_S."""

    def __init__(self, since: float | None, grep: str | None, generation: int | None) -> None:
        self._since = since
        self._generation = generation
        self._steps = 1
        """Odd while the pattern works: on its own compilation first."""
        self._seen = -1
        self._pattern: re.Pattern[str] | None = None
        if grep is not None:
            signal.signal(signal.SIGVTALRM, self._tick)
            signal.setitimer(signal.ITIMER_VIRTUAL, SEARCH_S, SEARCH_S)
            self._pattern = re.compile(grep)
        self._steps += 1

    def __call__(self, line: Line) -> bool:
        if self._since is not None and line[0] < self._since:
            return False
        if self._generation is not None and line[3] != self._generation:
            return False
        if self._pattern is None:
            return True
        text = line[2].decode(errors="replace")
        self._steps += 1
        found = self._pattern.search(text) is not None
        self._steps += 1
        return found

    def since(self, file: BinaryIO) -> bool:
        """Return whether *file* can hold lines that are new enough."""
        return self._since is None or os.fstat(file.fileno()).st_mtime >= self._since

    def _tick(self, _signum: int, _frame: FrameType | None) -> None:
        if self._steps % 2 and self._steps == self._seen:
            raise TooSlow
        self._seen = self._steps


class Log:
    """One instance's log: what is there, then what comes."""

    def __init__(self, folder: Path, id: str) -> None:
        self._folder = folder
        self._id = id
        self._files = logfiles.open_all(folder)
        self._at = 0.0
        self._generation = 0
        self._rest = b""

    def past(self, wanted: Wanted, *, follow: bool) -> Iterator[Line]:
        """Yield all wanted lines that are there, oldest first; the unfinished last one is left to ``new`` if *follow*."""
        for file in self._files:
            if wanted.since(file) or (follow and file is self._files[-1]):
                yield from filter(wanted, self._stamped(self._raw(file, follow)))

    def tail(self, wanted: Wanted, count: int, *, follow: bool) -> list[Line]:
        """Return the last *count* wanted lines, fewer when they are very long; files are read from the newest back."""
        kept: list[Line] = []
        for file in reversed(self._files):
            begun = follow and file is self._files[-1]
            if not begun and (len(kept) >= count or not wanted.since(file)):
                break
            newest = _last(filter(wanted, self._stamped(self._raw(file, follow))), count - len(kept))
            kept[:0] = newest
        return kept

    def new(self) -> list[Line]:
        """Return the lines that came since the last call, at most some ROUND_BYTES, across rotations."""
        found: list[bytes] = []
        budget = ROUND_BYTES
        while budget > 0:
            file = self._current()
            chunk = file.read(min(budget, ROUND_BYTES)) if file is not None else b""
            if chunk:
                budget -= len(chunk)
                *whole, self._rest = (self._rest + chunk).split(b"\n")
                found += whole
            elif file is None or not self._advance(file, found):
                break
        return list(self._stamped(found))

    def _current(self) -> BinaryIO | None:
        if not self._files:
            self._files = logfiles.open_all(self._folder)[-1:]
        return self._files[-1] if self._files else None

    def _advance(self, file: BinaryIO, found: list[bytes]) -> bool:
        """Go on to the next file when *file*, read to its end, was rotated; return whether there may be more."""
        try:
            there = os.stat(self._folder / "current").st_ino
        except FileNotFoundError:
            return False
        if there == os.fstat(file.fileno()).st_ino:
            return False
        if more := file.read(ROUND_BYTES):
            *whole, self._rest = (self._rest + more).split(b"\n")
            found += whole
            return True
        following = logfiles.successor(self._folder, file)
        if self._rest:
            found.append(self._rest)
            self._rest = b""
        if following is None:
            found.append(b"%.3f %s" % (self._at, SKIPPED))
            following = logfiles.open_all(self._folder)[-1]
        for old in self._files:
            old.close()
        self._files = [following]
        return True

    def _raw(self, file: BinaryIO, follow: bool) -> Iterator[bytes]:
        if not follow or file is not self._files[-1]:
            yield from logfiles.lines(file)
            return
        for chunk in logfiles.chunks(file):
            *whole, self._rest = (self._rest + chunk).split(b"\n")
            yield from whole

    def _stamped(self, lines: Iterable[bytes]) -> Iterator[Line]:
        """Split off the times and marks; a line without a time has those of the line before it."""
        for line in lines:
            stamp, _, text = line.partition(b" ")
            at, _, mark = stamp.partition(b"/")
            try:
                self._at, self._generation = float(at), int(mark or 0)
            except ValueError:
                text = line
            yield self._at, self._id, text, self._generation


def serve(request: Request, out: int, stdin: int) -> None:
    """Write all that *request* asks for to descriptor *out*; TooSlow or re.error when its pattern is no good."""
    wanted = Wanted(request.since, request.grep, request.generation)
    logs = [Log(Path(request.folder) / name, name) for name in request.ids]
    if request.tail is not None:
        ends = [log.tail(wanted, request.tail, follow=request.follow) for log in logs]
        newest = sorted((line for lines in ends for line in lines), key=_at)
        _write(out, newest[len(newest) - min(request.tail, len(newest)) :])
    else:
        _write(out, heapq.merge(*(log.past(wanted, follow=request.follow) for log in logs), key=_at))
    while request.follow:
        fresh = [line for log in logs for line in log.new()]
        _write(out, sorted(filter(wanted, fresh), key=_at))
        if select.select([stdin], [], [], 0 if fresh else POLL_S)[0] and not os.read(stdin, 1024):
            return


def _last(lines: Iterable[Line], count: int) -> list[Line]:
    kept: deque[Line] = deque()
    size = 0
    for line in lines:
        kept.append(line)
        size += len(line[2])
        while len(kept) > count or size > TAIL_BYTES_MAX:
            size -= len(kept.popleft()[2])
    return list(kept)


def _at(line: Line) -> float:
    return line[0]


def _write(out: int, lines: Iterable[Line]) -> None:
    batch = bytearray()
    for at, name, text, _ in lines:
        batch += b"%s %.3f %s\n" % (name.encode(), at, text)
        if len(batch) >= ROUND_BYTES:
            _write_all(out, batch)
            batch.clear()
    _write_all(out, batch)


def _write_all(out: int, data: bytes | bytearray) -> None:
    view = memoryview(bytes(data))
    while view:
        view = view[os.write(out, view) :]


def main(arguments: list[str]) -> int:
    """Serve one request; 0, or 1 with the reason as the last line of stderr."""
    request = msgspec.json.decode(arguments[0], type=Request)
    os.nice(5)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES_MAX, MEMORY_BYTES_MAX))
    try:
        serve(request, 1, 0)
    except BrokenPipeError:
        return 0
    except (re.error, RecursionError, OverflowError, MemoryError) as error:
        sys.stderr.write(f"the pattern {request.grep!r} is not usable: {error or type(error).__name__}\n")
        return 1
    except TooSlow:
        sys.stderr.write(f"the pattern {request.grep!r} takes too long on one line; make it simpler\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
