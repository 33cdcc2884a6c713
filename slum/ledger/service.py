"""The callers on the unix socket: takes proposals in, gives answers and news out, in the one thread that runs the member.

One thread, because a proposal would otherwise be handed over twice on its way, and wait for the interpreter each time. A turn
waits for peers and callers alike, reads what callers have sent (so much from each), lets the member work, and writes all
answers to a caller at once. Nothing here blocks: calls a connection, their size and what waits to be written are bounded, and
whoever does not read is cut off.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from collections.abc import Callable
from functools import partial

from slum.alive import Alive
from slum.errors import QuorumLost, SlumError
from slum.ledger import rpc
from slum.ledger.changes import Change
from slum.ledger.commands import Barrier, Proposal, new_request_id
from slum.ledger.commands import Member as MemberRow
from slum.ledger.member import Member
from slum.ledger.proposer import Answer, Take

IDLE_S = 0.5
"""How long a turn waits at most when nothing is to be done."""
WAIT_S_MAX = 60.0
READ_BYTES = 1 << 18
WRITE_BYTES_MAX = 16 << 20
DEAF_S = 1.0
"""No caller is let in for so long when there is no descriptor left for one."""
_PEER = struct.Struct("3i")
STOPPING = QuorumLost("the ledger process is stopping", hint="repeat the request with the same request id")


class Service:
    """Runs *member* and serves any number of connections to *listening*, which does not block."""

    def __init__(self, member: Member, listening: socket.socket) -> None:
        self.member = member
        self._listening = listening
        self._deaf_until = 0.0
        self._stopping = False
        self._waiters: dict[object, tuple[int, float, Callable[[int], None]]] = {}
        self._connections: dict[int, Connection] = {}
        self._to_flush: set[Connection] = set()
        self._poll = select.epoll()
        self._poll.register(listening.fileno(), select.EPOLLIN)
        self._alive = Alive()
        member.wait_for(self._poll.fileno(), self._serve)

    def stop(self) -> None:
        """Finish what is in flight, answer the rest with QuorumLost, then end. Safe to repeat, and in a signal's handler."""
        self._stopping = True
        self.member.wake.set()

    def run(self) -> None:
        """Serve until stop(); raise what ends the member."""
        member, proposer = self.member, self.member.proposer
        try:
            while not (self._stopping and not proposer.in_flight):
                member.take(self._patience())
                member.work()
                self._publish()
                self._alive.tell()
                if self._deaf_until and time.monotonic() >= self._deaf_until:
                    self._deaf_until = 0.0
                    self._poll.register(self._listening.fileno(), select.EPOLLIN)
            proposer.close(STOPPING)
            member.show()
            self._publish()
        finally:
            for connection in list(self._connections.values()):
                connection.close()
            self._poll.close()

    def wait(self, seq: int, deadline_s: float, take: Callable[[int], None]) -> None:
        """Give *take* the applied seq once it is above *seq*, or *seq* after *deadline_s*."""
        now = self.member.shown
        if now > seq:
            take(now)
        else:
            until = time.monotonic() + max(0.0, min(deadline_s, WAIT_S_MAX))
            self._waiters[object()] = (seq, until, take)

    def flush_later(self, connection: Connection) -> None:
        self._to_flush.add(connection)

    def watch(self, connection: Connection, events: int) -> None:
        """From now on wait for *events* of *connection*."""
        self._poll.modify(connection.descriptor, events)

    def forget(self, connection: Connection) -> None:
        self._poll.unregister(connection.descriptor)
        del self._connections[connection.descriptor]
        self._to_flush.discard(connection)

    # --- a turn ------------------------------------------------------------------------------------------------------

    def _patience(self) -> float:
        if not self._waiters:
            return IDLE_S
        return max(0.0, min(IDLE_S, min(until for _, until, _ in self._waiters.values()) - time.monotonic()))

    def _serve(self) -> None:
        for descriptor, event in self._poll.poll(0):
            connection = self._connections.get(descriptor)
            if connection is not None:
                connection.serve(event)
            elif descriptor == self._listening.fileno():
                self._accept()

    def _accept(self) -> None:
        try:
            sock, _ = self._listening.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError:
            self._poll.unregister(self._listening.fileno())
            self._deaf_until = time.monotonic() + DEAF_S
            return
        sock.setblocking(False)
        if not _is_ours(sock):
            sock.close()
            return
        connection = Connection(self, sock)
        self._connections[connection.descriptor] = connection
        self._poll.register(connection.descriptor, select.EPOLLIN)

    def _publish(self) -> None:
        for take, answer in self.member.answers():
            take(answer)
        if self._waiters:
            seq, now = self.member.shown, time.monotonic()
            for token, (above, until, give) in list(self._waiters.items()):
                if seq > above or now >= until:
                    del self._waiters[token]
                    give(seq if seq > above else above)
        while self._to_flush:
            self._to_flush.pop().flush()


class Connection:
    """One caller. Whoever speaks another protocol, or does not read, is cut off."""

    def __init__(self, service: Service, sock: socket.socket) -> None:
        self._service = service
        self._sock = sock
        self.descriptor = sock.fileno()
        self._splitter = rpc.Splitter()
        self._open_calls = 0
        self._out = bytearray()
        self._events = select.EPOLLIN
        self._closed = False

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._service.forget(self)
            self._sock.close()

    def serve(self, event: int) -> None:
        """Read what has come, at most READ_BYTES, and begin the calls in it; write what the kernel did not take before."""
        if event & select.EPOLLOUT:
            self.flush()
        if self._closed or not event & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR):
            return
        try:
            data = self._sock.recv(READ_BYTES)
            calls = [rpc.unpack_call(frame) for frame in self._splitter.feed(data)]
        except BlockingIOError:
            return
        except (OSError, rpc.BadFrame):
            data, calls = b"", []
        if not data:
            self.close()
            return
        self._open_calls += len(calls)
        for call in calls:
            self._begin(call)
        self._rearm()

    def flush(self) -> None:
        """Write what the kernel takes."""
        if self._closed:
            return
        try:
            sent = self._sock.send(self._out) if self._out else 0
        except BlockingIOError:
            sent = 0
        except OSError:
            self.close()
            return
        del self._out[:sent]
        if len(self._out) > WRITE_BYTES_MAX:
            self.close()
        else:
            self._rearm()

    def _rearm(self) -> None:
        if self._closed:
            return
        events = select.EPOLLIN if self._open_calls < rpc.CALLS_MAX else 0
        events |= select.EPOLLOUT if self._out else 0
        if events != self._events:
            self._events = events
            self._service.watch(self, events)

    # --- calls -------------------------------------------------------------------------------------------------------

    def _begin(self, call: rpc.Call) -> None:
        member, number = self._service.member, call.id
        match call.operation:
            case rpc.Propose(proposal=proposal):
                self._propose(proposal, partial(self._answer, number))
            case rpc.TakeBarrier():
                request_id = new_request_id(member.position.seq)
                proposal = Proposal(command=Barrier(), request_id=request_id, actor="")
                self._propose(proposal, partial(self._answer_barrier, number))
            case rpc.WaitFor(seq=seq, deadline_s=deadline_s):
                self._service.wait(seq, deadline_s, lambda now: self._reply(rpc.Reply(id=number, seq=now)))
            case rpc.AskLeader():
                member.show()
                self._reply(rpc.Reply(id=number, leader=member.leader()))
            case rpc.AskChange(add=add, remove=remove):
                self._change(Change(add=add, remove=remove), partial(self._answer_change, number))
            case rpc.AskStatus():
                member.show()
                self._reply(rpc.Reply(id=number, status=member.status()))
            case rpc.AskMembers():
                self._reply(rpc.Reply(id=number, members=member.position.members))

    def _propose(self, proposal: Proposal, take: Take) -> None:
        member = self._service.member
        try:
            member.proposer.submit(proposal, take, seq=member.position.seq)
        except SlumError as error:
            take(error)

    def _change(self, change: Change, take: Callable[[tuple[MemberRow, ...] | SlumError], None]) -> None:
        try:
            self._service.member.change(change, take)
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
            self._reply(rpc.Reply(id=number, seq=answer.seq))

    def _reply(self, reply: rpc.Reply) -> None:
        self._open_calls -= 1
        if not self._closed:
            self._out += rpc.pack(reply)
            self._service.flush_later(self)


def _is_ours(sock: socket.socket) -> bool:
    _, uid, _ = _PEER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    return uid in (0, os.geteuid())
