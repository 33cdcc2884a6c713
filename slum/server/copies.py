"""Bundles on several members: an upload counts when a majority has it on disk, and whoever lacks one fetches it.

Each member holds by itself (blobs.py); here is what goes between them. Besides uploads a task fetches whatever a kept
revision names and this member lacks: one that was away, or has joined. Every bundle is verified by its digest.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from slum import log
from slum.errors import QuorumLost, SlumError, Unreachable
from slum.node.websocket import WebSocket
from slum.server import memberwire
from slum.server.blobs import Blobs
from slum.server.pulse import Pulse
from slum.server.relay import Relay, read_answer
from slum.server.view import View

STORE_S = 300.0
FETCH_S = 300.0
AGAIN_S = 5.0
LOOK_S = 60.0


class Copies:
    def __init__(self, blobs: Blobs, relay: Relay, view: View, committed: Pulse) -> None:
        self._blobs = blobs
        self._relay = relay
        self._view = view
        self._committed = committed
        self._fetching: dict[str, asyncio.Lock] = {}

    async def put(self, digest: str, chunks: AsyncIterator[bytes]) -> bool:
        """Store what *chunks* holds here and with a majority; True when it was new here. QuorumLost when too few have it."""
        is_new = await self._blobs.put(digest, chunks)
        others = self._relay.others
        wanted = (len(others) + 1) // 2
        if not wanted:
            return is_new
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._store(member, digest), name=f"store at {member}") for member in others]
        have = [member for member, task in zip(others, tasks, strict=True) if task.result()]
        if len(have) < wanted:
            raise QuorumLost(
                f"only {len(have) + 1} of {len(others) + 1} members have the bundle {digest[:12]} on disk",
                hint="`slum status --cluster` shows which members are away",
            )
        return is_new

    async def touch(self, digest: str) -> bool:
        """Tell whether the blob is here, fetched from another member if need be, and keep it for an hour."""
        if self._blobs.touch(digest):
            return True
        lock = self._fetching.setdefault(digest, asyncio.Lock())
        try:
            async with lock:
                return self._blobs.touch(digest) or await self._fetch(digest)
        finally:
            if not lock.locked():
                self._fetching.pop(digest, None)

    async def run(self) -> None:
        """Fetch what is named and not here, until cancelled."""
        while True:
            seen, pause_s = self._committed.count, LOOK_S
            try:
                missing = [d for d in sorted(self._view.reader.blobs_named()) if not self._blobs.has(d)]
            except QuorumLost:
                missing = []
            for digest in missing if self._relay.others else ():
                if not await self.touch(digest):
                    pause_s = AGAIN_S
            await self._committed.wait(seen, pause_s)
            await asyncio.sleep(AGAIN_S / 10)

    async def _store(self, member: str, digest: str) -> bool:
        try:
            async with self._relay.asking(member, memberwire.Store(digest=digest)) as socket, asyncio.timeout(STORE_S):
                with self._blobs.path(digest).open("rb") as file:
                    while chunk := await asyncio.to_thread(file.read, memberwire.CHUNK_BYTES):
                        await socket.send(chunk)
                await socket.send(b"")
                await read_answer(socket, member)
        except SlumError as error:
            log.get().info("bundle_not_copied", digest=digest, member=member, why=error.message)
            return False
        return True

    async def _fetch(self, digest: str) -> bool:
        for member in self._relay.others:
            try:
                async with self._relay.asking(member, memberwire.Fetch(digest=digest)) as socket:
                    async with asyncio.timeout(FETCH_S):
                        await self._blobs.put(digest, _chunks(socket, member))
            except SlumError as error:
                log.get().info("bundle_not_fetched", digest=digest, member=member, why=error.message)
                continue
            return True
        return False


async def _chunks(socket: WebSocket, member: str) -> AsyncIterator[bytes]:
    """Yield the frames that begin with 0; the one that begins with 1 is the Answer, whose problem is raised."""
    while True:
        frame = await socket.receive()
        if frame[:1] == b"\x00":
            yield frame[1:]
            continue
        answer = memberwire.answer.decode(frame[1:])
        if answer.problem is not None:
            raise Unreachable(f"{member}: {answer.problem.message}")
        return
