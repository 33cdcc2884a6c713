"""Bundles by digest from a member: the one that the agent's line goes to, else any other.

A stream of bytes into a file; who calls verifies the digest, whoever sent it.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from pathlib import Path

import h11

from slum.errors import SlumError, Unreachable
from slum.node.doors import Door, Way
from slum.node.home import NAME

BLOB_S = 600.0
BLOB_READ_BYTES = 256 << 10


class NoSuchBlob(SlumError):
    """That member has none of that digest."""


async def fetch_blob(way: Way, digest: str, folder: Path) -> Path:
    """Stream the blob *digest* into a new file in *folder* and return it; the caller verifies and removes it.

    Unreachable when a member does not answer or the transfer breaks (safe to repeat), SlumError when all answer that they
    have no such blob.
    """
    doors = [door for group in way.doors() for door in group]
    if way.current is not None:
        name = way.current.name
        doors.sort(key=lambda door: door.name != name)
    whys: list[SlumError] = []
    for door in doors:
        try:
            return await _fetch_from(door, digest, folder)
        except (Unreachable, NoSuchBlob) as error:
            whys.append(error)
    raise next((why for why in whys if isinstance(why, Unreachable)), whys[0])


async def _fetch_from(door: Door, digest: str, folder: Path) -> Path:
    try:
        async with asyncio.timeout(BLOB_S):
            reader, writer = await door.open()
            try:
                return await _download(reader, writer, digest, folder)
            finally:
                writer.close()
    except TimeoutError:
        raise Unreachable(f"bundle {digest[:12]} did not arrive from {door.name} within {BLOB_S:g} s") from None
    except (OSError, h11.RemoteProtocolError) as error:
        raise Unreachable(f"bundle {digest[:12]} cannot be fetched from {door.name}: {error}") from error


async def _download(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, digest: str, folder: Path) -> Path:
    http = h11.Connection(h11.CLIENT)
    request = h11.Request(method="GET", target=f"/v1/blobs/{digest}", headers=[("Host", NAME), ("Connection", "close")])
    writer.write((http.send(request) or b"") + (http.send(h11.EndOfMessage()) or b""))
    await writer.drain()
    done = False
    with tempfile.NamedTemporaryFile(dir=folder, prefix="blob-", delete=False) as out:
        path = Path(out.name)
        try:
            while not done:
                event = http.next_event()
                if event is h11.NEED_DATA:
                    http.receive_data(await reader.read(BLOB_READ_BYTES))
                elif isinstance(event, h11.Response) and event.status_code != 200:
                    raise NoSuchBlob(f"the member has no bundle {digest[:12]} (HTTP {event.status_code})")
                elif isinstance(event, h11.Data):
                    out.write(event.data)
                elif isinstance(event, h11.ConnectionClosed):
                    raise Unreachable(f"bundle {digest[:12]}: the member hung up")
                done = isinstance(event, h11.EndOfMessage)
        except BaseException:
            os.unlink(path)
            raise
    return path
