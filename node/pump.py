"""The ends of a one-off command's input and output, as the agent holds them: three pipes, or one pseudo-terminal.

Non-blocking descriptors driven by the loop, so that neither a slow command nor a slow client stalls anything else.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import struct
import termios
from collections.abc import AsyncIterator

READ_BYTES = 32 << 10
END_OF_INPUT = b"\x04"


class Stdio:
    """What the command gets is *theirs*, to be closed here once it runs; close the rest when all is done."""

    def __init__(self, *, tty: bool, rows: int = 24, columns: int = 80) -> None:
        self.tty = tty
        if tty:
            master, slave = os.openpty()
            self.theirs: tuple[int, int, int] = (slave, slave, slave)
            self._input: int | None = master
            self._outputs = {1: master}
            self.resize(rows, columns)
        else:
            (stdin, self._input), (out, stdout), (err, stderr) = os.pipe(), os.pipe(), os.pipe()
            self.theirs = (stdin, stdout, stderr)
            self._outputs = {1: out, 2: err}
        for fd in {self._input, *self._outputs.values()}:
            os.set_blocking(fd, False)
        self._theirs_open = True

    @property
    def channels(self) -> tuple[int, ...]:
        return tuple(self._outputs)

    def close_theirs(self) -> None:
        if self._theirs_open:
            self._theirs_open = False
            for fd in set(self.theirs):
                os.close(fd)

    def close(self) -> None:
        """Close everything; for a terminal that hangs up whoever still has it."""
        self.close_theirs()
        for fd in {self._input, *self._outputs.values()} - {None}:
            os.close(fd)  # type: ignore[arg-type]  # None was taken out
        self._input, self._outputs = None, {}

    def resize(self, rows: int, columns: int) -> None:
        if self.tty and self._input is not None:
            fcntl.ioctl(self._input, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    async def write(self, data: bytes) -> None:
        """Give *data* to the command's input; empty means that there is no more. What it does not read is dropped."""
        if self._input is None:
            return
        if not data and not self.tty:
            os.close(self._input)
            self._input = None
            return
        data = data or END_OF_INPUT
        while data and self._input is not None:
            try:
                data = data[os.write(self._input, data) :]
            except BlockingIOError:
                await _ready(self._input, writing=True)
            except OSError as error:
                if error.errno not in (errno.EPIPE, errno.EIO):
                    raise
                return

    async def read(self, channel: int) -> AsyncIterator[bytes]:
        """Yield what the command writes to *channel* until it and all its children have closed it."""
        fd = self._outputs[channel]
        while True:
            try:
                data = os.read(fd, READ_BYTES)
            except BlockingIOError:
                await _ready(fd, writing=False)
                continue
            except OSError as error:
                if error.errno != errno.EIO:  # EIO: nobody has the terminal any more
                    raise
                return
            if not data:
                return
            yield data


async def _ready(fd: int, *, writing: bool) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    if writing:
        loop.add_writer(fd, ready.set)
    else:
        loop.add_reader(fd, ready.set)
    try:
        await ready.wait()
    finally:
        if writing:
            loop.remove_writer(fd)
        else:
            loop.remove_reader(fd)
