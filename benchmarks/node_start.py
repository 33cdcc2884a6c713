"""Start to first byte: a service started through keeper and runner, against the same program started bare.

Level `process` against posix_spawn, level `namespace` against bubblewrap with the mounts that anybody would write. The
program binds a unix socket and answers one byte; the clock runs from the request to start it until that byte is read.
Rounds alternate; medians. Needs root (each service has a uid of its own) and bubblewrap; takes about 15 s.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import first_byte, row

from slum.model import Key, Level, Service
from slum.node import keeperclient
from slum.node.keeperclient import KeeperClient
from slum.node.limits.detect import detect
from slum.node.runners.registry import runners
from slum.node.types import Instance
from slum.paths import Home

ROUNDS = int(os.environ.get("ROUNDS", "60"))
PROGRAM = Path(__file__).parent / "apps" / "first_byte.py"
UID = 265_000


def main() -> int:
    home = Home(
        data=Path(tempfile.mkdtemp(prefix="slum-bench-", dir="/tmp")),
        run=Path(tempfile.mkdtemp(prefix="s", dir="/tmp")),
    )
    for folder in (home.data, home.run):
        folder.chmod(0o711)
    keeperclient.start_detached(home)
    try:
        return asyncio.run(measure(home))
    finally:
        keeperclient.call(home, "shutdown", names=[])
        os.environ.get("KEEP") or shutil.rmtree(home.data)
        shutil.rmtree(home.run, ignore_errors=True)


async def measure(home: Home) -> int:
    program = home.data / "first_byte.py"
    shutil.copy(PROGRAM, program)
    program.chmod(0o644)
    good = True
    async with await KeeperClient.connect(home) as keeper:
        for level, bound in ((Level.PROCESS, 1.3), (Level.NAMESPACE, 1.3)):
            ours, peers = [], []
            for number in range(ROUNDS):
                ours.append(await through_slum(home, keeper, level, number, program))
                peers.append(bare(home, level, number, program))
            good &= row(f"{level}: start to first byte", ours, peers, bound=bound)
    return 0 if good else 1


def folders(home: Home, name: str) -> tuple[Path, Path]:
    data, run = home.data / "data" / name, home.run / "i" / name
    for folder in (data, run):
        folder.mkdir(parents=True, exist_ok=True)
        os.chown(folder, UID, UID)
        for parent in (folder.parent, home.data, home.run):
            parent.chmod(0o711)
    return data, run


async def through_slum(home: Home, keeper: KeeperClient, level: Level, number: int, program: Path) -> float:
    runner, limits = LEVELS.setdefault(home, runners(home))[level], LIMITS.setdefault(home, detect(home))
    name = f"{level}-{number}"
    data, run = folders(home, name)
    sock = run / "g.sock"
    command = ("/usr/bin/python3", "-S", "-E", str(program))
    started = time.perf_counter()
    instance = Instance(
        key=Key(tenement="here", service="bench", id="main"),
        service=Service(name="bench", command=command, isolation=level),
        release="0" * 64,
        generation=number,
        name=f"i/{name}",
        command=command,
        env={"SOCKET_PATH": str(sock), "PATH": "/usr/bin:/bin"},
        uid=UID,
        gid=UID,
        bundle=program,
        data=data,
        run=run,
        workdir=data,
        log=home.logs / name / "current",
        cgroup=limits.prepare(name, memory_mb=None, cpu_shares=None, pids=None),
    )
    spawn = runner.spawn(instance)
    prepared = time.perf_counter()
    await keeper.spawn(spawn)
    spawned = time.perf_counter()
    if os.environ.get("PARTS"):
        print(f"  prepare {(prepared - started) * 1e3:.2f} ms, spawn {(spawned - prepared) * 1e3:.2f} ms")
    took = await asyncio.to_thread(first_byte, sock, since=started)
    await keeper.signal(instance.name, signal.SIGKILL)
    while any(child.name == instance.name and child.running for child in await keeper.list_children()):
        await asyncio.sleep(0.001)
    await keeper.forget(instance.name)
    limits.remove(name)
    return took


LEVELS: dict[Home, dict[Level, object]] = {}
LIMITS: dict[Home, object] = {}


def bare(home: Home, level: Level, number: int, program: Path) -> float:
    run = home.run / "bare"
    run.mkdir(exist_ok=True)
    sock = run / f"{level}-{number}.sock"
    argv = ["/usr/bin/python3", "-S", "-E", str(program)]
    if level is Level.NAMESPACE:
        argv = [
            *(
                "bwrap",
                "--ro-bind",
                "/",
                "/",
                "--bind",
                str(run),
                str(run),
                "--proc",
                "/proc",
                "--dev",
                "/dev",
                "--tmpfs",
                "/dev/shm",
            ),
            *("--unshare-pid", "--unshare-ipc", "--unshare-uts", "--cap-drop", "ALL", *argv),
        ]
    started = time.perf_counter()
    pid = os.posix_spawnp(argv[0], argv, {"SOCKET_PATH": str(sock), "PATH": "/usr/bin:/bin"}, setsid=True)
    took = first_byte(sock, since=started)
    subprocess.run(["pkill", "-KILL", "-s", str(pid)], check=False)  # its own session: the monitor and all below
    os.waitpid(pid, 0)
    return took


if __name__ == "__main__":
    sys.exit(main())
