"""What a power cut leaves of state.db, whose commits are not all synced: SQLite's WAL, cut anywhere behind what was.

Reads the WAL's index (https://www.sqlite.org/walformat.html, section 2.1 of the -shm file) for how many frames count, and how many of
them a checkpoint has synced and copied. Frames behind the cut are gone, as they are when the kernel had not written them.
"""

from __future__ import annotations

import os
import random
import sqlite3
import struct
from pathlib import Path

from slum.ledger.state import State

FULL = 2
_HEADER_BYTES, _FRAME_HEADER_BYTES = 32, 24
_synced: dict[Path, tuple[bytes, int]] = {}
"""Of each state.db: the WAL's salts and how many of its frames were synced by a commit."""


def forget() -> None:
    """Another schedule begins."""
    _synced.clear()


def syncs(db: sqlite3.Connection) -> bool:
    """Tell whether a commit made now is synced."""
    (level,) = db.execute("PRAGMA synchronous").fetchone()
    return bool(level >= FULL)


def note_synced(path: Path) -> None:
    """All that state.db at *path* has committed is on the disk."""
    frames, salts, _ = _index(path)
    _synced[path] = (salts, frames)


def cut_off(state: State, chance: random.Random) -> tuple[Path, bytes, bytes]:
    """Return state.db's path and what a power cut leaves of it and of its WAL."""
    path = state.path
    frames, salts, copied = _index(path)
    before, count = _synced.get(path, (b"", 0))
    kept = max(copied, count if before == salts else 0)
    if chance.random() < 0.7:
        kept = chance.randint(kept, frames)
    wal = _wal(path).read_bytes() if frames else b""
    (page,) = struct.unpack(">H", path.read_bytes()[16:18])
    return path, path.read_bytes(), wal[: _HEADER_BYTES + kept * (_FRAME_HEADER_BYTES + page)]


def leave(found: tuple[Path, bytes, bytes]) -> None:
    path, pages, wal = found
    path.write_bytes(pages)
    _wal(path).write_bytes(wal)
    path.with_name(path.name + "-shm").unlink(missing_ok=True)
    # What has survived is on the disk, up to the last commit in it.
    (page,) = struct.unpack(">H", pages[16:18])
    frame_bytes = _FRAME_HEADER_BYTES + page
    kept = max(0, len(wal) - _HEADER_BYTES) // frame_bytes
    while kept and not any(wal[_HEADER_BYTES + (kept - 1) * frame_bytes :][4:8]):
        kept -= 1
    _synced[path] = (wal[16:24], kept)


def _wal(path: Path) -> Path:
    return path.with_name(path.name + "-wal")


def _index(path: Path) -> tuple[int, bytes, int]:
    """Return (frames that count, the WAL's salts, frames that a checkpoint has copied)."""
    try:
        descriptor = os.open(f"{path}-shm", os.O_RDONLY)
    except FileNotFoundError:
        return 0, b"", 0
    head = os.pread(descriptor, 100, 0)
    os.close(descriptor)
    (frames,), (copied,) = struct.unpack("=I", head[16:20]), struct.unpack("=I", head[96:100])
    return frames, head[32:40], copied
