"""Pack a service's source folder into a bundle: a tar.zst with the same bytes for the same contents, named by sha256.

Names sorted, times and owners zero, modes 0644 or 0755, one compression level on one thread without checksum. What a
machine could not safely unpack is refused here with its name: devices, FIFOs, sockets, absolute links and links that
lead out of the folder. The folder may change underneath: everything is opened relative to descriptors, without
following links, and a file that is not what it was at the listing is an error, never a torn bundle. It must never write
inside the folder; the bundle goes to *out*.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import msgspec
import pathspec
import zstandard

from slum.errors import ConfigError
from slum.frozen import Frozen
from slum.model import Fleet
from slum.problem import shown

BYTES_MAX = 256 << 20
"""Of the tar, and so of the bundle."""
FILES_MAX = 100_000
DEPTH_MAX = 100
IGNORE_FILE = ".slumignore"
IGNORE_BYTES_MAX = 64 << 10
ALWAYS_IGNORED = frozenset({".git"})
COMPRESSION_LEVEL = 6
LINK_HOPS_MAX = 40
_CHUNK = 1 << 20


class Packed(Frozen):
    """A bundle: *digest* is the sha256 of its compressed bytes, *bytes* their count, *files* what it holds."""

    digest: str
    bytes: int
    files: int


class _Entry(Frozen):
    """A file, folder or link as the listing saw it; *path* is relative, with slashes."""

    path: str
    mode: int
    size: int = 0
    inode: int = 0
    changed_ns: int = 0
    target: str = ""


def pack(folder: Path, out: Path, *, files_max: int = FILES_MAX) -> Packed:
    """Write the bundle of *folder* to *out* and return its name; ConfigError when the folder cannot be packed.

    *out* is replaced when it exists, and removed when packing fails. May be repeated: equal contents, equal bytes.
    """
    try:
        root = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(f"source {folder}: {_why(error)}") from error
    try:
        entries = _listing(root, folder, files_max)
        try:
            return _write(root, folder, entries, out)
        except BaseException:
            out.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise ConfigError(f"source {folder}: {error.filename or out}: {_why(error)}") from error
    finally:
        os.close(root)


def attach(fleet: Fleet, bundles: Mapping[tuple[str, str], str]) -> Fleet:
    """Return *fleet* with each service's bundle digest set from (tenement, service) -> digest."""
    return msgspec.structs.replace(
        fleet,
        tenements=tuple(
            msgspec.structs.replace(
                tenement,
                services=tuple(
                    msgspec.structs.replace(service, bundle=bundles[tenement.name, service.name])
                    if (tenement.name, service.name) in bundles
                    else service
                    for service in tenement.services
                ),
            )
            for tenement in fleet.tenements
        ),
    )


def _why(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def _listing(root: int, folder: Path, files_max: int) -> tuple[_Entry, ...]:
    """Return all that is to be packed, sorted by name, after the rules on names, kinds, links and sizes."""
    ignored = _read_ignored(root, folder)
    entries: list[_Entry] = []
    for entry in _walk(root, "", folder, ignored, 0):
        entries.append(entry)
        if len(entries) > files_max:
            raise ConfigError(f"source {folder} has more than {files_max:,} files", hint=_ignore_hint())
    total = sum(entry.size for entry in entries)
    if total > BYTES_MAX:
        raise _too_large(folder, total)
    found = {entry.path: entry for entry in entries}
    for entry in entries:
        if stat.S_ISLNK(entry.mode):
            _check_link(entry, found, folder)
    return tuple(sorted(entries, key=lambda entry: entry.path.encode()))


def _ignore_hint() -> str:
    return f"leave out what the service does not need with a {IGNORE_FILE} (patterns as in .gitignore)"


def _too_large(folder: Path, size: int) -> ConfigError:
    return ConfigError(f"source {folder} holds {size >> 20:,} MiB, more than {BYTES_MAX >> 20}", hint=_ignore_hint())


def _read_ignored(root: int, folder: Path) -> pathspec.GitIgnoreSpec:
    try:
        with _opened(root, IGNORE_FILE) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ConfigError(f"source {folder}: {IGNORE_FILE} is not a regular file")
            raw = file.read(IGNORE_BYTES_MAX + 1)
    except FileNotFoundError:
        return pathspec.GitIgnoreSpec.from_lines([])
    if len(raw) > IGNORE_BYTES_MAX:
        raise ConfigError(f"source {folder}: {IGNORE_FILE} is larger than {IGNORE_BYTES_MAX >> 10} KiB")
    try:
        return pathspec.GitIgnoreSpec.from_lines(raw.decode().splitlines())
    except ValueError as error:  # not UTF-8, or no pattern
        raise ConfigError(f"source {folder}: {IGNORE_FILE}: {error}") from error


def _walk(parent: int, inside: str, folder: Path, ignored: pathspec.GitIgnoreSpec, depth: int) -> Iterator[_Entry]:
    if depth > DEPTH_MAX:
        raise ConfigError(f"source {folder}: {shown(inside)} is nested deeper than {DEPTH_MAX} folders")
    for name in os.listdir(parent):
        path = inside + name
        seen = os.stat(name, dir_fd=parent, follow_symlinks=False)
        is_folder = stat.S_ISDIR(seen.st_mode)
        if name in ALWAYS_IGNORED or (not inside and name == IGNORE_FILE):
            continue
        _check_name(path, folder)
        if ignored.match_file(path + "/" if is_folder else path):
            continue
        if is_folder:
            yield _Entry(path=path, mode=seen.st_mode)
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            child = os.open(name, flags, dir_fd=parent)
            try:
                yield from _walk(child, path + "/", folder, ignored, depth + 1)
            finally:
                os.close(child)
        elif stat.S_ISLNK(seen.st_mode):
            target = os.readlink(name, dir_fd=parent)
            _check_name(target, folder)
            yield _Entry(path=path, mode=seen.st_mode, target=target)
        elif stat.S_ISREG(seen.st_mode):
            yield _Entry(
                path=path, mode=seen.st_mode, size=seen.st_size, inode=seen.st_ino, changed_ns=seen.st_mtime_ns
            )
        else:
            kind = next(
                word
                for test, word in (
                    (stat.S_ISFIFO, "a FIFO"),
                    (stat.S_ISSOCK, "a socket"),
                    (stat.S_ISBLK, "a device"),
                    (stat.S_ISCHR, "a device"),
                    (lambda _: True, "of no kind that can be packed"),
                )
                if test(seen.st_mode)
            )
            raise ConfigError(f"source {folder}: {shown(path)} is {kind}", hint=_ignore_hint())


def _check_name(path: str, folder: Path) -> None:
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"source {folder}: the name {path!r} is not UTF-8") from error


def _check_link(entry: _Entry, found: Mapping[str, _Entry], folder: Path) -> None:
    if not _stays_inside(entry, found):
        raise ConfigError(
            f"source {folder}: the link {shown(entry.path)} -> {shown(entry.target)} leads out of the folder",
            hint=f"copy what it points to, or name it in {IGNORE_FILE}",
        )


def _stays_inside(entry: _Entry, found: Mapping[str, _Entry]) -> bool:
    """Tell whether a link stays in the folder, following other links on the way as a kernel would; a circle does not."""
    where, parts, hops = entry.path.split("/")[:-1], entry.target.split("/")[::-1], 0
    if entry.target.startswith("/"):
        return False
    while parts:
        part = parts.pop()
        if part == ".." and not where:
            return False
        if part == "..":
            where.pop()
        elif part not in ("", "."):
            there = found.get("/".join([*where, part]))
            if there is None or not stat.S_ISLNK(there.mode):
                where.append(part)
                continue
            hops += 1
            if hops > LINK_HOPS_MAX or there.target.startswith("/"):
                return False
            parts += there.target.split("/")[::-1]
    return True


def _write(root: int, folder: Path, entries: tuple[_Entry, ...], out: Path) -> Packed:
    compressor = zstandard.ZstdCompressor(
        level=COMPRESSION_LEVEL, threads=0, write_checksum=False, write_content_size=False, write_dict_id=False
    )
    with open(out, "wb") as raw:
        sink = _Sink(raw)
        with compressor.stream_writer(cast(BinaryIO, sink), closefd=False) as stream:
            with tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT, bufsize=_CHUNK) as tar:
                for entry in entries:
                    _add(tar, root, folder, entry)
                    if tar.offset > BYTES_MAX:
                        raise _too_large(folder, tar.offset)
        raw.flush()
        os.fsync(raw.fileno())
    return Packed(digest=sink.hash.hexdigest(), bytes=sink.bytes, files=len(entries))


class _Sink:
    """Counts and hashes what goes to the file."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.hash = hashlib.sha256()
        self.bytes = 0

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        self.bytes += len(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def _add(tar: tarfile.TarFile, root: int, folder: Path, entry: _Entry) -> None:
    info = tarfile.TarInfo(entry.path)  # times, owners and their names are zero and empty from the start
    if stat.S_ISDIR(entry.mode):
        info.type, info.mode = tarfile.DIRTYPE, 0o755
        tar.addfile(info)
    elif stat.S_ISLNK(entry.mode):
        info.type, info.mode, info.linkname = tarfile.SYMTYPE, 0o777, entry.target
        tar.addfile(info)
    else:
        info.size, info.mode = entry.size, 0o755 if entry.mode & 0o111 else 0o644
        with _opened(root, entry.path) as file:
            _check_unchanged(file, folder, entry)
            try:
                tar.addfile(info, file)
            except OSError as error:
                if error.errno is not None:
                    raise
                raise _changed(folder, entry) from error  # tarfile's "unexpected end of data"
            _check_unchanged(file, folder, entry)


def _check_unchanged(file: BinaryIO, folder: Path, entry: _Entry) -> None:
    now = os.fstat(file.fileno())
    same = (now.st_ino, now.st_size, now.st_mtime_ns) == (entry.inode, entry.size, entry.changed_ns)
    if not (same and stat.S_ISREG(now.st_mode)):
        raise _changed(folder, entry)


def _changed(folder: Path, entry: _Entry) -> ConfigError:
    return ConfigError(f"source {folder}: {shown(entry.path)} changed while it was packed", hint="run it again")


@contextmanager
def _opened(root: int, path: str) -> Iterator[BinaryIO]:
    """Open a file below *root* for reading, following no link on the way and waiting for nobody."""
    *parents, name = path.split("/")
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    parent = root
    try:
        for part in parents:
            child = os.open(part, flags | os.O_DIRECTORY, dir_fd=parent)
            if parent != root:
                os.close(parent)
            parent = child
        folder = parent
        with open(name, "rb", opener=lambda n, _: os.open(n, flags | os.O_NONBLOCK, dir_fd=folder)) as file:
            yield file
    finally:
        if parent != root:
            os.close(parent)
