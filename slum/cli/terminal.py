"""One command's terminal over a WebSocket of the API, on its unix socket or over TLS: input, output, window size, exit status.

A single loop on poll(2): wsproto frames one way, standard input the other, neither able to stall the other. With a terminal
it is put into raw mode, so that every key (ctrl-C too) reaches the far side, and is always put back.
"""

from __future__ import annotations

import os
import selectors
import signal
import sys
import termios
import tty as tty_modes
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from types import FrameType
from urllib.parse import urlencode

import msgspec
from wsproto import ConnectionType, WSConnection, events
from wsproto.utilities import ProtocolError

from slum import api, wire
from slum.answers import problem_of
from slum.errors import SlumError, Unhealthy, Unreachable
from slum.reach import Link, Reach

INPUT_BYTES = 64 << 10
BACKLOG_BYTES_MAX = 256 << 10
"""More input than this is not read while the far side does not take what was sent."""
CONNECT_S = 10.0


def attach(at: Reach, path: str, query: list[tuple[str, str]], *, terminal: bool) -> int:
    """Run one WebSocket conversation at *path* and return the command's exit status (128 + n for signal n).

    Raises what the server refused with, Unreachable when the connection is lost, and Unhealthy when the command could not
    be started.
    """
    if terminal:
        columns, rows = os.get_terminal_size(0)
        query = [*query, ("tty", "1"), ("rows", str(rows)), ("columns", str(columns))]
    with ExitStack() as stack:
        link = stack.enter_context(closing(at.dial(CONNECT_S)))
        session = _Session(link, f"/v1/{path}?{urlencode(query)}")
        session.open()
        if terminal:
            stack.enter_context(_raw_mode())
        return session.talk(stack.enter_context(_resized()) if terminal else None)


class _Session:
    def __init__(self, link: Link, target: str) -> None:
        self._link = link
        self._target = target
        self._frames = WSConnection(ConnectionType.CLIENT)
        self._out = bytearray()
        self._partial = bytearray()
        self._end: wire.StreamEnd | None = None
        self._closed = False
        self._deaf = False
        """The far side takes nothing any more; what it said is still read."""

    def open(self) -> None:
        """Shake hands; raises the Problem that the server refused with."""
        self._send(events.Request(host="slum", target=self._target))
        self._link.sendall(self._out)
        self._out.clear()
        refused, body = 0, b""
        while True:
            data = self._hear()
            for event in self._frames.events():
                if isinstance(event, events.AcceptConnection):
                    self._take()
                    return
                if isinstance(event, events.RejectConnection):
                    refused = event.status_code
                    if not event.has_body:
                        raise problem_of(refused, b"")
                elif isinstance(event, events.RejectData):
                    body += event.data
                    if event.body_finished:
                        raise problem_of(refused, body)
            if not data:
                raise Unreachable("the control plane closed the connection", hint="`slum status`, then again")

    def _hear(self) -> bytes:
        """Take in what came and return it; b"" when the connection is over, however it ended."""
        try:
            data = self._link.recv(INPUT_BYTES)
            self._frames.receive_data(data or None)
        except BlockingIOError:
            raise
        except (OSError, ProtocolError):
            return b""
        return data

    def talk(self, resized: int | None) -> int:
        """Carry bytes until the far side says how the command ended."""
        self._link.setblocking(False)
        with selectors.PollSelector() as watched:
            watched.register(self._link, selectors.EVENT_READ)
            reading = False
            at_end = False
            if resized is not None:
                watched.register(resized, selectors.EVENT_READ)
            while not (self._end or self._closed):
                want = not (at_end or self._deaf) and len(self._out) < BACKLOG_BYTES_MAX
                if want != reading:
                    (watched.register(0, selectors.EVENT_READ) if want else watched.unregister(0))
                    reading = want
                writing = selectors.EVENT_WRITE if self._out else 0
                watched.modify(self._link, selectors.EVENT_READ | writing)
                for key, ready in watched.select():
                    if key.fd == 0:
                        data = os.read(0, INPUT_BYTES)
                        at_end = not data
                        self._say(wire.StreamData(data=data, channel=0))
                    elif key.fd == resized:
                        os.read(resized, 512)
                        columns, rows = os.get_terminal_size(0)
                        self._say(wire.StreamResize(rows=rows, columns=columns))
                    else:
                        self._exchange(ready)
        return self._status()

    def _exchange(self, ready: int) -> None:
        """Read before writing: a far side that takes no more may have said its last word already."""
        if ready & ~selectors.EVENT_WRITE:
            try:
                data = self._hear()
            except BlockingIOError:
                return
            self._take()
            if not data:
                self._closed = self._deaf = True
        if ready & selectors.EVENT_WRITE and not self._deaf:
            try:
                del self._out[: self._link.send(self._out)]
            except BlockingIOError:
                return
            except OSError:
                self._deaf = True
                self._out.clear()

    def _take(self) -> None:
        for event in self._frames.events():
            if isinstance(event, events.BytesMessage):
                self._partial += event.data
                if event.message_finished:
                    message = wire.on_stream.decode(self._partial)
                    self._partial = bytearray()
                    self._obey(message)
            elif isinstance(event, events.Ping):
                self._send(event.response())
            elif isinstance(event, events.CloseConnection):
                self._closed = self._deaf = True
                self._out.clear()

    def _obey(self, message: wire.OnStream) -> None:
        if isinstance(message, wire.StreamData):
            _write(2 if message.channel == 2 else 1, message.data)
        elif isinstance(message, wire.StreamEnd):
            self._end = message

    def _say(self, message: wire.OnStream) -> None:
        self._send(events.BytesMessage(data=wire.encoder.encode(message)))

    def _send(self, event: events.Event) -> None:
        if not self._deaf:
            self._out += self._frames.send(event)

    def _status(self) -> int:
        if self._end is None:
            raise Unreachable(
                "the connection was lost before the command ended; whether it still runs is not known",
                hint="`slum status` shows whether control plane and machine are there",
            )
        if self._end.status is None:
            raise _failed(self._end.error)
        return self._end.status if self._end.status >= 0 else 128 - self._end.status


def _failed(error: str) -> SlumError:
    try:
        problem = msgspec.json.decode(error, type=api.Problem)
    except msgspec.DecodeError:
        return Unhealthy(error or "the command could not be run", hint="`slum ps` shows what runs")
    return Unhealthy(problem.message, hint=problem.hint)


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


@contextmanager
def _raw_mode() -> Iterator[None]:
    """Give every key to the far side; the terminal is put back also when we are told to end."""
    before = termios.tcgetattr(0)

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    old = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        tty_modes.setraw(0, termios.TCSADRAIN)  # the default would drop what was typed ahead
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)
        for number, handler in old.items():
            signal.signal(number, handler)


@contextmanager
def _resized() -> Iterator[int]:
    """Give a descriptor that becomes readable when the window changes its size."""
    reading, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def changed(number: int, frame: FrameType | None) -> None:
        try:
            os.write(writing, b"x")
        except BlockingIOError:
            return  # full: it is readable already

    old = signal.signal(signal.SIGWINCH, changed)
    try:
        yield reading
    finally:
        signal.signal(signal.SIGWINCH, old)
        os.close(reading)
        os.close(writing)
