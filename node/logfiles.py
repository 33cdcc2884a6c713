"""The files of one log, as the keeper leaves them: which there are, opened without losing any to a rotation, and compressed.

PATH is written; PATH.1 (newest) to PATH.<keep> are rotated, and any of these may have become PATH.<n>.zst. Each line is
``<unix seconds> <text>``, or ``<unix seconds>/<generation> <text>``. The keeper renames while others read: a file is known by its inode, never by its name alone.
"""

from __future__ import annotations

import gzip
import os
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, cast

LINE_BYTES_MAX = 64 << 10
"""A longer line is cut in two; the keeper's own limit is lower."""
IDLE_S = 60.0
"""A rotated file is compressed once it is older: who follows has read it by then, and it is not about to be renamed."""
COMPRESSION_LEVEL = 3
_CHUNK = 1 << 18
_NAME = re.compile(r"current(?:\.([0-9]{1,4}))?(\.zst|\.gz)?")


def numbered(folder: Path) -> dict[int, Path]:
    """Return the log's files by number, 0 being the one that is written. A plain file wins over its compressed copy."""
    found: dict[int, Path] = {}
    try:
        names = sorted(os.listdir(folder), key=len, reverse=True)
    except FileNotFoundError:
        return found
    for name in names:
        match = _NAME.fullmatch(name)
        if match is not None:
            found[int(match[1] or 0)] = folder / name
    return found


def open_all(folder: Path) -> list[BinaryIO]:
    """Open every file of the log as one moment saw them, oldest first; the caller closes them."""
    for _ in range(20):
        with ExitStack() as undo:
            opened: list[BinaryIO] = []
            try:
                for _, path in sorted(numbered(folder).items()):
                    opened.append(undo.enter_context(open(path, "rb")))
            except FileNotFoundError:
                continue
            if [_inode(path) for _, path in sorted(numbered(folder).items())] == [_inode_of(file) for file in opened]:
                undo.pop_all()
                return opened[::-1]
    raise OSError(f"the log in {folder} rotates faster than it can be opened")


def lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield the whole lines of *file*, decompressed, without their ends, and at last what has no end yet."""
    rest = b""
    for chunk in chunks(file):
        *whole, rest = (rest + chunk).split(b"\n")
        yield from whole
        if len(rest) > LINE_BYTES_MAX:
            yield rest
            rest = b""
    if rest:
        yield rest


def chunks(file: BinaryIO) -> Iterator[bytes]:
    """Yield the contents of *file*, decompressed, from where it is to its end now."""
    start = file.peek(4)[:4] if hasattr(file, "peek") else b""
    source = file
    if file.tell() == 0 and start == b"\x28\xb5\x2f\xfd":
        import zstandard

        reader = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True, closefd=False)
        source = cast(BinaryIO, reader)
    elif file.tell() == 0 and start[:2] == b"\x1f\x8b":
        source = cast(BinaryIO, gzip.GzipFile(fileobj=file))
    while chunk := source.read(_CHUNK):
        yield chunk


def successor(folder: Path, file: BinaryIO) -> BinaryIO | None:
    """Open the file that was begun after the rotated *file*; None when *file* is not among the plain ones any more."""
    for _ in range(20):
        mine = _inode_of(file)
        by_number = numbered(folder)
        number = next((n for n, path in by_number.items() if _inode(path) == mine), None)
        if number is None:
            return None
        try:
            found = open(by_number[number - 1], "rb")  # noqa: SIM115 - the caller's to close
        except (FileNotFoundError, KeyError):
            continue
        if _inode(by_number[number]) == mine:
            return found
        found.close()
    return None


def compressible(logs: Path, now: float) -> list[Path]:
    """Return all rotated files below *logs* that are plain and have been left alone for IDLE_S."""
    found = []
    for folder, folders, _files in os.walk(logs):
        for number, path in numbered(Path(folder)).items():
            if number and path.suffix not in (".zst", ".gz") and _idle(path, now):
                found.append(path)
        folders.sort()
    return found


def compress(path: Path) -> bool:
    """Replace *path* by *path*.zst; False when it was renamed meanwhile, and then nothing has changed.

    The keeper may rename at any moment. So the copy gets its name last, in no other's place, and *path* is only removed
    when it still is the file that was copied; a copy that got a newer file's name is taken away again. What this does not
    stand is two rotations within some microseconds; files that are left alone for IDLE_S are not rotated so.
    """
    import zstandard

    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(path, "rb") as source, open(unfinished, "xb") as out:
            inode = os.fstat(source.fileno()).st_ino
            os.fchmod(out.fileno(), 0o600)
            zstandard.ZstdCompressor(level=COMPRESSION_LEVEL).copy_stream(source, out)
            out.flush()
            os.fsync(out.fileno())
            os.utime(out.fileno(), ns=(os.fstat(source.fileno()).st_mtime_ns,) * 2)
        copy = os.stat(unfinished).st_ino
        if _inode(path) != inode:
            return False
        os.link(unfinished, path.with_name(f"{path.name}.zst"))
        if _take_away(path, inode):
            return True
        for name in path.parent.glob("current.*.zst"):
            if _inode(name) == copy:
                name.unlink()
        return False
    except (FileNotFoundError, FileExistsError):
        return False
    finally:
        unfinished.unlink(missing_ok=True)


def compress_all(logs: Path) -> int:
    """Compress all that is compressible; return how many files were."""
    return sum(compress(path) for path in compressible(logs, time.time()))


def _take_away(path: Path, inode: int) -> bool:
    """Remove *path* if it is the file *inode*; looked at after it was renamed, so never another one."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    path.rename(aside)
    if _inode(aside) != inode:
        os.link(aside, path)
        aside.unlink()
        return False
    aside.unlink()
    return True


def _idle(path: Path, now: float) -> bool:
    try:
        return now - path.stat().st_mtime > IDLE_S
    except FileNotFoundError:
        return False


def _inode_of(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_ino


def _inode(path: Path) -> int | None:
    try:
        return os.stat(path).st_ino
    except FileNotFoundError:
        return None
