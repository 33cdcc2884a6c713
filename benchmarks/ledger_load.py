"""A load generator in a process of its own: notes of 100 bytes at a ledger's socket, as JSON on stdout what came of it.

python benchmarks/ledger_load.py SOCKET --clients 256 --seconds 10

It shares the machine with what it measures, as etcd's h2load does, and must not hold it back: calls are encoded once, only their
numbers and request ids are fresh, and of an answer it reads whose it is before that client's next call leaves, the rest after.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import socket
import time
from pathlib import Path

import msgspec
from etcd_peer import percentiles

from slum.ledger import rpc
from slum.ledger.commands import Done, NoteEvent, Proposal, Record, Rejected

TEXT = "v" * 100
STREAMS = 16
NUMBER = 0xFFFFFF
"""So large that its encoding leaves room for every number."""
PAUSE_S = 0.01


class Number(msgspec.Struct):
    """A reply's call number, and nothing else of it."""

    id: int


_number = msgspec.msgpack.Decoder(Number).decode


def proposal() -> Proposal:
    event = NoteEvent(kind="instance_noted", subject="instance:here/web/main", at=1.0, why=TEXT)
    return Proposal(command=Record(events=(event,)), request_id=_request_id(os.urandom(16).hex(), 0), actor="bench")


def _request_id(random_hex: str, seen_seq: int) -> str:
    """As new_request_id(), but always of one length."""
    return f"{random_hex}:{seen_seq:010d}"


class Line:
    """One connection; each of its *streams* clients writes one after the other, client n under the call number n."""

    def __init__(self, path: Path, streams: int) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(path))
        self.streams = streams
        self.began = [0.0] * streams
        self.took: list[float] = []
        self.refused = 0
        self._seen = 0
        self._splitter = rpc.Splitter()
        self._before, self._middle, self._after = _template(proposal())
        self._made: list[bytes] = []
        """What comes behind a call's number, for the next calls."""

    def write(self, clients: list[int]) -> None:
        """Let *clients* write something new."""
        if len(self._made) < len(clients):
            self._make(len(clients))
        now, calls = time.perf_counter(), []
        for client in clients:
            self.began[client] = now
            calls.append(self._before + client.to_bytes(4, "big") + self._made.pop())
        self.sock.sendall(b"".join(calls))

    def serve(self) -> None:
        """Take what has come, and let the clients that were answered write again."""
        data = self.sock.recv(1 << 18)
        now = time.perf_counter()
        if not data:
            raise ConnectionError("the ledger closed the connection")
        frames = self._splitter.feed(data)
        answered = [_number(frame).id for frame in frames]
        began = [self.began[client] for client in answered]
        if answered:
            self.write(answered)
        for frame, at in zip(frames, began, strict=True):
            reply = rpc.unpack_reply(frame)
            if isinstance(reply.result, Done | Rejected):
                self._seen = reply.result.seq
            if isinstance(reply.result, Done):
                self.took.append(now - at)
            else:
                self.refused += 1
        self._make(len(answered))

    def _make(self, count: int) -> None:
        ids, after = os.urandom(16 * count).hex().encode(), b":%010d" % self._seen + self._after
        self._made += [self._middle + ids[at : at + 32] + after for at in range(0, 32 * count, 32)]


def _template(made: Proposal) -> tuple[bytes, bytes, bytes]:
    """Return a call's bytes before its number (four bytes), up to its request id, and after that."""
    frame = rpc.pack(rpc.Call(id=NUMBER, operation=rpc.Propose(proposal=made)))
    before, middle = frame.split(b"\xce" + NUMBER.to_bytes(4, "big"))
    middle, after = middle.split(made.request_id.encode())
    return before + b"\xce", middle, after


def load(path: Path, clients: int, seconds: float) -> dict[str, float]:
    """Return writes a second and their latencies; *clients* write one after the other each, 16 share a connection."""
    count = max(1, clients // STREAMS)
    lines = {line.sock.fileno(): line for line in (Line(path, clients // count) for _ in range(count))}
    with select.epoll() as poll:
        for descriptor, line in lines.items():
            poll.register(descriptor, select.EPOLLIN)
            line.write(list(range(line.streams)))
        end = time.perf_counter() + seconds
        refused = 0
        while time.perf_counter() < end:
            for descriptor, _ in poll.poll(0.1):
                lines[descriptor].serve()
            now_refused = sum(line.refused for line in lines.values())
            if now_refused > refused:
                # No leader for a moment, say: asked again and again it would be none the sooner.
                refused = now_refused
                time.sleep(PAUSE_S)
    took = sorted(one for line in lines.values() for one in line.took)
    for line in lines.values():
        line.sock.close()
    return {"per_s": len(took) / seconds, "longest": took[-1], **percentiles(took)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("socket", type=Path)
    parser.add_argument("--clients", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=10.0)
    given = parser.parse_args()
    print(json.dumps({**load(given.socket, given.clients, given.seconds), "cpu_s": time.process_time()}))


if __name__ == "__main__":
    main()
