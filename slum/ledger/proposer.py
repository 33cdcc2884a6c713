"""The queue in front of the log: which proposals ride in the next entry, and who waits for their answers.

One entry is in flight at a time; what arrives meanwhile rides in the next one, up to 1 MiB (group commit). The
queue is bounded. A request id that waits or flies already is not proposed twice: the second asker gets the same answer.
What did not take effect, because its entry fell behind a Seal or carried an old leader's header, goes back to the front of
the queue in its old order. Answers leave through release() only, after the commit and under no lock. Knows neither
PySyncObj nor SQLite. submit() may be called from any thread, the rest belongs to the ledger's thread.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from slum.errors import QuorumLost, SlumError
from slum.ledger.commands import PROPOSAL_BYTES_MAX, Proposal, Rejected, Result, size_problem

QUEUE_MAX = 4096
QUEUE_BYTES_MAX = 32 << 20
_encode = msgspec.msgpack.Encoder().encode

Answer = Result | SlumError
Take = Callable[[Answer], None]


@dataclass(slots=True)
class _Waiting:
    proposal: Proposal
    size: int
    takers: list[Take] = field(default_factory=list)


class Proposer:
    def __init__(self, *, queue_max: int = QUEUE_MAX) -> None:
        self._queue_max = queue_max
        self._lock = threading.Lock()
        self._queue: deque[_Waiting] = deque()
        self._queue_bytes = 0
        self._known: dict[str, _Waiting] = {}
        """By request id: all that are queued or in flight."""
        self._in_flight: dict[str, _Waiting] = {}
        self._answered: list[tuple[Take, Answer]] = []
        self._closed: SlumError | None = None

    def submit(self, proposal: Proposal, take: Take, *, seq: int) -> None:
        """Queue *proposal*; *take* is called once with its answer. Raise QuorumLost when the queue is full or closed.

        *seq* is the newest applied one, for the answer to a proposal that is too large for any entry.
        """
        size = len(_encode(proposal))
        why = size_problem(size)
        if why:
            take(Rejected(seq=seq, code="invalid", why=why))
            return
        with self._lock:
            if self._closed is not None:
                raise self._closed
            known = self._known.get(proposal.request_id)
            if known is not None:
                known.takers.append(take)
                return
            if len(self._queue) >= self._queue_max or self._queue_bytes + size > QUEUE_BYTES_MAX:
                raise QuorumLost(
                    f"{len(self._queue)} commands wait for the ledger already",
                    hint="try again in 1 s with the same request id",
                )
            waiting = self._known[proposal.request_id] = _Waiting(proposal, size, [take])
            self._queue.append(waiting)
            self._queue_bytes += size

    @property
    def in_flight(self) -> bool:
        return bool(self._in_flight)

    @property
    def queued(self) -> int:
        return len(self._queue)

    def take_batch(self, refuse: Callable[[Proposal], SlumError | None] | None = None) -> tuple[Proposal, ...]:
        """Put the proposals of the next entry in flight and return them; those that *refuse* names are answered so."""
        batch: list[_Waiting] = []
        size = 0
        with self._lock:
            while self._queue and size + self._queue[0].size <= PROPOSAL_BYTES_MAX:
                waiting = self._queue.popleft()
                self._queue_bytes -= waiting.size
                error = refuse(waiting.proposal) if refuse is not None else None
                if error is not None:
                    self._settle(waiting, error)
                    continue
                size += waiting.size
                batch.append(waiting)
        self._in_flight = {waiting.proposal.request_id: waiting for waiting in batch}
        return tuple(waiting.proposal for waiting in batch)

    def applied(self, proposals: Sequence[Proposal], results: Sequence[Result]) -> None:
        """Take note of what an entry answered, whether or not it was proposed from here."""
        with self._lock:
            for proposal, result in zip(proposals, results, strict=True):
                waiting = self._in_flight.pop(proposal.request_id, None)
                if waiting is not None:
                    self._settle(waiting, result)

    def refuse(self, request_ids: Sequence[str], error: SlumError) -> None:
        """Answer those of what is in flight that *request_ids* names with *error*."""
        with self._lock:
            for request_id in request_ids:
                waiting = self._in_flight.pop(request_id, None)
                if waiting is not None:
                    self._settle(waiting, error)

    def put_back(self) -> None:
        """What is in flight certainly did not take effect, or may safely be proposed again: queue it first."""
        with self._lock:
            for waiting in reversed(self._in_flight.values()):
                self._queue.appendleft(waiting)
                self._queue_bytes += waiting.size
            self._in_flight = {}

    def close(self, error: SlumError) -> None:
        """Answer all that wait with *error*, and whatever is submitted from now on."""
        with self._lock:
            self._closed = error
            for waiting in list(self._known.values()):
                self._settle(waiting, error)
            self._queue.clear()
            self._in_flight = {}

    def release(self) -> list[tuple[Take, Answer]]:
        """Return the answers that may go out now, and to whom."""
        with self._lock:
            answered, self._answered = self._answered, []
        return answered

    def _settle(self, waiting: _Waiting, answer: Answer) -> None:
        self._known.pop(waiting.proposal.request_id, None)
        self._answered.extend((take, answer) for take in waiting.takers)
