"""Start to first byte: a service started through keeper and runner, against the same program started bare.

Level `process` against posix_spawn, level `namespace` against bubblewrap with the mounts that anybody would write. The
program binds a unix socket and answers one byte; the clock runs from the request to start it until that byte is read.
Rounds alternate; medians. Needs root (each service has a uid of its own) and bubblewrap; takes about 15 s.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec
from measure import first_byte, row

from slum.model import Key, Level, Service
from slum.node import keeperclient
from slum.node.limits.detect import detect
from slum.node.limits.groups import Limits
from slum.node.runners.registry import runners
from slum.node.types import Instance, Runner
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
        return measure(home)
    finally:
        keeperclient.call(home, "shutdown", names=[])
        detect(home).clear()
        shutil.rmtree(home.data)
        shutil.rmtree(home.run, ignore_errors=True)


def measure(home: Home) -> int:
    program = home.data / "first_byte.py"
    shutil.copy(PROGRAM, program)
    program.chmod(0o644)
    table, limits = runners(home), detect(home)
    good = True
    for level in (Level.PROCESS, Level.NAMESPACE):
        ours, peers = [], []
        for number in range(ROUNDS):
            ours.append(through_slum(home, table[level], limits, number, program))
            peers.append(bare(home, level, number, program))
        good &= row(f"{level}: start to first byte", ours, peers, bound=1.3)
    return 0 if good else 1


def folders(home: Home, name: str) -> tuple[Path, Path]:
    data, run = home.data / "data" / name, home.run / "i" / name
    for folder in (data, run):
        folder.mkdir(parents=True, exist_ok=True)
        os.chown(folder, UID, UID)
        for parent in (folder.parent, home.data, home.run):
            parent.chmod(0o711)
    return data, run


def through_slum(home: Home, runner: Runner, limits: Limits, number: int, program: Path) -> float:
    level = runner.level
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
    keeperclient.call(home, "spawn", spawn=msgspec.to_builtins(runner.spawn(instance)))
    took = first_byte(sock, since=started)
    keeperclient.call(home, "signal", name=instance.name, signal=int(signal.SIGKILL))
    while any(child["state"] == "running" for child in keeperclient.call(home, "list")["children"]):
        time.sleep(0.001)
    keeperclient.call(home, "forget", name=instance.name)
    limits.remove(name)
    return took


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
