"""The ledger beside etcd (Debian's etcd-server): three members each, TLS between them and fsync on both, same machine, same run.

    python benchmarks/ledger.py [--kills 50] [--seconds 10] [--seals 100] [--away 60] [--only writes,failover,seals,join,away]

Leaders are killed with kill -9, and the time counts until the next write is acknowledged by a survivor. Each load generator
is a process of its own: ours asyncio in Python at the ledger's socket, etcd's h2load, which is C. Exits 1 when a bound is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

from etcd_peer import Etcd  # noqa: E402  found beside this file
from ledger_cluster import Cluster, Node  # noqa: E402  found in tests, put on the path above
from ledger_load import proposal  # noqa: E402
from measure import rss_bytes  # noqa: E402

from slum.errors import QuorumLost, Unreachable  # noqa: E402
from slum.ledger.client import change_members, connect  # noqa: E402
from slum.ledger.commands import Done, Proposal, SetDesired, new_request_id, pack_fleet  # noqa: E402
from slum.ledger.joiner import Join, prepare  # noqa: E402
from slum.ledger.world import Config  # noqa: E402
from slum.model import Fleet, LocalOperator, Service, Tenement  # noqa: E402

AGAIN_S = 0.01
TRY_S = 0.3
DEFAULT = Config()
failures: list[str] = []


def verdict(what: str, value: float, bound: float, unit: str, *, least: bool = False) -> None:
    """Print one figure against its bound and remember whether it was missed."""
    ok = value >= bound if least else value <= bound
    print(
        f"  {what:58} {value:10.2f} {unit:4} (bound {'>=' if least else '<='} {bound:g})  {'ok' if ok else 'OVER'}",
        flush=True,
    )
    if not ok:
        failures.append(what)


def slum_cluster(entries: int = DEFAULT.epoch_entries) -> Cluster:
    cluster = Cluster(3, epoch_entries=entries, epoch_bytes=DEFAULT.epoch_bytes)
    cluster.start()
    return cluster


def slum_load(socket: Path, clients: int, seconds: float) -> dict[str, float]:
    argv = [sys.executable, str(HERE / "ledger_load.py"), str(socket), f"--clients={clients}", f"--seconds={seconds}"]
    found: dict[str, float] = json.loads(subprocess.run(argv, check=True, stdout=subprocess.PIPE).stdout)
    return found


def writes(seconds: int) -> None:
    print(f"writes of 100 bytes for {seconds} s, in turns")
    rates: dict[int, tuple[list[float], list[float]]] = {256: ([], []), 1: ([], [])}
    with slum_cluster() as cluster, Etcd() as etcd:
        leader = asyncio.run(cluster.leader())
        # One alone first: the 600,000 rows that the others leave are all hashed at the next epoch, beside whoever writes then.
        for clients in (1, 256):
            for _ in range(3):
                for system, found in (
                    ("slum", slum_load(leader.home.ledger_socket, clients, seconds)),
                    ("etcd", etcd.load(clients, seconds)),
                ):
                    rates[clients][system == "etcd"].append(found["per_s"])
                    print(
                        f"    {clients:3} clients  {system}  {found['per_s']:8.0f}/s   median {found['p50'] * 1000:7.2f} ms"
                        f"   p99 {found['p99'] * 1000:7.2f} ms   p99.9 {found['p999'] * 1000:7.2f} ms",
                        flush=True,
                    )
        ours = [rss_bytes(node.child.pid) / 1e6 for node in cluster.nodes if node.child]
        theirs = [rss_bytes(pid) / 1e6 for pid in etcd.pids()]
        for clients, bound in ((1, 1.0), (256, 2.0)):
            mine, peer = (statistics.median(one) for one in rates[clients])
            verdict(f"{clients} clients, slum over etcd", mine / peer, bound, "x", least=True)
        verdict(f"memory of a member (etcd {max(theirs):.0f} MB)", max(ours), 100, "MB")


async def _slum_answers(nodes: Sequence[Node]) -> None:
    """Return as soon as a write is acknowledged by any of *nodes*: all are asked, the same write, until one has it."""
    made, done = proposal(), asyncio.Event()

    async def insist(node: Node) -> None:
        while not done.is_set():
            with contextlib.suppress(Unreachable, QuorumLost):
                async with connect(node.home.ledger_socket) as ledger:
                    if isinstance(await ledger.propose(made, deadline_s=TRY_S), Done):
                        done.set()
            await asyncio.sleep(AGAIN_S)

    tasks = [asyncio.create_task(insist(node), name=node.name) for node in nodes]
    await done.wait()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def slum_failovers(kills: int) -> list[float]:
    took: list[float] = []
    with slum_cluster() as cluster:
        for _ in range(kills):
            await cluster.agreed()
            await _slum_answers(cluster.nodes)
            leader = await cluster.leader()
            began = time.perf_counter()
            cluster.kill(leader)
            await _slum_answers([node for node in cluster.nodes if node is not leader])
            took.append(time.perf_counter() - began)
            cluster.start(leader)
    return took


def etcd_failovers(kills: int, *options: str) -> list[float]:
    took: list[float] = []
    with Etcd(*options) as etcd, ThreadPoolExecutor(3) as pool:

        def answers(done: list[bool], number: int) -> None:
            while not done:
                try:
                    etcd.put(number, TRY_S)
                    done.append(True)
                except (OSError, http.client.HTTPException):
                    time.sleep(AGAIN_S)

        for _ in range(kills):
            leader = etcd.leader()
            etcd.put(leader, 5.0)
            began = time.perf_counter()
            etcd.kill(leader)
            done: list[bool] = []
            jobs = [pool.submit(answers, done, number) for number in etcd.alive()]
            while not done:
                time.sleep(0.001)
            took.append(time.perf_counter() - began)
            for job in jobs:
                job.result()
            etcd.start(leader)
    return took


def failover(kills: int) -> None:
    print(f"kill -9 of the leader to the next acknowledged write, {kills} kills")
    ours = asyncio.run(slum_failovers(kills))
    default = etcd_failovers(kills)
    equal = etcd_failovers(kills, "--election-timeout=400", "--heartbeat-interval=50")
    for name, found in (("slum", ours), ("etcd, its defaults", default), ("etcd, election 400-800 ms as ours", equal)):
        print(f"    {name:34} median {statistics.median(found):5.2f} s   longest {max(found):5.2f} s", flush=True)
    verdict("median over etcd's with its defaults", statistics.median(ours) / statistics.median(default), 0.5, "x")
    verdict("median over etcd's with equal timeouts", statistics.median(ours) / statistics.median(equal), 1.0, "x")
    verdict("longest over etcd's longest", max(ours) / max(default), 1.0, "x")


def seals(count: int) -> None:
    """Every write's wait while epochs of 200 entries are sealed: of the longest ones, as many as there were seals."""
    print(f"the longest wait of a write at each of some {count} seals")
    with slum_cluster(200) as cluster:
        leader = asyncio.run(cluster.leader())
        before = cluster.position(leader).epoch
        pauses: list[float] = []
        while cluster.position(leader).epoch - before < count:
            began = cluster.position(leader).epoch
            found = asyncio.run(_paced(leader, 2.0))
            pauses += sorted(found, reverse=True)[: cluster.position(leader).epoch - began]
        pauses.sort()
        print(
            f"    {len(pauses)} seals, median {statistics.median(pauses) * 1000:.1f} ms, longest {pauses[-1] * 1000:.1f} ms"
        )
        verdict("p99 of the pauses", pauses[int(len(pauses) * 0.99)] * 1000, 50, "ms")


async def _paced(leader: Node, seconds: float) -> list[float]:
    """Write one after the other for *seconds*; return how long each took."""
    took: list[float] = []
    async with connect(leader.home.ledger_socket) as ledger:
        end = time.perf_counter() + seconds
        while (began := time.perf_counter()) < end:
            await ledger.propose(proposal(), deadline_s=10.0)
            took.append(time.perf_counter() - began)
    return took


def big_fleet(services: int) -> Fleet:
    each = 100
    return Fleet(
        name="big",
        operators=(LocalOperator(name="local"),),
        tenements=tuple(
            Tenement(
                name=f"t{n}",
                operator="local",
                services=tuple(Service(name=f"s{k}", command=("python3", "app.py", str(k))) for k in range(each)),
            )
            for n in range(services // each)
        ),
    )


async def join() -> None:
    print("a fourth member joins, with a state of 10,000 services and 20,000 events")
    with slum_cluster() as cluster:
        leader = await cluster.leader()
        command = SetDesired(fleet_zstd=pack_fleet(big_fleet(10_000)), digest="d" * 64, base_revision=0)
        async with connect(leader.home.ledger_socket) as ledger:
            made = Proposal(command=command, request_id=new_request_id(0), actor="bench")
            result = await ledger.propose(made, deadline_s=60.0)
            assert isinstance(result, Done), result
            members = await ledger.members()
        slum_load(leader.home.ledger_socket, 256, 2.0)
        node = cluster.make_node(3)
        row = cluster.make_identity(node)
        prepare(node.home.state, Join(cluster="c0ffee", members=members))
        began = time.perf_counter()
        cluster.start(node)
        await change_members((await cluster.leader()).home.ledger_socket, add=row, deadline_s=60)
        took = time.perf_counter() - began
        cluster.nodes.append(node)
        await cluster.agreed()
        verdict("process started to member by the ledger", took, 3, "s")


async def away(seconds: int) -> None:
    print(f"a member that was away for {seconds} s under load catches up while the load goes on")
    with slum_cluster() as cluster:
        leader = await cluster.leader()
        behind = next(node for node in cluster.nodes if node is not leader)
        cluster.kill(behind)
        argv = [sys.executable, str(HERE / "ledger_load.py"), str(leader.home.ledger_socket)]
        argv += ["--clients=16", f"--seconds={seconds + 10}"]
        process = await asyncio.create_subprocess_exec(*argv, stdout=subprocess.DEVNULL)
        try:
            await asyncio.sleep(seconds)
            began = time.perf_counter()
            told = await cluster.info(leader)
            assert told is not None, cluster.logs()
            target = told.seq
            cluster.start(behind)
            while True:
                info = await cluster.info(behind)
                if info is not None and info.seq >= target:
                    break
                await asyncio.sleep(0.01)
            took = time.perf_counter() - began
        finally:
            await process.wait()
        print(f"    {target} entries of the ledger at the start")
        verdict("process started to all that was committed then", took, 3, "s")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seconds", type=int, default=10)
    parser.add_argument("--seals", type=int, default=100)
    parser.add_argument("--away", type=int, default=60)
    parser.add_argument("--only", default="writes,failover,seals,join,away")
    given = parser.parse_args(argv)
    parts = {
        "writes": lambda: writes(given.seconds),
        "failover": lambda: failover(given.kills),
        "seals": lambda: seals(given.seals),
        "join": lambda: asyncio.run(join()),
        "away": lambda: asyncio.run(away(given.away)),
    }
    for name in given.only.split(","):
        parts[name]()
    print("within all bounds" if not failures else f"over their bounds: {', '.join(failures)}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
