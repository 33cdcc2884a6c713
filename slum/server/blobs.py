"""Bundles on the members' disk, each named by its sha256: taken in by streaming, given out, and collected.

A blob is there when its file carries its name: it is written beside, hashed on the way, fsynced, renamed, and the folder
fsynced before the answer. Collected are blobs that none of the kept revisions names, and only an hour after they were
written or asked for, so that an upload whose fleet is not applied yet is safe.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import BinaryIO

from slum import log
from slum.errors import ConfigError, QuorumLost
from slum.server.problems import TooLarge

BLOB_BYTES_MAX = 256 << 20
KEEP_S = 3600.0
DIGEST = re.compile(r"[0-9a-f]{64}")


class Blobs:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, digest: str) -> Path:
        """Return where the blob *digest* lies; ConfigError when that is no sha256."""
        if not DIGEST.fullmatch(digest):
            raise ConfigError(f"{digest!r} is not a sha256 in lower-case hex")
        return self._folder / digest

    def has(self, digest: str) -> bool:
        return self.path(digest).is_file()

    def touch(self, digest: str) -> bool:
        """Tell whether the blob is there and, if so, keep it for KEEP_S from now."""
        try:
            os.utime(self.path(digest))
        except FileNotFoundError:
            return False
        return True

    async def put(self, digest: str, chunks: AsyncIterator[bytes]) -> bool:
        """Store what *chunks* holds as *digest*; True when it was not there before. ConfigError when it is not that."""
        if self.touch(digest):
            async for _ in chunks:
                pass
            return False
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = self._folder / f".{digest[:12]}-{secrets.token_hex(6)}"
        try:
            await self._write(temporary, digest, chunks)
            temporary.rename(self.path(digest))
            await asyncio.to_thread(_sync_folder, self._folder)
        finally:
            temporary.unlink(missing_ok=True)
        log.get().info("blob_stored", digest=digest, bytes=self.path(digest).stat().st_size)
        return True

    async def _write(self, path: Path, digest: str, chunks: AsyncIterator[bytes]) -> None:
        found, size = hashlib.sha256(), 0
        with _new_file(path) as file:
            async for chunk in chunks:
                size += len(chunk)
                if size > BLOB_BYTES_MAX:
                    raise TooLarge(f"the bundle is larger than {BLOB_BYTES_MAX >> 20} MiB")
                found.update(chunk)
                file.write(chunk)
            if found.hexdigest() != digest:
                raise ConfigError(f"the body's sha256 is {found.hexdigest()}, not {digest}", hint="upload it again")
            file.flush()
            await asyncio.to_thread(os.fsync, file.fileno())

    def collect(self, named: set[str], now: float) -> int:
        """Delete blobs that are not in *named* and older than KEEP_S, and left-overs of uploads; return how many."""
        gone = 0
        for entry in os.scandir(self._folder) if self._folder.is_dir() else ():
            try:
                if entry.name not in named and now - entry.stat().st_mtime > KEEP_S:
                    os.unlink(entry.path)
                    gone += 1
            except FileNotFoundError:
                continue
        return gone


async def collect_for_ever(blobs: Blobs, named: Callable[[], set[str]], every_s: float = 600.0) -> None:
    """Collect every *every_s* until cancelled."""
    while True:
        await asyncio.sleep(every_s)
        try:
            kept = named()
        except QuorumLost as error:
            log.get().info("blobs_not_collected", why=error.message)
            continue
        gone = await asyncio.to_thread(blobs.collect, kept, time.time())
        if gone:
            log.get().info("blobs_collected", count=gone)


def _new_file(path: Path) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb")


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
