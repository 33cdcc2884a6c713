"""What the ledger process and its callers say to each other over the unix socket: msgpack frames behind a length.

A connection carries many calls at once; replies come in any order and name their call. A frame is four bytes of length,
big-endian, and at most FRAME_BYTES_MAX of msgpack. Types and framing only: touches no socket.
"""

from __future__ import annotations

import struct

import msgspec

from slum.errors import BY_CODE, SlumError
from slum.frozen import Sparse
from slum.ledger.commands import ENTRY_BYTES_MAX, LeaderInfo, Member, Proposal, Result
from slum.ledger.status import LedgerStatus

FRAME_BYTES_MAX = ENTRY_BYTES_MAX + (64 << 10)
CALLS_MAX = 1024
"""Unanswered calls a connection; beyond it nothing more is read from it."""
_LENGTH = struct.Struct(">I")


class Propose(Sparse, tag="propose", tag_field="op"):
    proposal: Proposal


class TakeBarrier(Sparse, tag="barrier", tag_field="op"):
    pass


class WaitFor(Sparse, tag="wait", tag_field="op"):
    """Answered once the applied seq is above *seq*, or after *deadline_s*."""

    seq: int
    deadline_s: float


class AskLeader(Sparse, tag="leader", tag_field="op"):
    pass


class AskMembers(Sparse, tag="members", tag_field="op"):
    pass


class AskChange(Sparse, tag="change", tag_field="op"):
    """Add or remove one member; answered with the new members once they are in force."""

    add: Member | None = None
    remove: str | None = None


class AskStatus(Sparse, tag="status", tag_field="op"):
    pass


Operation = Propose | TakeBarrier | WaitFor | AskLeader | AskMembers | AskChange | AskStatus


class Call(Sparse):
    id: int
    operation: Operation


class Failure(Sparse):
    """A SlumError on its way."""

    code: str
    message: str
    hint: str = ""


class Reply(Sparse):
    """Exactly one of the fields beside *id* is set."""

    id: int
    result: Result | None = None
    seq: int | None = None
    leader: LeaderInfo | None = None
    members: tuple[Member, ...] | None = None
    status: LedgerStatus | None = None
    failure: Failure | None = None


class BadFrame(ValueError):
    """The other side does not speak this protocol; close the connection."""


_encode = msgspec.msgpack.Encoder().encode
_call = msgspec.msgpack.Decoder(Call)
_reply = msgspec.msgpack.Decoder(Reply)


class Splitter:
    """Cuts a stream of bytes into frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Return the frames that *data* completes; raise BadFrame for one that is too long."""
        self._buffer += data
        found, at = [], 0
        while len(self._buffer) - at >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, at)
            if length > FRAME_BYTES_MAX:
                raise BadFrame(f"a frame of {length} bytes, at most {FRAME_BYTES_MAX} are taken")
            end = at + _LENGTH.size + length
            if end > len(self._buffer):
                break
            found.append(bytes(self._buffer[at + _LENGTH.size : end]))
            at = end
        del self._buffer[:at]
        return found


def pack(message: Call | Reply) -> bytes:
    body = _encode(message)
    return _LENGTH.pack(len(body)) + body


def unpack_call(frame: bytes) -> Call:
    try:
        return _call.decode(frame)
    except msgspec.MsgspecError as error:
        raise BadFrame(str(error)) from error


def unpack_reply(frame: bytes) -> Reply:
    try:
        return _reply.decode(frame)
    except msgspec.MsgspecError as error:
        raise BadFrame(str(error)) from error


def to_failure(error: SlumError) -> Failure:
    return Failure(code=error.code, message=error.message, hint=error.hint)


def to_error(failure: Failure) -> SlumError:
    return BY_CODE.get(failure.code, SlumError)(failure.message, hint=failure.hint)
