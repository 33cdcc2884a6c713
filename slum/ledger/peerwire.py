"""What members of a ledger say to each other: msgpack frames behind a length, each type known, each size capped.

A frame is four bytes of length, big-endian, then one Message. The length is checked before anything is allocated, and is
small until the other side has said a hello that was accepted. Nothing here runs code that came from outside: there is no
pickle, and an entry can only be a command that is applied (REGULAR) or PySyncObj's no-op. Types and framing only: touches no
socket.
"""

from __future__ import annotations

import struct

import msgspec

from slum.frozen import Sparse
from slum.ledger.commands import Proposal

VERSION = 1
"""Of these frames; another one is refused in the hello."""
FRAME_BYTES_MAX = 8 << 20
"""4 MiB of entries, the last of which may be 1 MiB longer, and room."""
HELLO_BYTES_MAX = 4096
STASH_MAX = 300
REGULAR, NO_OP = 0, 1
_LENGTH = struct.Struct(">I")

Place = tuple[int, int]
"""(generation, epoch): which group a frame belongs to."""
LogEntry = tuple[bytes, int, int]
"""(command, index from 1, term), as in the journal."""


class _Message(Sparse, tag_field="t"):
    pass


class Hello(_Message, tag="hello"):
    """The first frame of each side."""

    version: int
    cluster: str
    member: str
    incarnation: str
    generation: int
    epoch: int
    lineage: str
    chain0: str
    """The chain before the first entry of this epoch: members that disagree about any outcome differ in it."""
    last_index: int
    last_term: int
    seq: int
    protocol: int
    run: str
    """Random, one a process."""
    rows_at: Place = (0, 0)
    rows: str = ""
    """The hash of all rows at the beginning of epoch *rows_at*."""

    @property
    def place(self) -> Place:
        return (self.generation, self.epoch)


class Refused(_Message, tag="refused"):
    """The last frame: this connection ends, and why."""

    why: str


class Append(_Message, tag="append"):
    place: Place
    term: int
    commit: int
    prev_index: int
    prev_term: int
    entries: tuple[LogEntry, ...] = ()


class NextIndex(_Message, tag="next"):
    place: Place
    term: int
    """The sender's term: PySyncObj's own reply carries none."""
    next: int
    reset: bool
    success: bool


class AskVote(_Message, tag="ask_vote"):
    place: Place
    term: int
    last_index: int
    last_term: int


class Vote(_Message, tag="vote"):
    place: Place
    term: int


class AskPreVote(_Message, tag="ask_pre_vote"):
    """Would you vote for me in the term after *term*? Nobody's term moves by it."""

    place: Place
    term: int
    round: int
    last_index: int
    last_term: int


class PreVote(_Message, tag="pre_vote"):
    place: Place
    round: int


class HigherTerm(_Message, tag="higher_term"):
    """My term is above yours; what you send in yours is ignored."""

    place: Place
    term: int


class Ping(_Message, tag="ping"):
    """Sent when nothing else was for a while: that I live, where I stand, what my clock says."""

    place: Place
    seq: int
    at: float
    rows_at: Place = (0, 0)
    rows: str = ""


class WantTail(_Message, tag="want_tail"):
    """Give me committed entries of epoch *place* after index *after*."""

    place: Place
    after: int


class Tail(_Message, tag="tail"):
    """Committed entries after *prev_index*; *gone* when I no longer have that epoch's journal.

    Then a copy is to be had, of *other* where one is named: whoever leads has more to do than others.
    """

    place: Place
    prev_index: int
    prev_term: int
    entries: tuple[LogEntry, ...] = ()
    gone: bool = False
    other: str = ""


class WantCopy(_Message, tag="want_copy"):
    """Give me bytes from *offset* of the copy of state.db called *name*; of one made beyond *place* when *name* is empty."""

    name: str
    offset: int
    place: Place = (0, 0)


class Part(_Message, tag="part"):
    """Bytes of a copy; an empty *name*: it is not ready yet, or no longer there.

    The last part carries the digest of them all, and has no bytes as long as that is not ready.
    """

    name: str
    offset: int
    size: int
    sha256: str
    data: bytes


class Relay(_Message, tag="relay"):
    """Proposals that came to a member that does not lead. Their answers come back through the log."""

    proposals: tuple[Proposal, ...]


class RelayRefused(_Message, tag="relay_refused"):
    request_ids: tuple[str, ...]
    code: str
    message: str
    hint: str = ""


Raft = Append | NextIndex | AskVote | Vote
OfEpoch = Append | NextIndex | AskVote | Vote | AskPreVote | PreVote | HigherTerm
Message = (
    Hello
    | Refused
    | Append
    | NextIndex
    | AskVote
    | Vote
    | AskPreVote
    | PreVote
    | HigherTerm
    | Ping
    | WantTail
    | Tail
    | WantCopy
    | Part
    | Relay
    | RelayRefused
)


class BadFrame(ValueError):
    """The other side does not speak this protocol; close the connection."""


_encode = msgspec.msgpack.Encoder().encode
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def pack(message: Message) -> bytes:
    body = _encode(message)
    return _LENGTH.pack(len(body)) + body


def unpack(body: bytes) -> Message:
    """Return the message of one frame; raise BadFrame unless it is one that a sound member may send."""
    try:
        message = _decoder.decode(body)
    except msgspec.MsgspecError as error:
        raise BadFrame(str(error)) from error
    if isinstance(message, Append | Tail):
        check_entries(message)
    return message


def check_entries(message: Append | Tail) -> None:
    """Raise BadFrame unless the entries follow *prev_index* one by one and are of types that may be applied."""
    term = message.prev_term
    if message.prev_index < 1:
        raise BadFrame(f"entries after index {message.prev_index}")
    for index, (command, found, entry_term) in enumerate(message.entries, message.prev_index + 1):
        if found != index or entry_term < term:
            raise BadFrame(f"entry {found} of term {entry_term} where {index} of at least {term} was due")
        if not command or command[0] not in (REGULAR, NO_OP) or (command[0] == NO_OP and len(command) != 1):
            raise BadFrame(f"entry {found} is of a type that is never applied")
        term = entry_term
    if isinstance(message, Append) and term > message.term:
        raise BadFrame(f"an entry of term {term} in a message of term {message.term}")


class Splitter:
    """Cuts a stream of bytes into frames of at most *bytes_max*, which may be raised once a hello was accepted."""

    def __init__(self, bytes_max: int = HELLO_BYTES_MAX) -> None:
        self.bytes_max = bytes_max
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        self._buffer += data

    def take(self) -> bytes | None:
        """Return the next whole frame, or None; raise BadFrame for one that is announced as too long."""
        if len(self._buffer) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._buffer)
        if length > self.bytes_max:
            raise BadFrame(f"a frame of {length} bytes, at most {self.bytes_max} are taken")
        end = _LENGTH.size + length
        if end > len(self._buffer):
            return None
        frame = bytes(self._buffer[_LENGTH.size : end])
        del self._buffer[:end]
        return frame
