"""A node: a machine of its own folders that joined members behind TLS, with a real keeper and agent; nothing outlives the test."""

from __future__ import annotations

import asyncio
import secrets
import shutil
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from agent_support import SETTINGS, end, free_port, remove_cgroups
from fakes.front import CLUSTER, FakeFleet, FakeFront

from slum.errors import Unreachable
from slum.model import Service, Stamp
from slum.node import boot
from slum.node.home import read_line
from slum.node.join import join
from slum.node.keeperclient import call
from slum.paths import Home
from slum.wire import Desired, Phase


class Node:
    def __init__(self) -> None:
        token = secrets.token_hex(4)
        self.home = Home(data=Path(f"/tmp/slum-n-{token}"), run=Path(f"/tmp/sn{token}"))
        self.seq = 0
        self.listen = (f"127.0.0.1:{free_port()}",)

    async def join(self, *fronts: FakeFront, token: str, machine: str = "here", wait_s: float = 0.0) -> bool:
        urls = [front.url for front in fronts]
        return await asyncio.to_thread(join, self.home, urls=urls, machine=machine, token=token, wait_s=wait_s)

    async def start(self) -> None:
        await asyncio.to_thread(boot.start, self.home, (boot.agent_program(self.home),))

    def agent_pid(self) -> int:
        return next((c.pid for c in boot.children(self.home) or () if c.name == "agent" and c.running), 0)

    def keeper_pid(self) -> int:
        try:
            return int(call(self.home, "hello")["pid"])
        except Unreachable:
            return 0

    def services(self) -> dict[str, int]:
        """Pids of the living generations by name."""
        return {c.name: c.pid for c in boot.children(self.home) or () if c.name.startswith("i/") and c.running}

    def server(self) -> str:
        """The member that the agent says it is connected to."""
        line = read_line(self.home)
        return line.server if line is not None else ""

    def desired(self, *services: Service) -> Desired:
        self.seq += 1
        return Desired(
            stamp=Stamp(generation=1, seq=self.seq),
            cluster=CLUSTER,
            revision=self.seq,
            fleet="test",
            tenement="here",
            domain="localhost",
            settings=SETTINGS,
            services=services,
            routing_listen=self.listen,
        )

    async def healthy(self, front: FakeFront, name: str = "web") -> None:
        well = (Phase.HEALTHY, Phase.RUNNING)

        def is_well() -> bool:
            report = front.reports.get((name, "main"))
            return front.stamp == front.desired.stamp and report is not None and report.phase in well

        await front.until(is_well, 30)

    def log(self) -> str:
        path = self.home.own_log("agent")
        return path.read_text() if path.exists() else ""


@asynccontextmanager
async def node() -> AsyncIterator[Node]:
    made = Node()
    try:
        yield made
    except BaseException:
        sys.stdout.write(made.log())
        raise
    finally:
        await end(made.home)
        shutil.rmtree(made.home.data, ignore_errors=True)
        shutil.rmtree(made.home.run, ignore_errors=True)
        remove_cgroups(made.home)


@asynccontextmanager
async def fleet(members: int = 1) -> AsyncIterator[tuple[FakeFleet, list[FakeFront]]]:
    """Give a fleet with so many members, all of which know each other's addresses."""
    whole = FakeFleet()
    fronts = [FakeFront(whole, f"m{number + 1}") for number in range(members)]
    try:
        for front in fronts:
            await front.start()
        whole.servers = tuple(front.url for front in fronts)
        yield whole, fronts
    finally:
        for front in fronts:
            await front.stop()
