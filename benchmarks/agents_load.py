"""Many agents in one process: the lines of as many machines to members elsewhere, with a node certificate each.

    python benchmarks/agents_load.py FOLDER SOCKET --urls URL,URL --device v4 --addresses 10.7.0.50,... --agents a1,a2,...

Each joins by the public path, with a token from the member at SOCKET (`slum join`'s own function, into a folder of its own), then
runs the agent's own link: its doors, back-off, TLS, messages. What is pretended is the machine behind it: a config is acted on
the moment it comes, two services report figures that always moved. Joins come from the *addresses* in turn, for members take
40 at once from one. Says on stdout, a line of JSON each, what happens and when (CLOCK_MONOTONIC). A line on stdin has all agents
begin anew, at members chosen at random; its end ends it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from slum import __version__, log, wire
from slum.client import Client
from slum.model import Stamp, release_of
from slum.node.doors import Door, Far
from slum.node.home import read_home, read_identity
from slum.node.join import join
from slum.node.link import HEARTBEAT_S, Link
from slum.paths import Home

LEVELS = ("process", "namespace", "sandbox", "wasm", "vm")
AT_ONCE = 40
"""So many joins of one address are let in at once: slum.server.attempts."""
THREADS = 8


def tell(what: str, machine: str = "", **more: object) -> None:
    print(json.dumps({"what": what, "machine": machine, "at": time.monotonic(), **more}), flush=True)


class Machine:
    """One machine that does at once what it is told: an Agent, as the link knows one."""

    def __init__(self, home: Home) -> None:
        identity, told = read_identity(home), read_home(home)
        if identity is None or told is None:
            raise FileNotFoundError(f"{home.data} has not joined")
        self._identity = identity
        self._boot_id = os.urandom(16).hex()
        self._stamp = self._told = Stamp()
        self._instances: tuple[wire.InstanceReport, ...] = ()
        self._cpu_s = 0.0
        self.link = Link(Far(home, told), self, self._line)

    async def run(self) -> None:
        """Dial some time within the first heartbeat's, as machines that were not started by one hand."""
        await asyncio.sleep(random.uniform(0.0, HEARTBEAT_S))
        await self.link.run()

    def hello(self) -> wire.Hello:
        levels = (
            wire.LevelStatus(level=level, available=True, detail="proven by a start when the agent started")
            for level in LEVELS
        )
        return wire.Hello(
            protocol=wire.PROTOCOL,
            version=__version__,
            machine=self._identity.machine,
            tenement=self._identity.tenement,
            stamp=self._stamp,
            boot_id=self._boot_id,
            host=self._identity.tenement,
            cpus=4,
            memory_bytes=8 << 30,
            levels=tuple(levels),
            limits="cgroup v2",
            dialled_at=time.time(),
        )

    def report(self, *, full: bool) -> wire.Report | None:
        if self._told == self._stamp and not full:
            return None
        if self._told != self._stamp:
            self._told = self._stamp
            tell("acknowledged", self._identity.tenement, seq=self._stamp.seq)
        return wire.Report(stamp=self._stamp, at=time.time(), full=full, instances=self._instances)

    def heartbeat(self) -> wire.Heartbeat:
        self._cpu_s += 0.05
        return wire.Heartbeat(
            at=time.time(),
            load=random.random(),
            memory_available_bytes=random.randrange(1 << 30, 4 << 30),
            rss_bytes=32 << 20,
            stats=tuple(
                wire.InstanceStats(
                    service=one.service,
                    id=one.id,
                    memory_bytes=random.randrange(30 << 20, 60 << 20),
                    cpu_s=self._cpu_s,
                    requests=int(self._cpu_s * 100),
                )
                for one in self._instances
            ),
        )

    def desire(self, desired: wire.Desired) -> None:
        self._stamp = desired.stamp
        self._instances = tuple(
            _healthy(service.name, instance, release_of(service))
            for service in desired.services
            for instance in service.instances
        )
        self.link.poke()

    def open_stream(self, request: wire.OpenStream, door: Door) -> None:
        """Nobody asks for streams here."""

    def _line(self, server: str, why: str) -> None:
        tell("connected" if server else "lost", self._identity.tenement, server=server, why=why)


def _healthy(service: str, instance: str, release: str) -> wire.InstanceReport:
    now = time.time()
    generation = wire.GenerationReport(
        number=1, release=release, phase=wire.Phase.HEALTHY, pid=4711, started_at=now, serving=True
    )
    return wire.InstanceReport(
        service=service,
        id=instance,
        phase=wire.Phase.HEALTHY,
        release=release,
        generation=1,
        serving=1,
        serving_release=release,
        generations=(generation,),
        health="GET / -> 200 in 2 ms",
        pid=4711,
        since=now,
        url=f"http://{service}.localhost:8080",
    )


def join_all(folder: Path, given: argparse.Namespace) -> list[Home]:
    """Return the homes of all agents, each joined; those that have joined before are left as they are."""
    homes = [Home(data=folder / name, run=folder / name) for name in given.agents]
    urls = list(given.urls)

    def join_one(home: Home) -> None:
        if not (home.agent / "home.json").exists():
            with Client(Home(data=folder, run=given.socket.parents[1])) as client:
                token = client.add_token("node", home.data.name).token
            join(home, urls=random.sample(urls, len(urls)), machine=home.data.name, token=token, wait_s=60.0)

    with ThreadPoolExecutor(THREADS) as pool:
        for number in range(0, len(homes), AT_ONCE):
            _speak_from(given.addresses[number // AT_ONCE % len(given.addresses)], given.device)
            list(pool.map(join_one, homes[number : number + AT_ONCE]))
    return homes


def _speak_from(address: str, device: str) -> None:
    """Let connections that are made from now on come from *address*."""
    subnet = f"{address.rpartition('.')[0]}.0/24"
    subprocess.run(["ip", "addr", "replace", f"{address}/24", "dev", device, "noprefixroute"], check=True)
    subprocess.run(["ip", "route", "replace", subnet, "dev", device, "src", address], check=True)


async def live(homes: list[Home]) -> None:
    """Be all agents until stdin ends, anew after each line of it."""
    reader = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(reader)
    await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, sys.stdin)
    while True:
        async with asyncio.TaskGroup() as group:
            running = [group.create_task(Machine(home).run()) for home in homes]
            line = await reader.readline()
            for task in running:
                task.cancel()
        for home in homes:
            tell("lost", home.data.name)
        if not line:
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("socket", type=Path)
    for name in ("urls", "addresses", "agents"):
        parser.add_argument(f"--{name}", type=lambda text: text.split(","), required=True)
    parser.add_argument("--device", required=True)
    given = parser.parse_args()
    log.start("agents", logging.WARNING)
    homes = join_all(given.folder, given)
    tell("joined")
    asyncio.run(live(homes))


if __name__ == "__main__":
    main()
