"""What a backup loses, how long it takes to come back, and what it costs while it runs.

    python benchmarks/backup.py [--kills 20] [--megabytes 50] [--seconds 20] [--only rpo|rto|cost]

RPO: a ledger that is written to all the time and its backup (to a folder) are killed with -9 together, over and over; lost is what
was acknowledged and is not in the restored state, told as the age of the oldest such write. RTO: a state of 50 MB from the
command `slum restore` until the control plane answers its first read, against `etcdctl snapshot restore` of the same keys and
values until etcd answers one. Cost: CPU and memory of the backup process and its Litestream, idle and while 50 writes a second
come. The peer is etcd (apt: etcd-server, etcd-client).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import os
import random
import secrets
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from measure import cpu_s, row, rss_bytes

from slum.backup import config, manifest, points, status
from slum.backup.config import Keys, Settings
from slum.backup.store import open_store
from slum.errors import QuorumLost, Unreachable
from slum.ledger import follow
from slum.ledger.client import connect
from slum.ledger.commands import NoteEvent, Proposal, Record, new_request_id
from slum.paths import Home

SLACK_S = 0.5
"""What a kill may lose beyond the interval: a send that was under way."""
RTO_BOUND = 6.0
"""Ours checks every page, event and row, and starts ledger, server and agent; etcd checks one hash and starts itself."""
VALUE_CHARS = 1900
NO_KEYS = Keys("", "")


class Plane:
    """Ledger and backup as processes of their own, in folders of their own."""

    def __init__(self, interval_ms: int) -> None:
        self.base = Path(tempfile.mkdtemp(prefix="sb", dir="/tmp"))
        self.home = Home(data=self.base / "d", run=self.base / "r")
        self.settings: Settings = config.made(f"file://{self.base}/store", interval_ms=interval_ms, verify_hours=0)
        self.home.data.mkdir()
        self.home.server_config.write_text(
            f'[backup]\nurl = "{self.settings.url}"\ninterval_ms = {interval_ms}\nverify_hours = 0\n'
        )
        self.children: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        folders = ["--data-dir", str(self.home.data), "--run-dir", str(self.home.run)]
        with (self.base / "log").open("ab") as log:
            for words in (["slum.ledger.process", "--ballast-bytes", "0"], ["slum.backup.process"]):
                self.children.append(subprocess.Popen([sys.executable, "-m", *words, *folders], stdout=log, stderr=log))

    def kill(self) -> None:
        for child in self.children:
            child.kill()
        for child in self.children:
            child.wait()
        self.children.clear()

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self.base, ignore_errors=True)

    async def up(self) -> None:
        await until(lambda: self.is_sent(), "the backup runs")

    def is_sent(self) -> bool:
        """Tell whether the store has all that the ledger has now; what the process said of it may be older."""
        said = status.read(self.home)
        if said is None or said.pid != self.children[1].pid or said.seq < 0:
            return False
        found = open_store(self.settings, NO_KEYS).get(manifest.HEAD)
        return found is not None and manifest.decode_head(found.data).seq >= follow.standing(self.home.state).seq

    def restored(self) -> points.Point:
        folder = Path(tempfile.mkdtemp(dir=self.base))
        return points.restored(open_store(self.settings, NO_KEYS), self.settings, NO_KEYS, folder)


async def rpo(interval_ms: int, kills: int, chance: random.Random) -> bool:
    lost_s: list[float] = []
    lost: list[int] = []
    plane = Plane(interval_ms)
    try:
        for _ in range(kills):
            plane.start()
            await plane.up()
            acknowledged: list[tuple[int, float]] = []
            writing = asyncio.create_task(write(plane.home, acknowledged, pause_s=0.004))
            await asyncio.sleep(1.0 + chance.random() * 2 * interval_ms / 1000)
            said = status.read(plane.home)
            plane.kill()
            killed = time.time()
            if said is not None and said.child_pid:
                await until(lambda pid=said.child_pid: not Path(f"/proc/{pid}").exists(), "litestream is gone")
            await writing
            seq = plane.restored().position.seq
            missing = [at for number, at in acknowledged if number > seq]
            lost.append(len(missing))
            lost_s.append(killed - missing[0] if missing else 0.0)
    finally:
        plane.close()
    bound = interval_ms / 1000 + SLACK_S
    ok = max(lost_s) <= bound
    median, worst = statistics.median(lost_s) * 1000, max(lost_s) * 1000
    print(
        f"RPO at {interval_ms:5} ms, {kills} kills       median {median:6.0f} ms   worst {worst:6.0f} ms (bound {bound * 1000:.0f})"
        f"   writes lost: median {statistics.median(lost):.0f}, worst {max(lost)}   {'ok' if ok else 'OVER'}"
    )
    return ok


async def write(
    home: Home, acknowledged: list[tuple[int, float]], *, pause_s: float, text: str = "w", seconds: float = 1e9
) -> None:
    """Write one note after the other until the ledger is gone, or *seconds* have passed."""
    end = time.monotonic() + seconds
    with contextlib.suppress(Unreachable, QuorumLost):
        async with connect(home.ledger_socket) as ledger:
            seq = (await ledger.leader()).seq
            while time.monotonic() < end:
                note = NoteEvent(kind="instance_noted", subject="instance:here/bench/main", at=1.0, why=text)
                request = new_request_id(seq)
                done = await ledger.propose(
                    Proposal(command=Record(events=(note,)), request_id=request, actor="bench"), deadline_s=10
                )
                seq = done.seq
                acknowledged.append((seq, time.time()))
                await asyncio.sleep(pause_s)


async def fill(home: Home, megabytes: int) -> list[tuple[str, str]]:
    """Fill the ledger with notes until its state has *megabytes*; return them as keys and values."""
    kept: list[tuple[str, str]] = []
    count = megabytes * (1 << 20) // 2350
    async with connect(home.ledger_socket) as ledger:
        seq = (await ledger.leader()).seq
        for first in range(0, count, 100):
            values = [
                (f"/bench/{n:08}", secrets.token_hex(VALUE_CHARS // 2)) for n in range(first, min(count, first + 100))
            ]
            notes = tuple(
                NoteEvent(kind="instance_noted", subject=f"instance:here{key}", at=1.0, why=value)
                for key, value in values
            )
            request = new_request_id(seq)
            done = await ledger.propose(
                Proposal(command=Record(events=notes), request_id=request, actor="bench"), deadline_s=30
            )
            seq = done.seq
            kept += values
    return kept


async def rto(megabytes: int, runs: int) -> bool:
    plane = Plane(1000)
    try:
        plane.start()
        await plane.up()
        data = await fill(plane.home, megabytes)
        await until(plane.is_sent, "all is sent", 300)
        size = (plane.home.state / "state.db").stat().st_size
        plane.kill()
        ours = [_slum_back(plane) for _ in range(runs)]
        with _etcd_data(data) as snapshot:
            peers = [_etcd_back(snapshot, data) for _ in range(runs)]
            peer_size = snapshot.stat().st_size
    finally:
        plane.close()
    print(
        f"state.db {size >> 20} MB, etcd's snapshot {peer_size >> 20} MB, {len(data)} values of {VALUE_CHARS} characters"
    )
    return row("RTO to the first answered read", ours, peers, bound=RTO_BOUND, unit="s", scale=1)


def _slum_back(plane: Plane) -> float:
    """Restore into folders of their own, start, and return the seconds until a read is answered; all checks are on."""
    base = Path(tempfile.mkdtemp(prefix="sb", dir="/tmp"))
    base.chmod(0o711)
    folders = ["--data-dir", str(base / "d"), "--run-dir", str(base / "r")]
    slum = [sys.executable, "-m", "slum.cli.main"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLUM_")}
    try:
        began = time.perf_counter()
        subprocess.run(
            [*slum, "restore", "--from", plane.settings.url, "-q", *folders],
            env=env,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        subprocess.run([*slum, "up", *folders], env=env, check=True, stdout=subprocess.DEVNULL)
        answer = _get(base / "r" / "p" / "api.sock", "/v1/events?newest=1&limit=1")
        took = time.perf_counter() - began
        assert answer.startswith(b"[{"), answer[:200]
    finally:
        subprocess.run([*slum, "down", "--services", *folders], env=env, check=False, stdout=subprocess.DEVNULL)
        shutil.rmtree(base, ignore_errors=True)
    return took


def _get(path: Path, what: str) -> bytes:
    connection = http.client.HTTPConnection("slum", timeout=10)
    connection.sock = socket.socket(socket.AF_UNIX)
    try:
        connection.sock.connect(str(path))
        connection.request("GET", what)
        return connection.getresponse().read()
    finally:
        connection.close()


@contextmanager
def _etcd_data(data: list[tuple[str, str]]) -> Iterator[Path]:
    """Yield a snapshot of an etcd that holds *data*."""
    folder = Path(tempfile.mkdtemp(prefix="sb", dir="/tmp"))
    try:
        with _etcd(folder / "first") as endpoint:
            for first in range(0, len(data), 100):
                puts = "\n".join(f"put {key} {value}" for key, value in data[first : first + 100])
                # One transaction of 100 puts, as a note holds 100 events: no compares, then the puts, no else.
                _etcdctl(endpoint, "txn", stdin=f"\n{puts}\n\n\n")
            snapshot = folder / "snapshot"
            _etcdctl(endpoint, "snapshot", "save", str(snapshot))
        yield snapshot
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _etcd_back(snapshot: Path, data: list[tuple[str, str]]) -> float:
    folder = Path(tempfile.mkdtemp(prefix="sb", dir="/tmp"))
    try:
        began = time.perf_counter()
        env = {**os.environ, "ETCDCTL_API": "3"}
        # etcdctl keeps the snapshot's hash from the save, and compares it: this is its check.
        subprocess.run(
            ["etcdctl", "snapshot", "restore", str(snapshot), "--data-dir", str(folder / "d")],
            env=env,
            check=True,
            capture_output=True,
        )
        with _etcd(folder / "d") as endpoint:
            said = _etcdctl(endpoint, "get", data[-1][0])
            took = time.perf_counter() - began
        assert data[-1][1] in said
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return took


@contextmanager
def _etcd(data_dir: Path) -> Iterator[str]:
    client, peer = _port(), _port()
    endpoint = f"http://127.0.0.1:{client}"
    words = ["--listen-client-urls", endpoint, "--advertise-client-urls", endpoint]
    words += ["--listen-peer-urls", f"http://127.0.0.1:{peer}", "--data-dir", str(data_dir), "--log-level", "error"]
    child = subprocess.Popen(["etcd", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError):
                connection = http.client.HTTPConnection("127.0.0.1", client, timeout=2)
                try:
                    connection.request("GET", "/health")
                    if b"true" in connection.getresponse().read():
                        break
                finally:
                    connection.close()
            if time.monotonic() > end:
                sys.exit("etcd does not start")
            time.sleep(0.005)
        yield endpoint
    finally:
        child.kill()
        child.wait()


def _etcdctl(endpoint: str, *words: str, stdin: str | None = None) -> str:
    done = subprocess.run(
        ["etcdctl", "--endpoints", endpoint, *words],
        env={**os.environ, "ETCDCTL_API": "3"},
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        sys.exit(f"etcdctl {words[0]}: {done.stderr[-500:]}")
    return done.stdout


async def cost(seconds: float) -> bool:
    plane = Plane(1000)
    try:
        plane.start()
        await plane.up()
        for name, pause_s in (("idle", None), ("50 writes/s", 0.02)):
            said = status.read(plane.home)
            assert said is not None
            before = [cpu_s(pid) for pid in (said.pid, said.child_pid)]
            began = time.monotonic()
            if pause_s is None:
                await asyncio.sleep(seconds)
            else:
                await write(plane.home, [], pause_s=pause_s, text="x" * 200, seconds=seconds)
            took = time.monotonic() - began
            used = [
                100 * (cpu_s(pid) - was) / took for pid, was in zip((said.pid, said.child_pid), before, strict=True)
            ]
            memory = [rss_bytes(pid) / (1 << 20) for pid in (said.pid, said.child_pid)]
            print(
                f"cost, {name:12}                  process {used[0]:5.2f} % of a core, {memory[0]:5.1f} MB"
                f"   litestream {used[1]:5.2f} %, {memory[1]:5.1f} MB"
            )
    finally:
        plane.close()
    return True


async def until(happened: Callable[[], Any], what: str, deadline_s: float = 60.0) -> None:
    end = time.monotonic() + deadline_s
    while not happened():
        if time.monotonic() > end:
            sys.exit(f"not within {deadline_s:g} s: {what}")
        await asyncio.sleep(0.01)


def _port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--megabytes", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=["rpo", "rto", "cost"])
    given = parser.parse_args()
    ok = True
    if given.only in (None, "cost"):
        ok &= await cost(given.seconds)
    if given.only in (None, "rpo"):
        for interval_ms in (100, 1000):
            ok &= await rpo(interval_ms, given.kills, random.Random(given.seed))
    if given.only in (None, "rto"):
        if shutil.which("etcd") is None or shutil.which("etcdctl") is None:
            sys.exit("the peer is not installed: apt install etcd-server etcd-client")
        ok &= await rto(given.megabytes, given.runs)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
