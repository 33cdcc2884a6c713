"""A real keeper with a real agent under it, and a member that the test plays; nothing of it outlives the test.

Services are small Python programs on the standard library. Folders are unique, the run folder's name short.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
from fakes.member import Member

import slum
from slum.errors import Unreachable
from slum.model import EnvVar, Level, Listen, Service, Settings, Stamp
from slum.node.keeperclient import Child, KeeperClient, KeeperError, call, start_detached
from slum.node.limits.detect import base_name
from slum.node.types import Log, Respawn, Spawn
from slum.paths import Home
from slum.wire import Desired, InstanceReport, Override, Phase

APP = Path(__file__).parent / "agent_app.py"
SETTINGS = Settings(
    health_check_interval_s=0.3, max_restarts=2, restart_window_s=20, backoff_base_ms=50, backoff_max_ms=400
)


def service(name: str = "web", **changes: object) -> Service:
    """An HTTP service at level process that answers "VERSION pid"; *changes* are fields of Service, env as a dict."""
    env = {"VERSION": "v1", **changes.pop("env", {})}  # type: ignore[dict-item]  # a dict by this function's contract
    fields: dict[str, object] = {
        "name": name,
        "command": ("/usr/bin/python3", str(APP)),
        "isolation": Level.PROCESS,
        "health": "/healthz",
        "startup_timeout_s": 10.0,
        "drain_timeout_s": 5.0,
        "stop_timeout_s": 3.0,
        "env": tuple(EnvVar(name=k, value=v) for k, v in sorted(env.items())),
    }
    return Service(**(fields | changes))  # type: ignore[arg-type]  # field names are checked by msgspec


def worker(name: str = "tick", script: str = "while :; do sleep 1; done", **changes: object) -> Service:
    command = ("/bin/sh", "-c", script)
    return service(name, **{"command": command, "listen": Listen.NONE, "health": None, **changes})


class Site:
    """One machine: keeper, agent, member."""

    def __init__(self, home: Home, member: Member) -> None:
        self.home = home
        self.member = member
        self.keeper: KeeperClient
        self.seq = 0

    def desired(
        self, *services: Service, settings: Settings = SETTINGS, overrides: tuple[Override, ...] = ()
    ) -> Desired:
        self.seq += 1
        return Desired(
            stamp=Stamp(generation=1, seq=self.seq),
            cluster="c1",
            revision=self.seq,
            fleet="test",
            tenement="here",
            domain="localhost",
            settings=settings,
            services=services,
            routing_listen=(f"127.0.0.1:{free_port()}",),
            overrides=overrides,
        )

    def push(self, *services: Service, **more: object) -> Desired:
        """Ask for *services*; the router's address stays what it was first."""
        desired = self.desired(*services, **more)  # type: ignore[arg-type]  # passed through
        if self.member.desired is not None:
            desired = msgspec.structs.replace(desired, routing_listen=self.member.desired.routing_listen)
        self.member.push(desired)
        return desired

    def report(self, name: str = "web", instance: str = "main") -> InstanceReport:
        return self.member.reports[name, instance]

    def phase(self, name: str = "web") -> Phase | None:
        """The phase of the newest config's release; None while the agent does not act on that."""
        desired = self.member.desired
        if desired is None or self.member.stamp != desired.stamp:
            return None
        report = self.member.reports.get((name, "main"))
        return report.phase if report else None

    async def healthy(self, *names: str, seconds: float = 20.0) -> None:
        well = (Phase.HEALTHY, Phase.RUNNING)
        await self.member.until(lambda: all(self.phase(n) in well for n in names or ("web",)), seconds)

    async def children(self) -> dict[str, Child]:
        return {child.name: child for child in await self.keeper.list_children()}

    async def generations(self) -> dict[str, int]:
        """Pids of the living generations by name."""
        return {n: c.pid for n, c in (await self.children()).items() if n.startswith("i/") and c.running}

    async def ask(self, path: str = "/", name: str = "web", instance: str | None = None) -> str:
        """Ask a service through its route, as the router would."""
        route = self.home.routes / (f"{name}.sock" if instance is None else f"{name}/{instance}.sock")
        reader, writer = await asyncio.open_unix_connection(str(route))
        writer.write(f"GET {path} HTTP/1.0\r\nHost: x\r\n\r\n".encode())
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
        head, _, body = answer.partition(b"\r\n\r\n")
        assert b" 200 " in head.split(b"\r\n")[0], answer
        return body.decode().strip()

    async def kill_agent(self) -> int:
        """kill -9 of the agent; the keeper starts the next one."""
        child = (await self.children())["agent"]
        os.kill(child.pid, signal.SIGKILL)
        return child.pid

    async def agent_back(self, old: int) -> None:
        count = len(self.member.hellos)
        await self.member.until(lambda: len(self.member.hellos) > count or not alive(old), 20)

    def log(self) -> str:
        path = self.home.own_log("agent")
        return path.read_text() if path.exists() else ""


@asynccontextmanager
async def site() -> AsyncIterator[Site]:
    """Give a Site whose agent is running and connected; everything that it started is ended afterwards."""
    home = new_home()
    start_detached(home)
    member = Member(home.api_socket)
    here = Site(home, member)
    try:
        await member.start()
        here.keeper = await KeeperClient.connect(home)
        await member.until(lambda: member.hellos, 20)
        yield here
    except BaseException:
        sys.stdout.write(here.log())
        raise
    finally:
        await member.stop()
        if hasattr(here, "keeper"):
            await here.keeper.close()
        await end(home)
        shutil.rmtree(home.data.parent, ignore_errors=True)
        remove_cgroups(home)


def new_home() -> Home:
    """Return a Home in new folders, with an identity and the agent as what the keeper starts."""
    folder = Path(tempfile.mkdtemp(prefix="sa", dir="/tmp"))
    folder.chmod(0o711)
    home = Home(data=folder / "d", run=folder / "r")
    home.data.mkdir()
    home.agent.mkdir(mode=0o700)
    home.data.chmod(0o711)
    home.identity.write_text(json.dumps({"tenement": "here", "machine": "local:m1"}))
    home.boot.write_bytes(msgspec.json.encode({"children": [agent_spawn(home)]}))
    return home


def agent_spawn(home: Home) -> Spawn:
    package = Path(slum.__file__ or "").parent.parent
    return Spawn(
        name="agent",
        argv=(sys.executable, "-m", "slum.node.agent", "--data-dir", str(home.data), "--run-dir", str(home.run)),
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(package), "AGENT_SECRET": "hush-9177"},
        log=Log(path=str(home.own_log("agent"))),
        respawn=Respawn(),
    )


async def end(home: Home) -> None:
    """End the keeper of *home* and all its children."""
    for _ in range(100):
        try:
            children = msgspec.convert(call(home, "list", after=None)["children"], list[Child])
            call(home, "shutdown", names=[c.name for c in children], grace_s=0.3)
        except (Unreachable, KeeperError):
            return
        await asyncio.sleep(0.05)


def remove_cgroups(home: Home) -> None:
    """Remove the base folders that the agent's limits made, which a real machine keeps."""
    for place in Path("/sys/fs/cgroup").glob("*"):
        for base in (place / base_name(home), place.parent / base_name(home)):
            if base.is_dir():
                for folder in (*(entry for entry in base.iterdir() if entry.is_dir()), base):
                    with contextlib.suppress(OSError):
                        folder.rmdir()


async def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    deadline = asyncio.get_running_loop().time() + seconds
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, f"not within {seconds} s"
        await asyncio.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
