"""A child's output: from its FIFO to a bounded set of log files, each line stamped with the time it began.

The child holds the FIFO open read-write as its descriptors 1 and 2, so that it never gets SIGPIPE and goes on writing
while the keeper is replaced. Nothing here may block or raise because of a child or a full disk: what cannot be kept is
dropped and counted, and the log says so. Lines are written through as they come, so a reader may see the beginning of
a line before its end.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time

from slum.node.keeper_loop import READ, Loop

TYPE_CHECKING = False  # typing itself costs the keeper a megabyte
if TYPE_CHECKING:
    from typing import Any

CHUNK_BYTES = 64 << 10
"""Read from one child in one turn: nobody is starved by a neighbour."""
LINE_BYTES_MAX = 16 << 10
STAMP_BYTES = 15
MUTE_S = 1.0
"""How long a child that exceeded its rate is not logged."""
MUTED_PAUSE_S = 0.004
MUTED_PIPE_BYTES = 1 << 20
"""A muted child is emptied a megabyte at a time with pauses: beyond 250 MB/s it waits, and the keeper's CPU stays low."""
COMPRESSED = ("", ".zst")


def stamp(chunk: bytes, now: float, column: int, mark: bytes = b"") -> tuple[bytes, int]:
    """Return *chunk* with ``<now><mark> `` before each line that begins in it, and the new column.

    *column* is how many bytes of the current line are already out; 0 means that a line begins here. Lines are cut at
    LINE_BYTES_MAX. Pure.
    """
    prefix = b"%.3f%s " % (now, mark)
    lines = chunk.split(b"\n")
    if column + len(lines[0]) <= LINE_BYTES_MAX and max(map(len, lines)) <= LINE_BYTES_MAX:
        tail = lines[-1]
        text = (b"\n" + prefix).join(lines) if tail else (b"\n" + prefix).join(lines[:-1]) + b"\n" * (len(lines) > 1)
        opens = column == 0 and bool(text)
        left = len(tail) + (column if len(lines) == 1 else 0)
        return (prefix + text if opens else text), left
    pieces = []
    for index, line in enumerate(lines):
        last = index == len(lines) - 1
        while column + len(line) > LINE_BYTES_MAX:
            room = LINE_BYTES_MAX - column
            pieces.append((b"" if column else prefix) + line[:room] + b"\n")
            line, column = line[room:], 0
        if last and not line:
            break
        pieces.append((b"" if column else prefix) + line + (b"" if last else b"\n"))
        column = column + len(line) if last else 0
    return b"".join(pieces), column


class LogFile:
    """PATH and its rotated files PATH.1 (newest) to PATH.<keep>; a rotated file may have been compressed to .zst."""

    __slots__ = ("bytes_max", "column", "fd", "keep", "path", "size")

    def __init__(self, path: str, bytes_max: int, keep: int) -> None:
        self.path = path
        self.bytes_max = bytes_max
        self.keep = keep
        self.fd = -1
        self.size = 0
        self.column = 0

    def append(self, data: bytes, column: int) -> bool:
        """Write *data*, which ends at *column*, and rotate first when it is due; False when not all of it fitted."""
        whole = True
        try:
            if self.fd < 0:
                self.open()
                data = b"\n" + data if self.column else data
            if self.size and self.size + len(data) > self.bytes_max:
                data, whole = self._rotate_before(data)
            written = os.write(self.fd, data)
        except OSError:
            return False
        self.size += written
        if written < len(data):
            self.column = 0 if data[written - 1 : written] == b"\n" else 1
            return False
        self.column = column
        return whole

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def open(self) -> None:
        """Open or make the file and its folder; OSError when it cannot be (``append`` tries again)."""
        os.makedirs(os.path.dirname(self.path), mode=0o700, exist_ok=True)
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self.fd = os.open(self.path, flags, 0o600)
        self.size = os.fstat(self.fd).st_size
        self.column = 1 if self.size and os.pread(self.fd, 1, self.size - 1) != b"\n" else 0

    def _rotate_before(self, data: bytes) -> tuple[bytes, bool]:
        """Rotate between two lines, or within one that has no end; return what is left to write, False when less."""
        whole = True
        if self.column:
            end = data.find(b"\n") + 1
            if not end and self.size < self.bytes_max + CHUNK_BYTES:
                return data, True
            try:
                os.write(self.fd, data[:end] or b"\n")
            except OSError:
                whole = False  # a full disk: rotating is what makes room
            data = data[end:]
        self.close()
        for number in range(self.keep, 0, -1):
            for suffix in COMPRESSED:
                older = f"{self.path}.{number}{suffix}"
                newer = f"{self.path}.{number - 1}{suffix}" if number > 1 else self.path + suffix
                unlink_if_there(older)
                try:
                    os.rename(newer, older)
                except FileNotFoundError:
                    continue  # also when a compressor has just replaced it by its .zst, which comes next
        if not self.keep:
            os.unlink(self.path)
        self.open()
        return data, whole


class Output:
    """One child's FIFO and log, watched by the loop from ``open`` to ``close``."""

    __slots__ = (
        "_burst",
        "_dropped",
        "_fd",
        "_file",
        "_loop",
        "_mark",
        "_muted_until",
        "_rate",
        "_refilled",
        "_tokens",
        "dropped_total",
        "fifo",
    )

    def __init__(self, loop: Loop, fifo: str, log: dict[str, Any]) -> None:
        self.fifo = fifo
        self.dropped_total = 0
        self._loop = loop
        self._file = LogFile(log["path"], log["bytes_max"], log["keep"])
        self._mark = b"/%d" % log["mark"] if log["mark"] else b""
        self._rate = log["rate_bytes_s"]
        self._burst = log["burst_bytes"]
        self._tokens = float(self._burst)
        self._refilled = time.monotonic()
        self._muted_until = 0.0
        self._dropped = 0
        self._fd = -1

    def open(self, uid: int | None, gid: int | None, *, fresh: bool) -> None:
        """Make the FIFO anew, readable and writable by *uid* alone, or (not *fresh*) open the one that is there.

        OSError when it cannot be. The log file is opened by the first line, or before it by ``open_log``.
        """
        if fresh:
            unlink_if_there(self.fifo)
            os.mkfifo(self.fifo, 0o600)
        fd = os.open(self.fifo, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            if fresh and (uid is not None or gid is not None):
                os.fchown(fd, -1 if uid is None else uid, -1 if gid is None else gid)
        except OSError:
            os.close(fd)
            raise
        self._fd = fd
        self._loop.watch(fd, self._readable)

    def open_log(self) -> str | None:
        """Open the log file; return why it cannot be (a full disk), which is tried again with each write."""
        try:
            self._file.open()
        except OSError as error:
            return f"{self._file.path}: {error.strerror}"
        return None

    def close(self, *, unlink: bool) -> None:
        """Take what is left, say what was dropped, and let go of the FIFO and the file. May be repeated."""
        if self._fd >= 0:
            self._drain()
            self._loop.unwatch(self._fd)
            os.close(self._fd)
            self._fd = -1
            if self._file.column or self._dropped:
                self._append(b"", 0)
        self._file.close()
        if unlink:
            unlink_if_there(self.fifo)

    def drain(self) -> None:
        """Take what is in the FIFO now."""
        if self._fd >= 0:
            self._drain()

    def note(self, text: str) -> None:
        """Write one line of the keeper's own into the log."""
        self._append(
            stamp(b"[slum] %s\n" % text.encode(errors="replace"), time.time(), 0, self._mark)[0], 0, break_line=True
        )

    def _readable(self, _mask: int) -> None:
        if time.monotonic() < self._muted_until:
            self._discard()
            self._loop.remask(self._fd, 0)
            self._loop.after(MUTED_PAUSE_S, self._unpause)
            return
        try:
            chunk = os.read(self._fd, CHUNK_BYTES)
        except BlockingIOError:
            return
        self._take(chunk)

    def _unpause(self) -> None:
        if self._fd >= 0:
            self._loop.remask(self._fd, READ)

    def _drain(self) -> None:
        for _ in range(MUTED_PIPE_BYTES // CHUNK_BYTES):
            if time.monotonic() < self._muted_until:
                self._discard()
                return
            try:
                self._take(os.read(self._fd, CHUNK_BYTES))
            except BlockingIOError:
                return

    def _take(self, chunk: bytes) -> None:
        now = time.monotonic()
        self._tokens = min(float(self._burst), self._tokens + (now - self._refilled) * self._rate)
        self._refilled = now
        cost = len(chunk) + STAMP_BYTES * chunk.count(b"\n")
        if cost > self._tokens:
            self._drop(len(chunk))
            self._mute(now)
            return
        self._tokens -= cost
        column = 0 if self._dropped else self._file.column
        text, column = stamp(chunk, time.time(), column, self._mark)
        if not self._append(text, column):
            self._drop(len(chunk))

    def _mute(self, now: float) -> None:
        self._muted_until = now + MUTE_S
        self._resize(MUTED_PIPE_BYTES)
        self._loop.after(MUTE_S, self._unmute)

    def _unmute(self) -> None:
        if self._fd < 0:
            return
        self._resize(CHUNK_BYTES)
        if self._dropped:
            self._append(b"", 0)

    def _resize(self, size: int) -> None:
        try:
            fcntl.fcntl(self._fd, fcntl.F_SETPIPE_SZ, size)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EBUSY, errno.EINVAL, errno.ENOMEM):
                raise

    def _discard(self) -> None:
        sink = os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC)
        try:
            self._drop(os.splice(self._fd, sink, MUTED_PIPE_BYTES, flags=os.SPLICE_F_NONBLOCK))
        except BlockingIOError:
            return
        finally:
            os.close(sink)

    def _drop(self, count: int) -> None:
        self._dropped += count
        self.dropped_total += count

    def _append(self, text: bytes, column: int, *, break_line: bool = False) -> bool:
        """Write *text*, after a word about what was dropped before it; an unfinished line is ended first for that."""
        lead = b""
        if self._file.column and (self._dropped or break_line or not text):
            lead = b"\n"
        if self._dropped:
            lead += stamp(b"[slum] dropped %d bytes\n" % self._dropped, time.time(), 0, self._mark)[0]
        if not self._file.append(lead + text, column):
            return False
        self._dropped = 0
        return True


def unlink_if_there(path: str) -> None:
    """Remove *path*; that it is absent is fine."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return
