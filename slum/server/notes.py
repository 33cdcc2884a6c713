"""What agents noted, on its way into the ledger: bounded queues a machine, batches of at most 200, one every 250 ms.

A note becomes an event of actor "agent@<machine>". While the ledger is away notes wait; beyond NOTES_MAX a machine's
oldest are dropped, counted, and the count itself becomes an event: nothing is lost in silence.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import deque
from collections.abc import Callable

from slum import log
from slum.errors import QuorumLost
from slum.ledger.commands import NoteEvent, Proposal, Record, Rejected, new_request_id
from slum.server.link import Link
from slum.wire import Note

BATCH_MAX = 200
NOTES_MAX = 1000
PAUSE_S = 0.25
PROPOSE_S = 10.0
TEXT_MAX = 1000
KIND = re.compile(r"[a-z][a-z0-9_]{0,47}")


class Notes:
    def __init__(self) -> None:
        self._queues: dict[str, deque[NoteEvent]] = {}
        self._dropped: dict[str, int] = {}
        self._wake = asyncio.Event()

    def add(self, machine: str, note: Note) -> None:
        """Queue *note*; the newest are kept when there are too many."""
        queue = self._queues.setdefault(machine, deque())
        if len(queue) >= NOTES_MAX:
            queue.popleft()
            self._dropped[machine] = self._dropped.get(machine, 0) + 1
        queue.append(as_event(machine, note))
        self._wake.set()

    async def run(self, link: Link, seen_seq: Callable[[], int]) -> None:
        """Commit what is queued until cancelled; *seen_seq* gives the newest ledger seq for request ids."""
        while True:
            await self._wake.wait()
            await asyncio.sleep(PAUSE_S)
            self._wake.clear()
            while batch := self._next():
                machine, events = batch
                await _commit(link, machine, events, seen_seq)

    def _next(self) -> tuple[str, tuple[NoteEvent, ...]] | None:
        for machine, queue in list(self._queues.items()):
            if not queue:
                del self._queues[machine]
                continue
            events = [queue.popleft() for _ in range(min(len(queue), BATCH_MAX - 1))]
            dropped = self._dropped.pop(machine, 0)
            if dropped:
                why = f"{dropped} notes of this machine were dropped: too many came while the ledger was away"
                events.append(NoteEvent(kind="notes_dropped", subject=f"tenement:{machine}", at=time.time(), why=why))
            return machine, tuple(events)
        return None


def as_event(machine: str, note: Note) -> NoteEvent:
    """Return *note* as an event about an instance of *machine*; what an agent sends is cut to size, never trusted."""
    after = {
        name: value for name, value in (("generation", note.generation), ("release", note.release)) if value is not None
    }
    return NoteEvent(
        kind=note.kind if KIND.fullmatch(note.kind) else "agent_noted",
        subject=f"instance:{machine}/{note.service[:32]}/{note.id[:40]}",
        at=note.at,
        why=note.detail[:TEXT_MAX],
        after=after or None,
    )


async def _commit(link: Link, machine: str, events: tuple[NoteEvent, ...], seen_seq: Callable[[], int]) -> None:
    """Commit *events* once, however long the ledger is away."""
    request_id = new_request_id(seen_seq())
    while True:
        proposal = Proposal(command=Record(events=events), request_id=request_id, actor=f"agent@{machine}")
        try:
            result = await link.propose(proposal, deadline_s=PROPOSE_S)
        except QuorumLost:
            await asyncio.sleep(PAUSE_S)
            continue
        if isinstance(result, Rejected) and result.code == "too_old":
            request_id = new_request_id(seen_seq())
            continue
        if isinstance(result, Rejected):
            log.get().error("notes_rejected", machine=machine, code=result.code, why=result.why)
        return
