"""Several real ledger processes on loopback ports, writers that insist, and the checks that follow: what all tests of
members in processes of their own share."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from ledger_support import ROOT, note, proposal

from slum.errors import QuorumLost, Unreachable
from slum.ledger import folder, identity
from slum.ledger.beginning import Beginning, begin
from slum.ledger.client import connect
from slum.ledger.commands import PROTOCOL, Done, LeaderInfo, Member, Proposal, Result
from slum.ledger.schema import Position, read_position, row_hash
from slum.ledger.world import Config
from slum.paths import Home

SMALL_BYTES = 1 << 20
OTHER = """
import sys
import slum.ledger.commands as commands
commands.PROTOCOL = %d
from slum.ledger.process import main
sys.exit(main(sys.argv[1:]))
"""


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@dataclass
class Node:
    name: str
    home: Home
    log: Path
    child: subprocess.Popen[bytes] | None = None
    protocol: int = PROTOCOL
    """What its slum speaks; a newer one is this one that says so."""

    @property
    def runs(self) -> bool:
        return self.child is not None and self.child.poll() is None


@dataclass
class Cluster:
    """*count* members, as a cluster that was set up whole."""

    count: int = 3
    epoch_entries: int = 50
    epoch_bytes: int = SMALL_BYTES
    upgrade_s: float = 3600.0
    removes: bool = True
    """The folder goes at the end; else it is its owner's business."""
    base: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="sl", dir="/tmp")))

    def __post_init__(self) -> None:
        self.nodes = [self.make_node(n) for n in range(self.count)]
        rows = [self.make_identity(node) for node in self.nodes]
        beginning = Beginning(cluster="c0ffee", lineage="l", generation=7, members=tuple(rows), at=1.0)
        for node in self.nodes:
            begin(node.home.state, beginning, self.epoch_bytes)

    def make_node(self, n: int) -> Node:
        base = self.base / str(n + 1)
        return Node(f"m{n + 1}", Home(data=base / "d", run=base / "r"), self.base / f"m{n + 1}.log")

    def make_identity(self, node: Node) -> Member:
        address = f"127.0.0.1:{free_port()}"
        return identity.make(node.home.state, id=node.name, listen=address, address=address)

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        for node in self.nodes:
            if node.runs:
                self.signal(node, signal.SIGCONT)
            self.kill(node)
        if os.environ.get("SLUM_TEST_KEEP"):
            sys.stdout.write(f"kept {self.base}\n")
        elif self.removes:
            shutil.rmtree(self.base)

    def start(self, *nodes: Node) -> None:
        for node in nodes or self.nodes:
            options = [
                "--ballast-bytes",
                "0",
                "--epoch-bytes",
                str(self.epoch_bytes),
                "--epoch-entries",
                str(self.epoch_entries),
                "--upgrade-s",
                str(self.upgrade_s),
            ]
            folders = ["--data-dir", str(node.home.data), "--run-dir", str(node.home.run)]
            with node.log.open("ab") as log:
                program = ["-m", "slum.ledger.process"] if node.protocol == PROTOCOL else ["-c", OTHER % node.protocol]
                node.child = subprocess.Popen([sys.executable, *program, *folders, *options], stderr=log, cwd=ROOT)

    def kill(self, *nodes: Node) -> None:
        for node in nodes:
            if node.child is not None:
                node.child.kill()
        for node in nodes:
            if node.child is not None:
                node.child.wait()

    async def keep(self) -> None:
        """Start again whoever has ended, as the keeper does, until cancelled."""
        while True:
            for node in self.nodes:
                if node.child is not None and not node.runs:
                    self.start(node)
            await asyncio.sleep(0.2)

    def signal(self, node: Node, number: int) -> None:
        assert node.child is not None
        node.child.send_signal(number)

    def terminate(self) -> None:
        for node in self.nodes:
            if node.runs:
                self.signal(node, signal.SIGTERM)
        for node in self.nodes:
            if node.child is not None:
                assert node.child.wait(20) == 0, node.log.read_text()[-3000:]

    async def info(self, node: Node) -> LeaderInfo | None:
        try:
            async with connect(node.home.ledger_socket) as ledger:
                return await ledger.leader()
        except (Unreachable, QuorumLost):
            return None

    async def leader(self, deadline_s: float = 20.0) -> Node:
        """Return the member that leads, once one does."""
        end = time.monotonic() + deadline_s
        while True:
            for node in self.nodes:
                info = await self.info(node) if node.runs else None
                if info is not None and info.is_self:
                    return node
            assert time.monotonic() < end, self.logs()
            await asyncio.sleep(0.02)

    async def agreed(self, deadline_s: float = 30.0) -> None:
        """Return once all members that run have applied the same."""
        end = time.monotonic() + deadline_s
        while True:
            infos = [await self.info(node) for node in self.nodes if node.runs]
            at = {(info.epoch, info.seq) for info in infos if info is not None}
            if len(at) == 1 and None not in infos and any(info is not None and info.is_self for info in infos):
                return
            assert time.monotonic() < end, (infos, self.logs())
            await asyncio.sleep(0.05)

    def logs(self) -> str:
        return "\n".join(f"{node.name}: {node.log.read_text()[-1500:]}" for node in self.nodes if node.log.exists())

    def position(self, node: Node) -> Position:
        with self.opened(node) as db:
            return read_position(db)

    def opened(self, node: Node) -> closing[sqlite3.Connection]:
        path = folder.current(node.home.state)
        assert path is not None
        return closing(sqlite3.connect(path))

    async def finish(self, writers: list[Writer], others: int = 0) -> None:
        """End all members and check what they keep.

        What a writer gave up on may still be under way and end up with some of them only. Started again with nobody who asks for
        anything they must agree.
        """
        await self.agreed()
        self.terminate()
        if len({self.position(node).seq for node in self.nodes}) > 1:
            self.start()
            await self.agreed()
            self.terminate()
        self._check(writers, others)

    def _check(self, writers: list[Writer], others: int) -> None:
        """Every acknowledged write once, same order, same chains and rows on all members."""
        texts, at, rows = set(), set(), set()
        for node in self.nodes:
            with self.opened(node) as db:
                found = db.execute("SELECT why FROM events WHERE kind = 'instance_noted' ORDER BY number").fetchall()
                texts.add(tuple(row[0] for row in found))
                position = read_position(db)
                at.add((position.seq, position.chain))
                rows.add(row_hash(db))
        assert len(at) == 1, at
        assert len(rows) == 1, "members differ in rows"
        assert len(texts) == 1
        (found,) = texts
        assert len(found) == len(set(found)), "something was written twice"
        acknowledged = {text for writer in writers for text in writer.acknowledged}
        assert set(found) >= acknowledged, f"lost {sorted(acknowledged - set(found))[:10]}"
        assert len(set(found) - acknowledged) <= len(writers) + others, (
            "more than what was under way was never answered"
        )
        for writer in writers:
            mine = [text for text in found if text.startswith(f"{writer.name}.")]
            assert mine[: len(writer.acknowledged)] == writer.acknowledged, "a writer's order was not kept"
            assert writer.seqs == sorted(writer.seqs)


class Writer:
    """Writes numbered notes one after the other, each until it is answered, at whichever member answers."""

    def __init__(self, cluster: Cluster, name: int, chance: random.Random) -> None:
        self._cluster = cluster
        self._chance = chance
        self.name = name
        self.acknowledged: list[str] = []
        self.seqs: list[int] = []
        self.longest_s = 0.0

    async def run(self, stop: asyncio.Event) -> None:
        numbers = itertools.count()
        while not stop.is_set():
            text = f"{self.name}.{next(numbers)}"
            began = time.monotonic()
            result = await self._insist(proposal(note(why=text)), stop)
            if result is None:
                return
            assert isinstance(result, Done), result
            self.longest_s = max(self.longest_s, time.monotonic() - began)
            self.acknowledged.append(text)
            self.seqs.append(result.seq)

    async def _insist(self, made: Proposal, stop: asyncio.Event) -> Result | None:
        while not stop.is_set():
            node = self._chance.choice([node for node in self._cluster.nodes if node.runs] or self._cluster.nodes)
            with contextlib.suppress(Unreachable, QuorumLost):
                async with connect(node.home.ledger_socket) as ledger:
                    return await ledger.propose(made, deadline_s=2)
            await asyncio.sleep(0.01)
        return None


async def until(happened: Callable[[], bool], deadline_s: float = 30.0) -> None:
    end = time.monotonic() + deadline_s
    while not happened():
        assert time.monotonic() < end, "did not happen in time"
        await asyncio.sleep(0.01)


__all__ = ["Cluster", "Config", "Node", "Writer", "free_port", "until"]
