"""Many small services on one machine: time until all answer, and what watching over them costs when nothing happens.

Start: 100 services of level `process`, from nothing running until every one has given a byte, against supervisord with the
same programs (startsecs=0). slum starts as after a reboot: keeper and agent, with the config from the agent's disk; the
figure with ledger and server starting beside it is given too. Rounds alternate; medians.

Idle: agent and keeper with 200 services, then 400, at a health interval of 30 s: memory, memory for each further service,
and CPU over 60 s. Needs root and apt's supervisor; takes some four minutes. SERVICES, ROUNDS and IDLE_S change it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import cpu_s, first_byte, row, rss_bytes

from slum.node import keeperclient
from slum.paths import Home

SERVICES = int(os.environ.get("SERVICES", "100"))
ROUNDS = int(os.environ.get("ROUNDS", "5"))
IDLE_S = float(os.environ.get("IDLE_S", "60"))
PROGRAM = Path(__file__).parent / "apps" / "first_byte.py"
PYTHON = "/usr/bin/python3"


class Slum:
    """A slum of its own in two throw-away folders, with *count* services applied and then stopped."""

    def __init__(self, count: int) -> None:
        self.home = Home(
            data=Path(tempfile.mkdtemp(prefix="slum-bench-", dir="/tmp")),
            run=Path(tempfile.mkdtemp(prefix="s", dir="/tmp")),
        )
        self.env = {**os.environ, "SLUM_DATA_DIR": str(self.home.data), "SLUM_RUN_DIR": str(self.home.run)}
        for folder in (self.home.data, self.home.run):
            folder.chmod(0o711)
        program = self.home.data / "first_byte.py"
        shutil.copy(PROGRAM, program)
        program.chmod(0o644)
        self.names = [f"s{n:03}" for n in range(count)]
        self.fleet = self.home.data / "slum.toml"
        self.fleet.write_text(
            '[operators.local]\ntype = "local"\n[tenement.here]\noperator = "local"\n'
            '[tenement.here.routing]\nlisten = ["127.0.0.1:18089"]\n'
            "[tenement.here.settings]\nhealth_check_interval = 30\n"
            + "".join(
                f'[tenement.here.service.{name}]\nisolation = "process"\ncommand = "{PYTHON} -S -E {program}"\nstartup_timeout = 120\n'
                for name in self.names
            )
        )

    def run(self, *words: str, check: bool = True) -> None:
        subprocess.run(
            [sys.executable, "-m", "slum.cli.main", *words], env=self.env, check=check, stdout=subprocess.DEVNULL
        )

    def all_answer(self, since: float) -> float:
        return max(first_byte(self.home.routes / f"{name}.sock", since=since) for name in self.names)

    def stop(self) -> None:
        self.run("down", "--services", check=False)

    def without_control_plane(self) -> None:
        """Leave only the agent in boot.json: a tenement whose control plane is elsewhere."""
        boot = json.loads(self.home.boot.read_text())
        boot["children"] = [child for child in boot["children"] if child["name"] == "agent"]
        self.home.boot.write_text(json.dumps(boot))

    def pid(self, name: str) -> int:
        children = keeperclient.call(self.home, "list")["children"]
        return next(int(child["pid"]) for child in children if child["name"] == name)

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self.home.data)
        shutil.rmtree(self.home.run, ignore_errors=True)


def main() -> int:
    good = start(SERVICES)
    return 0 if idle(2 * SERVICES) and good else 1


def start(count: int) -> bool:
    slum = Slum(count)
    alone, whole, peer = [], [], []
    try:
        slum.run("apply", str(slum.fleet), "--yes", "--timeout", "300")
        slum.stop()
        boot = slum.home.boot.read_bytes()
        for _ in range(ROUNDS):
            slum.without_control_plane()
            began = time.perf_counter()
            keeperclient.start_detached(slum.home)
            alone.append(slum.all_answer(began))
            keeperclient.call(slum.home, "shutdown", names=everything(slum), grace_s=5)
            gone(slum)
            peer.append(supervisord(slum.home.data / "supervisor", slum.home.data / "first_byte.py", slum.names))
            slum.home.boot.write_bytes(boot)
            began = time.perf_counter()
            slum.run("up")
            whole.append(slum.all_answer(began))
            slum.stop()
    finally:
        slum.close()
    good = row(f"{count} services, keeper and agent", alone, peer, bound=1.2, unit="s", scale=1)
    row(f"{count} services, control plane too", whole, peer, bound=2.0, unit="s", scale=1)
    return good


def everything(slum: Slum) -> list[str]:
    names: list[str] = []
    while True:
        page = keeperclient.call(slum.home, "list", after=names[-1] if names else None)
        names += [child["name"] for child in page["children"]]
        if not page["more"]:
            return names


def gone(slum: Slum) -> None:
    while slum.home.keeper_socket.exists():
        time.sleep(0.05)


def supervisord(folder: Path, program: Path, names: list[str]) -> float:
    """Return the seconds that supervisord needs for the same programs."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    config = folder / "supervisord.conf"
    config.write_text(
        f"[supervisord]\nnodaemon=true\nlogfile={folder}/log\npidfile={folder}/pid\nchildlogdir={folder}\nuser=root\n"
        + "".join(
            f"[program:{name}]\ncommand={PYTHON} -S -E {program}\nstartsecs=0\nautorestart=true\nuser=nobody\n"
            f'environment=SOCKET_PATH="{folder}/{name}.sock"\n'
            for name in names
        )
    )
    shutil.chown(folder, "nobody")
    began = time.perf_counter()
    process = subprocess.Popen(
        ["/usr/bin/supervisord", "-c", str(config)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        return max(first_byte(folder / f"{name}.sock", since=began) for name in names)
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)


def idle(count: int) -> bool:
    figures = []
    for services in (count, 2 * count):
        slum = Slum(services)
        try:
            slum.run("apply", str(slum.fleet), "--yes", "--timeout", "600")
            time.sleep(35)  # one round of probes has passed
            agent, keeper = slum.pid("agent"), keeper_pid(slum)
            cpu = cpu_s(agent) + cpu_s(keeper)
            time.sleep(IDLE_S)
            used = (cpu_s(agent) + cpu_s(keeper) - cpu) / IDLE_S
            figures.append((rss_bytes(agent), rss_bytes(keeper), used))
            print(
                f"{services} idle services: agent {rss_bytes(agent) / 1e6:.1f} MB, keeper {rss_bytes(keeper) / 1e6:.1f} MB, "
                f"CPU {used:.2%} of a core over {IDLE_S:.0f} s"
            )
        finally:
            slum.close()
    (agent1, keeper1, used), (agent2, keeper2, _) = figures
    together, each = (agent1 + keeper1) / 1e6, (agent2 + keeper2 - agent1 - keeper1) / 1e6 / count
    print(
        f"together at {count}: {together:.1f} MB (bound 45), each further service {each:.3f} MB (bound 0.1), CPU {used:.2%} (bound 1%)"
    )
    return together <= 45 and each <= 0.1 and used < 0.01


def keeper_pid(slum: Slum) -> int:
    return int(keeperclient.call(slum.home, "hello")["pid"])


if __name__ == "__main__":
    sys.exit(main())
