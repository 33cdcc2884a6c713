"""A load generator in a process of its own: notes of 100 bytes at a ledger's socket, as JSON on stdout what came of it.

python benchmarks/ledger_load.py SOCKET --clients 256 --seconds 10
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from contextlib import AsyncExitStack
from pathlib import Path

import uvloop
from etcd_peer import percentiles

from slum.errors import QuorumLost, Unreachable
from slum.ledger.client import connect
from slum.ledger.commands import Done, Ledger, NoteEvent, Proposal, Record, new_request_id

TEXT = "v" * 100
STREAMS = 16


def proposal() -> Proposal:
    event = NoteEvent(kind="instance_noted", subject="instance:here/web/main", at=1.0, why=TEXT)
    return Proposal(command=Record(events=(event,)), request_id=new_request_id(os.urandom(16).hex(), 0), actor="bench")


async def load(socket: Path, clients: int, seconds: float) -> dict[str, float]:
    """Return writes a second and their latencies; *clients* write one after the other each, 16 share a connection."""
    took: list[float] = []
    async with AsyncExitStack() as stack:
        lines = [await stack.enter_async_context(connect(socket)) for _ in range(max(1, clients // STREAMS))]
        end = time.perf_counter() + seconds

        async def write(ledger: Ledger) -> None:
            while (began := time.perf_counter()) < end:
                try:
                    done = await ledger.propose(proposal(), deadline_s=10.0)
                except (QuorumLost, Unreachable):
                    await asyncio.sleep(0.01)
                    continue
                if isinstance(done, Done):
                    took.append(time.perf_counter() - began)

        async with asyncio.TaskGroup() as group:
            for number in range(clients):
                group.create_task(write(lines[number % len(lines)]), name=f"client {number}")
    return {"per_s": len(took) / seconds, "longest": max(took), **percentiles(sorted(took))}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("socket", type=Path)
    parser.add_argument("--clients", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=10.0)
    given = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        print(json.dumps(runner.run(load(given.socket, given.clients, given.seconds))))


if __name__ == "__main__":
    main()
