"""Unpack one bundle, as a program: ``python -m slum.node.unpack BLOB DIGEST FOLDER GID``.

A bundle comes from whoever may apply a fleet and is unpacked as root, so nothing in it is believed: its digest is
compared before a byte is used, and a name that leads out, a link that does, a device, a set-uid bit, a name given
twice, more than BYTES_MAX or FILES_MAX end it. It is unpacked beside FOLDER, brought to disk and renamed, so FOLDER is
there whole or not at all. A process of its own keeps the agent small and lets memory and time be bounded.
"""

from __future__ import annotations

import hashlib
import os
import resource
import stat
import sys
import tarfile
from pathlib import Path
from typing import BinaryIO, cast

import zstandard

from slum.node import trees

BYTES_MAX = 1 << 30
FILES_MAX = 100_000
NAME_BYTES_MAX = 4096
DEPTH_MAX = 110
MEMORY_BYTES_MAX = 1 << 30
WINDOW_BYTES_MAX = 1 << 27
CHUNK_BYTES = 1 << 20
UNFINISHED = ".new-"


class Refused(Exception):
    """The bundle is not one that slum packed."""


def unpack(blob: Path, digest: str, folder: Path, gid: int, *, files_max: int = FILES_MAX) -> None:
    """Make *folder* hold the contents of *blob*, readable by *gid* (negative: the caller's); Refused when it is unsafe.

    A *folder* that is there already stays as it is.
    """
    with open(blob, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != digest:
            raise Refused(f"its contents have digest {found[:12]}, not {digest[:12]}")
        file.seek(0)
        unfinished = folder.with_name(f"{UNFINISHED}{os.urandom(8).hex()}")
        unfinished.mkdir(mode=0o700)
        try:
            _Unpacking(unfinished, gid, files_max).run(file)
            os.chown(unfinished, -1, gid)
            unfinished.chmod(trees.FOLDER_MODE)
            trees.sync(unfinished)
            try:
                unfinished.rename(folder)
            except OSError:
                if not folder.is_dir():
                    raise
            trees.sync_folder(folder.parent)
        finally:
            trees.remove(unfinished)


class _Unpacking:
    """One archive on its way into *root*, which nobody else can write to."""

    def __init__(self, root: Path, gid: int, files_max: int) -> None:
        self._root = root
        self._gid = gid
        self._files_max = files_max
        self._folders = {""}
        self._links: list[str] = []
        self._count = 0
        self._bytes = 0

    def run(self, file: BinaryIO) -> None:
        decompressor = zstandard.ZstdDecompressor(max_window_size=WINDOW_BYTES_MAX)
        try:
            with decompressor.stream_reader(file, read_across_frames=True, closefd=False) as stream:
                source = cast(BinaryIO, _Bounded(stream))
                with tarfile.open(fileobj=source, mode="r|", encoding="utf-8", errors="strict") as tar:
                    for member in tar:
                        self._take(tar, member)
        except (zstandard.ZstdError, tarfile.TarError, EOFError, UnicodeError) as error:
            raise Refused(f"it is damaged: {error}") from error
        for link in self._links:
            inside = Path(os.path.realpath(self._root / link))
            if not inside.is_relative_to(os.path.realpath(self._root)):
                raise Refused(f"the link {link!r} leads out of it")

    def _take(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        name = _checked(member.name)
        if stat.S_IMODE(member.mode) & trees.SPECIAL_BITS:
            raise Refused(f"{name!r} has a set-uid, set-gid or sticky bit")
        self._make_folders(name.rpartition("/")[0])
        if member.isdir():
            self._make_folders(name)
            return
        self._counted()
        try:
            if member.issym():
                self._link(name, member.linkname)
            elif member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse():
                self._write(tar, member, name)
            else:
                raise Refused(f"{name!r} is neither a file, a folder nor a symbolic link")
        except FileExistsError as error:
            raise Refused(f"{name!r} is in it twice") from error

    def _make_folders(self, name: str) -> None:
        if name in self._folders:
            return
        self._make_folders(name.rpartition("/")[0])
        self._counted()
        path = self._root / name
        try:
            path.mkdir(mode=0o700)
        except FileExistsError as error:
            raise Refused(f"{name!r} is in it twice, once as a folder") from error
        os.chown(path, -1, self._gid)
        path.chmod(trees.FOLDER_MODE)
        self._folders.add(name)

    def _counted(self) -> None:
        self._count += 1
        if self._count > self._files_max:
            raise Refused(f"it holds more than {self._files_max:,} files")

    def _link(self, name: str, target: str) -> None:
        if target.startswith("/") or "\0" in target or len(target.encode()) > NAME_BYTES_MAX or not target:
            raise Refused(f"the link {name!r} -> {target!r} leads out of it")
        os.symlink(target, self._root / name)
        self._links.append(name)

    def _write(self, tar: tarfile.TarFile, member: tarfile.TarInfo, name: str) -> None:
        self._bytes += member.size
        if self._bytes > BYTES_MAX:
            raise Refused(f"it holds more than {BYTES_MAX >> 20} MiB")
        source = tar.extractfile(member)
        if source is None:
            raise Refused(f"{name!r} has no contents")
        left = member.size
        with source, open(self._root / name, "xb") as out:
            while left and (chunk := source.read(min(left, CHUNK_BYTES))):
                out.write(chunk)
                left -= len(chunk)
            os.fchown(out.fileno(), -1, self._gid)
            os.fchmod(out.fileno(), 0o550 if member.mode & 0o111 else 0o440)
        if left:
            raise Refused(f"{name!r} is cut short")


class _Bounded:
    """A stream that ends in Refused once far more came out of it than files may hold: headers count as well."""

    def __init__(self, stream: zstandard.ZstdDecompressionReader) -> None:
        self._stream = stream
        self._left = BYTES_MAX + FILES_MAX * 2 * tarfile.BLOCKSIZE

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise Refused(f"it unpacks to more than {BYTES_MAX >> 20} MiB")
        return data


def _checked(name: str) -> str:
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts) or "\0" in name:
        raise Refused(f"the name {name!r} leads out of it")
    if len(name.encode()) > NAME_BYTES_MAX or len(parts) > DEPTH_MAX:
        raise Refused(f"the name {name[:40]!r}... is too long")
    return name


def main(arguments: list[str]) -> int:
    """Unpack one bundle; 0, or 1 with the reason as the last line of stderr."""
    blob, digest, folder, gid = arguments
    os.nice(trees.NICENESS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES_MAX, MEMORY_BYTES_MAX))
    try:
        unpack(Path(blob), digest, Path(folder), int(gid))
    except (Refused, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except MemoryError:
        sys.stderr.write("it needs too much memory to unpack\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
