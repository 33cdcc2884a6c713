"""Between the callers on the unix socket and the ledger's own thread: hands proposals in, answers and news out.

The thread runs Member.step() over and over; nothing that happens on the socket can delay it by more than the time to queue
a proposal. Everything else here runs on the event loop, in callbacks that never block. Calls a connection, their size and
what waits to be written are bounded.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable
from functools import partial

from slum.alive import Alive
from slum.errors import QuorumLost, SlumError
from slum.ledger import rpc
from slum.ledger.changes import Change
from slum.ledger.commands import Barrier, LeaderInfo, Proposal, Result, new_request_id
from slum.ledger.commands import Member as MemberRow
from slum.ledger.member import Member
from slum.ledger.proposer import Answer, Take
from slum.ledger.status import LedgerStatus

IDLE_S = 0.5
"""How long the thread waits when nothing is to be done; a proposal ends the wait."""
WAIT_S_MAX = 60.0
WRITE_BYTES_MAX = 16 << 20
_PEER = struct.Struct("3i")
STOPPING = QuorumLost("the ledger process is stopping", hint="repeat the request with the same request id")


class Service:
    """Runs *member* in a thread of its own and serves any number of connections."""

    def __init__(self, member: Member) -> None:
        self._member = member
        self._loop = asyncio.get_running_loop()
        self._stopping = threading.Event()
        self._info = member.leader()
        self._members = member.position.members
        self._waiters: dict[object, tuple[int, Callable[[int], None]]] = {}
        self._connections: set[Connection] = set()
        self._curious: deque[Callable[[LedgerStatus], None]] = deque()
        """Who wants the status; filled by the event loop, emptied by the ledger's thread."""
        self.ended: asyncio.Future[None] = self._loop.create_future()
        """Done when the thread has ended: after stop(), or with the error that ended it."""
        self._thread = threading.Thread(target=self._run, name="ledger")
        self._alive = Alive()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Finish what is in flight, answer the rest with QuorumLost, then end. Safe to repeat."""
        if not self._stopping.is_set():
            self._stopping.set()
            self._member.wake.set()

    def join(self) -> None:
        self._thread.join()
        for connection in list(self._connections):
            connection.abort()

    # --- what connections call ---------------------------------------------------------------------------------------

    @property
    def info(self) -> LeaderInfo:
        return self._info

    @property
    def members(self) -> tuple[MemberRow, ...]:
        return self._members

    def propose(self, proposal: Proposal, take: Take) -> None:
        """Queue *proposal*; *take* gets its answer. Raises QuorumLost when the queue is full."""
        self._member.proposer.submit(proposal, take, seq=self._info.seq)
        self._member.wake.set()

    def wait(self, seq: int, deadline_s: float, take: Callable[[int], None]) -> None:
        """Give *take* the applied seq once it is above *seq*, or *seq* after *deadline_s*."""
        if self._info.seq > seq:
            take(self._info.seq)
            return
        token = object()
        self._waiters[token] = (seq, take)
        self._loop.call_later(max(0.0, min(deadline_s, WAIT_S_MAX)), self._expire, token)

    def change(self, change: Change, take: Callable[[tuple[MemberRow, ...] | SlumError], None]) -> None:
        """Change the members; *take* hears the outcome on the event loop. Raises Conflict while another change runs."""
        self._member.change(change, lambda outcome: self._hand_over(take, outcome))

    def status(self, take: Callable[[LedgerStatus], None]) -> None:
        """Give *take* the status, on the event loop, as soon as the ledger's thread has made it."""
        self._curious.append(take)
        self._member.wake.set()

    def _hand_over(
        self, take: Callable[[tuple[MemberRow, ...] | SlumError], None], outcome: tuple[MemberRow, ...] | SlumError
    ) -> None:
        self._loop.call_soon_threadsafe(take, outcome)

    def add(self, connection: Connection) -> None:
        self._connections.add(connection)

    def remove(self, connection: Connection) -> None:
        self._connections.discard(connection)

    def _expire(self, token: object) -> None:
        waiter = self._waiters.pop(token, None)
        if waiter is not None:
            waiter[1](waiter[0])

    # --- the ledger's thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        failure: BaseException | None = None
        try:
            while True:
                self._member.step(IDLE_S)
                self._publish()
                if self._stopping.is_set() and not self._member.proposer.in_flight:
                    break
            self._member.proposer.close(STOPPING)
            self._publish()
        except BaseException as error:  # noqa: BLE001 - not swallowed: the loop's side raises it from `ended`
            failure = error
        self._loop.call_soon_threadsafe(self._end, failure)

    def _publish(self) -> None:
        if self._alive.due:  # both threads turn: this one, and the event loop
            self._loop.call_soon_threadsafe(self._alive.tell)
        if self._curious:
            status = self._member.status()
            while self._curious:
                self._loop.call_soon_threadsafe(self._curious.popleft(), status)
        answers, info = self._member.proposer.release(), self._member.leader()
        if answers or info != self._info:
            self._loop.call_soon_threadsafe(self._published, answers, info, self._member.position.members)

    def _published(self, answers: list[tuple[Take, Answer]], info: LeaderInfo, members: tuple[MemberRow, ...]) -> None:
        self._info, self._members = info, members
        for take, answer in answers:
            take(answer)
        due = [token for token, (seq, _) in self._waiters.items() if info.seq > seq]
        for token in due:
            self._waiters.pop(token)[1](info.seq)

    def _end(self, failure: BaseException | None) -> None:
        if failure is None:
            self.ended.set_result(None)
        else:
            self.ended.set_exception(failure)


class Connection(asyncio.Protocol):
    """One caller. Whoever is neither this user nor root, or speaks another protocol, is cut off."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._splitter = rpc.Splitter()
        self._transport: asyncio.Transport | None = None
        self._open_calls = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if not isinstance(transport, asyncio.Transport) or not _is_ours(transport):
            transport.close()
            return
        self._transport = transport
        self._service.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._service.remove(self)

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._transport is None:
            return
        try:
            calls = [rpc.unpack_call(frame) for frame in self._splitter.feed(data)]
        except rpc.BadFrame:
            self.abort()
            return
        for call in calls:
            self._open_calls += 1
            self._begin(call)
        if self._open_calls >= rpc.CALLS_MAX and self._transport is not None:
            self._transport.pause_reading()

    def _begin(self, call: rpc.Call) -> None:
        service, number = self._service, call.id
        match call.operation:
            case rpc.Propose(proposal=proposal):
                self._propose(proposal, partial(self._answer, number))
            case rpc.TakeBarrier():
                request_id = new_request_id(secrets.token_hex(16), service.info.seq)
                proposal = Proposal(command=Barrier(), request_id=request_id, actor="")
                self._propose(proposal, partial(self._answer_barrier, number))
            case rpc.WaitFor(seq=seq, deadline_s=deadline_s):
                service.wait(seq, deadline_s, lambda now: self._reply(rpc.Reply(id=number, seq=now)))
            case rpc.AskLeader():
                self._reply(rpc.Reply(id=number, leader=service.info))
            case rpc.AskChange(add=add, remove=remove):
                self._change(Change(add=add, remove=remove), partial(self._answer_change, number))
            case rpc.AskStatus():
                service.status(lambda status: self._reply(rpc.Reply(id=number, status=status)))
            case rpc.AskMembers():
                self._reply(rpc.Reply(id=number, members=service.members))

    def _propose(self, proposal: Proposal, take: Take) -> None:
        try:
            self._service.propose(proposal, take)
        except SlumError as error:
            take(error)

    def _change(self, change: Change, take: Callable[[tuple[MemberRow, ...] | SlumError], None]) -> None:
        try:
            self._service.change(change, take)
        except SlumError as error:
            take(error)

    def _answer_change(self, number: int, outcome: tuple[MemberRow, ...] | SlumError) -> None:
        if isinstance(outcome, SlumError):
            self._reply(rpc.Reply(id=number, failure=rpc.to_failure(outcome)))
        else:
            self._reply(rpc.Reply(id=number, members=outcome))

    def _answer(self, number: int, answer: Answer) -> None:
        if isinstance(answer, SlumError):
            self._reply(rpc.Reply(id=number, failure=rpc.to_failure(answer)))
        else:
            self._reply(rpc.Reply(id=number, result=answer))

    def _answer_barrier(self, number: int, answer: Answer) -> None:
        if isinstance(answer, SlumError):
            self._answer(number, answer)
        else:
            self._reply(rpc.Reply(id=number, seq=_seq(answer)))

    def _reply(self, reply: rpc.Reply) -> None:
        self._open_calls -= 1
        if self._transport is None:
            return
        self._transport.write(rpc.pack(reply))
        if self._transport.get_write_buffer_size() > WRITE_BYTES_MAX:
            self._transport.abort()
        elif self._open_calls < rpc.CALLS_MAX:
            self._transport.resume_reading()


def _seq(result: Result) -> int:
    return result.seq


def _is_ours(transport: asyncio.Transport) -> bool:
    peer: socket.socket = transport.get_extra_info("socket")
    _, uid, _ = _PEER.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    return uid in (0, os.geteuid())
