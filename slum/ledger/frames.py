"""The journal's format, as pure functions over bytes: file head, numbered frames with a CRC each, records in a frame.

    file    head (512 bytes: magic, identity as msgpack, CRC), then frames, then zeros as far as the file was allocated
    frame   header (magic, number, length, CRC of the body, CRC of the header, mark), body, one end byte
    body    records: entry, truncate-from, term and vote, commit index

Frames are written one at a time, each made durable before the next is begun, so at most the last one can be torn. A torn
frame is short, ends in zeros, or lacks whole sectors: it was never synced, so nobody was told of it, and it is cut. All
else that does not check is damage. The mark and the end byte differ from zero in many bits, so one flipped bit never
makes a whole frame look torn; header CRCs are salted per file, so no content can pass for a frame. Never touches a disk.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import msgspec

from slum.frozen import Frozen
from slum.ledger.refusal import Damaged

HEAD_BYTES = 512
SECTOR_BYTES = 512
_FILE_MAGIC = b"slumjrn1"
_FRAME_MAGIC = b"\xf5SlF"
_MARK = 0xA5
_END = b"\x5a"
_FRAME = struct.Struct("<4sQIIIB")
_FRAME_CRC_AT = 20
_ENTRY = struct.Struct("<BQI")
_TRUNCATE = struct.Struct("<BQ")
_VOTE = struct.Struct("<BQH")
_COMMIT = struct.Struct("<BQ")
_NO_VOTE = 0xFFFF
_LOOK_BYTES = 1 << 16


class JournalId(Frozen):
    """Which epoch a journal belongs to; *salt* is random per file."""

    cluster: str
    generation: int
    epoch: int
    lineage: str
    salt: bytes


class EntryAt(NamedTuple):
    """An entry of *term*; its command is *length* bytes at *offset* of the file."""

    term: int
    offset: int
    length: int


class Truncate(NamedTuple):
    """Entries from position *keep* on are gone."""

    keep: int


class Vote(NamedTuple):
    term: int
    voted_for: str | None


class Commit(NamedTuple):
    upto: int


Record = EntryAt | Truncate | Vote | Commit


class Scan(NamedTuple):
    frames: int
    end: int
    """Where the next frame goes."""
    torn: bool
    """Bytes of a frame that was never synced lie behind *end*."""


def encode_head(identity: JournalId) -> bytes:
    """Return the file's first HEAD_BYTES."""
    meta = msgspec.msgpack.encode(identity)
    head = _FILE_MAGIC + struct.pack("<I", len(meta)) + meta
    head += bytes(HEAD_BYTES - 4 - len(head))
    return head + struct.pack("<I", zlib.crc32(head))


def decode_head(head: bytes, name: str) -> JournalId:
    """Return whose journal this is; raise Damaged when the head does not check."""
    if len(head) < HEAD_BYTES or zlib.crc32(head[:-4]) != struct.unpack("<I", head[-4:])[0]:
        raise Damaged(f"{name}: the journal's head is damaged at offset 0")
    if head[:8] != _FILE_MAGIC:
        raise Damaged(f"{name}: not a journal of this version of slum")
    (length,) = struct.unpack("<I", head[8:12])
    return msgspec.msgpack.decode(head[12 : 12 + length], type=JournalId)


def entry_record(term: int, command: bytes) -> bytes:
    return _ENTRY.pack(1, term, len(command)) + command


def truncate_record(keep: int) -> bytes:
    return _TRUNCATE.pack(2, keep)


def vote_record(vote: Vote) -> bytes:
    name = vote.voted_for.encode() if vote.voted_for is not None else None
    return _VOTE.pack(3, vote.term, _NO_VOTE if name is None else len(name)) + (name or b"")


def commit_record(index: int) -> bytes:
    return _COMMIT.pack(4, index)


def encode_frame(number: int, body: bytes, salt: bytes) -> bytes:
    start = struct.pack("<4sQII", _FRAME_MAGIC, number, len(body), zlib.crc32(body))
    return start + struct.pack("<IB", zlib.crc32(salt + start), _MARK) + body + _END


def body_at(frame_at: int) -> int:
    """Return the offset of the body of the frame that begins at *frame_at*."""
    return frame_at + _FRAME.size


def entry_command_at(record_at: int) -> int:
    return record_at + _ENTRY.size


def scan(view: memoryview, salt: bytes, name: str, take: Callable[[Record], None]) -> Scan:
    """Give all records in *view* (a whole file) to *take*, in order; raise Damaged for a bad frame that is not torn."""
    frames, at = whole(view, HEAD_BYTES, 0, salt, name, take)
    _require_last(view, at, frames + 1, salt, name)
    return Scan(frames, at, torn=not _zeros(view, at, len(view)))


def whole(
    view: memoryview, at: int, frames: int, salt: bytes, name: str, take: Callable[[Record], None]
) -> tuple[int, int]:
    """Give the records of all whole frames from *at* on, which *frames* precede, to *take*; return (frames, end) then.

    *view* may be a part of the file that begins at a sector. Raise Damaged for a frame that is neither whole nor torn.
    """
    while True:
        length = _whole_frame(view, at, frames + 1, salt, name)
        if length is None:
            return frames, at
        body = body_at(at)
        for record in _records(view, body, body + length, name):
            take(record)
        frames += 1
        at = body + length + 1


def is_longer(view: memoryview, at: int) -> bool:
    """Tell whether the frame that begins at *at* ends behind *view*."""
    header = bytes(view[at : body_at(at)])
    if len(header) < _FRAME.size:
        return True
    return header[-1] == _MARK and body_at(at) + _FRAME.unpack(header)[2] + 1 > len(view)


def _whole_frame(view: memoryview, at: int, number: int, salt: bytes, name: str) -> int | None:
    """Return the body's length of frame *number* at *at*, or None when it is absent or torn."""
    body = body_at(at)
    header = bytes(view[at:body])
    if len(header) < _FRAME.size or header[-1] == 0 or _lacks_sector(view, at, body):
        return None
    magic, found, length, body_crc, header_crc, mark = _FRAME.unpack(header)
    if (magic, mark) != (_FRAME_MAGIC, _MARK) or header_crc != zlib.crc32(salt + header[:_FRAME_CRC_AT]):
        raise Damaged(f"{name}: the header of frame {number} is damaged at offset {at}", offset=at)
    if found != number:
        raise Damaged(f"{name}: frame {found} where {number} was due at offset {at}", offset=at)
    end = body + length
    if end + 1 > len(view):
        return None
    if view[end : end + 1] == _END and zlib.crc32(view[body:end]) == body_crc:
        return int(length)
    if view[end] == 0 or _lacks_sector(view, at, end + 1):
        return None
    raise Damaged(f"{name}: frame {number} is damaged at offset {at} ({length} bytes)", offset=at)


def _lacks_sector(view: memoryview, start: int, end: int) -> bool:
    """Tell whether a sector's whole share of [start, end) is zero: a write that a power cut kept from the disk."""
    at = start
    while at < end:
        until = min(end, (at // SECTOR_BYTES + 1) * SECTOR_BYTES)
        if _zeros(view, at, until):
            return True
        at = until
    return False


def _zeros(view: memoryview, start: int, end: int) -> bool:
    return all(not bytes(view[at : min(end, at + _LOOK_BYTES)]).strip(b"\0") for at in range(start, end, _LOOK_BYTES))


def _require_last(view: memoryview, at: int, number: int, salt: bytes, name: str) -> None:
    """Raise Damaged when a whole header of a later frame follows *at*: then the bad one in between had been synced."""
    for found in _finds(view, _FRAME_MAGIC, at + 1):
        header = bytes(view[found : found + _FRAME.size])
        if len(header) == _FRAME.size:
            _, later, _, _, crc, _ = _FRAME.unpack(header)
            if crc == zlib.crc32(salt + header[:_FRAME_CRC_AT]):
                raise Damaged(f"{name}: frame {number} at offset {at} is gone, but frame {later} follows", offset=at)


def _finds(view: memoryview, what: bytes, start: int) -> Iterator[int]:
    """Yield each offset of *what* from *start* on, searching in copies of windows that overlap.

    Not with mmap.find: CPython up to 3.11.2 reads one byte beyond the end there, which kills the process when the file
    ends with its last page (bytes end with a NUL that is never searched).
    """
    for low in range(start, len(view), _LOOK_BYTES):
        window = bytes(view[low : low + _LOOK_BYTES + len(what) - 1])
        at = window.find(what)
        while at >= 0:
            yield low + at
            at = window.find(what, at + 1)


def _records(view: memoryview, at: int, end: int, name: str) -> Iterator[Record]:
    while at < end:
        kind = view[at]
        if kind == 1:
            _, term, length = _ENTRY.unpack_from(view, at)
            at += _ENTRY.size
            yield EntryAt(term, at, length)
            at += length
        elif kind == 2:
            yield Truncate(_TRUNCATE.unpack_from(view, at)[1])
            at += _TRUNCATE.size
        elif kind == 3:
            _, term, length = _VOTE.unpack_from(view, at)
            at += _VOTE.size
            size = 0 if length == _NO_VOTE else length
            yield Vote(term, None if length == _NO_VOTE else bytes(view[at : at + size]).decode())
            at += size
        elif kind == 4:
            yield Commit(_COMMIT.unpack_from(view, at)[1])
            at += _COMMIT.size
        else:
            raise Damaged(f"{name}: a record of unknown type {kind} at offset {at}", offset=at)
