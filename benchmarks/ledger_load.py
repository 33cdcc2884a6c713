"""A load generator in a process of its own: notes of 100 bytes at a ledger's socket, as JSON on stdout what came of it.

python benchmarks/ledger_load.py SOCKET --clients 256 --seconds 10

It shares the machine with what it measures, as etcd's h2load does: calls are encoded once, only their numbers and request ids are
fresh, and every answer is decoded and looked at.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import socket
import time
from pathlib import Path

from etcd_peer import percentiles

from slum.ledger import rpc
from slum.ledger.commands import Done, NoteEvent, Proposal, Record, Rejected

TEXT = "v" * 100
STREAMS = 16
NUMBER = 0xFFFFFF
"""So large that its encoding leaves room for every number."""
PAUSE_S = 0.01


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
        made = proposal()
        self._before, self._middle, self._after = _template(made)

    def write(self, clients: list[int]) -> None:
        """Let *clients* write something new."""
        ids, now = os.urandom(16 * len(clients)).hex(), time.perf_counter()
        calls, after = [], b":%010d" % self._seen + self._after
        for place, client in enumerate(clients):
            self.began[client] = now
            fresh = ids[32 * place : 32 * place + 32].encode()
            calls.append(self._before + client.to_bytes(4, "big") + self._middle + fresh + after)
        self.sock.sendall(b"".join(calls))

    def read(self) -> list[int]:
        """Take what has come; return the clients that were answered."""
        data = self.sock.recv(1 << 18)
        if not data:
            raise ConnectionError("the ledger closed the connection")
        answered, now = [], time.perf_counter()
        for frame in self._splitter.feed(data):
            reply = rpc.unpack_reply(frame)
            answered.append(reply.id)
            if isinstance(reply.result, Done | Rejected):
                self._seen = reply.result.seq
            if isinstance(reply.result, Done):
                self.took.append(now - self.began[reply.id])
            else:
                self.refused += 1
        return answered


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
                line = lines[descriptor]
                line.write(line.read())
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
